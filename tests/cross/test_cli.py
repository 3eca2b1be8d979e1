"""Every command of `randlora` as users run it: a process of its own, the examples of its --help, its complaints."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import models
import numpy as np
import pytest
import torch
import transformers
from strategies import draw_adapter

import interop
import randlora_torch
from interop.cli import COMMANDS

ROOT = Path(interop.__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folders that the examples name: adapters on a small Llama, and the Llama, also in 4 bits."""
    folder = tmp_path_factory.mktemp("cli")
    model = models.llama()
    model.save_pretrained(folder / "base")
    config = models.our_config(models.CASES["llama"][1])
    for seed, name in enumerate(("adapter", "other")):
        adapter = interop.convert(randlora_torch.get_peft_model(models.llama(), config), to="peft")
        rng = np.random.default_rng(seed)
        for lam, gamma in adapter.factors.values():
            lam[...] = 0.05 * rng.standard_normal(lam.shape)
            gamma *= 1 + 0.5 * rng.standard_normal(gamma.shape).astype(np.float32)
        interop.save(adapter, folder / name)
    interop.save(interop.load(folder / "adapter"), folder / "rewritten")
    four_bits = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", quantization_config=four_bits)
    quantized.save_pretrained(folder / "base-4bit")
    return folder


def run(folder, *arguments, **environment):
    """The installed command, with the sources of this checkout."""
    command = Path(sys.executable).with_name("randlora")
    env = os.environ | {"PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [command, *arguments],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


def examples(command):
    """The command lines in a help text, without what is said of them."""
    lines = [line.strip() for line in COMMANDS[command].EXAMPLES.splitlines()]
    return [shlex.split(line.split("   ")[0])[1:] for line in lines]


EXAMPLES = [tuple(line) for name in COMMANDS for line in examples(name)]
NOT_SAME = [("diff", "adapter", "other"), ("diff", "adapter", "other", "--json")]


def test_help_shows_every_command_and_its_examples(folder):
    overall = run(folder, "--help")
    assert overall.returncode == 0
    assert overall.stdout.isascii()
    for name, command in COMMANDS.items():
        assert name in overall.stdout
        own = run(folder, name, "--help")
        assert own.returncode == 0
        assert own.stdout.isascii()
        assert all(f"  {line}\n" in own.stdout for line in command.EXAMPLES.splitlines())
        assert "exit codes: 0 done, or the same; 1 verify and diff: not the same; 2 it could not be done" in own.stdout


# The README verifies with both stacks as well, which takes the time to import them.
SLOW = [("verify", "adapter", "rewritten")]


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=pytest.mark.slow if line in SLOW else ()) for line in EXAMPLES], ids=" ".join
)
def test_the_examples_of_the_help_do_what_they_say(folder, line):
    done = run(folder, *line)
    assert "randlora" not in done.stderr  # libraries that are imported may have something to say
    assert done.returncode == (1 if line in NOT_SAME else 0), done.stdout + done.stderr
    assert done.stdout.isascii()
    if "--json" in line:
        json.loads(done.stdout)
    else:
        assert done.stdout.splitlines()


def test_what_the_examples_wrote_is_what_they_say(folder):
    for line in EXAMPLES:
        if (
            line[0] in ("convert", "merge", "export-lora")
            and not (folder / line[2 if line[0] != "merge" else 3]).exists()
        ):
            run(folder, *line)
    adapter = interop.load(folder / "adapter")
    for name in ("rewritten", "small", "wide"):
        assert interop.verify(adapter, folder / name, stacks=()).passed
    sizes = [(folder / name / "adapter_model.safetensors").stat().st_size for name in ("small", "rewritten", "wide")]
    assert sizes == sorted(sizes)
    tokens = models.tokens()
    want = models.logits(randlora_torch.load_adapter(models.llama(), adapter).eval(), tokens)
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(models.logits(merged, tokens), want, rtol=0, atol=2e-6)
    assert "quantization_config" in json.loads((folder / "merged-4bit" / "config.json").read_text())


def test_transformers_own_load_adapter_computes_the_same_from_copies_per_layer(folder):
    if not (folder / "wide").exists():
        run(folder, "convert", "adapter", "wide", "--bases", "per-layer")
    model = models.llama()
    model.load_adapter(str(folder / "wide"))
    tokens = models.tokens()
    want = models.logits(randlora_torch.load_adapter(models.llama(), folder / "adapter").eval(), tokens)
    assert (want - models.logits(models.llama(), tokens)).abs().max() > 0.1
    torch.testing.assert_close(models.logits(model.eval(), tokens), want, rtol=0, atol=2e-6)


def test_a_file_by_peft_without_bases_is_sized_by_its_base_model(folder):
    interop.save(interop.load(folder / "adapter"), folder / "bare", bases="none")
    path = folder / "bare" / "adapter_model.safetensors"
    from safetensors.numpy import load_file, save_file

    save_file(load_file(path), path, {"format": "pt"})  # PEFT writes no notes
    unknown = run(folder, "inspect", "bare")
    assert "unknown, as the file does not say how large the layers are" in unknown.stdout
    facts = json.loads(run(folder, "inspect", "bare", "--base-model", "base", "--json").stdout)
    whole = json.loads(run(folder, "inspect", "adapter", "--json").stdout)
    assert facts["recipes"] == whole["recipes"]
    assert facts["recipe"] == "torch>=2.12"
    warned = run(folder, "verify", "adapter", "bare", "--base-model", "base", "--stacks", "none")
    assert warned.returncode == 0
    assert warned.stderr.startswith("randlora verify: warning: ")
    assert "they will be rebuilt with 'torch>=2.12'" in warned.stderr
    named = ("verify", "adapter", "bare", "--base-model", "base", "--stacks", "none", "--recipe")
    assert run(folder, *named, "torch>=2.12").stderr == ""
    legacy = run(folder, "diff", "adapter", "bare", "--base-model", "base", "--recipe", "torch<=2.11")
    assert legacy.returncode == 2
    assert "the file names the recipe 'torch>=2.12', but recipe='torch<=2.11' was passed" in legacy.stderr


COMPLAINTS = {
    (
        "inspect",
        "nowhere",
    ): "randlora inspect: nowhere is not a folder. Pass the folder that holds adapter_config.json.\n",
    ("convert", "base", "x"): "randlora convert: base holds no adapter_config.json.\n",
    ("verify", "adapter", "base"): "randlora verify: base holds no adapter_config.json.\n",
    (
        "diff",
        "adapter",
        "pickled",
    ): "randlora diff: pickled holds adapter_model.bin, a pickle, which can run code when it",
    ("merge", "adapter", "base", "base"): "randlora merge: the target base is the base itself, which is not changed.",
    (
        "merge",
        "adapter",
        "adapter",
        "x",
    ): "randlora merge: adapter holds neither model.safetensors nor model.safetensors.",
    (
        "export-lora",
        "adapter",
        "other",
        "--rank",
        "4",
    ): "randlora export-lora: other holds an adapter of type 'RANDLORA'",
    ("export-lora", "adapter", "x", "--rank", "0"): "randlora export-lora: rank=0: must be at least 1.",
    (
        "inspect",
        "adapter",
        "--adapter-name",
        "b",
    ): "randlora inspect: adapter holds no adapter 'b': it has ['default'].\n",
    ("inspect", "cut"): "randlora inspect: cut/adapter_model.safetensors is not a valid safetensors file",
    ("inspect", "evil"): "randlora inspect: evil/adapter_config.json is not a valid config of an adapter: r='\\x1b[2J'",
}


@pytest.fixture(scope="module")
def broken(folder):
    (folder / "pickled").mkdir()
    for name in ("adapter_config.json", "adapter_model.bin"):
        (folder / "pickled" / name).write_text("{}")
    interop.save(draw_adapter(), folder / "cut")
    path = folder / "cut" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    interop.save(draw_adapter(), folder / "evil")
    (folder / "evil" / "adapter_config.json").write_text('{"r": "\\u001b[2J"}')
    return folder


@pytest.mark.parametrize("line", COMPLAINTS, ids=" ".join)
def test_complaints_are_one_message_on_stderr_with_exit_code_2(broken, line):
    done = run(broken, *line)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(COMPLAINTS[line])
    assert "Traceback" not in done.stderr
    assert not (broken / "x").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("train",), "argument COMMAND: invalid choice: 'train' (choose from "),
        ((), "the following arguments are required: COMMAND"),
        (("inspect",), "the following arguments are required: folder"),
        (("convert", "adapter", "x", "--bases", "two"), "argument --bases: invalid choice: 'two' (choose from "),
        (("verify", "adapter", "--recipe", "torch"), "argument --recipe: invalid choice: 'torch' (choose from "),
    ],
)
def test_a_wrong_command_line_shows_the_usage_with_exit_code_2(folder, line, message):
    done = run(folder, *line)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: randlora")
    assert message in done.stderr


def test_an_adapter_that_changed_is_not_the_same_with_exit_code_1(folder):
    done = run(folder, "verify", "adapter", "other", "--stacks", "none")
    assert done.returncode == 1
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1].startswith("NOT the same: 14 layers")


def test_names_in_files_cannot_write_to_the_terminal(folder):
    name = "layer\x1b[2J.\u202eq"
    interop.save(draw_adapter(shapes={name: (4, 4)}, r=2, target_modules=[name]), folder / "names")
    done = run(folder, "inspect", "names", PYTHONIOENCODING="utf-8")
    assert done.returncode == 0
    assert "  layer\\x1b[2J.\\u202eq  " in done.stdout


def test_what_a_reader_no_longer_wants_is_no_error(folder):
    command = f"{shlex.quote(str(Path(sys.executable).with_name('randlora')))} inspect adapter --json | head -c 10"
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, shell=True, cwd=folder, env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr, len(done.stdout)) == (0, "", 10)
