"""The command line on an adapter of the size of Llama-7B's, all linear layers: `pytest -m scale`, minutes and 3 GB."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import interop
from interop import RandLoraConfig

pytestmark = [
    pytest.mark.scale,
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from Linux's /proc"),
]

HIDDEN, MIDDLE, LAYERS, R = 4096, 11008, 32, 32
LINEAR = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (MIDDLE, HIDDEN)),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in LINEAR.items()}
ONE_LAYER = HIDDEN * MIDDLE * 8  # dW in float64
MEASURED = """
import re, sys
from pathlib import Path
from interop.cli import main
code = main(sys.argv[1:])
peak = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]  # ru_maxrss begins with the parent's
print(peak, file=sys.stderr)
sys.exit(code)
"""


def made_up(shapes, seed=0):
    """An adapter as after training; numbers are drawn in float32, layer by layer."""
    config = RandLoraConfig(r=R, target_modules=[name.split(".")[-1] for name in LINEAR], task_type="CAUSAL_LM")
    rng = np.random.default_rng(seed)
    adapter = interop.init_adapter(config, shapes)
    for lam, gamma in adapter.factors.values():
        lam[...] = 0.05 * rng.standard_normal(lam.shape, np.float32)
        gamma *= 1 + 0.5 * rng.standard_normal(gamma.shape, np.float32)
    return adapter


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """`adapter`; `changed`, of which one number is another; and `small`, which takes the memory of Python alone."""
    folder = tmp_path_factory.mktemp("scale")
    adapter = made_up(SHAPES)
    assert adapter.num_trainable == 118_358_016
    interop.save(adapter, folder / "adapter")
    name = "model.layers.7.mlp.down_proj"
    lam, gamma = adapter.factors[name]
    lam[0, 0] += 1
    interop.save(adapter, folder / "changed")
    del adapter, lam, gamma
    interop.save(made_up({"model.layers.0.self_attn.q_proj": (64, 64)}), folder / "small")
    return folder


def run(folder, *arguments):
    """Exit code, output and peak resident memory in bytes of one `randlora` process."""
    environment = os.environ | {"PYTHONPATH": str(Path(interop.__file__).parent.parent)}
    command = [sys.executable, "-c", MEASURED, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, 1024 * int(done.stderr.split()[-1])


CASES = {
    "convert": (["convert", "adapter", "converted"], ["convert", "small", "small-converted"], 0),
    "convert without bases": (["convert", "adapter", "bare", "--bases", "none"], ["inspect", "small"], 0),
    "inspect": (["inspect", "adapter"], ["inspect", "small"], 0),
    "verify": (["verify", "adapter", "converted", "--stacks", "none"], ["verify", "small", "--stacks", "none"], 0),
    "verify changed": (
        ["verify", "adapter", "changed", "--stacks", "none"],
        ["verify", "small", "--stacks", "none"],
        1,
    ),
    "diff": (["diff", "adapter", "changed"], ["diff", "small", "small"], 1),
    "export-lora": (
        ["export-lora", "adapter", "lora", "--rank", "16"],
        ["export-lora", "small", "s", "--rank", "16"],
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_memory_holds_no_more_than_the_adapter_and_one_layer(folder, case):
    command, small, code = CASES[case]
    size = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
    of_python = run(folder, *small)[2]
    returned, out, peak = run(folder, *command)
    assert returned == code, out
    print(f"\n{case}: {(peak - of_python) / size:.2f} of the adapter's {size / 1e6:.0f} MB")
    assert peak - of_python < 1.3 * size + ONE_LAYER
