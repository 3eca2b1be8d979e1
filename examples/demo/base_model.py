"""Train a small byte-level Llama on the standard library's docstrings and save it as a transformers folder.

Run `python examples/demo/base_model.py base_model`. The folder then holds what every Llama folder holds, config.json
and model.safetensors, so that `AutoModelForCausalLM.from_pretrained`, bitsandbytes and llama_nnx.load_llama read it.
"""

import math
import os
import sys
import time
from itertools import islice
from typing import NamedTuple

import numpy as np
import text
import torch
from progress import progress
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils.logging import disable_progress_bar

STEPS = 1000  # 75 s on two idle cores
LENGTH = 256  # bytes a crop predicts
BATCH_SIZE = 4  # small: at this budget, more steps teach more than larger ones


class BaseTraining(NamedTuple):
    """How the training went: the loss of each step, and of text the model never saw, in nats per byte."""

    losses: list[float]
    held_out_loss: float
    seconds: float


def small_llama(seed: int) -> LlamaForCausalLM:
    """A Llama of 0.9 million parameters with grouped queries; all sizes are multiples of 64, as bitsandbytes wants."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=text.VOCABULARY_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,  # every byte is text, none marks a beginning or an end
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train_base(
    folder: str | os.PathLike, *, steps: int = STEPS, seed: int = 0, learning_rate: float = 2e-3, log_every: int = 50
) -> BaseTraining:
    """Train `small_llama` with AdamW for `steps` steps and save it to `folder`.

    The learning rate rises over the first tenth of the steps and falls along a cosine to a tenth of `learning_rate`.
    The same seed, number of steps and machine give the same model.
    """
    training, held_out = text.split(text.to_tokens(text.docstrings()))
    model = small_llama(seed).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.99), weight_decay=0.1, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, steps))
    torch.set_num_threads(min(torch.get_num_threads(), 8))  # with matrices this small, more threads only wait
    losses: list[float] = []
    crops = text.batches(training, batch_size=BATCH_SIZE, length=LENGTH, seed=seed)
    started = time.perf_counter()
    for batch in progress(crops, total=steps, describe=lambda: f"loss {np.mean(losses[-25:]):.3f}", every=log_every):
        loss = next_token_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    seconds = time.perf_counter() - started
    disable_progress_bar()  # save_pretrained's own, over a single file
    model.eval().save_pretrained(folder)
    return BaseTraining(losses, held_out_loss(model, held_out), seconds)


def next_token_loss(model: LlamaForCausalLM, batch: np.ndarray) -> torch.Tensor:
    """Mean cross entropy, in nats per byte, of a batch (B, T+1)."""
    tokens = torch.from_numpy(batch).long()
    logits = model(tokens[:, :-1], use_cache=False).logits  # (B, T, V)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())  # (B*T, V), (B*T,)


@torch.no_grad()
def held_out_loss(model: LlamaForCausalLM, tokens: np.ndarray, *, count: int = 32) -> float:
    """Mean loss over `count` batches of `tokens`, always the same ones."""
    crops = text.batches(tokens, batch_size=BATCH_SIZE, length=LENGTH, seed=0)
    return float(np.mean([next_token_loss(model, batch).item() for batch in islice(crops, count)]))


def _warmup_cosine(step: int, steps: int) -> float:
    """The share of the peak learning rate."""
    warmup = max(1, steps // 10)
    if step < warmup:
        return (step + 1) / warmup
    return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))


if __name__ == "__main__":
    result = train_base(sys.argv[1] if len(sys.argv) > 1 else "base_model")
    print(f"held-out loss {result.held_out_loss:.3f} nats per byte after {result.seconds:.0f} s")
