"""Where the axes of a parameter have gone in a value computed from it.

Each dim of the value is a product of units, outermost first, and each unit knows which axes of the parameter it runs
over. Reshapes cut and join units, indexing and scans take them away; at a matrix product, what happens to a unit is
what happens to its axes. A unit cut out of several axes counts as all of them, so nothing is claimed that is not so.
"""

import dataclasses
import math
from collections.abc import Iterable
from typing import NamedTuple, TypeVar

from randlora_jax.layouts import Layout


class Unit(NamedTuple):
    """A factor of a dim: its size, and the axes of the parameter that it runs over; none for a broadcast."""

    size: int
    axes: tuple[int, ...]


Item = TypeVar("Item")
Dim = tuple[Unit, ...]


class Taken(NamedTuple):
    """Units that a scan or an index removed. `scope` tells the scan, which gives them back to what it stacks."""

    units: Dim
    scope: int | None


@dataclasses.dataclass(frozen=True)
class Track:
    """A value that stands for one parameter: the units of each dim, and those that were taken, outermost first."""

    name: str
    shape: tuple[int, ...]
    dims: tuple[Dim, ...]
    taken: tuple[Taken, ...] = ()

    @classmethod
    def start(cls, name: str, shape: tuple[int, ...]) -> "Track":
        """The parameter itself."""
        return cls(name, shape, tuple((Unit(size, (axis,)),) for axis, size in enumerate(shape)))

    def with_dims(self, dims: Iterable[Dim]) -> "Track":
        """The same parameter with other dims."""
        return dataclasses.replace(self, dims=tuple(dims))

    def axes(self) -> set[int]:
        """Axes of the parameter that are still dims of the value."""
        return {axis for dim in self.dims for axis in axes_of(dim)}

    def take(self, removed: Iterable[int], scope: int | None = None) -> "Track":
        """Remove dims by an index or by a scan."""
        removed = tuple(removed)
        gone = [Taken(self.dims[d], scope) for d in removed if axes_of(self.dims[d])]
        kept = tuple(dim for d, dim in enumerate(self.dims) if d not in removed)
        return dataclasses.replace(self, dims=kept, taken=_unique((*self.taken, *gone)))

    def give_back(self, scope: int, length: int) -> "Track":
        """Stack the slices that a scan took, or copies of what it did not slice, on a new first dim."""
        own = [taken.units for taken in self.taken if taken.scope == scope]
        first = own[0] if len(own) == 1 and size_of(own[0]) == length else new_dim(length)
        rest = tuple(taken for taken in self.taken if taken.scope != scope or first not in own)
        return dataclasses.replace(self, dims=(first, *self.dims), taken=rest)

    def resize(self, shape: tuple[int, ...]) -> "Track":
        """Change sizes of dims without moving them: a slice, a pad, a shard, one operand of a concatenation."""
        return self.with_dims(resized(dim, size) for dim, size in zip(self.dims, shape, strict=True))

    def index(self, sizes: tuple[int, ...]) -> "Track":
        """Slice, and take every dim of which a single index is left; it stays as a dim of size one."""
        single = [d for d, (dim, size) in enumerate(zip(self.dims, sizes, strict=True)) if size == 1 < size_of(dim)]
        kept = self.take(single).with_dims(() if d in single else dim for d, dim in enumerate(self.dims))
        return kept.resize(sizes)

    def broadcast(self, shape: tuple[int, ...], places: tuple[int, ...]) -> "Track":
        """As `lax.broadcast_in_dim`: axes that are repeated get no role in a later product."""
        dims = [new_dim(size) for size in shape]
        for dim, place in zip(self.dims, places, strict=True):
            if size_of(dim) == shape[place]:
                dims[place] = dim
        return self.with_dims(dims)

    def reshape(self, shape: tuple[int, ...]) -> "Track | None":
        """Cut and join units; None where the factors of the two shapes do not line up.

        An axis of size one that a slice left over counts as indexed; one that the parameter has joins its neighbor.
        """
        whole = self
        for d, dim in reversed(list(enumerate(self.dims))):
            if size_of(dim) == 1 and any(self.shape[axis] > 1 for axis in axes_of(dim)):
                whole = whole.take([d])
        units = [unit for dim in whole.dims for unit in dim]
        dims: list[Dim] = []
        for size in shape:
            filled = _fill(size, units)
            if filled is None:
                return None
            dims.append(filled)
        if units and dims:
            dims[-1] += tuple(units)
        return whole.with_dims(dims)

    def read(self, contracted: Iterable[int], batched: Iterable[int]) -> Layout | str:
        """The layout that a matrix product over these dims gives the parameter, or why it gives none."""
        contracted, batched = set(contracted), set(batched)
        roles: dict[int, dict[str, None]] = {}  # in order of nesting
        for taken in self.taken:
            for axis in axes_of(taken.units):
                roles.setdefault(axis, {})["stacked"] = None
        for d, dim in enumerate(self.dims):
            role = "contracted" if d in contracted else "stacked" if d in batched else "produced"
            for axis in axes_of(dim):
                roles.setdefault(axis, {})[role] = None
        for axis, found in roles.items():
            if len(found) > 1:
                return f"taken apart: parts of axis {axis} of {self.shape} are {' and '.join(found)}"
        axes = {
            role: [axis for axis, found in roles.items() if role in found]
            for role in ("contracted", "produced", "stacked")
        }
        if not axes["contracted"] or not axes["produced"]:
            missing = "contracted with data" if not axes["contracted"] else "left in the output"
            return f"a vector: none of the axes of {self.shape} is {missing}"
        if len(roles) < len(self.shape):
            lost = sorted(set(range(len(self.shape))) - set(roles))
            return f"broadcast along axes {lost} of {self.shape} before its product"
        return Layout(tuple(sorted(axes["contracted"])), tuple(sorted(axes["produced"])), tuple(axes["stacked"]))


def axes_of(dim: Dim) -> tuple[int, ...]:
    """Axes of the parameter that a dim runs over."""
    return _unique(axis for unit in dim for axis in unit.axes)


def size_of(dim: Dim) -> int:
    """Number of elements along a dim."""
    return math.prod(unit.size for unit in dim)


def new_dim(size: int) -> Dim:
    """A dim that runs over no axis of the parameter."""
    return (Unit(size, ()),) if size != 1 else ()


def resized(dim: Dim, size: int) -> Dim:
    """The dim at another size; where it is a product of units, which of them shrank is not known any more."""
    return dim if size_of(dim) == size else (Unit(size, axes_of(dim)),)


def _unique(items: Iterable[Item]) -> tuple[Item, ...]:
    return tuple(dict.fromkeys(items))


def _fill(size: int, units: list[Unit]) -> Dim | None:
    """Take units off the front until they make up `size`, cutting the last if needed; None if they cannot."""
    if size == 1:
        return (units.pop(0),) if units and units[0].size == 1 else ()
    dim: list[Unit] = []
    need = size
    while need != 1:
        if not units:
            return None
        unit = units.pop(0)
        if unit.size != 0 and need % unit.size == 0:
            need //= unit.size
        elif need != 0 and unit.size % need == 0:
            units.insert(0, Unit(unit.size // need, unit.axes))
            unit, need = Unit(need, unit.axes), 1
        else:
            return None
        dim.append(unit)
    return tuple(dim)
