"""Supervised fine-tuning in 4 bits with transformers' Trainer; then save, reload, merge, and see what merging costs.

Run `python examples/08_sft_4bit_torch.py [--model FOLDER] [--text FILE ...]`. The task is to write the body of a Python
function from its first line, as the standard library would; only bodies count in the loss. Without --model, a small
byte-level Llama is trained first. `loss.png` shows the losses. It needs `pip install "randlora[bnb]" accelerate`, and
takes about two minutes on two CPU cores; the last line is

    the reloaded adapter gives the same logits; it is in runs/08_sft_4bit_torch/adapter
"""

import argparse
import importlib.util
import re
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

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

from randlora_torch import RandLoraConfig, get_peft_model, load_adapter

# Indentation, first line, and a body that does not begin with a docstring.
FUNCTION = re.compile(r"^( *)(def [^\n]{,120}:\n)(?! *\w?[\"'])((?:\1 +[^\n]*\n)+)", re.MULTILINE)
LONGEST, HELD_OUT = 256, 32  # tokens of an example, longer bodies are cut; examples to evaluate on
Example = dict[str, list[int]]


def main() -> None:
    """Train, save, reload, check, merge."""
    options = parse_arguments()
    out, folder = options.out, options.model or options.out / "base_model"
    if not options.model and not options.resume:
        train_base(folder, options.base_steps)
    training, held_out = load_examples(folder, options)

    config = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_4bit(folder), config)
    model.print_trainable_parameters()
    trainer = Trainer(model, training_arguments(out / "checkpoints", options), collate, training, held_out)
    trainer.train(resume_from_checkpoint=options.resume)
    first = next(float(entry["eval_loss"]) for entry in trainer.state.log_history if "eval_loss" in entry)
    losses = {"the 4-bit base": first, "the base with its adapter": trainer.evaluate()["eval_loss"]}
    trainer.save_model(out / "adapter")  # the same two files as in each checkpoint
    write_plot(out / "loss.png", trainer.state.log_history)

    again = load_adapter(load_4bit(folder), out / "adapter")
    if not torch.equal(logits(again, held_out), logits(model, held_out)):
        sys.exit("the reloaded adapter gives other logits")

    roundings = model.merge_adapter()  # 4 bits hold W + dW only roughly; unmerge_adapter restores W bit for bit
    losses["both merged into 4 bits"] = trainer.evaluate()["eval_loss"]
    print(*(f"held-out loss of {name}: {loss:.3f}" for name, loss in losses.items()), sep="\n")
    layer, worst = max(roundings.items(), key=lambda item: item[1].of_update)
    print(f"merging rounds most in {layer}: {worst.of_weight:.2g} of W + dW, {worst.of_update:.2g} of dW")
    print(f"the reloaded adapter gives the same logits; it is in {out / 'adapter'}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a causal language model (default: train a small one)")
    parser.add_argument("--text", type=Path, nargs="+", help="Python files to learn from (default: the library's)")
    parser.add_argument("--out", type=Path, default="runs/08_sft_4bit_torch", help="where to write")
    parser.add_argument("--steps", type=int, default=200, help="steps of the fine-tuning (default: %(default)s)")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.steps, options.base_steps = (4, 4) if options.smoke else (options.steps, 300)
    return options


def load_4bit(folder: Path) -> torch.nn.Module:
    """The base in NF4 with double quantization, on the GPU if there is one."""
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    nf4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
    quantization = BitsAndBytesConfig(**nf4, bnb_4bit_compute_dtype=dtype)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=quantization, device_map=device)


def load_examples(folder: Path, options: argparse.Namespace) -> tuple[list[Example], list[Example]]:
    """Functions to train on, and functions of later files to evaluate on."""
    if any(folder.glob("tokenizer*")):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        encode = lambda string: tokenizer(string, add_special_tokens=False)["input_ids"]  # noqa: E731
    else:
        encode = lambda string: list(string.encode())  # noqa: E731, one token per byte
    files = options.text or sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    found = FUNCTION.findall("\n".join(file.read_text(encoding="utf-8", errors="ignore") for file in files))
    if len(found) <= HELD_OUT:
        sys.exit(f"--text has {len(found)} functions, {HELD_OUT} of which are held out: give more Python files")
    found = found[:: max(1, len(found) // (4 * options.steps + HELD_OUT))]
    examples = [as_example(encode(indent + first), encode(body)) for indent, first, body in found]
    return examples[:-HELD_OUT], examples[-HELD_OUT:]


def as_example(prompt: list[int], completion: list[int]) -> Example:
    """Token ids, and labels, which are -100 (ignored by the loss) where the prompt is."""
    labels = [-100] * len(prompt) + completion
    return {"input_ids": (prompt + completion)[:LONGEST], "labels": labels[:LONGEST]}


def collate(examples: list[Example]) -> dict[str, torch.Tensor]:
    """A batch (B, T) of examples, padded on the right to the longest of them."""
    length = max(len(example["input_ids"]) for example in examples)
    rows = [example | {"attention_mask": [1] * len(example["input_ids"])} for example in examples]
    fillers = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    padded = {key: [row[key] + [filler] * (length - len(row[key])) for row in rows] for key, filler in fillers.items()}
    return {key: torch.tensor(value) for key, value in padded.items()}


def training_arguments(out: Path, options: argparse.Namespace) -> TrainingArguments:
    """Four checkpoints on the way, of the adapter and its optimizer alone: the base is never written."""
    return TrainingArguments(
        out,
        max_steps=options.steps,
        per_device_train_batch_size=4,
        learning_rate=2.5e-3,
        lr_scheduler_type="cosine",
        warmup_steps=options.steps // 10,
        save_steps=0.25,
        eval_on_start=True,
        eval_strategy="steps",
        eval_steps=0.25,
        logging_steps=0.05,
        disable_tqdm=not sys.stderr.isatty(),  # then the Trainer prints its log instead
        dataloader_pin_memory=torch.cuda.is_available(),
        report_to="none",
    )


@torch.no_grad()
def logits(model: torch.nn.Module, examples: list[Example]) -> torch.Tensor:
    """What the model says to one batch."""
    batch = {key: value.to(model.device) for key, value in collate(examples[:4]).items()}
    return model.eval()(**batch).logits


def write_plot(file: Path, history: list[dict[str, float]]) -> None:
    """The losses over the steps, if matplotlib is there."""
    if importlib.util.find_spec("matplotlib") is None:
        return
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, name, style in (("loss", "training functions", "-"), ("eval_loss", "held-out functions", "o--")):
        points = [(entry["step"], float(entry[key])) for entry in history if key in entry]
        axes.plot(*zip(*points, strict=True), style, label=name)
    axes.set(xlabel="optimizer step", ylabel="loss of function bodies (nats per token)")
    axes.set_title("RandLoRA on a 4-bit Llama: writing the bodies of Python functions")
    axes.legend(frameon=False)
    axes.grid(alpha=0.25)
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
