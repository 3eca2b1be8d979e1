"""Trained modules and biases against PEFT: the same parameters, files both ways, the same steps of training."""

import numpy as np
import pytest
import torch

import interop
from randlora_torch import get_peft_model, load_adapter
from tests.torch.conftest import MODELS, TOKENS, X, assert_same, bert, config, output, randomize

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.usefixtures("factored")  # PEFT's order of products, bit for bit

CASES = {  # kind of model, fields of the config
    "all biases": ("MLP", {"bias": "all"}),
    "adapted biases": ("MLP", {"bias": "randlora_only"}),
    "a head": ("MLP", {"modules_to_save": ["head"]}),
    "modules and biases": ("MLP", {"modules_to_save": ["head", "norm"], "bias": "all"}),
    "embeddings": ("Llama", {"modules_to_save": ["embed_tokens", "lm_head"]}),
    "sequences": ("BERT", {"task_type": "SEQ_CLS"}),
    "sequences and a pooler": ("BERT", {"task_type": "SEQ_CLS", "modules_to_save": ["pooler"]}),
    "sequences and biases": ("BERT", {"task_type": "SEQ_CLS", "bias": "all"}),
    "Conv1D biases": ("GPT-2", {"bias": "all", "fan_in_fan_out": True}),
}
every_case = pytest.mark.parametrize("case", CASES)


def make(case):
    return MODELS[CASES[case][0]][0]().eval()


def ours(case):
    kind, fields = CASES[case]
    return get_peft_model(make(case), config(MODELS[kind][1], **fields)).eval()


def theirs(case):
    kind, fields = CASES[case]
    peft_config = peft.RandLoraConfig(r=3, randlora_alpha=3, target_modules=MODELS[kind][1], **fields)
    return peft.get_peft_model(make(case), peft_config).eval()


def peft_output(model):
    with torch.no_grad():
        kind = type(model.get_base_model()).__name__
        return model(X) if kind == "MLP" else model(input_ids=TOKENS).logits


@every_case
def test_the_same_parameters_train_as_in_peft(case, capsys):
    model, peft_model = ours(case), theirs(case)
    wanted = {
        name.removeprefix("base_model.model."): p.shape for name, p in peft_model.named_parameters() if p.requires_grad
    }
    assert {name: p.shape for name, p in model.named_parameters() if p.requires_grad} == wanted
    model.print_trainable_parameters()
    peft_model.print_trainable_parameters()
    line, _, by_peft = capsys.readouterr().out.splitlines()
    assert line == by_peft
    assert model.get_nb_trainable_parameters() == peft_model.get_nb_trainable_parameters()


@every_case
def test_files_of_peft_give_its_logits_bit_for_bit(case, tmp_path):
    peft_model = theirs(case)
    generator = torch.Generator().manual_seed(0)
    for _, parameter in sorted(peft_model.named_parameters()):
        if parameter.requires_grad:
            parameter.data.add_(torch.randn(parameter.shape, generator=generator) / 3)
    peft_model.save_pretrained(tmp_path)
    want = peft_output(peft_model)
    assert (want - output(make(case))).abs().max() > 0.05
    assert_same(output(load_adapter(make(case), tmp_path)), want)


@every_case
def test_our_files_give_peft_our_logits_bit_for_bit(case, tmp_path):
    model = randomize(ours(case))
    model.save_pretrained(tmp_path)
    assert_same(peft_output(peft.PeftModel.from_pretrained(make(case), tmp_path).eval()), output(model))


@every_case
def test_an_attached_adapter_is_set_to_the_values_in_files_of_peft(case, tmp_path):
    model = randomize(ours(case))
    theirs(case).save_pretrained(tmp_path)
    model.restore_adapter(tmp_path)
    assert_same(output(model), output(make(case)))


@pytest.mark.parametrize("fields", [{}, {"bias": "all"}, {"modules_to_save": ["pooler"]}], ids=str)
def test_twenty_adam_steps_of_a_classifier_are_pefts(fields):
    targets = ["query", "value"]
    options = {"r": 3, "randlora_alpha": 3, "target_modules": targets, "task_type": "SEQ_CLS", **fields}
    model = get_peft_model(bert(num_labels=3), config(targets, task_type="SEQ_CLS", **fields)).eval()
    peft_model = peft.get_peft_model(bert(num_labels=3), peft.RandLoraConfig(**options)).eval()
    labels = torch.tensor([0, 2])
    losses = {"ours": [], "theirs": []}
    for name, each in (("ours", model), ("theirs", peft_model)):
        optimizer = torch.optim.Adam([p for p in each.parameters() if p.requires_grad], lr=1e-2)
        for _ in range(20):
            optimizer.zero_grad()
            loss = each(input_ids=TOKENS, labels=labels).loss
            loss.backward()
            optimizer.step()
            losses[name].append(loss.item())
    np.testing.assert_allclose(losses["ours"], losses["theirs"], rtol=0, atol=1e-5)
    assert losses["ours"][-1] < 0.5 * losses["ours"][0]
    torch.testing.assert_close(output(model), peft_output(peft_model), rtol=0, atol=1e-5)
    named = {name.removeprefix("base_model.model."): p for name, p in peft_model.named_parameters()}
    for name, parameter in model.named_parameters():
        if name.endswith("key.bias"):  # attention ignores it: its gradient is rounding, which Adam blows up
            continue
        torch.testing.assert_close(parameter.data, named[name].data, rtol=0, atol=1e-5)


def with_more_tokens():
    torch.manual_seed(1)
    model = MODELS["Llama"][0]()
    model.resize_token_embeddings(48)
    return model


def peft_logits(model):
    with torch.no_grad():
        return model(input_ids=TOKENS).logits


def test_embeddings_that_peft_saved_along_are_loaded(tmp_path):
    options = {"r": 3, "randlora_alpha": 3, "target_modules": ["q_proj"], "init_weights": False}
    theirs = peft.get_peft_model(with_more_tokens(), peft.RandLoraConfig(**options)).eval()
    theirs.get_base_model().get_input_embeddings().weight.data.mul_(1.5)
    theirs.save_pretrained(tmp_path, save_embedding_layers=True)
    want = peft_logits(theirs)
    assert_same(output(load_adapter(with_more_tokens(), tmp_path)), want)
    small = MODELS["Llama"][0]()
    with pytest.raises(ValueError, match=r"embed_tokens\.weight: has shape \(48, 16\), the model's is \(40, 16\)"):
        load_adapter(small, tmp_path)
    assert type(small) is type(MODELS["Llama"][0]())


def test_embeddings_are_saved_along_if_asked_for_and_peft_loads_them(tmp_path):
    model = randomize(get_peft_model(with_more_tokens(), config(["q_proj"])))
    model.get_input_embeddings().weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "with", save_embedding_layers=True)
    model.save_pretrained(tmp_path / "without")
    want = output(model)
    assert_same(output(load_adapter(with_more_tokens(), tmp_path / "with")), want)
    assert_same(peft_logits(peft.PeftModel.from_pretrained(with_more_tokens(), tmp_path / "with").eval()), want)
    assert not torch.equal(output(load_adapter(with_more_tokens(), tmp_path / "without")), want)


def test_an_adapted_output_head_is_saved_along_under_pefts_name(tmp_path):
    targets = ["q_proj", "lm_head"]
    theirs = peft.get_peft_model(with_more_tokens(), peft.RandLoraConfig(r=3, target_modules=targets))
    theirs.save_pretrained(tmp_path / "theirs", save_embedding_layers=True)
    model = randomize(get_peft_model(with_more_tokens(), config(targets)))
    model.lm_head.base_layer.weight.data.mul_(1.5)
    model.save_pretrained(tmp_path / "ours", save_embedding_layers=True)
    ours, by_peft = (set(interop.load(tmp_path / which).saved_weights) for which in ("ours", "theirs"))
    assert by_peft == {"base_model.model.lm_head.base_layer.weight"}  # of the two, PEFT saves the one that is adapted
    assert ours == {*by_peft, "base_model.model.model.embed_tokens.weight"}
    again = peft.PeftModel.from_pretrained(with_more_tokens(), tmp_path / "ours").eval()
    assert_same(peft_logits(again), output(model))
    assert_same(output(load_adapter(with_more_tokens(), tmp_path / "ours")), output(model))


@pytest.mark.parametrize("sizes", ["unchanged", "changed"])
def test_new_tokens_are_saved_of_themselves_and_only_they(tmp_path, sizes):
    MODELS["Llama"][0]().save_pretrained(tmp_path / "base")
    model = type(MODELS["Llama"][0]()).from_pretrained(tmp_path / "base").eval()
    if sizes == "changed":
        model.resize_token_embeddings(48)
    randomize(get_peft_model(model, config(["q_proj"]))).save_pretrained(tmp_path / "adapter")
    names = set(interop.load(tmp_path / "adapter").saved_weights)
    kinds = {"model.embed_tokens", "lm_head"} if sizes == "changed" else set()
    assert names == {f"base_model.model.{name}.weight" for name in kinds}


def test_an_adapter_that_was_saved_with_its_embeddings_is_restored(tmp_path):
    model = randomize(get_peft_model(with_more_tokens(), config(["q_proj"])))
    want = output(model)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    randomize(model, seed=5)
    model.restore_adapter(tmp_path)
    assert_same(output(model), want)


def test_a_model_from_no_folder_is_not_compared_with_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"vocab_size": 7}')
    monkeypatch.chdir(tmp_path)
    get_peft_model(MODELS["Llama"][0](), config(["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert interop.load(tmp_path / "adapter").saved_weights == {}
