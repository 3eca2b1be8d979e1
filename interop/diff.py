"""`diff`: what two adapters adapt differently, and by how much, layer by layer."""

import dataclasses
from typing import Any

from interop.adapter import Adapter
from interop.compare import in_both, layer_differences, open_adapter, same_numbers, share_bases, unmatched
from interop.errors import bulleted, legible
from interop.progress import Progress, no_progress
from interop.table import size, table


@dataclasses.dataclass(frozen=True)
class LayerDiff:
    """How B's update of a layer differs from A's, in float64; of identical factors nothing is computed.

    Attributes:
        module: The layer.
        shape: (out, in).
        identical: Whether both make it of the very same numbers.
        norm_a, norm_b: Frobenius norms of the two updates.
        relative: Norm of the difference over the larger of the two.
        cosine: Of the angle between the two, as vectors.
    """

    module: str
    shape: tuple[int, int] | None
    identical: bool
    norm_a: float | None = None
    norm_b: float | None = None
    relative: float = 0.0
    cosine: float = 1.0

    def in_words(self) -> list[str]:
        """The numbers as the cells of a table."""
        if self.norm_a is None:
            return ["", "", "identical", ""]
        return [f"{self.norm_a:.4g}", f"{self.norm_b:.4g}", f"{self.relative:.2e}", f"{self.cosine:.4f}"]


@dataclasses.dataclass(frozen=True)
class AdapterDiff:
    """What `diff` found; `str` of it is a table.

    Attributes:
        fields: What A and B say in the fields of their configs that differ, bookkeeping left out.
        layers: One entry for each layer that both adapt.
        unmatched: What only one of the two has, or has in another shape.
    """

    fields: dict[str, tuple[Any, Any]]
    layers: list[LayerDiff]
    unmatched: list[str]

    @property
    def same(self) -> bool:
        """Whether both are the same update of the same layers; their configs may still say it in other words."""
        return not self.unmatched and all(layer.relative == 0 for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-compatible values."""
        return {"same": self.same, **dataclasses.asdict(self)}

    def __str__(self) -> str:
        """Fields, then a table with a line for each layer, then what is in one of them only."""
        lines = [legible(f"{name}: {a!r} in A, {b!r} in B") for name, (a, b) in self.fields.items()]
        lines += table(
            ["module", "shape", "norm A", "norm B", "relative", "cosine"],
            [[layer.module, size(layer.shape), *layer.in_words()] for layer in self.layers],
        )
        if self.unmatched:
            lines.append(bulleted("in one of them only, or different", self.unmatched))
        changed = sum(layer.relative != 0 for layer in self.layers)
        lines.append("the same update" if self.same else f"{changed} of {len(self.layers)} common layers differ")
        return "\n".join(lines)


# Fields of a config that say where an adapter comes from and not what it is.
_BOOKKEEPING = {"inference_mode", "peft_version", "revision", "auto_mapping", "unknown_fields"}


def diff(a: Any, b: Any, *, progress: Progress = no_progress) -> AdapterDiff:
    """Compare two adapters: their configs, which layers they adapt, and the update of each.

    They may be of different methods, ranks, seeds and stacks: the updates are what is compared, in float64.

    Args:
        a: A folder, an adapter of any kind, or a model with one attached.
        b: Likewise.
        progress: See `verify`.

    Raises:
        TypeError, ValueError, FileNotFoundError, AdapterFormatError: see `convert` and `load`; or an adapter does not
            know the shapes of its layers (`adapter.bind(shapes)`).
    """
    a = open_adapter(a)
    b = share_bases(a, open_adapter(b))
    layers = [_layer(a, b, module) for module in progress(in_both(a, b), "comparing")]
    return AdapterDiff(_fields(a, b), layers, unmatched(a, b))


def _layer(a: Adapter, b: Adapter, module: str) -> LayerDiff:
    shape = (a.shapes or b.shapes or {}).get(module)
    if same_numbers(a, b, module):
        return LayerDiff(module, shape, True)
    found = layer_differences(a, module, {"b": b}, shape)["b"]
    return LayerDiff(module, shape, False, found.norm_a, found.norm_b, found.relative, found.cosine)


def _fields(a: Adapter, b: Adapter) -> dict[str, tuple[Any, Any]]:
    if a.config.METHOD != b.config.METHOD:
        return {"method": (a.config.METHOD, b.config.METHOD)}  # their fields have little in common
    mine, other = a.config.to_dict(), b.config.to_dict()
    names = [name for name in {**mine, **other} if name not in _BOOKKEEPING]
    found = {name: (mine.get(name), other.get(name)) for name in names if mine.get(name) != other.get(name)}
    return found | ({"recipe": (a.recipe, b.recipe)} if a.recipe != b.recipe else {})
