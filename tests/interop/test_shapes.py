import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from interop.shapes import Dims, bases_shapes, count_trainable, factor_shapes, num_bases, shared_dims

sides = st.integers(1, 5000)


@given(min_dim=sides, r=sides)
def test_the_number_of_bases_is_the_least_that_reaches_full_rank(min_dim, r):
    n = num_bases(min_dim, r)
    assert n * r >= min_dim > (n - 1) * r


@pytest.mark.parametrize(("r", "count"), [(3, 161), (7, 81), (20, 40), (21, 41), (64, 84)])
def test_trainable_counts_of_a_20_by_20_layer_are_those_of_peft(r, count):
    assert count_trainable((20, 20), r) == count


@given(out=sides, inp=sides, r=st.integers(1, 64))
def test_the_trainable_count_is_the_size_of_lambda_and_gamma_and_ignores_orientation(out, inp, r):
    lam, gamma = factor_shapes((out, inp), r)
    n = num_bases(min(out, inp), r)
    assert (lam, gamma) == ((r, n), (n, min(out, inp)))
    assert count_trainable((out, inp), r) == np.prod(lam) + np.prod(gamma) == count_trainable((inp, out), r)


@given(min_dim=st.integers(2, 64))
def test_a_smaller_r_never_trains_less_until_r_reaches_the_short_side(min_dim):
    counts = [count_trainable((min_dim, 2 * min_dim), r) for r in range(1, min_dim + 1) if min_dim % r == 0]
    assert counts == sorted(counts, reverse=True)


@pytest.mark.parametrize(
    ("shapes", "dims"),
    [
        ([(128, 64)], (128, 64)),
        ([(64, 128)], (128, 64)),
        ([(256, 128), (128, 256)], (256, 256)),  # PEFT takes the maximum of each axis before it sorts
        ([(64, 64), (32, 64), (172, 64), (64, 172)], (172, 172)),
        ([(8, 3), (5, 2)], (8, 3)),
        ([(8, 3), (2, 5)], (8, 5)),
    ],
)
def test_shared_dims_are_the_sorted_maxima_over_out_and_in(shapes, dims):
    assert shared_dims(shapes) == Dims(*dims)
    assert shared_dims(iter(shapes)) == Dims(*dims)


@given(shapes=st.lists(st.tuples(sides, sides), min_size=1, max_size=5))
def test_shared_dims_reach_every_layer_and_do_not_depend_on_order(shapes):
    max_dim, min_dim = shared_dims(shapes)
    assert max_dim >= max(map(max, shapes))
    assert min_dim >= max(map(min, shapes))
    assert shared_dims(reversed(shapes)) == (max_dim, min_dim)


def test_no_layers_have_no_shared_dims():
    with pytest.raises(ValueError, match=r"shapes is empty: .* at least one layer\. Check target_modules\."):
        shared_dims([])


@pytest.mark.parametrize(("r", "n"), [(1, 12), (5, 3), (12, 1), (20, 1)])
def test_bases_have_the_shapes_that_peft_stores(r, n):
    assert bases_shapes(Dims(33, 12), r) == ((r, 1, 12), (33, n, r))
