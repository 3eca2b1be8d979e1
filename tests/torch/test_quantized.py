"""Llamas loaded in 8 and 4 bits: outputs and gradients of the dequantized W + dW, and merging, measured."""

import copy
import logging
import re

import numpy as np
import oracle
import pytest
import torch
from crossing import cross
from torch import nn

from interop import RandLoraConfig
from randlora_torch import RandLoraLayer, extract, get_peft_model, load_adapter, set_plan
from randlora_torch.bases import to_numpy
from tests.torch.conftest import (
    QUANTIZATIONS,
    TOKENS,
    assert_same,
    delta_by_oracle,
    layers_of,
    load_llama,
    loss_of,
    output,
    plain_dequantization,
    randomize,
    relative_error,
)

bitsandbytes = pytest.importorskip("bitsandbytes")
bnb = pytest.importorskip("randlora_torch.bnb")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
FOUR_BIT = [kind for kind in QUANTIZATIONS if kind.endswith("4") or kind.endswith("double")]
# (quantization, dtype of the model, dtype that 4-bit layers compute in)
CASES = [(kind, dtype, F32) for kind in QUANTIZATIONS for dtype in (F32, BF16)]
CASES += [
    ("nf4-double", F32, BF16),
    ("nf4", BF16, BF16),
    ("fp4", F32, F16),
    ("fp4-double", BF16, F16),
    ("int8", F16, F32),
]
every_case = pytest.mark.parametrize(
    ("kind", "dtype", "compute"), CASES, ids=[f"{k}-{str(d)[6:]}-{str(c)[6:]}" for k, d, c in CASES]
)


def config(targets="all-linear", **fields):
    return RandLoraConfig(**{"r": 16, "randlora_alpha": 16, "target_modules": targets, **fields})


def adapted(folder, kind, dtype=F32, compute=F32, **fields):
    """A loaded Llama with an adapter that moves its logits by about a third."""
    return randomize(get_peft_model(load_llama(folder, kind, dtype, compute), config(**fields)), scale=1 / 20)


def dequantized(layer):
    """The weight (out, in) that a base layer stands for, in float32, by the formats alone."""
    weight = layer.weight
    if isinstance(weight, bitsandbytes.nn.Params4bit):
        return torch.from_numpy(plain_dequantization(weight)).to(weight.quant_state.dtype).float()
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        scales = layer.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * (scales[:, None] / 127)
    return weight.detach().float()


def plain_twin(model, folder, weight_of):
    """The Llama of plain float32 layers, those adapted with the weights that `weight_of(layer)` gives."""
    twin = load_llama(folder)
    for name, module in twin.named_modules():
        if getattr(module, "weight", None) is not None:
            layer = model.get_submodule(name)
            weight = weight_of(layer) if isinstance(layer, RandLoraLayer) else dequantized(layer)
            module.weight = nn.Parameter(weight.to(F32, copy=True))
    return twin


def updated(layer):
    return dequantized(layer.base_layer) + torch.from_numpy(delta_by_oracle(layer))


def oracle_gradients(layer, upstream):
    A, B = (to_numpy(held["default"]) for held in (layer.randlora_A, layer.randlora_B))
    shape, scaling = (layer.out_features, layer.in_features), layer.scaling["default"]
    factors = map(to_numpy, layer.factors("default"))
    return oracle.gradients(A, B, *factors, scaling=scaling, shape=shape, upstream=upstream.numpy())


def recorded(model):
    """Runs forward and backward; what went into and came out of each adapted layer, and its gradients."""
    model.enable_input_require_grads()
    seen = {name: {} for name, _ in layers_of(model)}
    for name, layer in layers_of(model):
        layer.register_forward_hook(lambda _, x, y, s=seen[name]: s.update(x=x[0].detach(), y=y.detach()))
        layer.register_full_backward_hook(lambda _, dx, dy, s=seen[name]: s.update(dx=dx[0], dy=dy[0]))
    loss_of(model).backward()
    return seen


@every_case
def test_a_training_layer_computes_with_the_dequantized_weight_plus_dw(llama_folder, kind, dtype, compute):
    model = adapted(llama_folder, kind, dtype, compute).train()
    bound = 1e-5 if (dtype, compute) == (F32, F32) else 1e-2
    seen = recorded(model)
    assert len(seen) == 7
    for name, layer in layers_of(model):
        got = {key: value.reshape(-1, value.shape[-1]).double() for key, value in seen[name].items()}
        weight = updated(layer).double()
        assert seen[name]["y"].dtype == seen[name]["dx"].dtype == dtype
        assert relative_error(got["y"], got["x"] @ weight.T) < bound
        assert relative_error(got["dx"], got["dy"] @ weight) < bound
        want = oracle_gradients(layer, got["dy"].T @ got["x"])
        for parameter, expected in zip(layer.factors("default"), want, strict=True):
            assert parameter.grad.dtype == F32
            assert relative_error(parameter.grad, expected) < bound


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_what_kernels_read_of_a_quantized_weight_stands_for_the_same_numbers(llama_folder, kind):
    for _, layer in layers_of(adapted(llama_folder, kind)):
        packed = layer.packed()
        assert packed.shape == (layer.out_features, layer.in_features)
        torch.testing.assert_close(packed.dequantize(), dequantized(layer.base_layer), rtol=1e-6, atol=1e-7)


@cross(kind=list(QUANTIZATIONS), plan=["factored", "folded"])
def test_both_plans_train_a_quantized_llama_alike(llama_folder, kind, plan):
    model = adapted(llama_folder, kind).train()
    set_plan(model, plan)
    loss_of(model)  # in the first call, bitsandbytes settles in what dtype it computes
    loss = loss_of(model)
    loss.backward()
    twin = plain_twin(model, llama_folder, updated)
    want = loss_of(twin)
    want.backward()
    assert relative_error(loss, want) < 1e-5
    for name, layer in layers_of(model):
        expected = oracle_gradients(layer, twin.get_submodule(name).weight.grad)
        for parameter, exact in zip(layer.factors("default"), expected, strict=True):
            assert relative_error(parameter.grad, exact) < 1e-5


def test_an_8_bit_layer_answers_folded_as_its_dequantized_weight_does_in_inference_too(llama_folder):
    model = adapted(llama_folder, "int8-all").eval()
    twin, errors = plain_twin(model, llama_folder, updated), {}
    for plan in ("factored", "folded"):
        set_plan(model, plan)
        errors[plan] = relative_error(output(model), output(twin))
    assert errors["folded"] < 1e-5 < 1e-3 < errors["factored"]  # bitsandbytes rounds inputs to int8, folding does not


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_training_llama_in_float32_is_the_plain_one_with_w_plus_dw(llama_folder, kind):
    model = adapted(llama_folder, kind).train()
    twin = plain_twin(model, llama_folder, updated)
    assert relative_error(output(model), output(twin)) < 1e-5
    loss_of(model).backward()
    loss_of(twin).backward()
    for name, layer in layers_of(model):
        want = oracle_gradients(layer, twin.get_submodule(name).weight.grad)
        for parameter, expected in zip(layer.factors("default"), want, strict=True):
            assert relative_error(parameter.grad, expected) < 1e-5
    with model.disable_adapter():
        base = output(model)
    assert relative_error(base, output(twin)) > 0.2


@every_case
def test_half_precision_costs_a_llama_no_more_than_it_costs_the_plain_one(llama_folder, kind, dtype, compute):
    model = adapted(llama_folder, kind, dtype, compute).train()
    twin = plain_twin(model, llama_folder, updated)
    want = output(twin)
    half = compute if dtype == F32 else dtype
    cost = relative_error(output(twin.to(half)), want)
    assert output(model).dtype == dtype
    assert relative_error(output(model), want) < max(2 * cost, 1e-5)


EVAL_BOUNDS = {"int8": 2e-2, "int8-all": 0.1}  # LLM.int8() rounds activations too, but for outliers beyond 6


@every_case
def test_an_evaluating_layer_computes_with_the_dequantized_weight_plus_dw(llama_folder, kind, dtype, compute):
    model = adapted(llama_folder, kind, dtype, compute).eval()
    bound = EVAL_BOUNDS.get(kind, 1e-5 if (dtype, compute) == (F32, F32) else 1e-2)
    seen = {}
    for name, layer in layers_of(model):
        layer.register_forward_hook(lambda _, x, y, name=name: seen.update({name: (x[0].double(), y.double())}))
    output(model)
    for name, layer in layers_of(model):
        x, y = seen[name]
        assert relative_error(y, x @ updated(layer).double().T) < bound


def stored(layer):
    """Everything a base layer stores of its weight, to compare bit for bit."""
    weight = layer.weight
    if isinstance(weight, bitsandbytes.nn.Int8Params):
        return [weight.data.clone(), (layer.state.SCB if weight.SCB is None else weight.SCB).clone()]
    state = weight.quant_state
    parts = [weight.data.clone(), state.absmax.clone(), state.code.clone()]
    return parts + ([state.offset.clone(), state.state2.absmax.clone()] if state.nested else [])


def requantized(layer, weight):
    """What bitsandbytes' own functions make of a float32 weight: the weight that is stored, and its parts."""
    base, functional = layer.base_layer, bitsandbytes.functional
    if isinstance(base.weight, bitsandbytes.nn.Int8Params):
        codes, scales, _ = functional.int8_vectorwise_quant(weight.half())
        return codes.float() * (scales[:, None] / 127), [codes, scales]
    state = base.weight.quant_state
    packed, state = functional.quantize_4bit(
        weight.to(state.dtype),
        blocksize=state.blocksize,
        compress_statistics=state.nested,
        quant_type=state.quant_type,
    )
    parts = [packed, state.absmax, state.code]
    parts += [state.offset, state.state2.absmax] if state.nested else []
    return bnb.dequantize_4bit(bitsandbytes.nn.Params4bit(packed, quant_state=state)).float(), parts


@cross(kind=list(QUANTIZATIONS), dtype=[F32, BF16], keep_base=[True, False])
def test_merging_adds_what_requantizing_the_sum_rounds_and_nothing_else(llama_folder, kind, dtype, keep_base):
    model = adapted(llama_folder, kind, dtype).train()
    before, want = {name: stored(layer.base_layer) for name, layer in layers_of(model)}, output(model)
    exact, deltas, rounded = {}, {}, {}
    for name, layer in layers_of(model):
        deltas[name] = layer.get_delta_weight("default").detach()
        exact[name] = dequantized(layer.base_layer) + deltas[name]
        assert relative_error(exact[name], updated(layer)) < 1e-6
        rounded[name] = requantized(layer, exact[name])
    unrounded = output(plain_twin(model, llama_folder, updated))
    roundings = model.merge_adapter(keep_base=keep_base)
    assert roundings.keys() == before.keys()
    for name, layer in layers_of(model):
        weight, parts = rounded[name]
        assert_same(stored(layer.base_layer), parts)
        error = (weight.double() - exact[name].double()).norm().item()
        norms = (exact[name].double().norm().item(), deltas[name].double().norm().item())
        np.testing.assert_allclose(roundings[name], [error / norm for norm in norms], rtol=1e-4)
        assert 0.003 < roundings[name].of_weight < (0.02 if "int8" in kind else 0.15)
        assert roundings[name].of_update < 1
    # Logits move by what the same rounding of the weights of a plain Llama moves them, and by nothing else.
    twin = plain_twin(model, llama_folder, lambda layer: dequantized(layer.base_layer))
    for name, (weight, _) in rounded.items():
        assert_same(twin.get_submodule(name).weight.data, weight)
    merged, logits = output(model), output(twin)
    assert relative_error(logits, unrounded) > 0.003
    if dtype == F32:
        assert relative_error(merged, logits) < 1e-5
        assert relative_error(merged - want, logits - unrounded) < 1e-3
    else:
        noise = 2 * relative_error(output(twin.to(dtype)), logits)
        assert relative_error(merged, logits) < noise
        assert relative_error(merged, want) < relative_error(logits, unrounded) + 2 * noise
    assert relative_error(output(model.eval()), logits) < (0.05 if "int8" in kind else 2e-2)
    back = model.train().unmerge_adapter()
    if keep_base:
        assert {rounding.of_weight for rounding in back.values()} == {0.0}
        assert_same({name: stored(layer.base_layer) for name, layer in layers_of(model)}, before)
        assert_same(output(model), want)
    else:
        assert all(rounding.of_weight > 0.003 for rounding in back.values())


def test_the_error_of_merging_into_4_bits_is_logged_and_that_of_8_bits_is_smaller(llama_folder, caplog):
    logged = {}
    for kind in ("nf4", "int8"):
        model = adapted(llama_folder, kind)
        with caplog.at_level(logging.WARNING, logger="randlora_torch"):
            caplog.clear()
            model.merge_adapter()
        (record,) = [record for record in caplog.records if record.name.startswith("randlora_torch")]
        assert record.getMessage().startswith("merging rounded 7 weights to their storage format: mean error ")
        logged[kind] = record.args[2]
    assert logged["nf4"] > 5 * logged["int8"]


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_a_merged_llama_that_is_unloaded_is_the_quantized_model_saved_and_loaded(llama_folder, tmp_path, kind):
    model = adapted(llama_folder, kind)
    kept = extract(model)
    kind_before = type(load_llama(llama_folder, kind))
    plain = model.merge_and_unload()
    want = output(plain)
    assert type(plain) is kind_before
    assert not any(isinstance(module, RandLoraLayer) for module in plain.modules())
    plain.save_pretrained(tmp_path)
    again = kind_before.from_pretrained(tmp_path, device_map="cpu")
    bnb.protect_from_repacking(again)
    assert_same(output(again), want)
    twin = load_adapter(load_llama(llama_folder, kind), kept)
    twin.merge_adapter()
    assert_same(output(twin), want)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_an_unloaded_quantized_llama_has_its_bits_back(llama_folder, kind):
    model, base = adapted(llama_folder, kind), load_llama(llama_folder, kind)
    bnb.protect_from_repacking(base)
    want, parts = output(base), {name: stored(base.get_submodule(name)) for name, _ in layers_of(model)}
    model.merge_adapter()
    plain = model.unload()
    assert type(plain) is type(base)
    assert_same({name: stored(plain.get_submodule(name)) for name in parts}, parts)
    assert_same(output(plain), want)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_deep_copy_of_a_quantized_llama_is_independent_and_unmerges_to_its_bits(llama_folder, kind, merged):
    model = adapted(llama_folder, kind).train()
    before, plain = {name: stored(layer.base_layer) for name, layer in layers_of(model)}, output(model)
    if merged:
        model.merge_adapter()
    want = output(model)
    twin = copy.deepcopy(model)
    assert_same(output(twin), want)
    twin.unmerge_adapter()
    assert_same({name: stored(layer.base_layer) for name, layer in layers_of(twin)}, before)
    assert_same(output(twin), plain)
    assert_same(output(model), want)


@pytest.mark.parametrize("kind", ["nf4-double", "int8"])
def test_the_state_of_an_adapted_quantized_llama_is_that_of_the_base_and_the_factors(llama_folder, kind):
    model = adapted(llama_folder, kind).train()
    loss_of(model).backward()
    output(model.eval())
    state = {name: value.clone() for name, value in model.train().state_dict().items()}
    base = load_llama(llama_folder, kind)
    bnb.protect_from_repacking(base)
    for name, value in base.state_dict().items():
        assert_same(state[find(state, name)], value)
    assert len(state) == len(base.state_dict()) + 2 * len(layers_of(model))
    assert not any("randlora_A" in name or "randlora_B" in name for name in state)


def find(state, name):
    """The key of a base tensor in the state of the adapted model."""
    adapted_layer = re.sub(r"_proj\.", "_proj.base_layer.", name)
    return adapted_layer if adapted_layer in state else name


@pytest.mark.parametrize("kind", QUANTIZATIONS)
def test_a_quantized_llama_trains_saves_and_loads_with_the_same_logits(llama_folder, tmp_path, kind):
    model = get_peft_model(load_llama(llama_folder, kind, BF16, BF16), config(["q_proj", "v_proj", "down_proj"]))
    before = output(model.eval())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model.train()(TOKENS, labels=TOKENS).loss
        loss.backward()
        assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    want = output(model.eval())
    assert (want - before).abs().max() > 0.1
    model.save_pretrained(tmp_path)
    assert_same(output(load_adapter(load_llama(llama_folder, kind, BF16, BF16), tmp_path).eval()), want)


def test_all_linear_leaves_the_unquantized_head_out(llama_folder):
    model = get_peft_model(load_llama(llama_folder, "nf4"), config())
    assert len(extract(model).modules) == 7
    assert type(model.lm_head) is nn.Linear
