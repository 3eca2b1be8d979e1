"""The oracle itself: by hand on a layer of two bases, and its gradients against central differences."""

import numpy as np
import oracle
import pytest
from strategies import SHAPES, draw_factors
from tolerances import TOLERANCE


def test_the_oracle_pairs_flat_indices_as_peft_does():
    # r=2, n=2 on a (3, 3) layer: scaled A is flattened as k*n + b, B as b*r + k.
    A, B = np.zeros((2, 1, 3)), np.zeros((3, 2, 2))
    A[:, 0] = [[1, 2, 3], [10, 20, 30]]
    B[0], B[1], B[2] = [[1, 0], [0, 0]], [[0, 1], [0, 0]], [[0, 0], [1, 0]]  # out row i reads column i of B
    lam, gamma = np.array([[1, 2], [3, 4]]), np.array([[1, 1, 1], [1, 0, 0.5]])
    rows = [  # (k, b) = (0, 0), (0, 1), (1, 0)
        1 * gamma[0] * A[0, 0],
        2 * gamma[1] * A[0, 0],
        3 * gamma[0] * A[1, 0],
    ]
    got = oracle.delta_weight(A, B, lam, gamma, scaling=0.5, shape=(3, 3))
    np.testing.assert_array_equal(got, 0.5 * np.array(rows))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_oracle_reads_a_prefix_of_larger_bases(shape):
    large = draw_factors(0, shape=shape, r=2, spare=3)
    long, n, short = max(shape), large["lam"].shape[1], min(shape)
    small = {**large, "A": large["A"][..., :short], "B": large["B"][:long, :n]}
    want = oracle.delta_weight(**small, scaling=1.5, shape=shape)
    assert want.shape == shape
    np.testing.assert_array_equal(oracle.delta_weight(**large, scaling=1.5, shape=shape), want)
    if shape[0] != shape[1]:
        np.testing.assert_array_equal(oracle.delta_weight(**large, scaling=1.5, shape=shape[::-1]), want.T)


@pytest.mark.parametrize("shape", SHAPES)
def test_generic_factors_give_full_rank(shape):
    for r in (1, 2, 3, 8):
        delta = oracle.delta_weight(**draw_factors(3, shape=shape, r=r), scaling=1.0, shape=shape)
        assert np.linalg.matrix_rank(delta) == min(shape)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)])
@pytest.mark.parametrize("r", [1, 2, 3])
def test_oracle_gradients_are_central_differences(rng, shape, r):
    factors = draw_factors(1, shape=shape, r=r, spare=1, dtype=np.float64)
    upstream = rng.standard_normal(shape)
    got = oracle.gradients(**factors, scaling=1.7, shape=shape, upstream=upstream)
    for name, gradient in zip(("lam", "gamma"), got, strict=True):
        differences = np.zeros_like(factors[name])
        for index in np.ndindex(differences.shape):
            for sign in (1, -1):
                moved = {**factors, name: factors[name].copy()}
                moved[name][index] += sign * 1e-6
                delta = oracle.delta_weight(**moved, scaling=1.7, shape=shape)
                differences[index] += sign * (delta * upstream).sum() / 2e-6
        np.testing.assert_allclose(gradient, differences, **TOLERANCE["float64", "finite_difference"])
