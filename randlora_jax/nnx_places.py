"""Where the parameters of an NNX model stand, and which adapters are attached to them."""

from typing import Any, NamedTuple

from flax import nnx

from randlora_jax.layouts import module_name
from randlora_jax.nnx_weight import LayerAdapter, RandLoraWeight
from randlora_jax.quantized import is_quantized


class Place(NamedTuple):
    """Where a parameter of an NNX model stands, adapted or not."""

    parts: tuple[str, ...]
    owner: nnx.Module
    attribute: str
    value: nnx.Variable[Any] | RandLoraWeight

    @property
    def adapted(self) -> bool:
        """Whether a `RandLoraWeight` stands there."""
        return isinstance(self.value, RandLoraWeight)

    @property
    def base(self) -> nnx.Variable[Any]:
        """The parameter."""
        return self.value.base if isinstance(self.value, RandLoraWeight) else self.value

    def weight(self) -> RandLoraWeight:
        """The weight that stands there, put there if it was not."""
        if isinstance(self.value, RandLoraWeight):
            return self.value
        weight = RandLoraWeight(self.value)
        setattr(self.owner, self.attribute, weight)
        return weight

    def release(self) -> None:
        """Put the parameter back; a quantized one stays behind a weight that dequantizes it."""
        bare = RandLoraWeight(self.base) if is_quantized(self.base.get_value()) else self.base
        setattr(self.owner, self.attribute, bare)


def places_of(model: nnx.Module) -> list[Place]:
    """Every parameter of the model that is none of an adapter's."""
    return [
        Place((*map(str, path), attribute), owner, attribute, value)
        for path, owner in nnx.iter_modules(model)
        if not isinstance(owner, RandLoraWeight | LayerAdapter)
        for attribute, value in vars(owner).items()
        if isinstance(value, RandLoraWeight) or (isinstance(value, nnx.Param) and not isinstance(value, nnx.LoRAParam))
    ]


def adapted_weights(model: nnx.Module) -> list[tuple[str, RandLoraWeight]]:
    """What stands for adapted (or quantized) kernels, with their dotted names."""
    return [(module_name(place.parts), place.weight()) for place in places_of(model) if place.adapted]


def existing_adapter(model: nnx.Module, adapter_name: str | None) -> str:
    """The name, if the model has an adapter of that name.

    Raises:
        ValueError: it has none.
    """
    names = adapter_names(model)
    if not names:
        raise ValueError("the model has no adapter attached: attach(model, config) adds one.")
    if adapter_name not in names:
        what = "no adapter is active" if adapter_name is None else f"the model has no adapter {adapter_name!r}"
        raise ValueError(f"{what}: it has {names}. set_adapter(model, name) makes one the active one.")
    return adapter_name


def adapter_names(model: nnx.Module) -> tuple[str, ...]:
    """Names of the adapters attached to `model`, in the order of attaching."""
    return tuple(dict.fromkeys(name for _, weight in adapted_weights(model) for name in weight.adapters))


def active_adapter(model: nnx.Module) -> str | None:
    """Name of the adapter that the model computes with, if adapters are enabled; None if there is none."""
    return next((weight.active for _, weight in adapted_weights(model) if weight.active_adapter is not None), None)
