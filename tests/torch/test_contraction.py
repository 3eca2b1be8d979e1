"""`adapted_linear` and `folded_weight`: every plan against the definition in float64, in value and in all gradients."""

import itertools

import numpy as np
import oracle
import pytest
import torch
from stacks import CASES, SCALING, draw_layer, every_case, few_cases, without_type_checks
from tolerances import TOLERANCE

from interop import RandLoraConfig
from interop.bases import Bases
from interop.plans import Plan
from randlora_torch import adapted_linear, apply_delta, folded_weight, layer_bases, make_bases
from randlora_torch.bases import to_numpy, to_torch
from randlora_torch.contraction import plan_for
from randlora_torch.gradients import Operands
from randlora_torch.sparse import sparse_basis

WAYS = {
    "factored": {"plan": "factored"},
    "folded": {"plan": "folded"},
    "kept": {"plan": "folded", "keep_weight": True},
    "auto": {},
}
every_way = pytest.mark.parametrize("way", WAYS)
ROWS = 5


def operands_of(case, dtype="float64"):
    drawn = {name: to_torch(array) for name, array in draw_layer(case, 0, bases=dtype, factors=dtype).items()}
    return Operands(*layer_bases(Bases(drawn["A"], drawn["B"]), case.shape), drawn["lam"], drawn["gamma"])


@pytest.fixture
def parts():
    """Makes x, W, bias, the four operands, and an upstream gradient, for a case."""

    def make(case, dtype="float64"):
        generator = torch.Generator().manual_seed(1)
        out, inp = case.shape
        shapes = ((ROWS, inp), (out, inp), (out,), (ROWS, out))
        x, weight, bias, upstream = (torch.randn(s, generator=generator, dtype=torch.float64) for s in shapes)
        wanted = getattr(torch, dtype)
        return x.to(wanted), weight.to(wanted), bias.to(wanted), operands_of(case, dtype), upstream.to(wanted)

    return make


def expected(x, weight, bias, operands, upstream, shape):
    """The output and the gradients of x, W, bias, lambda and gamma, by the definition."""
    A, B, lam, gamma = (to_numpy(part).astype(np.float64) for part in operands)
    x, weight, bias, upstream = (
        None if part is None else part.double().numpy() for part in (x, weight, bias, upstream)
    )
    delta = oracle.delta_weight(A[:, None], B, lam, gamma, scaling=SCALING, shape=shape)
    effective = delta if weight is None else weight + delta
    grad_weight = upstream.T @ x
    factors = oracle.gradients(A[:, None], B, lam, gamma, scaling=SCALING, shape=shape, upstream=grad_weight)
    y = x @ effective.T + (0 if bias is None else bias)
    return y, [upstream @ effective, grad_weight, upstream.sum(0), *factors]


def computed(way, x, weight, bias, operands, upstream, out_features):
    leaves = [None if part is None else part.clone().requires_grad_() for part in (x, weight, bias, *operands[2:])]
    x, weight, bias, *factors = leaves
    given = (x, weight, bias, *operands[:2], *factors)
    y = adapted_linear(*given, out_features=out_features, scaling=SCALING, **WAYS[way])
    wanted = [leaf for leaf in leaves if leaf is not None]
    return y, torch.autograd.grad(y, wanted, upstream)


@every_case
@every_way
@pytest.mark.parametrize("frozen", ["W and bias", "W", "bias", "neither"])
def test_every_plan_computes_the_definition_and_all_its_gradients(case, way, frozen, parts):
    x, weight, bias, operands, upstream = parts(case)
    weight, bias = weight if "W" in frozen else None, bias if "bias" in frozen else None
    y, grads = computed(way, x, weight, bias, operands, upstream, case.shape[0])
    want, want_grads = expected(x, weight, bias, operands, upstream, case.shape)
    np.testing.assert_allclose(y.detach().numpy(), want, **TOLERANCE["float64"])
    given = [True, weight is not None, bias is not None, True, True]
    for got, exact in zip(grads, itertools.compress(want_grads, given), strict=True):
        np.testing.assert_allclose(got.numpy(), exact, **TOLERANCE["float64", "gradient"])


@few_cases
@every_way
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_plan_computes_in_every_dtype(case, way, dtype, parts):
    x, weight, bias, operands, upstream = parts(case, dtype)
    operands = Operands(*(part.float() for part in operands))  # factors train in float32
    y, grads = computed(way, x, weight, bias, operands, upstream, case.shape[0])
    want, want_grads = expected(x, weight, bias, operands, upstream, case.shape)
    assert y.dtype == getattr(torch, dtype)
    assert [grad.dtype for grad in grads] == [y.dtype] * 3 + [torch.float32] * 2
    bound = {"float32": 1e-5, "float16": 5e-3, "bfloat16": 4e-2}[dtype]
    for got, exact in zip((y, *grads), (want, *want_grads), strict=True):
        assert np.linalg.norm(got.detach().double().numpy() - exact) < bound * np.linalg.norm(exact)


@few_cases
def test_folded_gradients_pass_gradcheck_twice(case, parts):
    x, weight, bias, operands, _ = parts(case)
    leaves = [part.requires_grad_() for part in (x, weight, bias, *operands[2:])]

    def apply(x, weight, bias, lam, gamma):
        options = {"out_features": case.shape[0], "scaling": SCALING, "plan": "folded"}
        return adapted_linear(x, weight, bias, *operands[:2], lam, gamma, **options)

    assert torch.autograd.gradcheck(apply, leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(apply, leaves, fast_mode=True)


@few_cases
@every_way
def test_plans_work_under_vmap_and_jacrev(case, way, parts):
    x, weight, bias, operands, _ = parts(case)
    options = {"out_features": case.shape[0], "scaling": SCALING, **WAYS[way]}

    def apply(x, lam, gamma):
        return adapted_linear(x, weight, bias, *operands[:2], lam, gamma, **options)

    lams = torch.stack([operands.lam, 2 * operands.lam])
    got = torch.func.vmap(apply, in_dims=(None, 0, None))(x, lams, operands.gamma)
    torch.testing.assert_close(got[1], apply(x, 2 * operands.lam, operands.gamma), **TOLERANCE["float64"])
    got = torch.func.jacrev(apply, argnums=1)(x, operands.lam, operands.gamma)
    want = torch.autograd.functional.jacobian(lambda lam: apply(x, lam, operands.gamma), operands.lam)
    torch.testing.assert_close(got, want, **TOLERANCE["float64", "gradient"])


@few_cases
@every_way
def test_a_weight_stored_in_out_order_gives_the_same(case, way, parts):
    x, weight, *rest = parts(case)
    stored = weight.T.contiguous().T
    assert stored.stride() != weight.stride() or 1 in case.shape
    want, want_grads = computed(way, x, weight, *rest, case.shape[0])
    got, grads = computed(way, x, stored, *rest, case.shape[0])
    torch.testing.assert_close(got, want, **TOLERANCE["float64"])
    torch.testing.assert_close(grads, want_grads, **TOLERANCE["float64", "gradient"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("plan", ["factored", "folded"])
def test_autocast_meets_a_float32_weight_before_rounding(plan, dtype, parts):
    case = CASES["tall"]
    x, weight, bias, operands, _ = parts(case, "float32")
    small = Operands(operands.bases_A, operands.bases_B, operands.lam * 1e-3, operands.gamma)
    options = {"out_features": case.shape[0], "scaling": SCALING, "plan": plan}
    with torch.autocast("cpu", dtype):
        y = adapted_linear(x, weight, bias, *small, **options)
    assert y.dtype == dtype
    if plan == "folded":
        exact = folded_weight(weight, *small, out_features=case.shape[0], scaling=SCALING, dtype=torch.float32)
        # one rounding of the sum, of which the rounded dW is but a small part
        got = folded_weight(weight, *small, out_features=case.shape[0], scaling=SCALING, dtype=dtype)
        assert (got.float() - exact).abs().max() < 0.51 * torch.finfo(dtype).eps * exact.abs().max()
        assert (got != exact.to(dtype)).float().mean() < 0.05


def test_the_gradient_of_a_folded_weight_may_be_wider_than_the_weight():
    case = CASES["tall"]
    operands = Operands(*(part.float() for part in operands_of(case)))
    operands.lam.requires_grad_()
    folded = folded_weight(None, *operands, out_features=case.shape[0], scaling=SCALING, dtype=torch.bfloat16)
    assert folded.dtype == torch.bfloat16
    (grad,) = torch.autograd.grad(folded, operands.lam, torch.ones_like(folded))
    assert grad.dtype == torch.float32


def very_sparse_operands(shape, r=4):
    """Operands whose B is int8 codes with one number in 16 not zero, and the same B in float32."""
    config = RandLoraConfig(r=r, very_sparse=True)
    bases = make_bases(config, max_dim=max(shape), min_dim=min(shape))
    A, B = layer_bases(bases, shape)
    codes = torch.sign(B).to(torch.int8)
    generator = torch.Generator().manual_seed(0)
    lam, gamma = (torch.randn(s, generator=generator) for s in ((r, B.shape[1]), (B.shape[1], min(shape))))
    return Operands(A, codes, lam, gamma)


@pytest.mark.parametrize("shape", [(300, 256), (256, 300), (256, 256)])
@pytest.mark.parametrize("frozen", [True, False])
def test_sparse_products_give_what_dense_ones_give(shape, frozen, monkeypatch):
    operands = very_sparse_operands(shape)
    sparse = sparse_basis(operands.bases_B)
    assert sparse is not None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)) if frozen else None
    x = torch.randn(7, shape[1], generator=torch.Generator().manual_seed(3))
    found = []
    for basis in (None, sparse):
        leaves = [x.clone().requires_grad_(), *(part.clone().requires_grad_() for part in operands[2:])]
        options = {"out_features": shape[0], "scaling": 0.1, "plan": "folded", "sparse": basis}
        y = adapted_linear(leaves[0], weight, None, *operands[:2], *leaves[1:], **options)
        found.append((y.detach(), torch.autograd.grad(y.square().sum(), leaves)))
    (want, want_grads), (got, grads) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * want.abs().max().item())
    for a, b in zip(grads, want_grads, strict=True):
        assert (a - b).norm() < 1e-5 * b.norm()


def test_sparse_products_are_for_bases_of_few_numbers_only():
    assert sparse_basis(very_sparse_operands((256, 256)).bases_B) is not None
    dense = make_bases(RandLoraConfig(r=4), max_dim=64, min_dim=64).B
    third = torch.sign(make_bases(RandLoraConfig(r=4, sparse=True), max_dim=64, min_dim=64).B).to(torch.int8)
    assert sparse_basis(dense) is None
    assert sparse_basis(third) is None


def test_sparse_products_leave_second_derivatives_and_vmap_to_dense_ones():
    operands = very_sparse_operands((256, 256))
    sparse = sparse_basis(operands.bases_B)
    x = torch.randn(3, 256, requires_grad=True)
    options = {"out_features": 256, "scaling": 0.1, "plan": "folded", "sparse": sparse}

    def apply(lam):
        return adapted_linear(x, None, None, *operands[:2], lam, operands.gamma, **options)

    lam = operands.lam.clone().requires_grad_()
    (first,) = torch.autograd.grad(apply(lam).square().sum(), x, create_graph=True)
    assert torch.autograd.grad(first.square().sum(), lam)[0].abs().max() > 0
    torch.testing.assert_close(torch.func.vmap(apply)(lam[None])[0], apply(lam), rtol=1e-4, atol=1e-3)


def test_the_choice_follows_tokens_and_what_is_kept():
    operands = Operands(torch.empty(32, 1024), torch.empty(1024, 32, 32), torch.empty(32, 32), torch.empty(32, 1024))
    options = {"out_features": 1024, "plan": "auto", "dtype": torch.float32}

    def choose(tokens, **changes):
        x = torch.empty(2, tokens // 2, 1024, requires_grad=True)
        return plan_for(x, operands, **{**options, **changes})

    assert choose(256) == Plan(False, False)
    assert choose(4096) == Plan(True, True)
    assert choose(700) == Plan(True, False)
    assert choose(700, keep_weight=True) == Plan(True, True)
    assert choose(256, plan="folded") == Plan(True, True)
    assert choose(4096, plan="factored") == Plan(False, False)


def test_an_update_is_refused_if_shapes_or_the_plan_do_not_fit():
    case = CASES["tall"]
    operands, x = operands_of(case), torch.zeros(2, case.shape[1], dtype=torch.float64)
    options = {"scaling": 1.0}
    with pytest.raises(ValueError, match="plan='quick' is not known: choose one of"):
        apply_delta(x, *operands, out_features=case.shape[0], plan="quick", **options)
    with pytest.raises(ValueError, match=r"x has dtype torch.int64: pass floating point"), without_type_checks():
        adapted_linear(x.long(), None, None, *operands, out_features=case.shape[0], **options)
    with pytest.raises(ValueError, match=r"out_features=3: the bases are for \d+ or \d+"):
        folded_weight(None, *operands, out_features=3, dtype=torch.float64, **options)
