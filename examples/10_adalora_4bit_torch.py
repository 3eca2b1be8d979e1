"""AdaLoRA on a 4-bit model: all layers start with rank 12, training takes it where it matters least; see what is left.

Run `python examples/10_adalora_4bit_torch.py [--model FOLDER] [--text FILE ...]`. A model of Python's manual learns to
write the source code of its library. Without --model, a small byte-level Llama is trained first. `ranks.png` shows the
rank of each layer. It needs `pip install "randlora[bnb]" accelerate`, and takes about two minutes on two CPU cores; the
last line is

    the reloaded adapter gives the same logits; it is in runs/10_adalora_4bit_torch/adapter
"""

import argparse
import importlib.util
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

from randlora_torch import AdaLoraCallback, AdaLoraConfig, get_peft_model, load_adapter

LENGTH, HELD_OUT = 256, 32  # tokens of an example; examples to evaluate on
INIT_R, TARGET_R = 12, 4  # the rank of each layer at first, and on average in the end


def main() -> None:
    """Train, print and draw the ranks, save, reload, check."""
    options = parse_arguments()
    out, folder = options.out, options.model or options.out / "base_model"
    if not options.model:
        train_base(folder, options.base_steps)
    training, held_out = load_examples(folder, options)

    config = AdaLoraConfig(
        init_r=INIT_R,
        target_r=TARGET_R,
        total_step=options.steps,
        tinit=options.steps // 10,  # a while with all ranks, to learn what matters
        tfinal=options.steps // 3,  # and a while with those that are left
        lora_alpha=2 * INIT_R,
        orth_reg_weight=0.1,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(load_4bit(folder), config)
    model.print_trainable_parameters()
    trainer = Trainer(model, training_arguments(out, options), None, training, held_out, callbacks=[AdaLoraCallback()])
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    print(f"held-out loss: {before:.3f} before, {trainer.evaluate()['eval_loss']:.3f} after")
    show_ranks(model.ranks(), out / "ranks.png")
    trainer.save_model(out / "adapter")  # the ranks that are left; PEFT reads it, too

    again = load_adapter(load_4bit(folder), out / "adapter")
    if not torch.allclose(logits(again, held_out), logits(model, held_out), atol=1e-3):
        sys.exit("the reloaded adapter gives other logits")
    print(f"the reloaded adapter gives the same logits; it is in {out / 'adapter'}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model (default: train a small one)")
    parser.add_argument("--text", type=Path, nargs="+", help="text files to learn from (default: the library's code)")
    parser.add_argument("--out", type=Path, default="runs/10_adalora_4bit_torch", help="where to write")
    parser.add_argument("--steps", type=int, default=300, help="steps of the fine-tuning (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.steps, options.base_steps = (6, 4) if options.smoke else (options.steps, 300)
    return options


def load_4bit(folder: Path) -> torch.nn.Module:
    """The base in NF4 with double quantization, on the GPU if there is one."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map=device)


def load_examples(folder: Path, options: argparse.Namespace) -> tuple[list[dict], list[dict]]:
    """Random crops of the text to train on, and of its last tenth to evaluate on."""
    files = options.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    data = b"\n\n".join(file.read_bytes() for file in files)
    tokens = torch.tensor(list(data))  # one per byte, unless the model has a tokenizer
    if any(folder.glob("tokenizer*")):
        tokens = torch.tensor(AutoTokenizer.from_pretrained(folder)(data.decode(errors="ignore"))["input_ids"])
    boundary = len(tokens) * 9 // 10
    if len(tokens) - boundary <= LENGTH:
        sys.exit(f"--text has {len(tokens)} tokens, but a tenth of it must be more than {LENGTH}: give more text")
    return crops(tokens[:boundary], 4 * options.steps), crops(tokens[boundary:], 4 if options.smoke else HELD_OUT)


def crops(tokens: torch.Tensor, count: int) -> list[dict]:
    """Examples for the Trainer; labels are the inputs, which the model shifts by one."""
    starts = torch.randint(len(tokens) - LENGTH, (count, 1), generator=torch.Generator().manual_seed(0))
    return [{"input_ids": row, "labels": row} for row in tokens[starts + torch.arange(LENGTH)]]


def training_arguments(out: Path, options: argparse.Namespace) -> TrainingArguments:
    """Two checkpoints; training resumes from them exactly, allocator and all."""
    return TrainingArguments(
        out / "checkpoints",
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=5e-3,
        lr_scheduler_type="cosine",
        save_steps=0.5,
        logging_steps=0.1,
        disable_tqdm=not sys.stderr.isatty(),  # then the Trainer prints its log instead
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


@torch.no_grad()
def logits(model: torch.nn.Module, examples: list[dict]) -> torch.Tensor:
    """What the model says to one batch."""
    return model.eval()(torch.stack([example["input_ids"] for example in examples[:4]]).to(model.device)).logits


def show_ranks(ranks: dict[str, int], file: Path) -> None:
    """The layers by rank; and a map with a column per block and a row per projection, if matplotlib is there."""
    print(f"rank left of {INIT_R} in each layer, {sum(ranks.values()) / len(ranks):.1f} on average:")
    for name, rank in sorted(ranks.items(), key=lambda item: -item[1]):
        print(f"  {name:<{max(map(len, ranks))}}  {rank:>3} {'#' * rank}")
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    blocks = sorted({int(name.split(".layers.")[1].split(".")[0]) for name in ranks})
    projections = list(dict.fromkeys(name.rsplit(".", 1)[1] for name in ranks))
    grid = np.zeros((len(projections), len(blocks)))
    for name, rank in ranks.items():
        grid[projections.index(name.rsplit(".", 1)[1]), int(name.split(".layers.")[1].split(".")[0])] = rank
    figure = Figure(figsize=(3.5 + 0.6 * len(blocks), 1.6 + 0.4 * len(projections)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(grid, cmap="viridis", vmin=0, vmax=INIT_R, aspect="auto")
    for (y, x), rank in np.ndenumerate(grid):
        axes.text(x, y, f"{rank:.0f}", ha="center", va="center", color="white" if rank < INIT_R / 2 else "black")
    axes.set(xlabel="block of the model", xticks=blocks, ylabel="adapted layer of the block")
    axes.set(title=f"Rank that AdaLoRA left each layer; all began with {INIT_R}")
    axes.set_yticks(range(len(projections)), projections)
    figure.colorbar(image, label="rank")
    figure.savefig(file, dpi=150)


# A stand-in for your model: a Llama of 0.9 million parameters that reads bytes, trained on the manual of Python.
def train_base(folder: Path, steps: int) -> None:
    """Train it for some steps and save it; bitsandbytes wants sizes that are multiples of 64."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4}
    sizes |= {"vocab_size": 256, "num_key_value_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, bos_token_id=None, eos_token_id=None))
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    tokens = torch.tensor(list("".join(topics.values()).encode()))
    for step in range(1, steps + 1):
        batch = tokens[torch.randint(len(tokens) - 128, (8, 1)) + torch.arange(128)]  # (B, T)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"base model: step {step}/{steps}, loss {loss.item():.3f}", file=sys.stderr)
    model.save_pretrained(folder)


if __name__ == "__main__":
    main()
