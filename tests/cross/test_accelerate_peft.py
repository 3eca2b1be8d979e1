"""`accelerate_peft`: our layers inside PEFT's model; PEFT's own behaviour is the oracle where PEFT is right."""

import copy

import numpy as np
import oracle
import pytest
import torch
from stacks import without_type_checks
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

import randlora_torch
from interop import load
from randlora_torch.bases import to_numpy

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
bnb = pytest.importorskip("randlora_torch.bnb")
accelerate_peft = randlora_torch.accelerate_peft

KINDS = ("plain", "8-bit", "4-bit")
every_kind = pytest.mark.parametrize("kind", KINDS)
TOKENS = torch.randint(0, 40, (4, 6), generator=torch.Generator().manual_seed(9))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(
        LlamaConfig(num_key_value_heads=1, vocab_size=40, max_position_embeddings=16, initializer_range=0.2, **sizes)
    ).save_pretrained(path)
    return path


def base_model(folder, kind):
    options = {
        "plain": {},
        "8-bit": {"quantization_config": BitsAndBytesConfig(load_in_8bit=True), "device_map": "cpu"},
        "4-bit": {
            "quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
            "device_map": "cpu",
        },
    }
    model = AutoModelForCausalLM.from_pretrained(folder, **options[kind])
    bnb.protect_from_repacking(model)  # so that PEFT alone computes the same as PEFT with our layers
    return model


def config(**fields):
    given = {"r": 8, "randlora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "init_weights": False}
    return peft.RandLoraConfig(**{**given, **fields})


def by_peft(folder, kind, **fields):
    torch.manual_seed(1)
    return peft.get_peft_model(base_model(folder, kind), config(**fields))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=TOKENS, **kwargs).logits


def loss_and_gradients(model):
    model.zero_grad()
    loss = model.train()(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


@every_kind
def test_loss_gradients_and_parameter_names_stay_those_of_peft(folder, kind):
    model = by_peft(folder, kind)
    names = [name for name, _ in model.named_parameters()]
    loss, grads = loss_and_gradients(model)
    assert accelerate_peft(model) is model
    assert [name for name, _ in model.named_parameters()] == names
    layers = [m for m in model.modules() if hasattr(type(m), "get_scaled_bases")]
    assert len(layers) == 6
    assert all(isinstance(layer, peft.tuners.randlora.RandLoraLayer) for layer in layers)
    assert all(isinstance(layer, randlora_torch.RandLoraLayer) for layer in layers)
    new_loss, new_grads = loss_and_gradients(model)
    assert new_loss == pytest.approx(loss, rel=1e-6)
    assert set(new_grads) == set(grads)
    for name, grad in grads.items():
        torch.testing.assert_close(new_grads[name], grad, rtol=1e-4, atol=1e-5 * grad.abs().max().item())


def test_twenty_steps_of_adam_end_where_peft_ends(folder):
    models = [by_peft(folder, "plain", init_weights=True), accelerate_peft(by_peft(folder, "plain", init_weights=True))]
    for model in models:
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            model(input_ids=TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
    torch.testing.assert_close(logits(models[1]), logits(models[0]), rtol=1e-3, atol=1e-3)


@every_kind
def test_a_further_adapter_has_its_own_r_sparsity_seed_and_targets_and_changes_no_other(folder, kind, tmp_path):
    model = accelerate_peft(by_peft(folder, kind)).eval()
    want = logits(model)
    model.add_adapter("b", config(r=16, sparse=True, projection_prng_key=5, target_modules=["q_proj", "o_proj"]))
    assert_same(logits(model), want)
    model.set_adapter("b")
    of_b = logits(model)
    assert (of_b - want).abs().max() > 0.1
    model.set_adapter("default")
    assert_same(logits(model), want)
    model.save_pretrained(tmp_path)
    for name, path, expected in (("default", tmp_path, want), ("b", tmp_path / "b", of_b)):
        alone = randlora_torch.load_adapter(base_model(folder, kind), path).eval()
        torch.testing.assert_close(logits(alone), expected, rtol=1e-5, atol=1e-5)
        again = accelerate_peft(peft.PeftModel.from_pretrained(base_model(folder, kind), path)).eval()
        assert_same(logits(again), expected)
        assert load(path).config.r == (8 if name == "default" else 16)
    beside = accelerate_peft(peft.PeftModel.from_pretrained(base_model(folder, kind), tmp_path)).eval()
    beside.load_adapter(tmp_path / "b", "b")
    assert_same(logits(beside), want)
    beside.set_adapter("b")
    assert_same(logits(beside), of_b)


def test_files_hold_one_copy_of_the_bases(folder, tmp_path):
    model = by_peft(folder, "plain")
    model.save_pretrained(tmp_path / "before")
    accelerate_peft(model).save_pretrained(tmp_path / "after")
    sizes = [(tmp_path / name / "adapter_model.safetensors").stat().st_size for name in ("before", "after")]
    assert sizes[1] < sizes[0] / 3  # of seven copies, one per layer and one for all
    a, b = load(tmp_path / "before"), load(tmp_path / "after")
    assert a.modules == b.modules
    for one, other in [(a.bases, b.bases), *((a.factors[name], b.factors[name]) for name in a.modules)]:
        for part, its_twin in zip(one, other, strict=True):
            np.testing.assert_array_equal(part, its_twin)


@pytest.mark.parametrize(("kind", "bound"), [("plain", 1e-6), ("8-bit", 0.02), ("4-bit", 0.15)])
def test_merging_adds_the_update_of_the_paper_and_unmerging_is_exact(folder, kind, bound):
    model = accelerate_peft(by_peft(folder, kind)).eval()
    want = logits(model)
    layers = [m for m in model.modules() if hasattr(m, "randlora_lambda")]
    before = [layer._read_weight() for layer in layers]
    model.merge_adapter()
    for layer, base in zip(layers, before, strict=True):
        lam, gamma = (to_numpy(held["default"]) for held in (layer.randlora_lambda, layer.randlora_gamma))
        bases = (to_numpy(layer.randlora_A["default"]), to_numpy(layer.randlora_B["default"]))
        shape = (layer.out_features, layer.in_features)
        exact = base.numpy() + oracle.delta_weight(*bases, lam, gamma, scaling=1.0, shape=shape)
        error = np.linalg.norm(layer._read_weight().numpy() - exact) / np.linalg.norm(exact)
        assert error < bound
    assert not torch.equal(logits(model), want)
    model.unmerge_adapter()
    assert_same(logits(model), want)


@pytest.mark.parametrize("kind", ["plain", "4-bit"])
def test_each_row_of_a_batch_may_have_its_own_adapter(folder, kind):
    model = accelerate_peft(by_peft(folder, kind)).eval()
    model.add_adapter("b", config(r=4, projection_prng_key=0))
    mixed = logits(model, adapter_names=["default", "b", "__base__", "b"])
    for rows, name in (([0], "default"), ([1, 3], "b")):
        model.set_adapter(name)
        torch.testing.assert_close(mixed[rows], logits(model)[rows], rtol=1e-5, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(mixed[2], logits(model)[2], rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"\['c'\] are not attached"):
        model(input_ids=TOKENS, adapter_names=["c"] * 4)


@pytest.mark.parametrize("kind", ["8-bit", "4-bit"])
def test_adapters_that_peft_nested_are_put_side_by_side(folder, kind, tmp_path):
    model = by_peft(folder, kind)
    model.add_adapter("b", config())  # PEFT wraps its own wrapper
    accelerate_peft(model).eval()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    assert not hasattr(layer.base_layer, "randlora_lambda")
    assert set(layer.randlora_lambda.keys()) == {"default", "b"}
    want = logits(model)
    model.save_pretrained(tmp_path)
    alone = randlora_torch.load_adapter(base_model(folder, kind), tmp_path).eval()
    torch.testing.assert_close(logits(alone), want, rtol=1e-5, atol=1e-5)


def test_a_half_precision_model_computes_with_the_bases_of_peft_also_after_a_later_load(folder):
    model = accelerate_peft(by_peft(folder, "plain"))
    model.base_model.model.bfloat16()  # PEFT holds float32 bases beside a bfloat16 model
    before, base = logits(model.eval()), base_logits(model)
    assert "_copies" not in model.base_model.randlora_B.__dict__
    with torch.no_grad():
        model.base_model.randlora_B["default"].mul_(0)  # as load_state_dict does: in place
    assert not torch.equal(before, base)
    assert_same(logits(model), base)


def base_logits(model):
    with model.disable_adapter():
        return logits(model)


def test_copies_and_deletion_follow_peft(folder):
    model = accelerate_peft(by_peft(folder, "plain")).eval()
    want = logits(model)
    assert_same(logits(copy.deepcopy(model)), want)
    model.add_adapter("b", config(r=4))
    model.delete_adapter("b")
    assert_same(logits(model), want)
    plain = model.unload()
    assert type(plain) is LlamaForCausalLM
    assert_same(logits(plain), logits(base_model(folder, "plain").eval()))


def test_what_is_no_peft_model_with_randlora_is_refused(folder):
    message = r"model is a LlamaForCausalLM without RandLoRA: pass peft.get_peft_model"
    with without_type_checks(), pytest.raises(TypeError, match=message):
        accelerate_peft(base_model(folder, "plain"))
    lora = peft.get_peft_model(base_model(folder, "plain"), peft.LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(TypeError, match="without RandLoRA"):
        accelerate_peft(lora)
    merged = by_peft(folder, "plain")
    merged.merge_adapter()
    with pytest.raises(ValueError, match=r"adapters are merged into the base weights: call model\.unmerge_adapter"):
        accelerate_peft(merged)
