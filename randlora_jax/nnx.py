"""Flax NNX: an adapter is attached by replacing a layer's kernel, not the layer.

The replacement answers as the `nnx.Param` it stands for, with W + dW, so that every module that reads its kernel works
as it is, and each access computes the update inside whatever transformation it happens in.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
from flax import nnx

from interop.adapter import Adapter, Factors
from interop.bases import DEFAULT_RECIPE, Bases
from interop.config import RandLoraConfig
from interop.files import load
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.bases import layer_bases
from randlora_jax.gradients import delta_weight
from randlora_jax.layouts import Layout, module_name
from randlora_jax.params import Kernel, Kernels, add_delta, find_kernels, new_adapter, on_kernels

Model = TypeVar("Model", bound=nnx.Module)
Source = RandLoraConfig | RandLoraAdapter | Adapter | str | os.PathLike[str]


class RandLoraParam(nnx.LoRAParam):
    """lambda or gamma of one layer: what `nnx.Optimizer(model, tx, wrt=RandLoraParam)` trains, and nothing else.

    A subclass of `nnx.LoRAParam`, by which Tunix and MaxText recognize adapters.
    """


class RandLoraBasis(nnx.Variable):
    """One of the two frozen bases. All layers share one pair, so it appears once in the model's state."""


class RandLoraWeight(nnx.Module):
    """Stands for the `nnx.Param` of an adapted kernel and reads as W + dW, computed at each access."""

    def __init__(
        self, base: nnx.Param, factors: Factors, basis_A: RandLoraBasis, basis_B: RandLoraBasis, static: "Static"
    ):
        self.base = base
        self.randlora_lambda, self.randlora_gamma = RandLoraParam(factors.lam), RandLoraParam(factors.gamma)
        self.randlora_A, self.randlora_B = basis_A, basis_B
        self.static = static

    def delta_weight(self) -> jax.Array:
        """The update in torch's (out, in) orientation."""
        shape = self.static.kernel.shape
        bases = layer_bases(Bases(self.randlora_A[...], self.randlora_B[...]), shape)
        delta = delta_weight(
            *bases, self.randlora_lambda[...], self.randlora_gamma[...], scaling=self.static.config.scaling
        )
        return delta if shape[0] >= shape[1] else delta.T

    def get_value(self, *, index: Any = ...) -> jax.Array:
        """The effective kernel W + dW, in W's dtype."""
        return add_delta(self.base[...], self.delta_weight(), self.static.kernel.layout)[index]

    def set_value(self, value: Any, **_: Any) -> None:
        """Refused: W + dW is computed, not stored."""
        raise ValueError("this kernel is adapted: detach(model) before writing to it, or write to its `.base`.")

    value = property(get_value, set_value)
    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)
    ndim = property(lambda self: self.base.ndim)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.get_value(index=index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.set_value(value)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.get_value())

    def __getattr__(self, name: str) -> Any:
        """Whatever else an array has (`T`, `reshape`, `at`, ...), as nnx.Variable answers for its value."""
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.get_value(), name)

    def __jax_array__(self) -> jax.Array:
        return self.get_value()

    def astype(self, dtype: Any) -> jax.Array:
        """The effective kernel in another dtype."""
        return self.get_value().astype(dtype)


def _on_value(operator: str) -> Callable[..., jax.Array]:
    return lambda self, *operands: getattr(self.get_value(), operator)(*operands)


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        setattr(RandLoraWeight, _operator, _on_value(_operator))
for _operator in ("__neg__", "__abs__"):
    setattr(RandLoraWeight, _operator, _on_value(_operator))


class Static(NamedTuple):
    """What a `RandLoraWeight` knows besides arrays; hashable, part of the graph definition."""

    config: RandLoraConfig
    kernel: Kernel
    recipe: str | None


def attach(
    model: Model,
    config_or_adapter: Source,
    *,
    layouts: Mapping[str, Layout] | None = None,
    recipe: str = DEFAULT_RECIPE,
    rngs: nnx.Rngs | None = None,
) -> Model:
    """Adapt `model` in place and return it; its layers stay what they are, `model(x)` now computes with W + dW.

    Train with `nnx.Optimizer(model, tx, wrt=RandLoraParam)` and
    `nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))`.

    Args:
        model: Any NNX model. 2-D parameters named `kernel` or `w` are (in, out).
        config_or_adapter: A config for a new adapter; or an adapter of any stack, or a folder, to go on with.
        layouts: Layouts of further kernels by dotted name, e.g. `{"attn.query": Layout((0,), (1, 2))}`.
        recipe: How the bases of a new adapter are drawn, see `interop.RECIPES`.
        rngs: Needed for a new adapter with `init_weights=False` only.

    Raises:
        ValueError: the model has an adapter, a target matches nothing, the adapter was made for another model, or a
            new one asks for trained biases, modules_to_save or dropout.
        TypeError: `model` is no NNX model, or `config_or_adapter` is none of these.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model is a {type(model).__name__}, not an nnx.Module: randlora_jax.init adapts pytrees.")
    if _attached(model):
        raise ValueError("the model already has an adapter attached: detach(model) first.")
    places = {place.parts: place for place in _params(model)}
    if isinstance(config_or_adapter, RandLoraAdapter):  # it was made for a model like this one, or is refused below
        axes = {module_name(parts): place.param.ndim for parts, place in places.items()}
        recorded = {name: layout for name, layout in config_or_adapter.layouts if axes.get(name) == layout.ndim}
        layouts = {**recorded, **(layouts or {})}
    found = find_kernels([(parts, place.param) for parts, place in places.items()], layouts or {})
    adapter = _resolve(config_or_adapter, found, recipe, rngs)
    basis_A, basis_B = map(RandLoraBasis, adapter.bases)
    for parts, place in places.items():
        name = module_name(parts)
        if name in adapter.factors and name in found.kernels:
            static = Static(adapter.config, found.kernels[name], adapter.recipe)
            weight = RandLoraWeight(place.param, adapter.factors[name], basis_A, basis_B, static)
            setattr(place.owner, place.attribute, weight)
    return model


def extract(model: nnx.Module) -> RandLoraAdapter:
    """The adapter attached to `model`, with the current values of its factors.

    Raises:
        ValueError: the model has no adapter.
    """
    weights = dict(sorted(_weights(model).items()))
    any_weight = next(iter(weights.values()))
    return RandLoraAdapter(
        factors={name: Factors(w.randlora_lambda[...], w.randlora_gamma[...]) for name, w in weights.items()},
        bases=Bases(any_weight.randlora_A[...], any_weight.randlora_B[...]),
        config=any_weight.static.config,
        shapes=tuple((name, w.static.kernel.shape) for name, w in weights.items()),
        layouts=tuple((name, w.static.kernel.layout) for name, w in weights.items()),
        recipe=any_weight.static.recipe,
    )


def detach(model: Model, *, merge: bool = False) -> Model:
    """Take the adapter off `model`, in place; with `merge=True` the kernels keep W + dW.

    Raises:
        ValueError: the model has no adapter.
    """
    _weights(model)
    for place in _attached(model):
        base = place.param.base
        # A new Param, as the old one may be tied to a layer that the adapter does not belong to.
        setattr(place.owner, place.attribute, base.replace(place.param.get_value()) if merge else base)
    return model


class _Place(NamedTuple):
    """Where a parameter of an NNX model stands."""

    parts: tuple[str, ...]
    owner: nnx.Module
    attribute: str
    param: Any


def _places(model: nnx.Module, kind: type) -> list[_Place]:
    return [
        _Place((*map(str, path), attribute), owner, attribute, value)
        for path, owner in nnx.iter_modules(model)
        if not isinstance(owner, RandLoraWeight)
        for attribute, value in vars(owner).items()
        if isinstance(value, kind)
    ]


def _params(model: nnx.Module) -> list[_Place]:
    return [place for place in _places(model, nnx.Param) if not isinstance(place.param, nnx.LoRAParam)]


def _attached(model: nnx.Module) -> list[_Place]:
    return _places(model, RandLoraWeight)


def _weights(model: nnx.Module) -> dict[str, RandLoraWeight]:
    found = {module_name(place.parts): place.param for place in _attached(model)}
    if not found:
        raise ValueError("the model has no RandLoRA adapter attached: attach(model, config) adds one.")
    return found


def _resolve(source: Source, found: Kernels, recipe: str, rngs: nnx.Rngs | None) -> RandLoraAdapter:
    """The adapter to attach, on the default device and checked against the kernels."""
    if isinstance(source, RandLoraConfig):
        key = None if rngs is None else rngs.params()
        return new_adapter(source, found, recipe=recipe, key=key)
    if isinstance(source, str | os.PathLike):
        source = load(source)
    elif hasattr(source, "to_interop"):
        source = source.to_interop()
    if not isinstance(source, Adapter):
        raise TypeError(
            f"config_or_adapter is a {type(source).__name__}: pass a RandLoraConfig, an adapter, or an adapter folder."
        )
    return on_kernels(source, found)
