"""Several adapters on one NNX model: which of them it computes with, and which is trained."""

import contextlib
from collections.abc import Iterator
from typing import TypeVar

from flax import nnx

from randlora_jax.bases import Captured
from randlora_jax.nnx_places import adapted_weights, existing_adapter, places_of

Model = TypeVar("Model", bound=nnx.Module)


def set_adapter(model: Model, adapter_name: str) -> Model:
    """Make the adapter of that name the active one: the model computes with it, and only it is a `RandLoraParam`.

    Make the optimizer anew after this call, for it holds moments of the other adapter's factors.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    existing_adapter(model, adapter_name)
    for _, weight in adapted_weights(model):
        weight.activate(adapter_name)
    return model


def delete_adapter(model: Model, adapter_name: str) -> Model:
    """Take one adapter off `model`, in place. If it was the active one, the model computes without until `set_adapter`.

    Raises:
        ValueError: the model has no adapter of that name.
    """
    existing_adapter(model, adapter_name)
    for place in places_of(model):
        if place.adapted and adapter_name in place.weight().adapters:
            del place.weight().adapters[adapter_name]
            if not len(place.weight().adapters):
                place.release()
    return model


def disable_adapters(model: Model) -> Model:
    """Let the model compute without its adapters, which stay attached, until `enable_adapters`."""
    for _, weight in adapted_weights(model):
        weight.enabled = False
    return model


def enable_adapters(model: Model) -> Model:
    """Let the model compute with its active adapter again."""
    for _, weight in adapted_weights(model):
        weight.enabled = True
    return model


@contextlib.contextmanager
def bound_bases(model: Model) -> Iterator[Model]:
    """For models that scan over stacked layers: call them in this context, inside the loss function.

    `nnx.scan` and `nnx.vmap` slice every Variable of the layers they are given, and the bases, which all layers share,
    must not be: "scan got values with different leading axis sizes" is what jax says then. Within the context they are
    constants of the function being traced. The alternative is to say so to the transformation, in the model:
    `nnx.scan(in_axes=(nnx.StateAxes({RandLoraBasis: None, ...: 0}), nnx.Carry))`. AdaLoRA, which has no bases, needs
    neither.
    """
    parts = [part for _, weight in adapted_weights(model) for part in weight.adapters.values() if part.has_bases]
    held = [(part.randlora_A, part.randlora_B) for part in parts]
    captured = {
        id(basis): basis if isinstance(basis, Captured) else Captured(basis.get_value())
        for bases in held
        for basis in bases
    }
    for part, (basis_A, basis_B) in zip(parts, held, strict=True):
        part.hold(captured[id(basis_A)], captured[id(basis_B)])
    try:
        yield model
    finally:
        for part, bases in zip(parts, held, strict=True):
            part.hold(*bases)
