"""Layouts from a small table of rules: what the kernels of a model are called in adapter files, and how they lie.

Tracing (`infer_layouts`) finds the axes of a kernel, but not the names of its weights in files, nor which projections
share it. A rule says that for the kernels of all layers at once.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, cast

from randlora_jax.layouts import Layout, default_layout

HEAD_SCALE = "1/sqrt(head_dim)"
_INDICES = ("{i}", "{j}")
_AXES = ("in_axes", "out_axes", "stack_axes")


class Parameter(NamedTuple):
    """A parameter that a rule may be about: its dotted name, the last part of its path, and its shape."""

    name: str
    leaf: str | None
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


@dataclasses.dataclass(frozen=True)
class LayoutRule:
    r"""What all kernels of one kind are called in adapter files, and where needed how they lie.

    It is for the kernels whose name it matches and that have as many axes as it speaks of. Axes that it leaves out are
    those of `infer_layouts`, where it is combined with that; otherwise the stack_axes come first, and a kernel has one
    axis of inputs, then one of outputs ("weight", as in torch: one of outputs, then one of inputs).

    Attributes:
        kernel: A regular expression for the whole dotted name, without a final "kernel", "w" or "weight", as `init`
            has it; "/" stands for "." as well.
        modules: The name of its weight in adapter files, in which `\1` or `\g<name>` stands for what a group matched,
            `{i}` and `{j}` for the index along the first and the second of stack_axes. For a kernel that holds several
            projections, the list of their names along `fused_axis`; None in place of a name leaves one unadapted.
        in_axes: See `Layout`; with out_axes or not at all.
        out_axes: See `Layout`, without the fused_axis.
        stack_axes: Axes of a scan or vmap, without the fused_axis.
        fused_axis: The axis that numbers the projections which a kernel holds.
        scale: What the kernel is torch's weight times: a number, or "1/sqrt(head_dim)", where head_dim is the size of
            the last of out_axes.
        interleaved: See `Layout`.
        optional: Whether a model may have no such kernel; otherwise that is an error.

    Raises:
        ValueError: one of these is none of what is said above.

    >>> rule = LayoutRule("layers_(\d+)/attn/kv", [r"layers.\1.k_proj", r"layers.\1.v_proj"], fused_axis=0)
    """

    kernel: str
    modules: str | tuple[str | None, ...] | list[str | None]
    in_axes: Sequence[int] | int | None = None
    out_axes: Sequence[int] | int | None = None
    stack_axes: Sequence[int] | int | None = None
    fused_axis: int | None = None
    scale: float | int | str = 1.0
    interleaved: bool = False
    optional: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without a model."""
        for field in _AXES:
            given = getattr(self, field)
            object.__setattr__(self, field, _as_tuple(given))
        if isinstance(self.modules, list):
            object.__setattr__(self, "modules", tuple(self.modules))
        problem = next(self._problems(), None)
        if problem:
            raise ValueError(f"the layout rule for kernel={self.kernel!r}: {problem}")

    def layout(self, parameter: Parameter, known: Layout | None) -> Layout | None:
        """The layout of a parameter by this rule, or None if the rule is not for it.

        Args:
            parameter: Any parameter of the model.
            known: Its layout by other means.

        Raises:
            ValueError: the rule is for it, but contradicts what is known or does not name all of its projections.
        """
        match = self.pattern.fullmatch(parameter.name)
        axes = None if match is None else self._axes(parameter, known)
        if match is None or axes is None:
            return None
        sizes = [parameter.shape[axis] for axis in axes.stack_axes]
        templates = (self.modules,) if isinstance(self.modules, str) else tuple(self.modules)
        if self.fused_axis is not None and sizes.pop() != len(templates):
            raise ValueError(
                f"the layout rule for kernel={self.kernel!r} lists {len(templates)} modules, but {parameter} holds"
                f" {parameter.shape[self.fused_axis]} on fused_axis={self.fused_axis}: name each, or None."
            )
        indices = itertools.product(*map(range, sizes))
        names = [_expand(match, template, index) for index in indices for template in templates]
        scale = (
            1 / math.sqrt(parameter.shape[axes.out_axes[-1]]) if self.scale == HEAD_SCALE else cast(float, self.scale)
        )
        before = known or axes
        return dataclasses.replace(
            axes,
            modules=tuple(names),
            scale=before.scale if scale == 1 else scale,
            interleaved=before.interleaved or self.interleaved,
        )

    @property
    def pattern(self) -> re.Pattern[str]:
        """The expression that a kernel's dotted name must match in full."""
        return re.compile(self.kernel.replace("/", r"\."))

    @property
    def _fused(self) -> tuple[int, ...]:
        return () if self.fused_axis is None else (self.fused_axis,)

    def _axes(self, parameter: Parameter, known: Layout | None) -> Layout | None:
        """The axes of a parameter whose name fits; None if the parameter has others than the rule is for."""
        ndim = len(parameter.shape)
        counted = _as_tuple(self.stack_axes)
        if counted is None:
            counted = tuple(range(self._counted)) if known is None or self.in_axes is not None else known.stack_axes
        stack = (*(axis for axis in counted if axis not in self._fused), *self._fused)
        if max(stack, default=0) >= ndim or len(stack) != self._counted + len(self._fused):
            return None
        groups = self._groups(parameter, known, stack)
        if groups is None or sum(map(len, (*groups, stack))) != ndim:
            return None
        if known and (set(groups[0]) != set(known.in_axes) or not set(known.stack_axes) <= set(stack) or not groups[1]):
            raise ValueError(
                f"the layout rule for kernel={self.kernel!r} makes {parameter} a kernel with in_axes={groups[0]},"
                f" out_axes={groups[1]}, stack_axes={stack}, but the layout found for it is {known}: correct the rule,"
                " or leave the axes out of it."
            )
        return Layout(*groups, stack)

    def _groups(
        self, parameter: Parameter, known: Layout | None, stack: tuple[int, ...]
    ) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The axes of inputs and of outputs, when those of stacked and fused weights are taken out."""
        given_in, given_out = _as_tuple(self.in_axes), _as_tuple(self.out_axes)
        if given_in is not None and given_out is not None:
            return given_in, given_out
        if known is not None:
            inputs, outputs = (tuple(a for a in axes if a not in stack) for axes in (known.in_axes, known.out_axes))
            return inputs, outputs
        rest = [axis for axis in range(len(parameter.shape)) if axis not in stack]
        plain = default_layout((parameter.leaf,), len(rest)) if parameter.leaf else None
        return None if plain is None else ((rest[plain.in_axes[0]],), (rest[plain.out_axes[0]],))

    @property
    def _counted(self) -> int:
        """How many stack axes, besides a fused one, the names count."""
        return max(sum(index in name for index in _INDICES) for name in self._templates)

    @property
    def _templates(self) -> list[str]:
        modules = (self.modules,) if isinstance(self.modules, str) else self.modules
        return [name for name in modules if name is not None]

    def _problems(self) -> Iterator[str]:
        """What is wrong with the rule as such, the first of which is reported."""
        try:
            groups = self.pattern
        except (AttributeError, re.error) as error:
            yield f"it is no regular expression, {error}."
            return
        many = isinstance(self.modules, tuple)
        names = self.modules if isinstance(self.modules, tuple) else (self.modules,)
        if not any(names) or not all(name is None or (isinstance(name, str) and name) for name in names):
            yield f"modules={self.modules!r} names no weight: give a name, or the list of names along fused_axis."
            return
        if many and self.fused_axis is None:
            yield f"modules={self.modules} are several: say with fused_axis which axis of the kernel numbers them."
        if not many and self.fused_axis is not None:
            yield f"fused_axis={self.fused_axis} numbers several weights: give modules as the list of their names."
        for name in self._templates:
            yield from _problems_of_name(name, groups)
        counted = {tuple(index in name for index in _INDICES) for name in self._templates}
        if len(counted) > 1 or (False, True) in counted:
            yield f"modules={self.modules!r} must all count the same stack_axes, the first with {{i}}, then {{j}}."
        stack_axes = _as_tuple(self.stack_axes)
        if stack_axes is not None and len(stack_axes) != self._counted:
            yield (
                f"stack_axes={stack_axes} are {len(stack_axes)}, modules={self.modules!r} count"
                f" {self._counted}: write {{i}} for the index along the first of them, {{j}} along the second."
            )
        yield from self._problems_of_axes()
        yield from self._problems_of_values()

    def _problems_of_axes(self) -> Iterator[str]:
        in_axes, out_axes, stack_axes = map(_as_tuple, (self.in_axes, self.out_axes, self.stack_axes))
        given = (in_axes, out_axes, stack_axes, self._fused)
        for axis in itertools.chain.from_iterable(axes or () for axes in given):
            if not isinstance(axis, int) or axis < 0:
                yield f"axis {axis!r}: give integers, and count axes from the first, which is 0."
                return
        if (self.in_axes is None) != (self.out_axes is None):
            yield f"in_axes={self.in_axes} and out_axes={self.out_axes}: give both, or neither."
        elif in_axes is not None and out_axes is not None:
            if self.stack_axes is None and self._counted:
                yield f"modules={self.modules!r} count stack_axes: give these as well as in_axes and out_axes."
            try:
                Layout(in_axes, out_axes, (*(stack_axes or ()), *self._fused))
            except ValueError as error:
                yield str(error)

    def _problems_of_values(self) -> Iterator[str]:
        number = isinstance(self.scale, int | float) and math.isfinite(self.scale) and self.scale != 0
        if not number and self.scale != HEAD_SCALE:
            yield f"scale={self.scale!r}: give a finite number other than 0, or {HEAD_SCALE!r}."
        for field in ("interleaved", "optional"):
            if not isinstance(getattr(self, field), bool):
                yield f"{field}={getattr(self, field)!r}: give true or false."


def _as_tuple(axes: Sequence[int] | int | None) -> tuple[int, ...] | None:
    """What `LayoutRule` holds its axes as."""
    if axes is None or isinstance(axes, int):
        return None if axes is None else (axes,)
    return tuple(axes)


def _expand(match: re.Match[str], template: str | None, index: tuple[int, ...]) -> str | None:
    """The name of one weight."""
    if template is None:
        return None
    name = match.expand(template)
    for placeholder, number in zip(_INDICES, index, strict=False):
        name = name.replace(placeholder, str(number))
    return name


def _problems_of_name(name: str, pattern: re.Pattern[str]) -> Iterator[str]:
    for number, group in re.findall(r"\\(?:(\d+)|g<(\w+)>)", name):
        known = int(number or group) <= pattern.groups if (number or group).isdigit() else group in pattern.groupindex
        if not known:
            yield f"modules have {name!r}, but the expression has no group {number or group!r}."
    for braces in re.findall(r"\{.*?\}", name):
        if braces not in _INDICES:
            yield f"modules have {name!r}, with {braces}: only {{i}} and {{j}} are indices."
