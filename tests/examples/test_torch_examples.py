"""The torch examples, a few steps of everything, each in a process of its own as a user would run it."""

import re
from pathlib import Path

import pytest

import interop
from tests.examples import running
from tests.examples.running import docstring

TUNE, SERVE, ADALORA = "08_sft_4bit_torch.py", "09_serve_adapters_torch.py", "10_adalora_4bit_torch.py"


def run(name, folder, *arguments):
    """The lines of an example and the folder that it writes to; its docstring says what the last line is."""
    lines = running.run(name, folder, *arguments)
    assert f"\n    {lines[-1]}\n" in docstring(name) + "\n"
    return lines, folder / "runs" / name.removesuffix(".py")


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return folder, *run(TUNE, folder)


def test_fine_tuning_in_4_bits_saves_reloads_and_merges(tuned):
    _, lines, out = tuned
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
    _, _, out = tuned
    checkpoints = sorted((out / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == [f"checkpoint-{step}" for step in range(1, 5)]
    assert {path.name for path in checkpoints[0].glob("*.safetensors")} == {"adapter_model.safetensors"}


@pytest.mark.slow
def test_fine_tuning_in_4_bits_goes_on_from_a_checkpoint(tuned):
    folder, _, out = tuned
    before = (out / "adapter" / "adapter_model.safetensors").read_bytes()
    for step in (3, 4):
        (out / "checkpoints" / f"checkpoint-{step}").rename(out / f"put-away-{step}")
    run(TUNE, folder, "--resume")
    assert (out / "adapter" / "adapter_model.safetensors").read_bytes() == before


def assert_serves(folder, *arguments):
    lines, out = run(SERVE, folder, *arguments)
    configs = {name: interop.load(out / name).config for name in ("code", "capitals", "leet")}
    assert {name: config.r for name, config in configs.items()} == {"code": 16, "capitals": 32, "leet": 8}
    assert configs["capitals"].sparse
    sizes = [int(found.replace(",", "")) for found in re.findall(r"([\d,]+) bytes", "\n".join(lines))]
    assert sizes[1] < sizes[0]  # deleting one adapter freed its memory


def test_adapters_of_three_kinds_are_served_on_one_base(tmp_path):
    assert_serves(tmp_path)


@pytest.mark.slow
def test_adapters_are_served_on_a_given_base_in_4_bits(tuned, tmp_path):
    assert_serves(tmp_path, "--nf4", "--model", tuned[2] / "base_model")


def assert_allocates(folder, *arguments):
    lines, out = run(ADALORA, folder, *arguments)
    adapter = interop.load(out / "adapter")
    ranks = {name: len(factors.E) for name, factors in adapter.factors.items()}
    assert len(ranks) == 28
    assert sum(ranks.values()) == 4 * 28
    assert len(set(ranks.values())) > 3
    shown = dict(re.findall(r"^  (\S+) +(\d+) #*$", "\n".join(lines), re.MULTILINE))
    assert {name: int(rank) for name, rank in shown.items()} == ranks
    assert (out / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_adalora_takes_ranks_from_a_4_bit_model_and_draws_what_is_left(tmp_path):
    assert_allocates(tmp_path)


@pytest.mark.slow
def test_adalora_in_4_bits_on_a_given_model_and_text(tuned, tmp_path):
    assert_allocates(tmp_path, "--model", tuned[2] / "base_model", "--text", __file__, Path(interop.__file__))
