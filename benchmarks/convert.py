"""Moving an adapter: between its folder, torch and JAX, beside PEFT's own loading.

Run `python benchmarks/convert.py`. Claims: what goes from torch through JAX to a folder is equal byte by byte to what
torch saves itself, and each way takes at most the time in which PEFT loads the same adapter on its model.
"""

import copy
import tempfile
import textwrap
from pathlib import Path

import jax
import llama
import measure
from peft import PeftModel

import interop
import randlora_torch

HIDDEN, ROUNDS = 512, 7


def main() -> None:
    """Measure every way, and check the claims."""
    base = llama.base(HIDDEN)
    model = llama.ours(copy.deepcopy(base), init_weights=False)
    with tempfile.TemporaryDirectory() as temporary:
        folder, moved = Path(temporary, "torch"), Path(temporary, "moved")
        model.save_pretrained(folder)
        in_jax = interop.convert(folder, to="jax")
        in_jax.save_pretrained(moved)
        for file in ("adapter_config.json", "adapter_model.safetensors"):
            assert (moved / file).read_bytes() == (folder / file).read_bytes(), f"{file} differs"
        ways = {
            "folder to torch": lambda: interop.convert(folder, to="torch"),
            "folder to JAX": lambda: jax.block_until_ready(interop.convert(folder, to="jax").trainable),
            "torch model to JAX": lambda: jax.block_until_ready(interop.convert(model, to="jax").trainable),
            "JAX to torch": lambda: interop.convert(in_jax, to="torch"),
            "JAX to a folder": lambda: in_jax.save_pretrained(moved),
            "folder onto a torch model": lambda: randlora_torch.load_adapter(copy.deepcopy(base), folder),
            "PEFT, folder onto a model": lambda: PeftModel.from_pretrained(copy.deepcopy(base), folder),
        }
        seconds = measure.alternate(ways, rounds=ROUNDS)
    reference = "PEFT, folder onto a model"
    found = {name: measure.ratios(seconds, name, reference) for name in ways}
    rows: list[tuple[str, ...]] = [("way", "time, ms", "of PEFT's loading")]
    rows += [(name, measure.spread(seconds[name]), f"{measure.bar(found[name])[0]:.2f}") for name in ways]
    title = f"Moving an adapter of a Llama, hidden {HIDDEN}, 14 adapted layers, r = {llama.RANK}"
    measure.write("convert", title, rows, packages=("numpy", "torch", "jax", "peft"))
    labels = [textwrap.fill(name, 12) for name in ways]
    bars = {"time": [measure.bar(values) for values in found.values()]}
    measure.draw("convert", title, labels, bars, "time relative to PEFT's loading")
    above = {name: measure.bar(values)[0] for name, values in found.items() if measure.bar(values)[0] > 1}
    assert not above, above


if __name__ == "__main__":
    main()
