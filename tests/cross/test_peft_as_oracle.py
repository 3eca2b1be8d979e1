"""PEFT is right on plain layers in float32: there, whole models of ours do what PEFT's do, option by option."""

import json
import warnings

import models
import peft
import pytest
import torch
from peft.utils.constants import TRANSFORMERS_MODELS_TO_RANDLORA_TARGET_MODULES_MAPPING as PEFT_TARGETS
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTForImageClassification,
)

import interop
import randlora_torch
from interop.targets import DEFAULT_TARGETS

PREFIX = "base_model.model."
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _quiet_on_one_thread(monkeypatch):
    """PEFT warns about options that are meant; threads only slow models down that are this small.

    Layers multiply in PEFT's order: some gradients here are zero but for rounding.
    """
    monkeypatch.setattr(randlora_torch.RandLoraLayer, "plan", "factored")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.set_num_threads(threads)


def gpt2():
    """GPT-2 with its own dropout, for training mode."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=128, n_positions=16)).eval()


def bert():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=128, max_position_embeddings=16, num_labels=3, initializer_range=0.2, **SIZES)
    return BertForSequenceClassification(config).eval()


def bert_for(kind):
    def make():
        torch.manual_seed(0)
        config = BertConfig(vocab_size=128, max_position_embeddings=16, initializer_range=0.2, **SIZES)
        return kind(config).eval()

    return make


def llama(kind=LlamaForCausalLM, **fields):
    torch.manual_seed(0)
    sizes = {**SIZES, "num_key_value_heads": 1, "vocab_size": 128, "max_position_embeddings": 32}
    return kind(LlamaConfig(initializer_range=0.1, pad_token_id=0, **sizes, **fields)).eval()


def llama_classifier():
    return llama(LlamaForSequenceClassification, num_labels=3)


def t5():
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 2, "num_heads": 2, "vocab_size": 128}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes)).eval()


def vit():
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, num_labels=3, initializer_range=0.2, **SIZES)
    return ViTForImageClassification(config).eval()


PROJECTIONS = ["q_proj", "v_proj"]
CASES = {  # name -> (base model, fields of the config)
    "llama": (llama, {}),  # the targets that PEFT knows for Llama
    "llama, all-linear": (llama, {"target_modules": "all-linear", "save_projection": False}),
    "llama, one block": (
        llama,
        {"target_modules": ["up_proj", "down_proj"], "layers_to_transform": [1], "very_sparse": True},
    ),
    "llama, head and norms": (
        llama,
        {"target_modules": PROJECTIONS, "modules_to_save": ["lm_head", "model.norm"]},
    ),
    "llama, all norms": (llama, {"target_modules": PROJECTIONS, "modules_to_save": ["norm"]}),
    "gpt2": (gpt2, {"fan_in_fan_out": True, "init_weights": False, "projection_prng_key": 7}),
    "gpt2, all biases": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "bias": "all"}),
    "gpt2, its biases": (
        gpt2,
        {"target_modules": ["mlp.c_fc"], "fan_in_fan_out": True, "bias": "randlora_only", "sparse": True},
    ),
    "bert, classifier": (bert, {"task_type": "SEQ_CLS"}),
    "bert, classifier, all biases": (bert, {"task_type": "SEQ_CLS", "bias": "all", "target_modules": ["dense"]}),
    "bert, all-linear": (bert, {"task_type": "SEQ_CLS", "target_modules": "all-linear", "bias": "randlora_only"}),
    "vit, classifier": (vit, {"target_modules": PROJECTIONS, "modules_to_save": ["classifier"], "bias": "all"}),
    "bert, tokens": (bert_for(BertForTokenClassification), {"task_type": "TOKEN_CLS"}),
    "bert, questions": (bert_for(BertForQuestionAnswering), {"task_type": "QUESTION_ANS"}),
    "llama, score": (llama_classifier, {"task_type": "SEQ_CLS", "target_modules": "all-linear"}),
    "gpt2, tied embedding": (gpt2, {"modules_to_save": ["wte"], "fan_in_fan_out": True}),
    "gpt2, tied head": (gpt2, {"modules_to_save": ["lm_head"], "fan_in_fan_out": True}),
    "t5": (t5, {"task_type": "SEQ_2_SEQ_LM"}),
    "vit, fc": (vit, {"target_modules": r"vit\.layers\.\d\.mlp\.fc\d", "sparse": True, "r": 64}),
}


def each(cases):
    return pytest.mark.parametrize("case", cases)


every_case = each(CASES)


def options(fields):
    r = fields.get("r", 5)
    return {"r": r, "randlora_alpha": r, **fields}


def pair(case, *, trained=True, **fields):
    """Our model and PEFT's with the same base and config and, if `trained`, the same values in all that trains."""
    make, given = CASES[case]
    given = options({**given, **fields})
    ours = randlora_torch.get_peft_model(make(), interop.RandLoraConfig(**given)).eval()
    theirs = peft.get_peft_model(make(), peft.RandLoraConfig(**given)).eval()
    if trained:
        models.randomize(trainable(theirs).items())
        copy_values(ours, theirs)
    return ours, theirs


def copy_values(ours, theirs):
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, value in trainable(theirs).items():
            mine[name.removeprefix(PREFIX)].copy_(value)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def stripped(names):
    return {name.removeprefix(PREFIX) for name in names}


def batch(model):
    if hasattr(model.config, "image_size"):
        pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(1))
        return {"pixel_values": pixels, "labels": torch.tensor([0, 2, 1])}
    tokens = models.tokens(length=9)
    kind = type(model.get_base_model()) if isinstance(model, peft.PeftModel) else type(model)
    if "QuestionAnswering" in kind.__name__:
        return {
            "input_ids": tokens,
            "start_positions": torch.tensor([0, 2, 1]),
            "end_positions": torch.tensor([3, 8, 1]),
        }
    labels = {"SequenceClassification": torch.tensor([0, 2, 1]), "TokenClassification": tokens % 2}
    found = [value for name, value in labels.items() if name in kind.__name__]
    return {"input_ids": tokens, "labels": found[0] if found else tokens}


def logits(model):
    with torch.no_grad():
        out = model(**batch(model))
    return torch.stack([out.start_logits, out.end_logits]) if "start_logits" in out else out.logits


def gradients(model):
    model.zero_grad()
    model(**batch(model)).loss.backward()
    return {name.removeprefix(PREFIX): p.grad for name, p in trainable(model).items()}


def assert_close(got, want, tolerance=1e-5):
    """Relative to the largest number: sums of some hundred float32 products, in another order."""
    assert got.keys() == want.keys() if isinstance(want, dict) else got.shape == want.shape
    for key in want if isinstance(want, dict) else [...]:
        torch.testing.assert_close(got[key], want[key], rtol=0, atol=tolerance * want[key].abs().max().item() + 1e-12)


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_the_targets_of_models_that_name_none_are_pefts():
    ours = {kind: targets if isinstance(targets, str) else list(targets) for kind, targets in DEFAULT_TARGETS.items()}
    assert ours == PEFT_TARGETS


@every_case
def test_the_same_parameters_train_from_the_same_values(case):
    ours, theirs = pair(case, trained=False)
    mine, want = trainable(ours), trainable(theirs)
    assert stripped(mine) == stripped(want)
    random = CASES[case][1].get("init_weights") is False  # then lambda is drawn, and from another stream
    for name, value in want.items():
        got = mine[name.removeprefix(PREFIX)]
        assert got.shape == value.shape
        if not (random and "lambda" in name):
            assert_same(got, value)


@every_case
def test_the_line_of_parameter_counts_is_pefts(case, capsys):
    ours, theirs = pair(case, trained=False)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()
    theirs.print_trainable_parameters()
    want = capsys.readouterr().out.splitlines()[0]
    ours.print_trainable_parameters()
    assert capsys.readouterr().out.splitlines()[0] == want


@every_case
def test_the_state_dict_has_pefts_keys_and_values_without_the_bases(case):
    ours, theirs = pair(case)
    want = {key.removeprefix(PREFIX): value for key, value in theirs.state_dict().items()}
    want = {key: value for key, value in want.items() if "randlora_A" not in key and "randlora_B" not in key}
    assert_same(dict(ours.state_dict()), want)


@every_case
def test_outputs_and_gradients_are_pefts(case):
    ours, theirs = pair(case)
    assert (logits(theirs) - logits(CASES[case][0]())).abs().max() > 0.01
    assert_close(logits(ours), logits(theirs))
    assert_close(gradients(ours), gradients(theirs), 2e-5)


@each(["llama, one block", "llama, all norms", "gpt2, all biases", "bert, classifier, all biases", "vit, classifier"])
def test_twenty_steps_of_adam_end_at_pefts_values(case):
    ours, theirs = pair(case)
    losses = []
    for model in (ours, theirs):
        optimizer = torch.optim.Adam(trainable(model).values(), lr=2e-3)
        losses.append([])
        for _ in range(20):
            optimizer.zero_grad()
            loss = model(**batch(model)).loss
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.detach())
    mine, want = map(torch.stack, losses)
    assert want[0] - want[-1] > 0.02
    assert_close(mine, want, 1e-5)
    assert_close(logits(ours), logits(theirs), 1e-3)  # Adam divides by gradients that may be nearly zero


@every_case
def test_what_peft_saved_is_loaded_and_trains_on_as_in_peft(case, tmp_path):
    _, theirs = pair(case)
    theirs.save_pretrained(tmp_path)
    make = CASES[case][0]
    ours = randlora_torch.load_adapter(make(), tmp_path).eval()
    assert_close(logits(ours), logits(theirs))
    assert trainable(ours) == {}
    ours = randlora_torch.load_adapter(make(), tmp_path, is_trainable=True).eval()
    again = peft.PeftModel.from_pretrained(make(), tmp_path, is_trainable=True).eval()
    assert stripped(trainable(ours)) == stripped(trainable(again))
    assert_close(gradients(ours), gradients(again), 2e-5)


@every_case
def test_what_we_saved_is_loaded_by_peft_and_has_the_keys_that_peft_writes(case, tmp_path):
    ours, theirs = pair(case)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    again = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path / "ours").eval()
    assert_close(logits(again), logits(ours))
    lazily = peft.PeftModel.from_pretrained(CASES[case][0](), tmp_path / "ours", low_cpu_mem_usage=True).eval()
    assert_same(logits(lazily), logits(again))
    mine, want = (load_file(tmp_path / name / WEIGHTS) for name in ("ours", "theirs"))
    copies = (".original_module.", ".modules_to_save.")  # PEFT writes the biases of trained modules twice more
    for part in ("A", "B"):  # and the bases once per layer
        want = {key: value for key, value in want.items() if not key.endswith(f".randlora_{part}") or key in mine}
    want = {key: value for key, value in want.items() if not any(copy in key for copy in copies)}
    assert mine.keys() == want.keys()
    for key, value in want.items():
        assert_same(mine[key].to(value.dtype), value)


@every_case
def test_our_config_file_says_what_pefts_says(case, tmp_path):
    for model, name in zip(pair(case), ("ours", "theirs"), strict=True):
        model.save_pretrained(tmp_path / name)
    mine, want = (json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in ("ours", "theirs"))
    assert mine.keys() == want.keys()
    named = {model: set(fields.pop("target_modules")) for model, fields in (("ours", mine), ("theirs", want))}
    layers = {name for name, module in CASES[case][0]().named_modules() if hasattr(module, "weight")}
    assert matches(layers, named["ours"]) == matches(layers, named["theirs"])
    for fields in (mine, want):
        fields["modules_to_save"] = set(fields["modules_to_save"] or ())
        del fields["peft_version"], fields["base_model_name_or_path"], fields["auto_mapping"]
    assert mine == want


def matches(layers, entries):
    return {name for name in layers if any(f".{name}".endswith(f".{entry}") for entry in entries)}


@every_case
def test_disabling_gives_the_base_model_as_in_peft(case):
    ours, theirs = pair(case)
    want = logits(CASES[case][0]())
    with ours.disable_adapter():
        assert_same(logits(ours), want)
    if CASES[case][1].get("bias", "none") == "none":  # PEFT leaves trained biases in the model, and warns of it
        with theirs.disable_adapter():
            assert_same(logits(theirs), want)


@every_case
def test_the_merged_model_is_pefts(case):
    ours, theirs = (model.merge_and_unload() for model in pair(case))
    assert type(ours) is type(theirs)
    assert_close(dict(ours.state_dict()), dict(theirs.state_dict()))
    assert_close(logits(ours), logits(theirs))


@pytest.mark.parametrize("case", ["llama", "gpt2", "bert, classifier", "vit, fc"])
def test_dropout_draws_the_masks_that_peft_draws(case):
    both = [model.train() for model in pair(case, randlora_dropout=0.3)]
    outputs = []
    for model in both:
        torch.manual_seed(5)
        outputs.append(logits(model))
    assert (outputs[0] - logits(both[0])).abs().max() > 0.01  # other masks matter
    assert_close(*outputs)
    grads = []
    for model in both:
        torch.manual_seed(6)
        grads.append(gradients(model))
    assert_close(*grads, 2e-5)


@pytest.mark.parametrize("case", ["llama, all-linear", "gpt2", "vit, fc"])
def test_under_bfloat16_autocast_outputs_and_gradients_are_pefts_within_the_rounding(case):
    results = []
    for model in pair(case):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append((logits(model).float(), gradients(model)))
    (mine, my_grads), (want, want_grads) = results
    assert_close(mine, want, 0.03)
    for name, grad in want_grads.items():
        assert my_grads[name].dtype == grad.dtype == torch.float32
        assert torch.linalg.norm(my_grads[name] - grad) < 0.05 * torch.linalg.norm(grad)


def two_adapters(case):
    """Two adapters of the same r in each model, with the same values."""
    ours, theirs = pair(case)
    given = options(CASES[case][1])
    ours.add_adapter("other", interop.RandLoraConfig(**given))
    theirs.add_adapter("other", peft.RandLoraConfig(**given))
    for model in (ours, theirs):
        model.set_adapter("other")
    models.randomize(trainable(theirs).items(), seed=1)
    copy_values(ours, theirs)
    return ours.eval(), theirs.eval()


@pytest.mark.parametrize("case", ["llama, head and norms", "vit, fc", "bert, classifier"])
def test_switching_and_deleting_adapters_goes_as_in_peft(case):
    ours, theirs = two_adapters(case)
    seen = []
    for name in ("other", "default", "other"):
        for model in (ours, theirs):
            model.set_adapter(name)
        assert_close(logits(ours), logits(theirs))
        assert stripped(trainable(ours)) == stripped(trainable(theirs))
        seen.append(logits(ours))
    assert (seen[0] - seen[1]).abs().max() > 0.005
    for model in (ours, theirs):
        model.delete_adapter("other")
    assert ours.active_adapters == theirs.active_adapters == ["default"]
    assert_close(logits(ours), logits(theirs))
    assert_close(logits(ours), seen[1])


@pytest.mark.parametrize("case", ["llama, all-linear", "llama, one block", "gpt2"])
def test_several_active_adapters_add_up_as_in_peft(case):
    ours, theirs = two_adapters(case)
    ours.set_adapter(["default", "other"])
    theirs.base_model.set_adapter(["default", "other"])
    assert_close(logits(ours), logits(theirs))
    assert_close(gradients(ours), gradients(theirs), 2e-5)
    for model in (ours, theirs):
        model.merge_adapter()
    assert_close(logits(ours), logits(theirs))
    for model in (ours, theirs):
        model.unmerge_adapter()
        model.merge_adapter(["other"])
    assert_close(logits(ours.merge_and_unload(adapter_names=["other"])), logits(theirs.unload()))


def test_generated_tokens_are_pefts():
    ours, theirs = pair("llama, all-linear")
    tokens = models.tokens(length=5)
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0  # padding on the left
    given = {"input_ids": tokens, "attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    want = theirs.generate(**given)
    with theirs.disable_adapter():
        assert not torch.equal(theirs.generate(**given), want)
    assert_same(ours.generate(**given), want)
    beams = {**given, "num_beams": 3}
    assert_same(ours.generate(**beams), theirs.generate(**beams))


def test_checkpointed_activations_give_pefts_gradients():
    both = pair("llama, all-linear")
    for model in both:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    assert_close(*map(gradients, both), 2e-5)


def test_transformers_own_loading_reads_what_we_saved(tmp_path):
    ours, _ = pair("llama")
    ours.save_pretrained(tmp_path)
    plain = llama()
    LlamaForCausalLM.load_adapter(plain, tmp_path)
    assert_close(logits(plain.eval()), logits(ours))


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", None])
def test_pefts_auto_classes_load_what_we_saved(task_type, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
    config = interop.RandLoraConfig(**options({"task_type": task_type, "init_weights": False}))
    ours = randlora_torch.get_peft_model(base, config).eval()
    ours.save_pretrained(tmp_path / "adapter")
    auto = peft.AutoPeftModelForCausalLM if task_type else peft.AutoPeftModel
    assert_close(logits(auto.from_pretrained(tmp_path / "adapter").eval()), logits(ours))


def test_the_file_says_fan_in_fan_out_if_the_layers_are_conv1d(tmp_path):
    given, said = options({"target_modules": ["c_attn"]}), []
    for model in (
        randlora_torch.get_peft_model(gpt2(), interop.RandLoraConfig(**given)),
        peft.get_peft_model(gpt2(), peft.RandLoraConfig(**given)),
    ):
        model.save_pretrained(tmp_path)
        said.append(json.loads((tmp_path / "adapter_config.json").read_text())["fan_in_fan_out"])
    assert said == [True, True]


def test_an_adapter_of_the_head_is_loaded_from_pefts_file(tmp_path):
    theirs = peft.get_peft_model(llama(), peft.RandLoraConfig(**options({"target_modules": ["q_proj", "lm_head"]})))
    models.randomize(trainable(theirs).items())
    theirs.eval().save_pretrained(tmp_path)
    assert f"{PREFIX}lm_head.base_layer.weight" in load_file(tmp_path / WEIGHTS)
    assert_close(logits(randlora_torch.load_adapter(llama(), tmp_path).eval()), logits(theirs))


def test_an_adapter_of_a_model_with_added_tokens_is_loaded_from_pefts_file(tmp_path):
    llama().save_pretrained(tmp_path / "base")

    def with_added_tokens():
        torch.manual_seed(1)  # the rows of the added tokens are drawn
        model = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(130, mean_resizing=False)
        return model

    theirs = peft.get_peft_model(with_added_tokens(), peft.RandLoraConfig(**options({})))
    models.randomize(trainable(theirs).items())
    theirs.eval().save_pretrained(tmp_path / "adapter")
    assert f"{PREFIX}model.embed_tokens.weight" in load_file(tmp_path / "adapter" / WEIGHTS)
    ours = randlora_torch.load_adapter(with_added_tokens(), tmp_path / "adapter").eval()
    assert_close(logits(ours), logits(theirs))
