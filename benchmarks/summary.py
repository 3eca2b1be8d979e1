"""The README's table: time of a step, memory and file of one model by each method, all measured in one run.

Run `python benchmarks/summary.py`. Claims at hidden size 512 with 8 x 512 tokens: a step takes at most 1.10 times the
time of PEFT's LoRA and less than PEFT's RandLoRA, the bases take half of PEFT's memory, the file a tenth of PEFT's.
"""

import tempfile
from pathlib import Path
from typing import Any

import llama
import measure
import memory
import model_step

HIDDEN, COUNT, ROUNDS = 512, 8, 8


def file_bytes(model: Any) -> int:
    """What saving writes: the adapter, or the whole model where all of it is trained."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def main() -> None:
    """Measure all methods, and check the claims."""
    models = {name: method(llama.base(HIDDEN)) for name, method in llama.METHODS.items()}
    seconds = measure.alternate(model_step.stepping(models, COUNT), rounds=ROUNDS)
    ids = llama.batches(1, COUNT)[0]
    head = ("method", "trainable parameters", "time of a step", "kept for backward, MiB", "bases, MiB", "file, MB")
    rows: list[tuple[str, ...]] = [head]
    times, bases, files = {}, {}, {}
    for name, model in models.items():
        times[name] = measure.bar(measure.ratios(seconds, name, "PEFT LoRA"))
        bases[name] = sum(basis.nbytes for basis in memory.bases_of(model)) / 2**20
        files[name] = file_bytes(model) / 1e6
        kept = memory.kept_bytes(model, ids) / 2**20
        trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
        ratio = "1" if name == "PEFT LoRA" else "{:.2f} ({:.2f} to {:.2f})".format(*times[name])
        shown = ratio, f"{kept:.0f}", f"{bases[name]:.1f}" if bases[name] else "-", f"{files[name]:.1f}"
        rows.append((name.replace("ours", "randlora"), f"{trainable:,d}", *shown))
    model = f"Llama of 2 layers, hidden {HIDDEN}, all 14 linear layers adapted, r = {llama.RANK}, float32"
    title = f"{model}, {COUNT} x {llama.LENGTH} tokens"
    measure.write("summary", title, rows, packages=("torch", "transformers", "peft"))
    assert times["ours"][0] <= min(1.10, times["PEFT RandLoRA"][0]), times
    assert bases["ours"] <= bases["PEFT RandLoRA"] / 2, bases
    assert files["ours"] <= files["PEFT RandLoRA"] / 10, files


if __name__ == "__main__":
    main()
