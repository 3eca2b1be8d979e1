"""bitsandbytes repacks 4-bit weights on AVX512-BF16 CPUs: switching between training and serving loses nothing."""

import dataclasses
import logging

import pytest
import torch
from crossing import cross
from torch import nn

from interop import AdaLoraConfig, RandLoraConfig
from randlora_torch import get_peft_model, load_adapter
from tests.torch.conftest import (
    TOKENS,
    assert_same,
    layers_of,
    load_llama,
    output,
    plain_dequantization,
    relative_error,
)

bitsandbytes = pytest.importorskip("bitsandbytes")
bnb = pytest.importorskip("randlora_torch.bnb")

KINDS = ["nf4", "fp4-double"]
SOME = ["q_proj", "down_proj"]
SCHEDULE = {"init_r": 4, "target_r": 1, "total_step": 100, "lora_alpha": 16}
CONFIGS = {
    "all layers": RandLoraConfig(r=16, randlora_alpha=16, target_modules="all-linear"),
    "some layers": RandLoraConfig(r=16, randlora_alpha=16, target_modules=SOME),
    "AdaLoRA": AdaLoraConfig(**SCHEDULE, target_modules=SOME),
}
BF16 = torch.bfloat16
repacks_here = pytest.mark.skipif(
    not bitsandbytes.functional.has_avx512bf16(), reason="bitsandbytes repacks on CPUs with AVX512-BF16 only"
)


def four_bit_layers(model):
    return [module for module in model.modules() if isinstance(module, bitsandbytes.nn.Linear4bit)]


def forced(model, repack):
    """The model with bitsandbytes' own flag for its packed kernel set on every 4-bit layer."""
    layers = four_bit_layers(model)
    assert len(layers) == 7
    for layer in layers:
        layer.support_avx512bf16_for_cpu = repack
    return model


def train(model, *, evaluate):
    """Three steps; between them, and after each backward pass, evaluations if asked for."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    for _ in range(3):
        optimizer.zero_grad()
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in parameters)
        if evaluate:
            output(model.eval())
        optimizer.step()
    return model


def story(folder, tmp_path, kind, config, *, repack, evaluate):
    """What a model computes after training, when merged, unmerged and merged again; and when it is loaded again."""
    fresh = lambda: forced(load_llama(folder, kind, compute=BF16), repack)  # noqa: E731
    torch.manual_seed(0)
    model = train(forced(get_peft_model(fresh(), config), repack), evaluate=evaluate)
    seen = {"training": output(model.train())}
    model.save_pretrained(tmp_path)
    for again in ("merged", "merged again"):
        if evaluate:
            output(model.eval())
        model.train().merge_adapter()
        seen[again] = output(model)
        if evaluate:
            output(model.eval())
        model.train().unmerge_adapter()
    seen["unmerged"] = output(model)
    loaded = forced(load_adapter(fresh(), tmp_path), repack)
    if evaluate:
        output(loaded.eval())
    seen["loaded"] = output(loaded.train())
    loaded.merge_adapter()
    seen["loaded and merged"] = output(loaded)
    return seen


@cross(
    "all layers-True-nf4",
    "some layers-False-fp4-double",
    "some layers-True-nf4",
    "AdaLoRA-True-fp4-double",
    adapter=list(CONFIGS),
    repack=[False, True],
    kind=KINDS,
)
def test_switching_between_training_and_serving_changes_no_bit_of_what_follows(
    llama_folder, tmp_path, kind, adapter, repack
):
    want = story(llama_folder, tmp_path / "a", kind, CONFIGS[adapter], repack=False, evaluate=False)
    got = story(llama_folder, tmp_path / "b", kind, CONFIGS[adapter], repack=repack, evaluate=True)
    assert_same(got, want)
    assert_same(got["training"], got["unmerged"])
    assert_same(got["training"], got["loaded"])
    assert_same(got["merged"], got["merged again"])
    assert_same(got["merged"], got["loaded and merged"])
    assert 0.003 < relative_error(got["merged"], got["training"]) < 0.5


@pytest.mark.parametrize("adapter", CONFIGS)
def test_gradients_come_through_every_layer_after_an_evaluation(llama_folder, adapter):
    random = "init_lora_weights" if adapter == "AdaLoRA" else "init_weights"
    config = dataclasses.replace(CONFIGS[adapter], **{random: False})
    model = get_peft_model(forced(load_llama(llama_folder, "nf4", compute=BF16), True), config)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        model.train()(TOKENS, labels=TOKENS).loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad})
        output(model.eval())
    assert_same(gradients[1], gradients[0])
    assert all((grad != 0).any() for grad in gradients[0].values())
    for layer in four_bit_layers(model):
        assert not getattr(layer.weight.quant_state, "packing_format_for_cpu", False)


@pytest.mark.parametrize("kind", ["nf4", "nf4-double", "fp4", "fp4-double"])
@repacks_here
def test_a_base_that_served_before_is_repaired_up_to_the_rounding_of_its_scales(llama_folder, kind, caplog):
    base = load_llama(llama_folder, kind, compute=BF16)
    want = {name: plain_dequantization(layer.weight) for name, layer in base.named_modules() if is_4_bit(layer)}
    output(base)
    assert all(layer.weight.quant_state.packing_format_for_cpu for layer in four_bit_layers(base))
    with caplog.at_level(logging.WARNING, logger="randlora_torch"):
        model = get_peft_model(base, RandLoraConfig(r=16, target_modules=["q_proj", "down_proj"]))
    assert [name for name, _ in layers_of(model)] == [name for name in want if name.endswith(("q_proj", "down_proj"))]
    for name, weight in want.items():
        layer = model.get_submodule(name)
        layer = getattr(layer, "base_layer", layer)
        assert relative_error(bnb.dequantize_4bit(layer.weight), weight) < 4e-3
        assert relative_error(plain_dequantization(layer.weight), weight) < 4e-3
    assert "repacked 7 4-bit weights in an eval forward and rounded their scales to bfloat16" in caplog.text
    model.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all((p.grad != 0).any() for n, p in model.named_parameters() if p.requires_grad and "lambda" in n)


def is_4_bit(module):
    return isinstance(module, bitsandbytes.nn.Linear4bit)


def test_a_base_that_never_served_is_attached_to_without_a_warning_and_keeps_its_bits(llama_folder, caplog):
    base = load_llama(llama_folder, "nf4-double")
    weights = {name: layer.weight.data.clone() for name, layer in base.named_modules() if is_4_bit(layer)}
    with caplog.at_level(logging.WARNING, logger="randlora_torch"):
        model = get_peft_model(base, RandLoraConfig(r=16, target_modules="all-linear"))
        output(model.eval())
    assert [record for record in caplog.records if record.name.startswith("randlora_torch")] == []
    assert_same({name: layer.base_layer.weight.data for name, layer in layers_of(model)}, weights)


@repacks_here
def test_without_the_protection_bitsandbytes_would_lose_the_gradients():
    """The hazard is real on this machine: if this fails, bitsandbytes was repaired and the protection can go."""
    layer = bitsandbytes.nn.Linear4bit(64, 64, bias=False, compute_dtype=BF16, quant_type="nf4").to("cpu")
    x = torch.randn(2, 64, dtype=BF16)
    with torch.no_grad():
        layer.eval()(x)
    assert layer.weight.quant_state.packing_format_for_cpu
    x.requires_grad_()
    y = layer.train()(x)
    assert not y.requires_grad or torch.autograd.grad(y.sum(), x, allow_unused=True)[0] is None
    adapted = get_peft_model(nn.ModuleDict({"layer": layer}), RandLoraConfig(r=16, target_modules=["layer"]))
    assert torch.autograd.grad(adapted["layer"](x).sum(), x)[0].abs().sum() > 0
