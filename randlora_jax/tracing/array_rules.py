"""How each array primitive moves the axes of a parameter, or ends its track: the rules of `Propagation`, by name.

A primitive without a rule ends the tracks that meet it, so what is not known is never taken for a kernel.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable
from typing import Any, SupportsIndex

from jax.extend.core import JaxprEqn

from randlora_jax.tracing.propagation import Propagation, Rule, Value, join, shapes_of, unknown
from randlora_jax.tracing.tracks import Dim, Track, Unit, axes_of, new_dim, resized, size_of


def dot_general(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """A product settles the axes of both operands; what comes out is no parameter."""
    (left, right), (left_batch, right_batch) = _numbers(eqn.params["dimension_numbers"])
    walk.product(operands[0], operands[1], left, left_batch)
    walk.product(operands[1], operands[0], right, right_batch)
    return [Value(join(operands).data)]


def ragged_dot(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """A product in which each group of rows has its own weight: groups are stacked weights."""
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (left, right), (left_batch, right_batch) = _numbers(numbers.dot_dimension_numbers)
    walk.product(operands[0], operands[1], left, left_batch)
    walk.product(operands[1], operands[0], right, (*right_batch, *_ints(numbers.rhs_group_dimensions)))
    return [Value(join(operands).data)]


def convolution(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Noted by name: the update of a convolution is no matrix product."""
    for track in join(operands).tracks:
        walk.findings[track.name].convolved = True
    return [Value(join(operands).data)]


WITH_DATA = {
    **dict.fromkeys(("add", "sub", "add_any"), "added to activations"),
    **dict.fromkeys(("mul", "div"), "multiplied with activations element by element"),
    **dict.fromkeys(("concatenate", "stack"), "concatenated with activations"),
}


def elementwise(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """With constants and parameters all tracks go on, as in WeightNorm; at data they end."""
    return [_combine(walk, eqn, operands, shapes_of(eqn.invars))]


def select(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """A mask by data does not end a track: a kernel with entries dropped is a kernel."""
    cases = _combine(walk, eqn, operands[1:], shapes_of(eqn.invars[1:]))
    return [Value(join(operands).data, cases.tracks)]


def concatenate(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Every operand is a part of the result, along the dim in which they are joined."""
    (shape,) = shapes_of(eqn.outvars)
    return [_combine(walk, eqn, [value.resize(shape) for value in operands], [shape] * len(operands))]


def stack(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Each operand, along a new dim."""
    (shape,), place = shapes_of(eqn.outvars), eqn.params["axis"]
    kept = tuple(d for d in range(len(shape)) if d != place)
    return [_combine(walk, eqn, [_broadcast(value, shape, kept) for value in operands], [shape] * len(operands))]


def overwrite(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Entries set to something else: what remains is the first operand."""
    first, rest = operands[0], join(operands[1:])
    walk.end(rest.tracks, f"used by {eqn.primitive.name}")
    if rest.data:
        walk.end(first.tracks, "overwritten by activations")
    return [Value(first.data or rest.data, () if rest.data else first.tracks)]


def _combine(walk: Propagation, eqn: JaxprEqn, operands: list[Value], shapes: list[tuple[int, ...]]) -> Value:
    (shape,) = shapes_of(eqn.outvars)
    result: Any = eqn.outvars[0].aval
    going_on: list[Value] = []
    for i, (value, own) in enumerate(zip(operands, shapes, strict=True)):
        if any(other.data for j, other in enumerate(operands) if j != i):
            use = WITH_DATA.get(eqn.primitive.name, f"combined with activations by {eqn.primitive.name}")
            walk.end(value.tracks, use)
        elif len(own) != len(shape) or result.dtype == bool:  # a scalar factor, a comparison
            walk.end(value.tracks, f"used by {eqn.primitive.name}")
        else:
            going_on.append(_broadcast(value, shape, tuple(range(len(shape)))))
    return Value(join(operands).data, join(going_on).tracks)


def unchanged(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The same arrays in another dtype, in another place, or in reverse."""
    return operands if len(operands) == len(eqn.outvars) else unknown(walk, eqn, operands)


def transpose(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Dims in another order."""
    order = _ints(eqn.params["permutation"])
    return [operands[0].map(lambda track: track.with_dims(track.dims[d] for d in order))]


def reshape(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Dims cut and joined, as far as their factors line up."""
    (shape,) = shapes_of(eqn.outvars)

    def reshaped(track: Track) -> Track | None:
        result = track.reshape(shape)
        if result is None:
            walk.end([track], f"reshaped to {shape}, which mixes its axes")
        return result

    return [operands[0].map(reshaped)]


def squeeze(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The second half of an index such as W[0]."""
    return [operands[0].map(lambda track: track.take(_ints(eqn.params["dimensions"])))]


def unstack(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Every index of one dim."""
    return [operands[0].map(lambda track: track.take([int(eqn.params["axis"])]))] * len(eqn.outvars)


def broadcast(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """New dims, which are no axes of the parameter."""
    (shape,) = shapes_of(eqn.outvars)
    return [_broadcast(operands[0], shape, _ints(eqn.params["broadcast_dimensions"]))]


def tile(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Copies along each dim, which count as a factor of it."""
    copies = [new_dim(count) for count in _ints(eqn.params["reps"])]
    return [operands[0].map(lambda track: track.with_dims(map(operator.add, copies, track.dims)))]


def all_gather(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The shards of a dim put together again, as one dim or with the number of the shard as a new one."""
    place, shapes = eqn.params["all_gather_dimension"], shapes_of(eqn.outvars)

    def gathered(track: Track, shape: tuple[int, ...]) -> Track:
        if eqn.params["tiled"]:
            return track.resize(shape)
        return track.with_dims((*track.dims[:place], new_dim(shape[place]), *track.dims[place:]))

    return [operand.map(functools.partial(gathered, shape=s)) for operand, s in zip(operands, shapes, strict=True)]


def resize(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """A part of every dim, or a dim with something added at its ends."""
    return [operands[0].resize(shape) for shape in shapes_of(eqn.outvars)]


def dynamic_slice(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """W[i] inside a loop, or a part of every dim."""
    return [_choose(walk, operands, lambda track: track.index(_ints(eqn.params["slice_sizes"])), many=False)]


def gather(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """W[i] by one index or several; rows by data of an embedding table."""
    numbers, sizes = eqn.params["dimension_numbers"], _ints(eqn.params["slice_sizes"])
    (shape,), rows = shapes_of(eqn.outvars), shapes_of(eqn.invars[1:2])[0][:-1]
    many, by_data, collapsed = math.prod(rows) != 1, operands[1].data, numbers.collapsed_slice_dims
    if numbers.operand_batching_dims:
        return unknown(walk, eqn, operands)

    def gathered(track: Track) -> Track:
        row_dims: list[Dim]
        indexed = {d for d, dim in enumerate(track.dims) if d in collapsed or sizes[d] == 1 < size_of(dim)}
        kept = [
            () if d in indexed else resized(dim, sizes[d]) for d, dim in enumerate(track.dims) if d not in collapsed
        ]
        if many and not by_data and len(indexed) == 1:  # a fixed choice along one axis: still that axis
            axes = axes_of(track.dims[next(iter(indexed))])
            row_dims = [(Unit(size, axes),) for size in rows]
        else:
            track, row_dims = track.take(sorted(indexed)), [new_dim(size) for size in rows]
        return track.with_dims((kept if d in numbers.offset_dims else row_dims).pop(0) for d in range(len(shape)))

    return [_choose(walk, operands, gathered, many=many)]


def _choose(walk: Propagation, operands: list[Value], select: Callable[[Track], Track], *, many: bool) -> Value:
    """Select by index. Where data choose, and what they choose is no matrix, it is an embedding table."""
    by_data = join(operands[1:]).data

    def chosen(track: Track) -> Track | None:
        result = select(track)
        if by_data and len(result.axes()) < min(2, len(track.axes())):
            walk.findings[track.name].looked_up = True
            return None if many else result
        return result

    return Value(operands[0].data or by_data, operands[0].map(chosen).tracks)


def _broadcast(value: Value, shape: tuple[int, ...], places: tuple[int, ...]) -> Value:
    return value.map(lambda track: track.broadcast(shape, places))


def _ints(numbers: Iterable[SupportsIndex]) -> tuple[int, ...]:
    """Parameters of equations as Python's integers: numpy's occur among them."""
    return tuple(map(operator.index, numbers))


def _numbers(groups: Iterable[Iterable[Iterable[SupportsIndex]]]) -> tuple[tuple[tuple[int, ...], ...], ...]:
    return tuple(tuple(map(_ints, pair)) for pair in groups)


def _named(rule: Rule, names: str) -> dict[str, Rule]:
    return dict.fromkeys(names.split(), rule)


ARRAY_RULES: dict[str, Rule] = {
    "dot_general": dot_general,
    "ragged_dot_general": ragged_dot,
    "conv_general_dilated": convolution,
    "select_n": select,
    "concatenate": concatenate,
    "stack": stack,
    "tile": tile,
    "transpose": transpose,
    "reshape": reshape,
    "squeeze": squeeze,
    "unstack": unstack,
    "broadcast_in_dim": broadcast,
    "dynamic_slice": dynamic_slice,
    "gather": gather,
    **_named(all_gather, "all_gather all_gather_invariant all_gather_reduced"),
    **_named(overwrite, "dynamic_update_slice scatter scatter-add scatter-mul scatter-min scatter-max"),
    **_named(resize, "slice split pad"),
    **_named(
        unchanged,
        "convert_element_type copy copy_p stop_gradient sharding_constraint layout_constraint reshard mesh_cast"
        " device_put reduce_precision optimization_barrier name rev psum psum_invariant pmax pmin pvary pcast ppermute",
    ),
    **_named(
        elementwise,
        "add sub mul div rem max min pow add_any atan2 nextafter clamp integer_pow square sqrt rsqrt cbrt neg abs sign"
        " floor ceil round exp exp2 expm1 log log1p tanh logistic sin cos tan asin acos atan sinh cosh asinh acosh"
        " atanh erf erfc erf_inv and or xor not shift_left shift_right_logical shift_right_arithmetic"
        " eq ne lt le gt ge is_finite",
    ),
}
