"""The laws of the update, written once and run over both stacks: one table of cases crossed with every law.

Imports neither jax nor torch. `tests/jax/test_update.py` and `tests/torch/test_update.py` subclass `UpdateLaws` with a
`stack`, which says how arrays are cast and differentiated there; a new kind of layer is one line in `CASES`.
"""

import abc
import contextlib
from typing import NamedTuple

import jaxtyping
import ml_dtypes
import numpy as np
import oracle
import pytest
from strategies import draw_factors
from tolerances import TOLERANCE

from interop import Bases


class Case(NamedTuple):
    shape: tuple[int, int]  # (out, in)
    r: int


CASES = {
    "square": Case((8, 8), 4),
    "wide": Case((6, 10), 2),
    "tall": Case((10, 6), 2),
    "r does not divide, wide": Case((7, 12), 3),
    "r does not divide, tall": Case((12, 7), 3),
    "r above the short side": Case((6, 10), 8),
    "r of one": Case((4, 5), 1),
    "one output": Case((1, 5), 1),
    "one input": Case((5, 1), 2),
}
SCALING = 1.5
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}
STORED = {  # dtypes of (bases, factors)
    "float32": ("float32", "float32"),
    "bf16 bases": ("bfloat16", "float32"),
    "fp16 bases": ("float16", "float32"),
    "bf16 all": ("bfloat16", "bfloat16"),
    "fp16 all": ("float16", "float16"),
    "bf16 factors": ("float32", "bfloat16"),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
_FEW = ("wide", "tall", "r does not divide, wide")  # where the law is about dtypes or steps, not about shapes
few_cases = pytest.mark.parametrize("case", [CASES[name] for name in _FEW], ids=_FEW)


def draw_layer(case, seed=0, *, bases="bfloat16", factors="float32", spare=2):
    """Factors of a layer, and bases larger than it needs; the keys are the arguments of `oracle.delta_weight`."""
    drawn = draw_factors(seed, shape=case.shape, r=case.r, spare=spare, dtype=np.float64)
    kinds = {"A": bases, "B": bases, "lam": factors, "gamma": factors}
    return {name: array.astype(DTYPES.get(kinds[name], kinds[name])) for name, array in drawn.items()}


def formula(A, B, lam, gamma, scaling):
    """The update (long, short) written out, for any array library that can differentiate it."""
    scaled_A = lam[:, :, None] * A[:, None, :] * gamma[None]
    return scaling * (B.reshape(B.shape[0], -1) @ scaled_A.reshape(-1, A.shape[-1]))


@contextlib.contextmanager
def without_type_checks():
    """Without the suite's own type checks: a wrong type gets to the package's message, and dynamo sees plain code."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)


class Stack(abc.ABC):
    """What the laws need to know about a stack."""

    @abc.abstractmethod
    def cast(self, array):
        """A numpy array as an array of this stack, same dtype."""

    @abc.abstractmethod
    def numpy(self, array):
        """The way back."""

    @abc.abstractmethod
    def gradients(self, function, *arguments):
        """Gradients of `function(*arguments).sum()`; None for an argument that gets none."""

    def wide(self):
        """A context in which float64 exists."""
        return contextlib.nullcontext()

    delta_weight = apply_delta = layer_bases = None  # the functions of the package, as static methods


class UpdateLaws(abc.ABC):
    """delta_weight and apply_delta against the oracle, against each other and against differentiation."""

    stack: Stack

    def layer(self, drawn, case):
        """The arguments of `stack.delta_weight`: the layer's part of the bases, lambda and gamma."""
        cast = {name: self.stack.cast(array) for name, array in drawn.items()}
        bases = self.stack.layer_bases(Bases(cast["A"], cast["B"]), case.shape)
        return (*bases, cast["lam"], cast["gamma"])

    def delta(self, arguments, case):
        delta = self.stack.delta_weight(*arguments, scaling=SCALING)
        return delta if case.shape[0] >= case.shape[1] else delta.T

    def apply(self, x, arguments, case):
        return self.stack.apply_delta(x, *arguments, out_features=case.shape[0], scaling=SCALING)

    @every_case
    def test_delta_weight_is_the_sum_over_bases(self, case):
        drawn = draw_layer(case)
        got = self.stack.numpy(self.delta(self.layer(drawn, case), case))
        want = oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape)
        np.testing.assert_allclose(got, want, **TOLERANCE["float32"])

    @few_cases
    @pytest.mark.parametrize("stored", STORED)
    def test_delta_weight_is_computed_in_float32_whatever_is_stored(self, case, stored):
        bases, factors = STORED[stored]
        drawn = draw_layer(case, bases=bases, factors=factors)
        got = self.stack.numpy(self.delta(self.layer(drawn, case), case))
        assert got.dtype == np.float32
        want = oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape)
        np.testing.assert_allclose(got, want, **TOLERANCE["float32"])

    @every_case
    def test_apply_delta_is_x_times_the_transposed_update(self, case, rng):
        drawn = draw_layer(case, 1)
        x = rng.standard_normal((2, 3, case.shape[1]), np.float32)
        arguments = self.layer(drawn, case)
        got = self.stack.numpy(self.apply(self.stack.cast(x), arguments, case))
        want = x @ oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape).T
        np.testing.assert_allclose(got, want, **TOLERANCE["float32", "forward"])
        dense = x @ self.stack.numpy(self.delta(arguments, case)).T
        np.testing.assert_allclose(got, dense, **TOLERANCE["float32", "forward"])

    @few_cases
    def test_apply_delta_takes_any_number_of_batch_axes(self, case, rng):
        arguments = self.layer(draw_layer(case, 1), case)
        x = rng.standard_normal((2, 3, case.shape[1]), np.float32)
        want = self.stack.numpy(self.apply(self.stack.cast(x), arguments, case))
        vector = self.stack.numpy(self.apply(self.stack.cast(x[0, 1]), arguments, case))
        np.testing.assert_allclose(vector, want[0, 1], **TOLERANCE["float32", "forward"])
        empty = self.stack.numpy(self.apply(self.stack.cast(x[:0]), arguments, case))
        assert empty.shape == (0, 3, case.shape[0])

    @few_cases
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_apply_delta_keeps_the_dtype_of_x_and_rounds_no_more_than_its_products_to_it(self, case, dtype, rng):
        drawn = draw_layer(case, 2, factors=dtype)
        x = rng.standard_normal((4, case.shape[1])).astype(DTYPES[dtype])
        got = self.stack.numpy(self.apply(self.stack.cast(x), self.layer(drawn, case), case))
        assert got.dtype == DTYPES[dtype]
        want = x.astype(np.float64) @ oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape).T
        np.testing.assert_allclose(got.astype(np.float64), want, **TOLERANCE[dtype, "forward"])

    @few_cases
    def test_in_float64_the_update_is_exact(self, case, rng):
        drawn = draw_layer(case, 3, bases="float64", factors="float64")
        x = rng.standard_normal((3, case.shape[1]))
        want = oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape)
        with self.stack.wide():
            arguments = self.layer(drawn, case)
            delta = self.stack.numpy(self.delta(arguments, case))
            y = self.stack.numpy(self.apply(self.stack.cast(x), arguments, case))
        assert delta.dtype == y.dtype == np.float64
        np.testing.assert_allclose(delta, want, **TOLERANCE["float64"])
        np.testing.assert_allclose(y, x @ want.T, **TOLERANCE["float64", "forward"])

    @every_case
    def test_generic_factors_give_an_update_of_full_rank(self, case):
        delta = self.stack.numpy(self.delta(self.layer(draw_layer(case, 4), case), case))
        assert np.linalg.matrix_rank(delta) == min(case.shape)

    @every_case
    def test_lambda_of_zero_gives_no_update_at_all(self, case, rng):
        drawn = draw_layer(case, 5)
        arguments = self.layer({**drawn, "lam": np.zeros_like(drawn["lam"])}, case)
        x = self.stack.cast(rng.standard_normal((2, 3, case.shape[1]), np.float32))
        np.testing.assert_array_equal(self.stack.numpy(self.delta(arguments, case)), np.zeros(case.shape))
        np.testing.assert_array_equal(self.stack.numpy(self.apply(x, arguments, case)), np.zeros((2, 3, case.shape[0])))

    @few_cases
    @pytest.mark.parametrize("stored", STORED)
    def test_gradients_of_the_update_are_those_of_the_oracle_in_the_dtype_of_the_factors(self, case, stored, rng):
        bases, factors = STORED[stored]
        drawn = draw_layer(case, 6, bases=bases, factors=factors)
        upstream = rng.standard_normal(case.shape, np.float32)
        A, B, *trainable = self.layer(drawn, case)
        weight = self.stack.cast(upstream)
        grads = self.stack.gradients(lambda *t: weight * self.delta((A, B, *t), case), *trainable)
        want = oracle.gradients(**drawn, scaling=SCALING, shape=case.shape, upstream=upstream)
        for got, expected in zip(map(self.stack.numpy, grads), want, strict=True):
            assert got.dtype == DTYPES[factors]
            np.testing.assert_allclose(got.astype(np.float64), expected, **TOLERANCE[factors, "gradient"])

    @every_case
    def test_gradients_of_apply_delta_are_those_of_the_oracle(self, case, rng):
        drawn = draw_layer(case, 7)
        x = rng.standard_normal((2, 3, case.shape[1]), np.float32)
        upstream = rng.standard_normal((2, 3, case.shape[0]), np.float32)
        A, B, *trainable = self.layer(drawn, case)
        weight = self.stack.cast(upstream)
        grads = self.stack.gradients(
            lambda x, *t: weight * self.apply(x, (A, B, *t), case), self.stack.cast(x), *trainable
        )
        # y = x dW^T: the gradient of dW is the sum over rows of upstream^T x.
        rows = upstream.reshape(-1, case.shape[0]).T.astype(np.float64) @ x.reshape(-1, case.shape[1])
        want_x = upstream @ oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape)
        want = (want_x, *oracle.gradients(**drawn, scaling=SCALING, shape=case.shape, upstream=rows))
        for got, expected in zip(map(self.stack.numpy, grads), want, strict=True):
            np.testing.assert_allclose(got, expected, **TOLERANCE["float32", "gradient"])

    @few_cases
    @pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
    def test_gradients_of_apply_delta_come_in_the_dtypes_of_their_arguments(self, case, dtype, rng):
        drawn = draw_layer(case, 8)
        x = rng.standard_normal((4, case.shape[1])).astype(DTYPES[dtype])
        A, B, *trainable = self.layer(drawn, case)
        grads = self.stack.gradients(lambda x, *t: self.apply(x, (A, B, *t), case), self.stack.cast(x), *trainable)
        grad_x, *grad_factors = map(self.stack.numpy, grads)
        rows = np.ones((case.shape[0], 4)) @ x.astype(np.float64)
        want_x = np.ones((4, case.shape[0])) @ oracle.delta_weight(**drawn, scaling=SCALING, shape=case.shape)
        want = oracle.gradients(**drawn, scaling=SCALING, shape=case.shape, upstream=rows)
        assert grad_x.dtype == DTYPES[dtype]
        np.testing.assert_allclose(grad_x.astype(np.float64), want_x, **TOLERANCE[dtype, "gradient"])
        for got, expected in zip(grad_factors, want, strict=True):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, expected, **TOLERANCE[dtype, "gradient"])

    @few_cases
    def test_the_hand_written_gradients_are_those_of_differentiating_the_formula(self, case, rng):
        drawn = draw_layer(case, 9, bases="float64", factors="float64")
        short_input = case.shape[0] >= case.shape[1]
        with self.stack.wide():
            x = self.stack.cast(rng.standard_normal((3, case.shape[1])))
            A, B, *trainable = self.layer(drawn, case)

            def written_out(x, lam, gamma):
                delta = formula(A, B, lam, gamma, SCALING)  # (long, short)
                return (x @ (delta.T if short_input else delta)) ** 2

            got = self.stack.gradients(lambda x, *t: self.apply(x, (A, B, *t), case) ** 2, x, *trainable)
            want = self.stack.gradients(written_out, x, *trainable)
            dense = self.stack.gradients(lambda *t: self.delta((A, B, *t), case) ** 2, *trainable)
            want_dense = self.stack.gradients(lambda *t: formula(A, B, *t, SCALING) ** 2, *trainable)
            pairs = [
                (self.stack.numpy(a), self.stack.numpy(b)) for a, b in zip(got + dense, want + want_dense, strict=True)
            ]
        for hand_written, automatic in pairs:
            np.testing.assert_allclose(hand_written, automatic, **TOLERANCE["float64", "gradient"])

    @few_cases
    def test_the_hand_written_gradients_are_central_differences(self, case, rng):
        drawn = draw_layer(case, 10, bases="float64", factors="float64")
        with self.stack.wide():
            x = rng.standard_normal((2, case.shape[1]))
            A, B, *trainable = self.layer(drawn, case)
            arguments = [x, drawn["lam"], drawn["gamma"]]
            grads = self.stack.gradients(lambda x, *t: self.apply(x, (A, B, *t), case), self.stack.cast(x), *trainable)
            for position, grad in enumerate(grads):
                direction = rng.standard_normal(arguments[position].shape)
                sums = []
                for step in (1e-6, -1e-6):
                    moved = [a + (step * direction if i == position else 0) for i, a in enumerate(arguments)]
                    moved_x, *moved_factors = map(self.stack.cast, moved)
                    sums.append(self.stack.numpy(self.apply(moved_x, (A, B, *moved_factors), case)).sum())
                slope = (sums[0] - sums[1]) / 2e-6
                along = (self.stack.numpy(grad) * direction).sum()
                np.testing.assert_allclose(along, slope, **TOLERANCE["float64", "finite_difference"])

    @few_cases
    def test_the_bases_get_no_gradient(self, case, rng):
        arguments = self.layer(draw_layer(case, 11), case)
        x = self.stack.cast(rng.standard_normal((2, case.shape[1]), np.float32))
        for grads in (
            self.stack.gradients(lambda *a: self.delta(a, case), *arguments),
            self.stack.gradients(lambda *a: self.apply(x, a, case), *arguments),
        ):
            for base, grad in zip(arguments[:2], grads[:2], strict=True):
                if grad is not None:
                    np.testing.assert_array_equal(self.stack.numpy(grad), np.zeros(base.shape))
            for grad in grads[2:]:
                assert np.any(self.stack.numpy(grad) != 0)

    @pytest.mark.parametrize(("inputs", "outputs"), [(10, 5), (6, 6), (11, 6), (7, 10), (1, 10)])
    def test_apply_delta_refuses_a_layer_that_the_bases_were_not_sliced_for(self, inputs, outputs):
        case = CASES["wide"]
        arguments = self.layer(draw_layer(case), case)
        message = (
            rf"a layer of shape \({outputs}, {inputs}\) does not fit bases for a 10 x 6 layer: slice them with"
            r" layer_bases\(bases, \(out, in\)\)\."
        )
        with pytest.raises(ValueError, match=message):
            self.stack.apply_delta(
                self.stack.cast(np.ones((2, inputs), np.float32)), *arguments, out_features=outputs, scaling=SCALING
            )

    @every_case
    def test_layer_bases_is_the_prefix_that_the_layer_needs(self, case):
        drawn = draw_layer(case, 12)
        bases = self.stack.layer_bases(Bases(*map(self.stack.cast, (drawn["A"], drawn["B"]))), case.shape)
        n = -(-min(case.shape) // case.r)
        np.testing.assert_array_equal(self.stack.numpy(bases.A), drawn["A"][:, 0, : min(case.shape)])
        np.testing.assert_array_equal(self.stack.numpy(bases.B), drawn["B"][: max(case.shape), :n])
        assert bases.B.shape == (max(case.shape), n, case.r)
