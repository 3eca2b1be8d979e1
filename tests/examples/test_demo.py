"""The demo, a few steps of everything, in a process of its own as a user would run it."""

import json

import pytest

import interop
from tests.examples.running import EXAMPLES, run_in_place


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("demo")
    return out, run_in_place(EXAMPLES / "demo" / "demo.py", "--out", out)


def test_the_demo_writes_adapter_picture_and_report(finished):
    out, lines = finished
    assert lines[-1] == f"wrote adapter, loss.png and report.md to {out}"
    adapter = interop.load(out / "adapter")
    assert len(adapter.modules) == 28
    assert any(part.any() for part in (lam for lam, _ in adapter.factors.values()))
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "report.md").read_text(encoding="utf-8")
    assert f"| RandLoRA | {adapter.num_trainable:,d} |" in report


def test_the_two_stacks_agree_in_the_demo(finished):
    report = (finished[0] / "report.md").read_text(encoding="utf-8")
    differences = [
        float(line.split(": ")[1].split()[0].rstrip(".")) for line in report.splitlines() if "n Flax" in line
    ]
    differences += [
        float(line.split(": ")[1].rstrip(".")) for line in report.splitlines() if "The same after going on" in line
    ]
    assert len(differences) == 2
    assert max(differences) < 1e-5


def save_llama_with_a_tokenizer(folder, corpus):
    """A model as a user has it: other sizes than the demo's own, and a tokenizer of its own."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([corpus], trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=tokenizer.get_vocab_size(), **sizes)).save_pretrained(folder)


@pytest.mark.slow
def test_the_demo_takes_a_users_own_model_tokenizer_and_text(tmp_path):
    corpus = " ".join(f"sentence {i} of my own text, größer than the one before;" for i in range(900))
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "mine.txt").write_text(corpus, encoding="utf-8")
    save_llama_with_a_tokenizer(tmp_path / "model", corpus)
    options = ["--model", tmp_path / "model", "--text", tmp_path / "text", "--out", tmp_path / "out"]
    run_in_place(EXAMPLES / "demo" / "demo.py", *options)
    config = json.loads((tmp_path / "out" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] == str(tmp_path / "model")
    assert len(interop.load(tmp_path / "out" / "adapter").modules) == 7
    assert not (tmp_path / "out" / "base_model").exists()
