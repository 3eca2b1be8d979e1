"""A training step on a GPU at Llama-3.2-3B's sizes: ours, PEFT's RandLoRA, LoRA and full fine-tuning.

Run `python benchmarks/gpu_step.py` on a machine with a CUDA device; it takes some minutes. Everything runs under
bfloat16 autocast, as in transformers' Trainer with bf16=True. A second table says for each layer what Triton's kernels
and torch took for the folded weight and its gradient, and which of them is used from then on.
"""

import argparse
import dataclasses
import gc
import importlib.util
import math
import time
from collections.abc import Callable

import measure
import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import randlora_torch
from interop import RandLoraConfig
from randlora_torch.gradients import Operands
from randlora_torch.kernel_choice import TORCH, kernel_choices

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 32
PACKAGES = ("torch", "transformers", "peft")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What the model is made of; by default two layers of Llama-3.2-3B, and few words, as those cost all the same."""

    hidden: int = 3072
    intermediate: int = 8192
    heads: int = 24
    kv_heads: int = 8
    layers: int = 2
    vocabulary: int = 2048
    tokens: tuple[int, ...] = (2048, 8192)
    sequence: int = 1024
    rounds: int = 10

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """(out, in) of the adapted layers, each once."""
        hidden, keys = self.hidden, self.hidden // self.heads * self.kv_heads
        return [(hidden, hidden), (keys, hidden), (self.intermediate, hidden), (hidden, self.intermediate)]


SMOKE = Sizes(64, 128, 4, 2, layers=1, vocabulary=64, tokens=(32,), sequence=16, rounds=1)


def llama(sizes: Sizes, device: str, quantized: bool) -> nn.Module:
    """The base model in bfloat16 with random weights; its linear layers in NF4 if asked for."""
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        intermediate_size=sizes.intermediate,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        num_hidden_layers=sizes.layers,
        vocab_size=sizes.vocabulary,
        use_cache=False,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    return (in_4_bits(model) if quantized else model).to(device).train()


def in_4_bits(model: nn.Module) -> nn.Module:
    """The model with its target layers packed, which happens when they are moved to a device."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for parent in model.modules():
        for name, layer in parent.named_children():
            if name in TARGETS:
                options = {"bias": False, "compute_dtype": torch.bfloat16, "quant_type": "nf4"}
                packed = Linear4bit(layer.in_features, layer.out_features, **options)
                packed.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4")
                setattr(parent, name, packed)
    return model


METHODS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "LoRA (PEFT)": lambda model: peft.get_peft_model(model, peft.LoraConfig(r=RANK, target_modules=TARGETS)),
    "RandLoRA, ours": lambda model: randlora_torch.get_peft_model(
        model, RandLoraConfig(r=RANK, target_modules=TARGETS)
    ),
    "RandLoRA, PEFT": lambda model: peft.get_peft_model(model, peft.RandLoraConfig(r=RANK, target_modules=TARGETS)),
    "full fine-tuning": lambda model: model,
}


def step_of(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    """Forward, backward and AdamW."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        with torch.autocast(tokens.device.type, torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def timed(step: Callable[[], None], rounds: int, device: str) -> tuple[list[float], float]:
    """Seconds of each step, and the peak of memory in GiB; kernels are chosen in the steps before that."""
    on_gpu = device != "cpu"
    for _ in range(3 if on_gpu else 1):
        step()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(rounds):
        torch.cuda.synchronize() if on_gpu else None
        start = time.perf_counter()
        step()
        torch.cuda.synchronize() if on_gpu else None
        seconds.append(time.perf_counter() - start)
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if on_gpu else math.nan


def steps(sizes: Sizes, device: str) -> list[tuple[str, ...]]:
    """The table of steps, one model at a time."""
    rows: list[tuple[str, ...]] = [("base", "tokens", "method", "step, ms", "of LoRA", "peak memory, GiB")]
    bases = ["bf16", "nf4"] if importlib.util.find_spec("bitsandbytes") else ["bf16"]
    for base in bases:
        for count in sizes.tokens:
            ids = torch.randint(sizes.vocabulary, (count // sizes.sequence, sizes.sequence), device=device)
            unit = math.nan
            for method, adapt in METHODS.items():
                if base == "nf4" and method == "full fine-tuning":
                    continue
                step = step_of(adapt(llama(sizes, device, base == "nf4")), ids)
                seconds, memory = timed(step, sizes.rounds, device)
                del step
                gc.collect()
                middle = sorted(seconds)[len(seconds) // 2]
                unit = middle if method.startswith("LoRA") else unit
                spread = measure.spread(seconds)
                rows.append((base, str(count), method, spread, f"{middle / unit:.2f}", f"{memory:.2f}"))
    return rows


def try_kernels(sizes: Sizes, device: str) -> None:
    """Have each layer's fold and projection measured, whether the model's plan has use for them or not."""
    for out_features, in_features in sizes.shapes:
        long, short = max(out_features, in_features), min(out_features, in_features)
        n, dtype = -(-short // RANK), torch.bfloat16
        A, lam = torch.randn(RANK, short, device=device), torch.randn(RANK, n, device=device)
        gamma, weight = torch.randn(n, short, device=device), torch.randn(out_features, in_features, device=device)
        weight = weight.to(dtype)
        for B in (torch.randn(long, n, RANK, device=device).to(dtype), torch.ones(long, n, RANK, device=device).char()):
            measure_kernels(weight, Operands(A, B, lam, gamma))


def measure_kernels(weight: Tensor, operands: Operands) -> None:
    """One folded weight and one projected gradient, as layers ask for them."""
    with torch.no_grad():
        options = {"out_features": len(weight), "scaling": 1.0, "dtype": weight.dtype}
        randlora_torch.folded_weight(weight, *operands, **options)
        operands.project(weight, 1.0, tall=len(weight) == len(operands.bases_B))


def choices() -> list[tuple[str, ...]]:
    """The table of what was measured and chosen."""
    rows: list[tuple[str, ...]] = [
        ("product", "(out, in)", "W", "B", "torch, ms", "Triton by tiles, ms", "chosen", "why")
    ]
    for call, chosen, reason, milliseconds in kernel_choices():
        triton = ", ".join(f"{name}: {value:.3f}" for name, value in milliseconds.items() if name != TORCH)
        why = " ".join(reason.split())[:200].replace("|", "/")
        product = (call.product, str(call.shape), call.weight, call.bases)
        rows.append((*product, f"{milliseconds[TORCH]:.3f}", triton or "none ran", chosen, why))
    return rows


def main() -> None:
    """Measure, and write both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", help="default: %(default)s; cpu only with --smoke")
    parser.add_argument("--layers", type=int, default=Sizes.layers, help="default: %(default)s")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, nothing is stored: does the script run?")
    options = parser.parse_args()
    sizes = SMOKE if options.smoke else Sizes(layers=options.layers)
    if options.device == "cpu" and not options.smoke:
        raise SystemExit("This measures a GPU: leave --device cpu out, or add --smoke to see whether the script runs.")
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit(
            "This measures a GPU, and torch finds no CUDA device. `--smoke --device cpu` runs without one."
        )
    try_kernels(sizes, options.device)
    title = f"A training step: Llama, hidden {sizes.hidden}, {sizes.layers} layers, r = {RANK}, bf16 autocast, AdamW"
    tables = {"gpu_step": (title, steps(sizes, options.device))}
    tables["gpu_kernels"] = ("Triton or torch, as this GPU chose", choices())
    accelerator = "" if options.device == "cpu" else torch.cuda.get_device_name()
    for name, (title, rows) in tables.items():
        if options.smoke:
            print(measure.table(title, rows, packages=PACKAGES, accelerator=accelerator))
        else:
            measure.write(name, title, rows, packages=PACKAGES, accelerator=accelerator)


if __name__ == "__main__":
    main()
