"""The explicit NNX layer, for models that are written with RandLoRA in mind: the one with a place for dropout.

W + dW has none, as dropout belongs to the input of the adapter's branch alone. While it is active, the layer computes
that branch beside its base. Otherwise it multiplies by `adapted_linear`, whose backward pass does not keep W + dW.
"""

from collections.abc import Iterable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from interop.bases import DEFAULT_RECIPE, Bases
from interop.config import RandLoraConfig
from interop.delta import Factors
from interop.plans import check_plan
from randlora_jax.explicit import add_update, check_fits, make_shared_bases, multiply, start_factors
from randlora_jax.kernels import Kernel, on_explicit_mesh
from randlora_jax.layouts import IN_OUT
from randlora_jax.nnx_weight import LayerAdapter, RandLoraBasis, RandLoraWeight, Static, factors_at
from randlora_jax.quantized import dequantize

ADAPTER_NAME = "default"


class RandLoraBases(nnx.Module):
    """The pair of frozen bases that all `RandLoraLinear` layers of a model share: it appears once in the state.

    Args:
        config: What the adapter is. The fields that select layers are not read: the model's code does.
        shapes: (out, in) of the model's RandLoraLinear layers, each kind once: PEFT sizes the bases by them.
        recipe: How the bases are drawn, see `interop.RECIPES`.

    Raises:
        ValueError: `shapes` is empty, the bases cannot be made, or the config asks for trained biases,
            modules_to_save or a classification head.
    """

    def __init__(self, config: RandLoraConfig, shapes: Iterable[tuple[int, int]], *, recipe: str = DEFAULT_RECIPE):
        shared = make_shared_bases(config, shapes, recipe=recipe)
        self.randlora_A, self.randlora_B = map(RandLoraBasis, shared.bases)
        self.config, self.limits, self.recipe = shared.config, shared.limits, recipe


class RandLoraLinear(nnx.Linear):
    """An `nnx.Linear` with an adapter called "default": y = x W + dropout(x) dW + bias.

    `extract`, `detach`, `attach` and the other functions work on a model of such layers as on one that was adapted by
    `attach`. Its dropout is that of flax: `model.train()`, `model.eval()` and `nnx.view` switch it, the stream
    "dropout" of `rngs` feeds it. Its rate is `randlora_dropout` of the active adapter.

        bases = RandLoraBases(config, shapes=[(256, 64), (64, 256)])
        self.up = RandLoraLinear(64, 256, bases=bases, rngs=rngs)
        self.down = RandLoraLinear(256, 64, bases=bases, rngs=rngs)

    Args:
        in_features: Number of input features.
        out_features: Number of output features.
        bases: Made once for the model.
        rngs: As for `nnx.Linear`; with `randlora_dropout > 0` also for the stream "dropout".
        plan: See `adapted_linear`; so is keep_weight. With a `dot_general`, `precision` or `preferred_element_type`
            of your own, with `out_sharding`, or on a mesh with explicit axes, W + dW is made and given to the layer's
            own product instead.
        keep_weight: See plan.
        options: The other arguments of `nnx.Linear`: use_bias, dtype, param_dtype, precision, kernel_init, ...

    Raises:
        ValueError: the bases were not made for a layer of this shape, `rngs` has no stream for dropout, or the plan is
            not known.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bases: RandLoraBases,
        rngs: nnx.Rngs,
        plan: str = "auto",
        keep_weight: bool = False,
        **options: Any,
    ):
        check_plan(plan)
        check_fits((out_features, in_features), bases.limits)
        super().__init__(in_features, out_features, rngs=rngs, **options)
        factors = start_factors(bases.config, (out_features, in_features), rngs.params)
        static = Static(bases.config, Kernel(IN_OUT, (in_features, out_features)), bases.recipe, None)
        weight = RandLoraWeight(self.kernel)
        shared = Bases(bases.randlora_A, bases.randlora_B)
        weight.adapters[ADAPTER_NAME] = LayerAdapter(factors, static, shared)
        weight.activate(ADAPTER_NAME)
        self.kernel = weight  # type: ignore[assignment] # it stands for the nnx.Param
        self.plan, self.keep_weight = plan, keep_weight
        rate = bases.config.randlora_dropout
        self.dropout = nnx.Dropout(rate, rngs=_dropout_stream(rngs, rate) if rate else None)

    def __call__(
        self,
        inputs: Array,
        out_sharding: Any = None,
        *,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | nnx.RngStream | jax.Array | None = None,
    ) -> Array:
        """The layer's output (*batch, out_features).

        Args:
            inputs: (*batch, in_features).
            out_sharding: As for `nnx.Linear`.
            deterministic: True switches dropout off, False on, whatever `train` and `eval` said.
            rngs: What dropout draws from instead of the layer's own stream; or a key.

        Raises:
            ValueError: dropout is active, but neither the layer nor the call has an rng for it.
        """
        part = self._active()
        if part is None:
            return super().__call__(inputs, out_sharding)
        weight, config = dequantize(self.kernel.base.get_value()), part.static.config
        assert isinstance(config, RandLoraConfig)  # `attach` refuses AdaLoRA here
        assert part.bases is not None
        deterministic = self.dropout.deterministic if deterministic is None else deterministic
        drops = config.randlora_dropout and not deterministic
        if not (drops or self._plans(out_sharding, inputs, weight)):
            return super().__call__(inputs, out_sharding)
        bias = None if self.bias is None else self.bias[...]
        promoted, _, bias = self.promote_dtype((inputs, weight, bias), dtype=self.dtype)
        factors, _ = factors_at(part, weight.shape)
        assert isinstance(factors, Factors)
        options: dict[str, Any] = {"scaling": config.scaling, "plan": self.plan}
        if drops:
            same: Any = _WithKernel(self, weight)
            y = nnx.Linear.__call__(same, inputs, out_sharding)
            return add_update(y, self._drop(promoted, config.randlora_dropout, rngs), part.bases, factors, **options)
        options |= {"dtype": part.static.dtype, "keep_weight": self.keep_weight}
        y = multiply(promoted, weight, part.bases, factors, **options)
        return y if bias is None else y + bias

    def _plans(self, out_sharding: Any, *arrays: Array) -> bool:
        """Whether `adapted_linear` multiplies: not where the user, or the mesh, has a say in the layer's product."""
        demands = (self.precision, self.preferred_element_type, out_sharding)
        standard = self.dot_general is jax.lax.dot_general and all(demand is None for demand in demands)
        return standard and not on_explicit_mesh(*arrays)

    def _active(self) -> LayerAdapter | None:
        """The adapter that the layer computes with; none after `detach`, or while adapters are disabled."""
        weight = self.kernel
        return weight.active_adapter if isinstance(weight, RandLoraWeight) and weight.enabled else None

    def _drop(self, inputs: Array, rate: float, rngs: Any) -> Array:
        rngs = self.dropout.rngs if rngs is None else rngs
        if rngs is None:
            raise ValueError(
                f"the active adapter has randlora_dropout={rate}, but this layer was made without dropout and has no"
                " rng for it: call model.eval() for inference, or pass rngs=nnx.Rngs(dropout=0) to the layer."
            )
        # Not self.dropout itself: its rate is that of the adapter which the layer was made with.
        return nnx.Dropout(rate)(inputs, deterministic=False, rngs=rngs)


class _WithKernel:
    """A layer as `nnx.Linear` sees it in its forward pass, with another kernel."""

    def __init__(self, layer: nnx.Linear, kernel: jax.Array):
        self.layer, self.kernel = layer, kernel

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


def _dropout_stream(rngs: nnx.Rngs, rate: float) -> nnx.RngStream:
    try:
        return rngs["dropout"]
    except KeyError as error:
        raise ValueError(
            f"randlora_dropout={rate}, but rngs has the streams {sorted(rngs)} only: add one, such as"
            " nnx.Rngs(params=0, dropout=1), or set randlora_dropout=0.0."
        ) from error
