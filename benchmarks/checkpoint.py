"""The adapter file: size, time to save and time to load, ours against PEFT's, for the same adapter.

Run `python benchmarks/checkpoint.py`. Claim: with n adapted layers, PEFT's file holds n + 1 copies of the bases and
ours one, in half the bytes; ours is at most a tenth of PEFT's size for 28 layers.
"""

import copy
import tempfile
from pathlib import Path

import measure
from peft import PeftModel, get_peft_model
from peft import RandLoraConfig as PeftConfig
from transformers import LlamaConfig, LlamaForCausalLM

import interop
import randlora_torch

LAYERS, HIDDEN = 4, 512
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def main() -> None:
    """Measure both writers and readers, and check the claim."""
    config = LlamaConfig(hidden_size=HIDDEN, intermediate_size=3 * HIDDEN, num_hidden_layers=LAYERS, vocab_size=256)
    config.num_attention_heads = config.num_key_value_heads = 8
    base = LlamaForCausalLM(config)
    options = {"r": 32, "target_modules": TARGETS}
    theirs = get_peft_model(copy.deepcopy(base), PeftConfig(**options))
    ours = randlora_torch.get_peft_model(copy.deepcopy(base), interop.RandLoraConfig(**options))
    with tempfile.TemporaryDirectory() as folder:
        folders = {"PEFT": Path(folder, "peft"), "ours": Path(folder, "ours")}
        saving = measure.alternate(
            {
                "PEFT": lambda: theirs.save_pretrained(folders["PEFT"]),
                "ours": lambda: ours.save_pretrained(folders["ours"]),
            },
            rounds=5,
        )
        loading = measure.alternate(
            {
                "PEFT": lambda: PeftModel.from_pretrained(copy.deepcopy(base), folders["PEFT"]),
                "ours": lambda: randlora_torch.load_adapter(copy.deepcopy(base), folders["ours"]),
            },
            rounds=5,
        )
        size = {name: (path / "adapter_model.safetensors").stat().st_size for name, path in folders.items()}
    rows: list[tuple[str, ...]] = [("writer", "file, MB", "save, ms", "load, ms")]
    for name in folders:
        rows.append((name, f"{size[name] / 1e6:.1f}", measure.spread(saving[name]), measure.spread(loading[name])))
    title = f"Adapter file: Llama, hidden {HIDDEN}, {LAYERS * len(TARGETS)} adapted layers, r = 32"
    measure.write("checkpoint", title, rows, packages=("torch", "peft", "safetensors"))
    relative = {
        "size of the file": [(size[name] / size["PEFT"],) * 3 for name in folders],
        "time to save": [measure.bar(measure.ratios(saving, name, "PEFT")) for name in folders],
        "time to load": [measure.bar(measure.ratios(loading, name, "PEFT")) for name in folders],
    }
    by_writer = {name: [bars[place] for bars in relative.values()] for place, name in enumerate(folders)}
    measure.draw("checkpoint", title, list(relative), by_writer, "relative to PEFT")
    assert size["ours"] < size["PEFT"] / 10, size


if __name__ == "__main__":
    main()
