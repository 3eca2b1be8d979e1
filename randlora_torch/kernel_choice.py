"""Triton's kernel or torch's products: each machine measures for itself, as the kernels were written without a GPU.

The first call of each kind is computed both ways, with random factors. Triton's way is taken from then on if its result
agrees and it takes at most nine tenths of torch's time; otherwise torch's. Choices last as long as the process. As they
go by time, another run may choose otherwise, and so may the processes of one run: results then differ by rounding.
Nothing is tried, and torch computes, where that must not be (`torch.use_deterministic_algorithms`, `set_kernels`).
"""

import functools
import importlib.util
import logging
import statistics
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

KernelName = Literal["auto", "triton", "torch"]
KERNELS: tuple[str, ...] = get_args(KernelName)
Way = Callable[..., Tensor | tuple[Tensor, ...]]

TORCH = "torch"  # the name of torch's way; the others are Triton's, by their tiles
_WORTHWHILE = 0.9  # of torch's time
# How far results may lie apart, in units of the number and of the typical number beside it. The ways round at different
# places, a few units in the last place each; what is wrong differs by 1.
_TOLERANCE = {"float32": 1e-3, "tf32": 1e-2, "float16": 1e-2, "bfloat16": 5e-2}
_ROWS = 1024  # compared at once


class Call(NamedTuple):
    """What choices depend on.

    Attributes:
        product: "fold", W' from its parts, or "project", the gradients of lambda and gamma from that of W'.
        shape: (out, in) of the layer.
        r: Rank of one basis.
        weight: How W is stored, or its gradient.
        bases: How B is stored.
        dtype: Of the product; "tf32" for float32 where torch may multiply in it.
        device: Where.
    """

    product: str
    shape: tuple[int, int]
    r: int
    weight: str
    bases: str
    dtype: str
    device: str


class Choice(NamedTuple):
    """A choice that was made.

    Attributes:
        call: For what.
        chosen: "torch", or the tiles of Triton's kernel.
        reason: Why, in words.
        milliseconds: Of each way that ran and agreed.
    """

    call: Call
    chosen: str
    reason: str
    milliseconds: dict[str, float]


class Chooser:
    """Makes choices and keeps them.

    Args:
        milliseconds: Times a function without arguments.
    """

    def __init__(self, milliseconds: Callable[[Callable[[], object]], float]) -> None:
        self.kernels: str = "auto"
        self.made: dict[Call, Choice] = {}
        self._milliseconds = milliseconds
        self._warned: set[str] = set()

    def choose(
        self, call: Call, ways: Mapping[str, Way], draw: Callable[[], tuple[Tensor, ...]], *, may_try: bool = True
    ) -> Way:
        """The way to compute a call.

        Args:
            call: What is to be computed.
            ways: Torch's under `TORCH`, and at least one of Triton's, the likeliest first.
            draw: Arguments of the ways for a trial, if there is one. Zeros would tell nothing: an update starts as 0.
            may_try: Whether this is a moment to run and time anything; if not, an unknown call is torch's for now.
        """
        if self.kernels != "auto":
            likeliest = next(name for name in ways if name != TORCH)
            return ways[TORCH if self.kernels == TORCH else likeliest]
        if call not in self.made:
            if not may_try:
                return ways[TORCH]
            self.made[call] = self._try_out(call, ways, draw())
        return ways[self.made[call].chosen]

    def _try_out(self, call: Call, ways: Mapping[str, Way], arguments: tuple[Tensor, ...]) -> Choice:
        torch_way = ways[TORCH]
        want = torch_way(*arguments)
        milliseconds, failures = {TORCH: self._milliseconds(lambda: torch_way(*arguments))}, []
        for name, way in ways.items():
            if name == TORCH:
                continue
            try:
                if agree(way(*arguments), want, _TOLERANCE[call.dtype]):
                    milliseconds[name] = self._milliseconds(functools.partial(way, *arguments))
                else:
                    failures.append("its result is not torch's")
            except Exception as error:  # compilers, drivers and allocators each have their own
                failures.append(f"{type(error).__name__}: {error}")
        if len(milliseconds) == 1:
            self._warn(call, failures[0])
            return Choice(call, TORCH, failures[0], milliseconds)
        fastest = min(milliseconds, key=milliseconds.__getitem__)
        share = milliseconds[fastest] / milliseconds[TORCH]
        if share <= _WORTHWHILE:
            return Choice(call, fastest, f"takes {share:.2f} of torch's time", milliseconds)
        return Choice(call, TORCH, "no kernel is at least 10% faster", milliseconds)

    def _warn(self, call: Call, reason: str) -> None:
        """Once for each reason, however many kinds of calls it holds for."""
        if reason not in self._warned:
            self._warned.add(reason)
            logger.warning("Triton's kernel is not used for %s, and torch computes it: %s", call, reason)


def agree(got: Tensor | tuple[Tensor, ...], want: Tensor | tuple[Tensor, ...], tolerance: float) -> bool:
    """Whether every number of one result is close to that of the other, in units of it and of its neighborhood."""
    if isinstance(want, tuple):
        return all(agree(*pair, tolerance) for pair in zip(got, want, strict=True))
    assert isinstance(got, Tensor)
    return all(
        bool(((a.float() - b.float()).abs() <= tolerance * (b.float().abs() + b.float().square().mean().sqrt())).all())
        for a, b in zip(got.split(_ROWS), want.split(_ROWS), strict=True)
    )


def cuda_milliseconds(run: Callable[[], object], *, repetitions: int = 5) -> float:
    """Median time of a function on the current CUDA stream, after a run to warm up."""
    run()
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repetitions)]
    for begin, end in pairs:
        begin.record()
        run()
        end.record()
    pairs[-1][1].synchronize()
    return statistics.median(begin.elapsed_time(end) for begin, end in pairs)


chooser = Chooser(cuda_milliseconds)


def set_kernels(kernels: KernelName) -> None:
    """Say how folded weights and their gradients are computed on GPUs, for the whole process.

    Args:
        kernels: "auto" measures once for each shape and dtype and takes what is faster; "torch" never uses Triton, so
            that results do not depend on measurements; "triton" never measures. Whatever is set, torch computes what
            Triton cannot: on the CPU, while torch.compile traces, under `torch.func`, and what is differentiated again.

    Raises:
        ValueError: the name is none of these.
        ImportError: "triton", and it is not installed.
    """
    if kernels not in KERNELS:
        raise ValueError(f"kernels={kernels!r} is not known: choose one of {list(KERNELS)}.")
    if kernels == "triton" and importlib.util.find_spec("triton") is None:
        raise ImportError("kernels='triton' needs Triton, which torch installs with its builds for GPUs.")
    chooser.kernels = kernels


def kernel_choices() -> list[Choice]:
    """The choices made in this process so far, with the times that they were made by."""
    return list(chooser.made.values())
