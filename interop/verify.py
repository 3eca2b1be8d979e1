"""`verify`: that an adapter is the same one after a conversion, and computes the same in every stack."""

import dataclasses
import importlib.util
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from interop.adapter import Adapter
from interop.compare import in_both, layer_differences, open_adapter, same_numbers, share_bases, unmatched
from interop.convert import STACKS, convert, model_logits
from interop.errors import bulleted
from interop.progress import Progress, no_progress
from interop.table import size, table

TOLERANCE = 1e-5  # float32 products of a few thousand terms are off by 1e-7 to 1e-6


@dataclasses.dataclass(frozen=True)
class LayerCheck:
    """One layer's update: how it compares with A's in float64 numpy, by the definition.

    Attributes:
        module: The layer.
        shape: (out, in).
        identical: Whether B holds the very same numbers as A.
        norm: Frobenius norm of A's update; None if nothing had to be computed.
        errors: Relative errors of B, by "numpy" in float64, and in the stacks "jax" and "torch".
    """

    module: str
    shape: tuple[int, int] | None
    identical: bool
    norm: float | None
    errors: dict[str, float]


@dataclasses.dataclass(frozen=True)
class Verification:
    """What `verify` found; `str` of it is a table.

    Attributes:
        layers: One check for each layer that both adapt.
        problems: What only one of the two has, or has in another shape.
        logits_error: The largest difference of two logits over the largest logit, if models were given.
        tolerance: What relative errors may be.
    """

    layers: list[LayerCheck]
    problems: list[str]
    logits_error: float | None
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether nothing was lost; there are no problems, and every error is within the tolerance."""
        errors = [error for layer in self.layers for error in layer.errors.values()]
        errors += [] if self.logits_error is None else [self.logits_error]
        return not self.problems and bool(self.layers) and all(error <= self.tolerance for error in errors)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-compatible values."""
        return {"passed": self.passed, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """A table with a line for each layer, then what else was found, then the verdict."""
        stacks = list(dict.fromkeys(stack for layer in self.layers for stack in layer.errors))
        lines = table(
            ["module", "shape", "norm of dW", *stacks],
            [
                [
                    layer.module,
                    size(layer.shape),
                    "-" if layer.norm is None else f"{layer.norm:.4g}",
                    *(_error(layer.errors.get(stack)) for stack in stacks),
                ]
                for layer in self.layers
            ],
        )
        if self.logits_error is not None:
            lines.append(f"logits: relative error {self.logits_error:.1e}")
        if self.problems:
            lines.append(bulleted("the adapters do not correspond", self.problems))
        verdict = "the same" if self.passed else "NOT the same"
        lines.append(f"{verdict}: {len(self.layers)} layers, relative errors may be {self.tolerance:.0e}")
        return "\n".join(lines)


def _error(error: float | None) -> str:
    return "" if error is None else "identical" if error == 0 else f"{error:.1e}"


def verify(
    a: Any,
    b: Any = None,
    *,
    stacks: Collection[str] | None = None,
    models: Sequence[Callable[[Any], Any]] | None = None,
    inputs: Any = None,
    tolerance: float = TOLERANCE,
    progress: Progress = no_progress,
) -> Verification:
    """Check that two adapters make the same updates, by float64 numpy, by JAX and by torch, layer by layer.

    Folders are read one layer at a time, so that memory holds no more than the bases and one layer.

    Args:
        a: What is right: a folder, an adapter of any kind, or a model with one attached.
        b: What it became; by default `a` again, so that only the stacks are checked against the definition.
        stacks: Of "jax" and "torch"; by default those that are installed.
        models: Two models, of any stack, with the adapters attached; their logits for `inputs` are compared.
        inputs: Token ids (batch, length), or what else the models take, in numpy.
        tolerance: What relative errors may be: of an update by Frobenius norm, of logits by the largest one.
        progress: Called with the layers and a word on what is done to them, gives them back.

    Raises:
        TypeError, ValueError, FileNotFoundError, AdapterFormatError: see `convert` and `load`; or an adapter does not
            know the shapes of its layers (`adapter.bind(shapes)`).
        ImportError: a stack is not installed.
    """
    a = open_adapter(a)
    b = a if b is None else share_bases(a, open_adapter(b))
    stacks = [name for name in STACKS if importlib.util.find_spec(name)] if stacks is None else list(stacks)
    layers = [_check(a, b, module, stacks) for module in progress(in_both(a, b), "verifying")]
    logits_error = None if models is None else _logits_error(models, inputs)
    return Verification(layers, unmatched(a, b), logits_error, tolerance)


def _check(a: Adapter, b: Adapter, module: str, stacks: Collection[str]) -> LayerCheck:
    shape = (a.shapes or b.shapes or {}).get(module)
    identical = b is a or same_numbers(a, b, module)
    if identical and not stacks:
        return LayerCheck(module, shape, identical, None, {"numpy": 0.0})
    others: dict[str, Any] = {} if b is a else {"numpy": a if identical else b}
    layer = b.layer(module, shape)
    others |= {stack: np.asarray(convert(layer, to=stack).delta_weight(module)) for stack in stacks}
    found = layer_differences(a, module, others, shape)
    norm = next(iter(found.values())).norm_a if found else None
    return LayerCheck(module, shape, identical, norm, {name: one.relative for name, one in found.items()})


def _logits_error(models: Sequence[Callable[[Any], Any]], inputs: Any) -> float:
    if len(models) != 2 or inputs is None:
        raise ValueError(f"models has {len(models)} entries and inputs is {inputs!r}: give two models, and inputs.")
    one, other = (np.asarray(model_logits(model, inputs)).astype(np.float64) for model in models)
    if one.shape != other.shape:
        raise ValueError(f"the models give logits of shapes {one.shape} and {other.shape}, which cannot be compared.")
    largest = np.abs(one).max(initial=0.0)
    return float(np.abs(one - other).max(initial=0.0) / (largest or 1.0))
