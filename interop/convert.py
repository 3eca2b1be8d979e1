"""`convert`: from anything that holds an adapter to any stack, which is imported by name only when asked for."""

import importlib
import os
from collections.abc import Mapping
from typing import Any, Literal, overload

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.config import RandLoraConfig
from interop.files import load

STACKS = {"jax": "randlora_jax", "torch": "randlora_torch"}
# What each stack calls them.
_ADAPTERS: dict[type, str] = {RandLoraConfig: "RandLoraAdapter", AdaLoraConfig: "AdaLoraAdapter"}
_MODEL_ROOTS = {"flax": "jax", "torch": "torch"}  # package that a model's base class comes from -> stack
_EXPLICIT = {"params", "randlora"}  # collections of linen variables that hold an adapter, but not its config
TARGETS = (*STACKS, "peft")


@overload
def convert(
    source: Any, to: Literal["peft"], *, adapter_name: str | None = ..., recipe: str | None = ...
) -> Adapter: ...
@overload
def convert(source: Any, to: str, *, adapter_name: str | None = ..., recipe: str | None = ...) -> Any: ...
def convert(source: Any, to: str, *, adapter_name: str | None = None, recipe: str | None = None) -> Any:
    """Move an adapter to another stack. Arrays are renamed, never recomputed: round trips give the same bytes.

    Args:
        source: A folder, an `interop.Adapter`, a `RandLoraAdapter` or `AdaLoraAdapter` of either stack; a model with an
            adapter attached, of torch by this package or by PEFT, or of Flax NNX; or the linen variables that
            `randlora_jax.lazy_params` gives.
        to: "jax" for `randlora_jax.RandLoraAdapter` or `AdaLoraAdapter`, "torch" for those of `randlora_torch`, "peft"
            for an `interop.Adapter` ready for `interop.save`.
        adapter_name: Which adapter of a model with several, or of a folder with a sub-folder for each. By default the
            only one of a torch model, the active one of an NNX model, the one in the folder itself.
        recipe: See `load`; for a folder only.

    Raises:
        ValueError: `to` is none of these; the model has no such adapter, or several and no name was given; a name or a
            recipe is given for a source that cannot have one; or `to` is a stack and the adapter's bases are not known.
        TypeError: `source` holds no adapter, or no config of its adapter.
        ImportError: the stack is not installed; the message names the extra.
        FileNotFoundError: there is no such folder.
        AdapterFormatError: a folder, or a model of PEFT, does not hold a complete adapter.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is not a stack: choose one of {TARGETS}.")
    adapter = _as_adapter(source, adapter_name, recipe)
    if to == "peft":
        return adapter
    return getattr(stack_module(to), _ADAPTERS[type(adapter.config)]).from_interop(adapter)


def _as_adapter(source: Any, adapter_name: str | None, recipe: str | None) -> Adapter:
    if isinstance(source, str | os.PathLike):
        return load(source, adapter_name=adapter_name, recipe=recipe)
    kind = type(source).__name__
    if recipe is not None:
        raise ValueError(f"recipe={recipe!r} is for a folder whose file names none, not for a source of type {kind}.")
    model_of = None if hasattr(source, "to_interop") else _model_of(source)
    if model_of is not None and not isinstance(source, Mapping):
        return stack_module(model_of).extract(source, adapter_name).to_interop()
    if adapter_name is not None:
        raise ValueError(f"adapter_name={adapter_name!r} is for a folder or a model, not for a source of type {kind}.")
    if model_of is not None:
        return stack_module(model_of).linen.extract_lazy(source).to_interop()
    adapter = source.to_interop() if hasattr(source, "to_interop") else source
    if isinstance(adapter, Adapter):
        return adapter
    raise TypeError(
        f"source is a {kind}, which holds no adapter: pass a folder, an Adapter of any kind, a torch or Flax NNX model"
        " with an adapter attached, by this package or by PEFT, or the linen variables of randlora_jax.lazy_params."
    )


def _model_of(source: Any) -> str | None:
    """The stack of a model, or of linen variables with an adapter; None for anything else."""
    if isinstance(source, Mapping):
        return "jax" if _EXPLICIT <= source.keys() or _has_boxes(source) else None
    roots = (base.__module__.split(".")[0] for base in type(source).__mro__)
    stack = next((_MODEL_ROOTS[root] for root in roots if root in _MODEL_ROOTS), None)
    return None if stack == "torch" and not hasattr(source, "named_modules") else stack


def _has_boxes(variables: Mapping[Any, Any]) -> bool:
    """Whether `randlora_jax.lazy_params` put something into these variables."""
    return any(
        _has_boxes(value) if isinstance(value, Mapping) else type(value).__module__.split(".")[0] == STACKS["jax"]
        for value in variables.values()
    )


def model_logits(model: Any, inputs: Any) -> Any:
    """What a model of any stack, or another function, gives for inputs in numpy: an array, or an output with logits."""
    stack = _model_of(model)
    given = model(inputs) if stack is None else stack_inference(stack).call(model, inputs)
    return getattr(given, "logits", given)


def stack_inference(name: str) -> Any:
    """The module of a stack that calls models."""
    return importlib.import_module(f"{stack_module(name).__name__}.inference")


def stack_module(name: str) -> Any:
    """The package of a stack.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(STACKS[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith(("randlora", "interop")):
            raise
        raise ImportError(f"{error.name} is not installed. Run: pip install 'randlora[{name}]'") from error
