"""One adapted layer: its forward pass, its several adapters, merging and unmerging."""

import copy

import numpy as np
import oracle
import pytest
import torch
from stacks import CASES, Case, every_case, few_cases
from tolerances import TOLERANCE
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora_torch
from interop import Factors, RandLoraConfig
from randlora_torch import BufferDict, Linear, Rounding, make_bases
from randlora_torch.bases import to_numpy
from tests.torch.conftest import assert_same, delta_by_oracle

ADAPTERS = {  # name: (r, seed, other config fields); they differ in all that adapters on one layer may differ in
    "a": (3, 0, {}),
    "b": (2, 5, {"sparse": True}),
    "c": (8, -1, {"very_sparse": True}),
}


def base_layer(shape, *, conv=False, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    layer = Conv1D(*shape) if conv else nn.Linear(shape[1], shape[0], bias=bias)
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator)
    return layer.to(dtype).requires_grad_(False)


def randomize(layer, name, seed=0):
    """Random lambda and gamma, as after training; values such that updates are of order 1."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in layer.factors(name):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 2)


def adapted(base, *names, alpha=4, dropout=0.0, package=randlora_torch):
    """`base` with the adapters of these names, all active, with random factors and bases larger than needed."""
    bases_A, bases_B = package.BufferDict(), package.BufferDict()
    layer = None
    for seed, name in enumerate(names or ("a",)):
        r, key, fields = ADAPTERS[name]
        config = RandLoraConfig(r=r, projection_prng_key=key, **fields)
        bases_A[name], bases_B[name] = make_bases(config, max_dim=16, min_dim=14)
        if layer is None:
            layer = package.Linear(base, name, bases_A, bases_B, r, alpha, dropout)
        else:
            layer.update_layer(name, r, alpha, dropout)
        randomize(layer, name, seed)
    layer.active_adapters = list(names or ("a",))
    return layer


def inputs(layer, *batch, seed=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(batch or (4,)), layer.in_features, generator=generator).to(dtype)


@every_case
@pytest.mark.parametrize("kind", ["Linear", "Linear without bias", "Conv1D"])
def test_forward_is_the_base_output_plus_x_times_the_transposed_update(case, kind):
    base = base_layer(case.shape, conv=kind == "Conv1D", bias=kind == "Linear")
    layer = adapted(base)
    assert (layer.out_features, layer.in_features) == case.shape
    x = inputs(layer, 2, 3)
    want = base(x).numpy() + x.numpy() @ delta_by_oracle(layer, "a").T
    np.testing.assert_allclose(layer(x).detach().numpy(), want, **TOLERANCE["float32", "forward"])


@every_case
def test_the_update_of_a_layer_is_that_of_the_oracle(case):
    layer = adapted(base_layer(case.shape))
    got = layer.get_delta_weight("a")
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.detach().numpy(), delta_by_oracle(layer, "a"), **TOLERANCE["float32"])


@every_case
@pytest.mark.parametrize("name", ADAPTERS)
def test_the_product_of_the_scaled_bases_is_the_update_before_scaling(case, name):
    layer = adapted(base_layer(case.shape), name)
    scaled = layer.get_scaled_bases(name)
    product = scaled.B @ scaled.A  # (long, short)
    product = product if case.shape[0] >= case.shape[1] else product.T
    want = layer.get_delta_weight(name) / layer.scaling[name]
    torch.testing.assert_close(product, want, **TOLERANCE["float32"])


@few_cases
def test_gradients_reach_lambda_gamma_and_x_but_neither_base_weight_nor_bases(case):
    layer = adapted(base_layer(case.shape))
    x = inputs(layer).requires_grad_()
    layer(x).sum().backward()
    lam, gamma = layer.factors("a")
    A, B = layer.randlora_A["a"], layer.randlora_B["a"]
    rows = np.ones((case.shape[0], 4)) @ x.detach().numpy()
    want = oracle.gradients(
        *map(to_numpy, (A, B, lam, gamma)), scaling=layer.scaling["a"], shape=case.shape, upstream=rows
    )
    for parameter, expected in zip((lam, gamma), want, strict=True):
        np.testing.assert_allclose(parameter.grad.numpy(), expected, **TOLERANCE["float32", "gradient"])
    want_x = np.ones((4, case.shape[0])) @ (layer.base_layer.weight.numpy() + delta_by_oracle(layer, "a"))
    np.testing.assert_allclose(x.grad.numpy(), want_x, **TOLERANCE["float32", "gradient"])
    assert layer.base_layer.weight.grad is None
    assert A.grad is None
    assert B.grad is None


@pytest.mark.parametrize("r", [1, 3, 20])
def test_a_new_adapter_has_pefts_starting_values_and_changes_no_bit(r):
    base = base_layer((12, 7))
    bases = make_bases(RandLoraConfig(r=r), max_dim=12, min_dim=7)
    layer = Linear(base, "x", BufferDict({"x": bases.A}), BufferDict({"x": bases.B}), r)
    lam, gamma = layer.factors("x")
    n = -(-7 // r)
    torch.testing.assert_close(lam.data, torch.zeros(r, n), rtol=0, atol=0)
    torch.testing.assert_close(gamma.data, torch.full((n, 7), 1 / max(n, 7)), rtol=0, atol=0)
    x = inputs(layer)
    torch.testing.assert_close(layer(x), base(x), rtol=0, atol=0)


def test_init_weights_false_starts_at_normal_lambda_and_gamma_one_over_the_long_side():
    bases = make_bases(RandLoraConfig(r=8), max_dim=160, min_dim=128)
    torch.manual_seed(0)
    layer = Linear(
        base_layer((160, 128)), "x", BufferDict({"x": bases.A}), BufferDict({"x": bases.B}), 8, init_weights=False
    )
    lam, gamma = layer.factors("x")
    torch.testing.assert_close(gamma.data, torch.full((16, 128), 1 / 160), rtol=0, atol=0)
    np.testing.assert_allclose([lam.mean().item(), lam.std().item()], [0, 1], atol=0.3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_base_output(dtype):
    layer = adapted(base_layer((12, 7), dtype=dtype))
    x = inputs(layer, dtype=dtype)
    got = layer(x)
    assert got.dtype == layer.base_layer(x).dtype == dtype
    exact = x.double().numpy() @ (layer.base_layer.weight.double().numpy() + delta_by_oracle(layer, "a")).T
    exact += layer.base_layer.bias.double().numpy()
    name = str(dtype).removeprefix("torch.")
    np.testing.assert_allclose(got.double().detach().numpy(), exact, **TOLERANCE[name, "forward"])
    got.sum().backward()
    assert layer.factors("a").lam.grad.dtype == torch.float32


def test_under_autocast_the_output_has_the_dtype_of_the_base_output():
    layer = adapted(base_layer((12, 7)))
    x = inputs(layer)
    want = layer(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
        assert got.dtype == layer.base_layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, **TOLERANCE["bfloat16", "forward"])
    got.sum().backward()
    assert torch.isfinite(layer.factors("a").lam.grad).all()
    assert layer.factors("a").lam.grad.dtype == torch.float32


def test_dropout_thins_the_input_of_the_update_while_training_only():
    layer = adapted(base_layer((12, 7)), dropout=0.5)
    x = inputs(layer, 2000)
    want = layer.base_layer(x) + x @ layer.get_delta_weight("a").T
    layer.eval()
    torch.testing.assert_close(layer(x), want, **TOLERANCE["float32", "forward"])
    layer.train()
    torch.manual_seed(0)
    got = layer(x)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    assert (got != want).any(dim=1).float().mean() > 0.9
    torch.manual_seed(0)
    mask = nn.functional.dropout(torch.ones_like(x), 0.5)
    thinned = layer.base_layer(x) + (mask * x) @ layer.get_delta_weight("a").T
    torch.testing.assert_close(got, thinned, **TOLERANCE["float32", "forward"])


@few_cases
def test_adapters_of_different_rank_seed_and_sparsity_add_up(case):
    # PEFT shares one n and one pair of bases between all adapters of a layer and cannot do this.
    layer = adapted(base_layer(case.shape), *ADAPTERS)
    x = inputs(layer)
    want = layer.base_layer(x).numpy() + sum(x.numpy() @ delta_by_oracle(layer, name).T for name in ADAPTERS)
    np.testing.assert_allclose(layer(x).detach().numpy(), want, **TOLERANCE["float32", "forward"])


@few_cases
@pytest.mark.parametrize("first", ADAPTERS)
def test_an_adapter_is_not_disturbed_by_those_added_later(case, first):
    alone = adapted(base_layer(case.shape), first)
    x = inputs(alone)
    together = adapted(base_layer(case.shape), first, *(name for name in ADAPTERS if name != first))
    together.active_adapters = [first]
    torch.testing.assert_close(together(x), alone(x), rtol=0, atol=0)
    assert together.r[first] == alone.r[first]


def test_active_adapters_that_are_not_on_the_layer_and_disabled_ones_do_nothing():
    layer = adapted(base_layer((12, 7)))
    x = inputs(layer)
    layer.active_adapters = ["elsewhere"]
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    layer.active_adapters, layer.disable_adapters = ["a"], True
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)


@every_case
@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
def test_a_merged_layer_computes_the_same_and_unmerging_restores_it(case, conv):
    layer = adapted(base_layer(case.shape, conv=conv))
    original, x = layer.base_layer.weight.clone(), inputs(layer)
    want = layer(x)
    layer.merge()
    assert layer.merged
    merged = original + (layer.get_delta_weight("a").T if conv else layer.get_delta_weight("a"))
    torch.testing.assert_close(layer.base_layer.weight.data, merged.detach(), **TOLERANCE["float32", "merge"])
    torch.testing.assert_close(layer(x), want, **TOLERANCE["float32", "forward"])
    torch.testing.assert_close(layer(x), layer.base_layer(x), rtol=0, atol=0)
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight.data, original, **TOLERANCE["float32", "merge"])
    torch.testing.assert_close(layer(x), want, **TOLERANCE["float32", "forward"])


every_dtype = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])


def eps_of(dtype):
    return torch.finfo(dtype).eps


@every_dtype
@pytest.mark.parametrize("conv", [False, True], ids=["Linear", "Conv1D"])
def test_with_the_base_kept_unmerging_restores_the_very_weight(dtype, conv):
    layer = adapted(base_layer((12, 7), dtype=dtype, conv=conv))
    weight, original = layer.base_layer.weight, layer.base_layer.weight.clone()
    rounding = layer.merge()
    delta = layer.get_delta_weight("a").double()
    exact = original.double() + (delta.T if conv else delta)
    merged = layer.base_layer.weight
    assert merged is not weight
    assert (merged.dtype, merged.requires_grad, merged.is_contiguous()) == (dtype, False, True)
    torch.testing.assert_close(merged.double(), exact, rtol=0.51 * eps_of(dtype), atol=1e-6)
    error = (merged.double() - exact).norm()
    want = ((error / exact.norm()).item(), (error / delta.norm()).item())
    torch.testing.assert_close(tuple(rounding), want, rtol=1e-3, atol=1e-7)
    assert_same(weight.data, original)
    assert layer.unmerge() == Rounding(0.0, 0.0)
    assert layer.base_layer.weight is weight
    assert_same(weight.data, original)
    assert layer.unmerge() == Rounding(0.0, 0.0)


@every_dtype
def test_without_the_base_kept_a_merge_is_in_place_and_unmerging_exact_up_to_two_roundings(dtype):
    layer = adapted(base_layer((12, 7), dtype=dtype))
    weight = layer.base_layer.weight
    original, data = weight.clone(), weight.data_ptr()
    layer.merge(keep_base=False)
    assert layer.base_layer.weight is weight
    merged = weight.clone()
    exact = original.double() + layer.get_delta_weight("a").double()
    torch.testing.assert_close(merged.double(), exact, rtol=0.51 * eps_of(dtype), atol=1e-6)
    layer.unmerge()
    assert layer.base_layer.weight is weight
    assert (weight.dtype, weight.data_ptr()) == (dtype, data)
    largest = max(merged.abs().max().item(), original.abs().max().item())
    torch.testing.assert_close(weight.double(), original.double(), rtol=0, atol=1.01 * eps_of(dtype) * largest)


@pytest.mark.parametrize("keep_base", [[True, False], [False, True], [True, True], [False, False]], ids=str)
def test_unmerging_after_several_merges_is_exact_if_the_first_of_them_kept_the_base(keep_base):
    layer = adapted(base_layer((12, 7), dtype=torch.bfloat16), "a", "b")
    original, x = layer.base_layer.weight.clone(), inputs(layer, dtype=torch.bfloat16)
    want = layer(x)
    for name, keep in zip("ab", keep_base, strict=True):
        layer.merge(adapter_names=[name], keep_base=keep)
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, original) == keep_base[0]
    torch.testing.assert_close(layer(x), want, **TOLERANCE["bfloat16", "forward"])


def test_several_adapters_merge_together_or_one_by_one():
    layer = adapted(base_layer((12, 7)), *ADAPTERS)
    original, x = layer.base_layer.weight.clone(), inputs(layer)
    want = layer(x)
    layer.merge(adapter_names=["b"])
    layer.merge(adapter_names=["b", "a"])
    layer.merge()
    assert layer.merged_adapters == ["b", "a", "c"]
    torch.testing.assert_close(layer(x), want, **TOLERANCE["float32", "forward"])
    layer.merge()
    torch.testing.assert_close(layer(x), want, **TOLERANCE["float32", "forward"])
    layer.unmerge()
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight.data, original, **TOLERANCE["float32", "merge"])


def test_merging_one_of_two_active_adapters_keeps_the_output():
    layer = adapted(base_layer((12, 7)), "a", "b")
    x = inputs(layer)
    want = layer(x)
    layer.merge(adapter_names=["a"])
    torch.testing.assert_close(layer(x), want, **TOLERANCE["float32", "forward"])


@pytest.mark.parametrize("keep_base", [True, False])
def test_many_cycles_of_merging_do_not_drift(keep_base):
    layer = adapted(base_layer((12, 7)))
    original = layer.base_layer.weight.clone()
    for _ in range(10):
        layer.merge(keep_base=keep_base)
        layer.unmerge()
    drift = (layer.base_layer.weight - original).abs().max()
    assert drift <= (0 if keep_base else 3e-6)  # PEFT: 3e-8 at |W| of order 0.1


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_safe_merge_refuses_what_is_not_finite_and_leaves_the_layer_as_it_was(value):
    layer = adapted(base_layer((12, 7)), "a", "b")
    layer.factors("b").lam.data[0, 0] = value
    original = layer.base_layer.weight.clone()
    message = r"merging \['a', 'b'\] would make the weight of this layer not finite\. Check the adapter\."
    with pytest.raises(ValueError, match=message):
        layer.merge(safe_merge=True)
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight.data, original, rtol=0, atol=0)
    layer.merge(safe_merge=True, adapter_names=["a"])
    assert layer.merged_adapters == ["a"]


def test_a_weight_that_overflows_its_dtype_is_refused_by_a_safe_merge():
    layer = adapted(base_layer((12, 7), dtype=torch.float16))
    layer.factors("a").lam.data.mul_(1e6)
    with pytest.raises(ValueError, match="would make the weight of this layer not finite"):
        layer.merge(safe_merge=True)


def test_factors_keep_their_dtype_when_set_and_stay_parameters():
    layer = adapted(base_layer((12, 7)))
    lam, gamma = (part.detach().bfloat16() for part in layer.factors("a"))
    layer.set_factors("a", Factors(lam, gamma))
    assert [part.dtype for part in layer.factors("a")] == 2 * [torch.bfloat16]
    assert all(isinstance(part, nn.Parameter) and part.requires_grad for part in layer.factors("a"))
    np.testing.assert_allclose(
        layer.get_delta_weight("a").detach().numpy(), delta_by_oracle(layer, "a"), **TOLERANCE["float32"]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_backward_of_a_layer_keeps_no_tensor_of_the_size_of_its_bases(dtype):
    layer = adapted(base_layer((12, 7), dtype=dtype))
    x = inputs(layer, dtype=dtype)
    layer(x)  # from here on, the bases are as wide as the products
    lam, gamma = layer.factors("a")
    A, B = layer.randlora_A["a"], layer.randlora_B["a"]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(x)
    given = (x, layer.base_layer.weight, lam, gamma, A, B)
    assert kept
    storages = {tensor.untyped_storage().data_ptr() for tensor in given}
    assert {tensor.untyped_storage().data_ptr() for tensor in kept} <= storages
    assert (layer.randlora_A.nbytes, layer.randlora_B.nbytes) == (A.nbytes, B.nbytes)


@pytest.mark.parametrize("case", [CASES["wide"], CASES["tall"], Case((8, 8), 3)], ids=["wide", "tall", "square"])
def test_a_compiled_layer_equals_the_eager_one_in_value_and_gradients(case, unchecked):
    layer = adapted(base_layer(case.shape), package=unchecked)
    twin = copy.deepcopy(layer)
    torch._dynamo.reset()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    x, x_twin = inputs(layer).requires_grad_(), inputs(layer).requires_grad_()
    want, got = layer(x), compiled(x_twin)
    torch.testing.assert_close(got, want, **TOLERANCE["float32", "forward"])
    (want**2).sum().backward()
    (got**2).sum().backward()
    for ours, theirs in zip((x_twin, *twin.factors("a")), (x, *layer.factors("a")), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, **TOLERANCE["float32", "gradient"])
