"""The torch examples, a few steps of everything, each in a process of its own as a user would run it."""

import re

import pytest

import interop
from tests.examples.running import EXAMPLES, assert_is_short, assert_tells_the_last_line, run


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    out = tmp_path_factory.mktemp("sft")
    return out, run("sft_4bit.py", "--out", out)


def test_fine_tuning_in_4_bits_saves_reloads_and_merges(tuned):
    out, lines = tuned
    assert lines[-1] == f"the reloaded adapter gives the same logits; it is in {out / 'adapter'}"
    assert_tells_the_last_line("sft_4bit.py", lines[-1], out)
    adapter = interop.load(out / "adapter")
    assert len(adapter.modules) == 28
    assert any(lam.any() for lam, _ in adapter.factors.values())
    assert f"trainable params: {adapter.num_trainable:,d} || all params: " in "\n".join(lines)
    (merging,) = [line for line in lines if line.startswith("merging rounds most in model.layers.")]
    of_weight, of_update = map(float, re.findall(r"([\d.e-]+) of (?:W \+ dW|dW)", merging))
    assert 0.02 < of_weight < 0.2  # what NF4 does to a normal weight, about 9 percent
    assert of_weight < of_update
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_fine_tuning_in_4_bits_writes_checkpoints_of_the_adapter_alone(tuned):
    out, _ = tuned
    checkpoints = sorted((out / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [f"checkpoint-{step}" for step in range(1, 5)]
    assert {path.name for path in checkpoints[0].glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.slow
def test_fine_tuning_in_4_bits_goes_on_from_a_checkpoint(tuned):
    out, _ = tuned
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    for step in (3, 4):
        (out / "checkpoints" / f"checkpoint-{step}").rename(out / f"put-away-{step}")
    run("sft_4bit.py", "--out", out, "--resume")
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before


def served(tmp_path, *arguments):
    lines = run("serve_adapters.py", "--out", tmp_path, *arguments)
    want = "every row of the mixed batch is that of its adapter alone; the adapters are in"
    assert lines[-1] == f"{want} {tmp_path}"
    assert_tells_the_last_line("serve_adapters.py", lines[-1], tmp_path)
    assert {name: interop.load(tmp_path / name).config.r for name in ("code", "capitals", "leet")} == {
        "code": 16,
        "capitals": 32,
        "leet": 8,
    }
    assert interop.load(tmp_path / "capitals").config.sparse
    sizes = [int(found.replace(",", "")) for found in re.findall(r"([\d,]+) bytes", "\n".join(lines))]
    assert sizes[1] < sizes[0]  # deleting one adapter freed its memory


def test_adapters_of_three_kinds_are_served_on_one_base(tuned, tmp_path):
    served(tmp_path, "--model", tuned[0] / "base_model")


@pytest.mark.slow
def test_adapters_are_served_on_a_base_in_4_bits_that_the_example_trained_itself(tmp_path):
    served(tmp_path, "--nf4")


def allocated(out, *arguments):
    lines = run("adalora_4bit.py", "--out", out, *arguments)
    assert lines[-1] == f"the reloaded adapter gives the same logits; it is in {out / 'adapter'}"
    assert_tells_the_last_line("adalora_4bit.py", lines[-1], out)
    adapter = interop.load(out / "adapter")
    ranks = {name: len(factors.E) for name, factors in adapter.factors.items()}
    assert len(ranks) == 28
    assert sum(ranks.values()) == 4 * 28
    assert len(set(ranks.values())) > 3
    shown = dict(re.findall(r"^  (\S+) +(\d+) #*$", "\n".join(lines), re.MULTILINE))
    assert {name: int(rank) for name, rank in shown.items()} == ranks
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_adalora_takes_ranks_from_a_4_bit_model_and_draws_what_is_left(tuned, tmp_path):
    allocated(tmp_path, "--model", tuned[0] / "base_model", "--text", EXAMPLES)


@pytest.mark.slow
def test_adalora_in_4_bits_on_a_base_that_the_example_trained_itself(tmp_path):
    allocated(tmp_path)


@pytest.mark.parametrize("name", ["sft_4bit.py", "serve_adapters.py", "adalora_4bit.py"])
def test_an_example_is_short_and_has_few_options(name):
    assert_is_short(name)
