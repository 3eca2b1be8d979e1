"""Integer arithmetic of RandLoRA: how many bases, which shapes, how many trainable numbers.

Everything here follows from a layer's (out, in) shape and the rank r alone, so it is computed here and nowhere else.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

MAX_SIDE = 2**24  # of a layer: what is larger is a damaged or malicious file
MAX_BASIS = 2**32  # numbers in B; all linear layers of Llama-3.1-405B take 2.8e9


class Dims(NamedTuple):
    """The two sizes that one pair of bases is made for; both are shared by every layer of an adapter."""

    max_dim: int
    min_dim: int


def num_bases(min_dim: int, r: int) -> int:
    """Number n of rank-r bases that reach full rank on a layer whose short side is `min_dim`: ceil(min_dim / r)."""
    return -(-min_dim // r)


def shared_dims(shapes: Iterable[tuple[int, int]]) -> Dims:
    """Sizes of the bases that serve all layers of the given (out, in) shapes.

    PEFT takes the element-wise maximum over (out, in) first and sorts it afterwards, so an up projection (256, 128)
    beside a down projection (128, 256) asks for min_dim=256 although no layer has that short side.

    Raises:
        ValueError: `shapes` is empty.
    """
    shapes = list(shapes)
    if not shapes:
        raise ValueError("shapes is empty: the bases are sized by at least one layer. Check target_modules.")
    largest = max(out for out, _ in shapes), max(inp for _, inp in shapes)
    return Dims(max(largest), min(largest))


def used_dims(shapes: Iterable[tuple[int, int]]) -> Dims:
    """Sizes of the block of the shared bases that the layers of the given (out, in) shapes use: each a prefix of it.

    Never more than `shared_dims`, and less where both an up and a down projection are adapted.

    >>> used_dims([(256, 128), (128, 256)]), shared_dims([(256, 128), (128, 256)])
    (Dims(max_dim=256, min_dim=128), Dims(max_dim=256, min_dim=256))
    """
    shapes = list(shapes)
    return Dims(max(map(max, shapes)), max(map(min, shapes)))


def factor_shapes(shape: tuple[int, int], r: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Shapes (r, n) of lambda and (n, min(out, in)) of gamma for one layer of shape (out, in)."""
    min_dim = min(shape)
    n = num_bases(min_dim, r)
    return (r, n), (n, min_dim)


def bases_shapes(dims: Dims, r: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Shapes (r, 1, min_dim) of A and (max_dim, n, r) of B, as PEFT stores them."""
    return (r, 1, dims.min_dim), (dims.max_dim, num_bases(dims.min_dim, r), r)


def count_trainable(shape: tuple[int, int], r: int) -> int:
    """Trainable numbers of one layer, n * (r + min(out, in)): a *smaller* r trains *more* (until r = min(out, in)).

    >>> [count_trainable((48, 64), r) for r in (4, 8, 16, 32)]
    [624, 336, 192, 160]
    """
    return sum(rows * columns for rows, columns in factor_shapes(shape, r))


def check_factor_shapes(
    bases_A: Sequence[int], bases_B: Sequence[int], lam: Sequence[int], gamma: Sequence[int]
) -> None:
    """Check that one layer's A (r, d), B (D, n, r), lambda (r, n) and gamma (n, d) go together.

    Sizes of 1 would broadcast without a word.

    Raises:
        ValueError: they do not.
    """
    (r, d), (_, n, columns) = bases_A, bases_B
    if columns != r or tuple(lam) != (r, n) or tuple(gamma) != (n, d):
        raise ValueError(
            f"bases A {tuple(bases_A)} and B {tuple(bases_B)} go with lambda {(r, n)} and gamma {(n, d)},"
            f" not {tuple(lam)} and {tuple(gamma)}. See layer_bases and interop.shapes.factor_shapes."
        )
