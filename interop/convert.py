"""`convert`: from anything that holds an adapter to any stack, which is imported by name only when asked for."""

import importlib
import os
from typing import Any

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.config import RandLoraConfig
from interop.files import load

STACKS = {"jax": "randlora_jax", "torch": "randlora_torch"}
_ADAPTERS = {RandLoraConfig: "RandLoraAdapter", AdaLoraConfig: "AdaLoraAdapter"}  # what each stack calls them
_MODEL_ROOTS = {"flax": "jax", "torch": "torch"}  # package that a model's base class comes from -> stack
TARGETS = (*STACKS, "peft")


def convert(source: Any, to: str) -> Any:
    """Move an adapter to another stack. Arrays are renamed, never recomputed: round trips give the same bytes.

    Args:
        source: A folder, an `interop.Adapter`, a `RandLoraAdapter` or `AdaLoraAdapter` of either stack, or a model with
            one attached.
        to: "jax" for `randlora_jax.RandLoraAdapter` or `AdaLoraAdapter`, "torch" for those of `randlora_torch`, "peft"
            for an `interop.Adapter` ready for `interop.save`.

    Raises:
        ValueError: `to` is none of these.
        TypeError: `source` holds no adapter.
        ImportError: the stack is not installed; the message names the extra.
        AdapterFormatError: a folder does not hold a complete adapter.
    """
    if to not in TARGETS:
        raise ValueError(f"to={to!r} is not a stack: choose one of {TARGETS}.")
    adapter = _as_adapter(source)
    if to == "peft":
        return adapter
    return getattr(stack_module(to), _ADAPTERS[type(adapter.config)]).from_interop(adapter)


def _as_adapter(source: Any) -> Adapter:
    if isinstance(source, Adapter):
        return source
    if isinstance(source, str | os.PathLike):
        return load(source)
    if hasattr(source, "to_interop"):
        return source.to_interop()
    stack = model_stack(source)
    if stack is not None:
        return stack_module(stack).extract(source).to_interop()
    raise TypeError(
        f"source is a {type(source).__name__}, which holds no adapter: pass a folder, an Adapter of any kind, or"
        " a torch or Flax NNX model with an adapter attached."
    )


def model_stack(model: Any) -> str | None:
    """The name of the stack that a model belongs to by its class, or None."""
    roots = (base.__module__.split(".")[0] for base in type(model).__mro__)
    return next((_MODEL_ROOTS[root] for root in roots if root in _MODEL_ROOTS), None)


def model_logits(model: Any, inputs: Any) -> Any:
    """What a model of any stack, or another function, gives for inputs in numpy: an array, or an output with logits."""
    stack = model_stack(model)
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
