"""The explicit linen layer, for models that are written with RandLoRA in mind: the one with a place for dropout.

The frozen kernel and bias are in "params" as those of `nn.Dense`, lambda and gamma in the collection "randlora", which
is the one to train, and the bases in "randlora_bases", once for the model. The layers get them as an argument.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array

from interop.bases import DEFAULT_RECIPE, Bases
from interop.config import RandLoraConfig
from interop.delta import Factors
from interop.errors import bulleted
from interop.plans import check_plan
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.explicit import (
    SharedBases,
    add_update,
    check_fits,
    explicit_config,
    largest_sides,
    make_shared_bases,
    multiply,
    start_factors,
)
from randlora_jax.kernels import Kernel, Kernels, on_explicit_mesh
from randlora_jax.layouts import IN_OUT, Layout, module_name
from randlora_jax.naming import Layouts, resolve_layouts
from randlora_jax.rebuilding import adapted_kernel
from randlora_jax.selection import Source, as_interop, on_kernels, require_randlora

TRAINABLE, FROZEN = "randlora", "randlora_bases"  # names of the collections
_FACTORS = Factors("randlora_lambda", "randlora_gamma")
_BASES = Bases("randlora_A", "randlora_B")


class RandLoraBases(nn.Module):
    """The pair of frozen bases that all `RandLoraLinear` layers of a model share; call it for what they are given.

    Attributes:
        config: What the adapter is. The fields that select layers are not read: the model's code does.
        shapes: (out, in) of the model's RandLoraLinear layers, each kind once: PEFT sizes the bases by them.
        recipe: How the bases are drawn, see `interop.RECIPES`.
    """

    config: RandLoraConfig
    shapes: Sequence[tuple[int, int]]
    recipe: str = DEFAULT_RECIPE

    @nn.compact
    def __call__(self) -> SharedBases:
        """The bases, to be passed to the layers, also through `nn.scan` (broadcast) and `nn.remat`.

        Raises:
            ValueError: `shapes` is empty, the bases cannot be made, or the config asks for trained biases,
                modules_to_save or a classification head.
        """
        made = functools.cache(lambda: make_shared_bases(self.config, self.shapes, recipe=self.recipe).bases)
        bases = Bases(
            self.variable(FROZEN, _BASES.A, lambda: made().A).value,
            self.variable(FROZEN, _BASES.B, lambda: made().B).value,
        )
        return SharedBases(bases, explicit_config(self.config), largest_sides(self.shapes))


class RandLoraLinear(nn.Module):
    """An `nn.Dense` with an adapter: y = x W + dropout(x) dW + bias.

        bases = RandLoraBases(config, shapes=((256, 64), (64, 256)))()
        x = RandLoraLinear(256, name="up")(x, bases, deterministic=not train)

    Attributes:
        features: Number of output features; this and the following as for `nn.Dense`.
        use_bias: Whether to add a bias.
        dtype: Of the computation; by default inferred from input and params.
        param_dtype: Of kernel and bias.
        precision: Of the product with the kernel.
        kernel_init: Initializer of the kernel.
        bias_init: Initializer of the bias.
        dot_general: The product with the kernel.
        plan: See `adapted_linear`; so is keep_weight. With a `dot_general` or `precision` of your own, or on a mesh
            with explicit axes, W + dW is made and given to the layer's own product instead.
        keep_weight: See plan.

    Raises:
        ValueError: the plan is not known.
    """

    features: int
    use_bias: bool = True
    dtype: Any = None
    param_dtype: Any = jnp.float32
    precision: Any = None
    kernel_init: Any = nn.initializers.lecun_normal()
    bias_init: Any = nn.initializers.zeros_init()
    dot_general: Any = jax.lax.dot_general
    plan: str = "auto"
    keep_weight: bool = False

    def __post_init__(self) -> None:
        check_plan(self.plan)
        super().__post_init__()

    @nn.compact
    def __call__(self, inputs: Array, bases: SharedBases, deterministic: bool | None = None) -> Array:
        """The layer's output (*batch, features).

        Args:
            inputs: (*batch, in_features).
            bases: What the model's one `RandLoraBases` gives.
            deterministic: True switches dropout off, False on; must be said if `randlora_dropout > 0`. Dropout draws
                from the rng "dropout".

        Raises:
            ValueError: the bases were not made for a layer of this shape, or with `randlora_dropout > 0`
                `deterministic` is not given, or no rng for dropout.
        """
        shape, config = (self.features, inputs.shape[-1]), bases.config
        check_fits(shape, bases.limits)
        kernel = self.param("kernel", self.kernel_init, shape[::-1], self.param_dtype)
        bias = self.param("bias", self.bias_init, (self.features,), self.param_dtype) if self.use_bias else None
        factors = self._factors(config, shape)
        drops = self._drops(config.randlora_dropout, deterministic)
        promoted, _, bias = nn.dtypes.promote_dtype(inputs, kernel, bias, dtype=self.dtype)
        options: dict[str, Any] = {"scaling": config.scaling, "plan": self.plan}
        if drops:
            dropped = nn.Dropout(config.randlora_dropout, name="dropout")(promoted, deterministic=False)
            y = add_update(self._product(inputs, kernel), dropped, bases.bases, factors, **options)
        elif self._plans(inputs, kernel):
            y = multiply(promoted, kernel, bases.bases, factors, keep_weight=self.keep_weight, **options)
        else:
            adapted = Kernel(IN_OUT, kernel.shape)
            y = self._product(inputs, adapted_kernel(kernel, bases.bases, factors, adapted, scaling=config.scaling))
        return y if bias is None else y + bias

    def _product(self, inputs: Array, kernel: Array) -> Array:
        """The layer's own product."""
        inputs, kernel = nn.dtypes.promote_dtype(inputs, kernel, dtype=self.dtype)
        last_with_first = (((inputs.ndim - 1,), (0,)), ((), ()))
        return self.dot_general(inputs, kernel, last_with_first, precision=self.precision)

    def _plans(self, *arrays: Array) -> bool:
        """Whether `adapted_linear` multiplies: not where the user, or the mesh, has a say in the layer's product."""
        return self.dot_general is jax.lax.dot_general and self.precision is None and not on_explicit_mesh(*arrays)

    def _factors(self, config: RandLoraConfig, shape: tuple[int, int]) -> Factors:
        start = functools.cache(lambda: start_factors(config, shape, lambda: self.make_rng("params")))
        return Factors(
            self.variable(TRAINABLE, _FACTORS.lam, lambda: start().lam).value,
            self.variable(TRAINABLE, _FACTORS.gamma, lambda: start().gamma).value,
        )

    def _drops(self, rate: float, deterministic: bool | None) -> bool:
        if not rate or deterministic:
            return False
        if deterministic is None:
            raise ValueError(
                f"randlora_dropout={rate}: say deterministic=False for training or deterministic=True for inference"
                " where the layer is called."
            )
        if not (self.has_rng("dropout") or self.has_rng("params")):
            raise ValueError(
                f"randlora_dropout={rate} needs random numbers: pass rngs={{'dropout': jax.random.key(0)}} to apply, or"
                " deterministic=True for inference."
            )
        return True


def extract_adapter(
    variables: Mapping[str, Any],
    config: RandLoraConfig,
    *,
    layouts: Layouts | None = None,
    recipe: str | None = DEFAULT_RECIPE,
) -> RandLoraAdapter:
    """The adapter in the variables of a model of `RandLoraLinear` layers: to save, to convert, to merge.

    Args:
        variables: With the collections "params", "randlora" and "randlora_bases".
        config: The one that the model was built with.
        layouts: Of scanned or vmapped kernels that are stacked on another axis than the first, or whose weights have
            other names in files (`Layout.modules`), or rules for them, see `init`. lambda and gamma must be stacked
            on the first.
        recipe: The one that the model was built with.

    Raises:
        ValueError: a collection is missing, the model has several RandLoraBases, or `layouts` does not fit.
    """
    parts = _Parts.of(variables, layouts)
    factors = {
        name: Factors(*(part.reshape(-1, *part.shape[-2:]) if part.ndim > 2 else part for part in pair))
        for name, pair in parts.factors.items()
    }
    return RandLoraAdapter(
        factors={name: factors[name] for name in sorted(factors)},
        bases=parts.bases,
        config=explicit_config(config),
        shapes=tuple((name, parts.kernels[name].shape) for name in sorted(factors)),
        layouts=tuple((name, parts.kernels[name].layout) for name in sorted(factors)),
        recipe=recipe,
    )


def insert_adapter(
    variables: Mapping[str, Any],
    source: Source,
    config: RandLoraConfig,
    *,
    layouts: Layouts | None = None,
) -> dict[str, Any]:
    """The variables with the factors and bases of an adapter, of any stack or from a folder, in place of their own.

    Args:
        variables: See `extract_adapter`.
        source: The adapter. It must adapt the very layers that are RandLoraLinear.
        config: The one that the model was built with; the adapter's must have the same r and scaling.
        layouts: See `extract_adapter`.

    Raises:
        AdapterFormatError: a layer that it adapts is missing or has another shape.
        ValueError: it leaves out a layer, or has another r or scaling.
        TypeError: `source` is no adapter, or one of AdaLoRA.
    """
    adapter = as_interop(source)
    require_randlora(adapter.config, "lazy_params(params, adapter) adapts linen layers as they are.")
    parts = _Parts.of(variables, layouts)
    if (adapter.config.r, adapter.config.scaling) != (config.r, config.scaling):
        raise ValueError(
            f"the adapter has r={adapter.config.r} and randlora_alpha={adapter.config.randlora_alpha}, the model was"
            f" built with r={config.r} and randlora_alpha={config.randlora_alpha}: build it with the adapter's config,"
            " RandLoraConfig.from_pretrained(folder)."
        )
    without_dropout = dataclasses.replace(adapter.config, randlora_dropout=0.0)  # that is up to the model
    loaded = on_kernels(dataclasses.replace(adapter, config=without_dropout), Kernels(parts.kernels, {}, []))
    partial = [name for name, layout in loaded.layouts if None in (layout.modules or ())]
    missing = [name for name in parts.kernels if name not in loaded.factors or name in partial]
    if missing:
        raise ValueError(bulleted("the adapter leaves out these RandLoraLinear layers, or weights in them", missing))
    trainable, frozen = {}, dict(traverse_util.flatten_dict(variables[FROZEN]))
    for name, path in parts.paths.items():
        for field, part, old in zip(_FACTORS, loaded.factors[name], parts.factors[name], strict=True):
            trainable[*path, field] = part.reshape(old.shape)
    for path in frozen:
        frozen[path] = getattr(loaded.bases, path[-1].removeprefix("randlora_"))
    unflatten = traverse_util.unflatten_dict
    return {**variables, TRAINABLE: unflatten(trainable), FROZEN: unflatten(frozen)}


@dataclasses.dataclass(frozen=True)
class _Parts:
    """The adapter in a model's variables, by layer, with factors as they are stored there."""

    paths: dict[str, tuple[str, ...]]
    factors: dict[str, Factors]
    kernels: dict[str, Kernel]
    bases: Bases

    @classmethod
    def of(cls, variables: Mapping[str, Any], layouts: Layouts | None) -> "_Parts":
        missing = [name for name in ("params", TRAINABLE, FROZEN) if name not in variables]
        if missing:
            raise ValueError(
                f"the variables lack the collections {missing}, they have {list(variables)}: pass all that model.init"
                " gives for a model of RandLoraLinear layers, with the trained 'randlora' put in."
            )
        params, trainable, frozen = (
            traverse_util.flatten_dict(nn.meta.unbox(variables[name])) for name in ("params", TRAINABLE, FROZEN)
        )
        found = {module_name((*path[:-1], "kernel")): path[:-1] for path in trainable if path[-1] == _FACTORS.lam}
        leaves = [((*path, "kernel"), params[*path, "kernel"]) for path in found.values()]
        layouts = resolve_layouts(layouts, leaves)
        unknown = sorted(set(layouts) - set(found))
        if unknown:
            raise ValueError(f"layouts are given for {unknown}, which are no RandLoraLinear layers: {list(found)} are.")
        factors = {name: Factors(*(trainable[*path, field] for field in _FACTORS)) for name, path in found.items()}
        kernels = {}
        for name, path in found.items():
            stacked = factors[name].lam.ndim - 2
            layout = layouts.get(name) or Layout((stacked,), (stacked + 1,), stack_axes=tuple(range(stacked)))
            if not layout.is_plain:
                raise ValueError(f"{name} is a RandLoraLinear layer, which takes no {layout}: leave out its scale.")
            kernels[name] = Kernel(layout, params[*path, "kernel"].shape)
            kernels[name].modules(name)  # refuses a wrong number of axes or names
        places = sorted({".".join(path[:-1]) for path in frozen})
        if len(places) != 1:
            raise ValueError(f"the model has RandLoraBases in {len(places)} places, {places}: one adapter shares one.")
        arrays = {path[-1]: array for path, array in frozen.items()}
        return cls(found, factors, kernels, Bases(*(arrays[field] for field in _BASES)))
