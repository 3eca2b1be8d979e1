"""The walk through a jaxpr that follows parameters: values, what is found out, and calls, branches and loops.

Each equation has a rule, chosen by its primitive, that takes the values of its operands and returns those of its
results; what it learns about parameters on the way goes into `Findings`. Loops run until their carries hold no news,
so that a state which is zero at first and data later counts as data.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

from randlora_jax.layouts import Layout
from randlora_jax.tracing.tracks import Track


@dataclasses.dataclass(frozen=True)
class Value:
    """What is known of an array: whether the inputs had a part in it, and which parameters it stands for."""

    data: bool = False
    tracks: tuple[Track, ...] = ()

    def map(self, change: Callable[[Track], Track | None]) -> "Value":
        """The value after an operation that moves axes; tracks that become None end."""
        changed = (change(track) for track in self.tracks)
        return Value(self.data, tuple(dict.fromkeys(track for track in changed if track is not None)))

    def resize(self, shape: tuple[int, ...]) -> "Value":
        """`Track.resize` of all tracks."""
        return self.map(lambda track: track.resize(shape))


CONSTANT = Value()


def join(values: Iterable[Value]) -> Value:
    """What is known of an array that may be, or is computed from, any of these."""
    values = list(values)
    tracks = dict.fromkeys(track for value in values for track in value.tracks)
    return Value(any(value.data for value in values), tuple(tracks))


def shapes_of(atoms: Iterable[Any]) -> list[tuple[int, ...]]:
    """Shapes of operands or results of an equation."""
    return [tuple(map(int, atom.aval.shape)) for atom in atoms]


@dataclasses.dataclass
class Findings:
    """What happens to one parameter. Dicts serve as ordered sets.

    Attributes:
        with_data: Readings of its products with data: a layout, or why there is none.
        without_data: Readings of its products with other parameters and constants.
        ends: Other uses, as participles.
        looked_up: Whether rows are looked up in it, by which it is an embedding table.
        convolved: Whether it takes part in a convolution.
    """

    with_data: dict[Layout | str, None] = dataclasses.field(default_factory=dict)
    without_data: dict[Layout | str, None] = dataclasses.field(default_factory=dict)
    ends: dict[str, None] = dataclasses.field(default_factory=dict)
    looked_up: bool = False
    convolved: bool = False


@dataclasses.dataclass(frozen=True)
class Propagation:
    """One walk through a jaxpr: the rules by primitive, and what they find out by parameter."""

    rules: Mapping[str, "Rule"]
    findings: dict[str, Findings]

    def run(self, jaxpr: Jaxpr | ClosedJaxpr, values: Sequence[Value]) -> list[Value]:
        """Values of the results of a jaxpr, given those of its arguments."""
        if isinstance(jaxpr, ClosedJaxpr):
            jaxpr = jaxpr.jaxpr
        env = dict(zip(jaxpr.invars, values, strict=True))

        def read(atom: Any) -> Value:
            return CONSTANT if isinstance(atom, Literal) else env.get(atom, CONSTANT)

        for eqn in jaxpr.eqns:
            operands = [read(atom) for atom in eqn.invars]
            results = [CONSTANT] * len(eqn.outvars)
            if any(value != CONSTANT for value in operands):
                results = self._rule(eqn)(self, eqn, operands)
            env.update(zip(eqn.outvars, results, strict=True))
        return [read(atom) for atom in jaxpr.outvars]

    def end(self, tracks: Iterable[Track], use: str) -> None:
        """Note a use other than in a product, at which tracks end."""
        for track in tracks:
            self.findings[track.name].ends[use] = None

    def product(self, value: Value, other: Value, contracted: Sequence[int], batched: Sequence[int]) -> None:
        """Note a product over some dims of `value` with another operand."""
        for track in value.tracks:
            findings = self.findings[track.name]
            readings = findings.with_data if other.data else findings.without_data
            readings[track.read(contracted, batched)] = None

    def _rule(self, eqn: JaxprEqn) -> "Rule":
        return self.rules.get(eqn.primitive.name) or (unknown if callee(eqn) is None else call)


Rule = Callable[[Propagation, JaxprEqn, list[Value]], list[Value]]


def unknown(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Reductions, sorts, kernels in other languages: what comes out stands for no parameter."""
    whole = join(operands)
    walk.end(whole.tracks, f"used by {eqn.primitive.name}")
    return [Value(whole.data)] * len(eqn.outvars)


def callee(eqn: JaxprEqn) -> Jaxpr | None:
    """The jaxpr that an equation calls with its own operands: jit, remat, custom_jvp, shard_map and the like."""
    jaxprs: list[Any] = [getattr(p, "jaxpr", p) for p in eqn.params.values() if isinstance(p, Jaxpr | ClosedJaxpr)]
    if len(jaxprs) != 1:
        return None
    pairs = ((jaxprs[0].invars, eqn.invars), (jaxprs[0].outvars, eqn.outvars))
    ranks = [[[len(shape) for shape in shapes_of(variables)] for variables in pair] for pair in pairs]
    # Other ranks: not a call, but a function of numbers, such as the one that `lax.reduce` combines them by.
    return jaxprs[0] if all(inner == outer for inner, outer in ranks) else None


def call(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Go through the body. Inside a shard_map dims are smaller by the mesh, so they are resized on both sides."""
    body = callee(eqn)
    assert body is not None
    inner = [value.resize(shape) for value, shape in zip(operands, shapes_of(body.invars), strict=True)]
    results = zip(walk.run(body, inner), shapes_of(eqn.outvars), strict=True)
    return [value.resize(shape) for value, shape in results]


def cond(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """Every branch may run."""
    which, *operands = operands
    branches = [walk.run(branch, operands) for branch in eqn.params["branches"]]
    return [join([Value(which.data), *results]) for results in zip(*branches, strict=True)]


def while_loop(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The body, then the condition on what it leaves."""
    first, last = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    carry, _ = _settle(operands[last:], lambda carry: walk.run(eqn.params["body_jaxpr"], operands[first:last] + carry))
    walk.run(eqn.params["cond_jaxpr"], operands[:first] + carry)
    return carry


def scan(walk: Propagation, eqn: JaxprEqn, operands: list[Value]) -> list[Value]:
    """The body, on slices of what is scanned; what it stacks gets its slices back."""
    body, scope, length = eqn.params["jaxpr"], id(eqn), eqn.params["length"]
    # Constants and carry go into the body as they are, and carry comes out of it so; the rest has one more dim outside.
    # (jax says how many there are of each in parameters of its own, by other names since 0.12.)
    last, carried = _same_ranks(eqn.invars, body.jaxpr.invars), _same_ranks(eqn.outvars, body.jaxpr.outvars)
    first = last - carried
    slices = [value.map(lambda track: track.take([0], scope)) for value in operands[last:]]
    carry, stacked = _settle(operands[first:last], lambda carry: walk.run(body, operands[:first] + carry + slices))
    return carry + [value.map(lambda track: track.give_back(scope, length)) for value in stacked]


def _same_ranks(outer: Sequence[Any], inner: Sequence[Any]) -> int:
    """How many variables have the same number of dims outside and inside of the body of a scan."""
    return sum(len(a) == len(b) for a, b in zip(shapes_of(outer), shapes_of(inner), strict=True))


def _settle(carry: list[Value], step: Callable[[list[Value]], list[Value]]) -> tuple[list[Value], list[Value]]:
    """Repeat the body of a loop until its carry holds no news: the carry, and what else the last run returned."""
    while True:
        results = step(carry)
        news = [join(pair) for pair in zip(carry, results[: len(carry)], strict=True)]
        if news == carry:
            return carry, results[len(carry) :]
        carry = news


CONTROL_FLOW: dict[str, Rule] = {"cond": cond, "while": while_loop, "scan": scan}
