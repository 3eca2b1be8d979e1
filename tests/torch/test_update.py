"""The update in torch: the laws of both stacks, and what only torch has: saved tensors, torch.func, torch.compile."""

import numpy as np
import pytest
import torch
from stacks import CASES, SCALING, Stack, UpdateLaws, draw_layer, every_case, few_cases
from tolerances import TOLERANCE

from randlora_torch import UniqueBaseGrad, apply_delta, delta_weight, layer_bases
from randlora_torch.bases import to_numpy, to_torch


class TorchStack(Stack):
    cast, numpy = staticmethod(to_torch), staticmethod(to_numpy)
    delta_weight, apply_delta, layer_bases = map(staticmethod, (delta_weight, apply_delta, layer_bases))

    def gradients(self, function, *arguments):
        leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
        return torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)


class TestUpdate(UpdateLaws):
    stack = TorchStack()


def layer_of(case, seed=0, **dtypes):
    return TestUpdate().layer(draw_layer(case, seed, **dtypes), case)


def layer_in_float64(case, seed=0):
    """(x, A, B, lambda, gamma) with gradients asked of x, lambda and gamma."""
    A, B, lam, gamma = layer_of(case, seed, bases="float64", factors="float64")
    x = torch.randn(3, case.shape[1], dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return x.requires_grad_(), A, B, lam.requires_grad_(), gamma.requires_grad_()


def apply(x, arguments, case, plan="auto"):
    return apply_delta(x, *arguments, out_features=case.shape[0], scaling=SCALING, plan=plan)


def saved_for_backward(function):
    """The tensors that autograd keeps while `function` runs."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        output = function()
    assert output.requires_grad
    return kept


@every_case
def test_backward_keeps_its_arguments_and_nothing_derived_from_them(case):
    # Above all not the scaled bases (r*n, d), nor A or B in a wider dtype: everything kept lies in a given storage.
    A, B, lam, gamma = layer_of(case)
    lam.requires_grad_()
    gamma.requires_grad_()
    x = torch.randn(4, case.shape[1])
    given = {tensor.untyped_storage().data_ptr() for tensor in (x, A, B, lam, gamma)}
    for function in (
        lambda: delta_weight(A, B, lam, gamma, scaling=SCALING),
        lambda: apply(x, (A, B, lam, gamma), case),
        lambda: UniqueBaseGrad.apply(A[:, None], lam, gamma),
    ):
        kept = saved_for_backward(function)
        assert len(kept) >= 3
        assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= given


@few_cases
def test_scaling_the_bases_passes_gradcheck_twice(case):
    _, A, _, lam, gamma = layer_in_float64(case)
    assert torch.autograd.gradcheck(lambda *f: UniqueBaseGrad.apply(A[:, None], *f), (lam, gamma))
    assert torch.autograd.gradgradcheck(lambda *f: UniqueBaseGrad.apply(A[:, None], *f), (lam, gamma))


@few_cases
def test_the_update_passes_gradcheck_twice(case):
    x, A, B, lam, gamma = layer_in_float64(case)
    for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
        assert check(lambda *f: delta_weight(A, B, *f, scaling=SCALING), (lam, gamma), fast_mode=True)
        assert check(lambda x, *f: apply(x, (A, B, *f), case), (x, lam, gamma), fast_mode=True)


every_plan = pytest.mark.parametrize("plan", ["factored", "folded"])
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


@few_cases
@HALF
def test_products_run_in_the_dtype_of_x_after_lambda_and_gamma_were_applied_in_float32(case, dtype):
    A, B, lam, gamma = layer_of(case, bases="float32")
    x = torch.randn(4, case.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype)
    scaled_A = ((SCALING * lam)[:, :, None] * A[:, None] * gamma).flatten(end_dim=1).to(dtype)  # (r*n, d)
    B_flat = B.to(dtype).flatten(start_dim=1)  # (D, n*r)
    want = (x @ scaled_A.T) @ B_flat.T if case.shape[0] >= case.shape[1] else (x @ B_flat) @ scaled_A
    got = apply(x, (A, B, lam, gamma), case)
    assert got.dtype == dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@few_cases
@HALF
def test_autocast_converts_float32_inputs_and_leaves_float64_ones_alone(case, dtype):
    arguments = layer_of(case)
    x = torch.randn(4, case.shape[1], generator=torch.Generator().manual_seed(0))
    wide = apply(x.double(), arguments, case)
    with torch.autocast("cpu", dtype):
        got, untouched = apply(x, arguments, case), apply(x.double(), arguments, case)
        dense = delta_weight(*arguments, scaling=SCALING)
    torch.testing.assert_close(got, apply(x.to(dtype), arguments, case), rtol=0, atol=0)
    torch.testing.assert_close(untouched, wide, rtol=0, atol=0)
    torch.testing.assert_close(dense, delta_weight(*arguments, scaling=SCALING), rtol=0, atol=0)


@few_cases
@HALF
def test_under_autocast_gradients_come_in_the_dtypes_of_their_arguments(case, dtype):
    A, B, *trainable = layer_of(case)
    x = torch.randn(4, case.shape[1], generator=torch.Generator().manual_seed(0))
    leaves = [tensor.clone().requires_grad_() for tensor in (x, *trainable)]
    with torch.autocast("cpu", dtype):
        y = apply(leaves[0], (A, B, *leaves[1:]), case)
    grads = torch.autograd.grad(y.float().sum(), leaves)
    want = torch.autograd.grad(apply(leaves[0], (A, B, *leaves[1:]), case).sum(), leaves)
    for got, exact in zip(grads, want, strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, exact, **TOLERANCE[str(dtype).removeprefix("torch."), "gradient"])


@few_cases
def test_scaled_bases_are_the_written_out_product(case):
    A, _, lam, gamma = layer_of(case, bases="float32")
    want = lam.numpy()[:, :, None] * A.numpy()[:, None, :] * gamma.numpy()[None]
    np.testing.assert_allclose(UniqueBaseGrad.apply(A[:, None], lam, gamma), want, **TOLERANCE["float32"])


@few_cases
@every_plan
def test_x_without_gradient_leaves_those_of_the_factors_as_they_are(case, plan):
    x, A, B, lam, gamma = layer_in_float64(case)
    with_x = torch.autograd.grad(apply(x, (A, B, lam, gamma), case, plan).sum(), (x, lam, gamma))[1:]
    without = torch.autograd.grad(apply(x.detach(), (A, B, lam, gamma), case, plan).sum(), (lam, gamma))
    torch.testing.assert_close(without, with_x, rtol=0, atol=0)


@few_cases
def test_torch_func_grad_and_jacrev_agree_with_autograd(case):
    x, A, B, lam, gamma = layer_in_float64(case)

    def loss(x, lam, gamma):
        return (apply(x, (A, B, lam, gamma), case) ** 2).sum()

    want = torch.autograd.grad(loss(x, lam, gamma), (x, lam, gamma))
    got = torch.func.grad(loss, argnums=(0, 1, 2))(x, lam, gamma)
    torch.testing.assert_close(got, want, **TOLERANCE["float64", "gradient"])
    for of in (
        lambda lam: apply(x, (A, B, lam, gamma), case),
        lambda lam: UniqueBaseGrad.apply(A[:, None], lam, gamma),
    ):
        want = torch.autograd.functional.jacobian(of, lam)
        torch.testing.assert_close(torch.func.jacrev(of)(lam), want, **TOLERANCE["float64", "gradient"])


@few_cases
def test_vmap_over_adapters_is_a_loop_over_adapters(case):
    layers = [layer_in_float64(case, seed) for seed in range(3)]
    A, B = layers[0][1:3]
    x, lam, gamma = (torch.stack([layer[i].detach() for layer in layers]) for i in (0, 3, 4))

    def step(x, lam, gamma):
        return torch.func.grad(lambda *a: (apply(a[0], (A, B, *a[1:]), case) ** 2).sum(), argnums=(0, 1, 2))(
            x, lam, gamma
        )

    functions = {
        "apply_delta": lambda x, lam, gamma: apply(x, (A, B, lam, gamma), case),
        "delta_weight": lambda x, lam, gamma: delta_weight(A, B, lam, gamma, scaling=SCALING),
        "UniqueBaseGrad": lambda x, lam, gamma: UniqueBaseGrad.apply(A[:, None], lam, gamma),
        "gradients": step,
    }
    for name, function in functions.items():
        got = torch.func.vmap(function)(x, lam, gamma)
        looped = [function(*each) for each in zip(x, lam, gamma, strict=True)]
        want = tuple(map(torch.stack, zip(*looped, strict=True))) if name == "gradients" else torch.stack(looped)
        torch.testing.assert_close(
            got, want, **TOLERANCE["float64", "gradient"], msg=lambda m, name=name: f"{name}: {m}"
        )


def test_per_example_gradients_sum_to_the_gradient_of_the_batch():
    case = CASES["tall"]
    x, A, B, lam, gamma = layer_in_float64(case)

    def loss(lam, row):
        return (apply(row, (A, B, lam, gamma), case) ** 2).sum()

    each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(lam, x)
    want = torch.func.grad(loss)(lam, x)
    torch.testing.assert_close(each.sum(0), want, **TOLERANCE["float64", "gradient"])
