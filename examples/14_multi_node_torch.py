"""Train an adapter in torch with any number of processes: the same script under DDP, FSDP2 and DeepSpeed.

Which of them, on how many devices and hosts, is in a config file of Accelerate; docs/clusters.md has the commands.

    python examples/14_multi_node_torch.py                                                       # one process
    accelerate launch --config_file examples/configs/fsdp2.yaml examples/14_multi_node_torch.py  # as many as it says

The base is a byte-level Llama, trained on Python's documentation; the adapter learns Python's source code. Every
process computes its share of one global batch, so the losses do not depend on how many there are. With more --steps, a
second run goes on from the last checkpoint, with any number of processes. Where there is no accelerator, processes
share the CPU, and FSDP2 shards there, too. About two minutes on two CPU cores; the last line is

    the reloaded adapter gives the same loss; it is in runs/14_multi_node_torch/adapter
"""

import argparse
import os
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.utils import DataLoaderConfiguration, DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim import AdamW
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from randlora_torch import RandLoraConfig, get_peft_model, load_adapter

CONFIG = RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear", task_type="CAUSAL_LM")
LENGTH, BATCH_SIZE = 128, 16  # the batch of all processes together


def main() -> None:
    """Train, save, reload, check."""
    options = parse_arguments()
    base_steps, steps = (8, min(8, options.steps)) if options.smoke else (200, options.steps)
    accelerator, out = connect(), Path(options.out)
    say = print if accelerator.is_main_process else lambda line: None  # accelerator.print would, once per host
    say(f"{accelerator.num_processes} process(es), {accelerator.distributed_type.value}")
    prose = "\n".join(topics[name] for name in sorted(topics)).encode()
    code = b"\n".join(file.read_bytes() for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")))
    code, held_out = code[:-100_000], crops(code[-100_000:], 0).to(accelerator.device)

    with accelerator.main_process_first():
        if not (out / "base").exists():  # for the others, it does
            train_base(prose, base_steps, accelerator.device).save_pretrained(out / "base")
    base = LlamaForCausalLM.from_pretrained(out / "base", dtype=options.dtype)
    adapted = get_peft_model(base, CONFIG)  # before the base is sharded
    if accelerator.is_main_process:
        adapted.print_trainable_parameters()
    first, checkpoint = newest_checkpoint(out)
    optimizer = AdamW([parameter for parameter in adapted.parameters() if parameter.requires_grad], lr=3e-3)
    rows = [row for step in range(first, steps) for row in crops(code, step)]
    model, optimizer, loader = accelerator.prepare(adapted, optimizer, DataLoader(rows, batch_size=BATCH_SIZE))
    if checkpoint:
        say(f"going on from {checkpoint}")
        restore(accelerator, adapted, optimizer, checkpoint)

    before = evaluate(model, held_out)
    model.train()
    losses = []
    for step, batch in enumerate(loader, first + 1):  # of every batch, each process gets its share
        loss = model(input_ids=batch, labels=batch).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(accelerator.reduce(loss.detach(), "mean").item())
        if step in (first + 1, steps) or step % 20 == 0:
            say(f"step {step}: loss {losses[-1]:.4f}")
        if step == steps or step % (4 if options.smoke else 50) == 0:
            save(accelerator, adapted, optimizer, out / f"checkpoint-{step}")
    after = evaluate(model, held_out)
    say(f"held-out loss {before:.4f} before, {after:.4f} after {steps} steps")

    adapted.save_pretrained(out / "adapter", is_main_process=accelerator.is_main_process)  # all gather, one writes
    if accelerator.is_main_process:
        unset_hf_deepspeed_config()  # under ZeRO-3, it would have all processes read their parts
        again = LlamaForCausalLM.from_pretrained(out / "base", dtype=options.dtype).to(accelerator.device)
        reloaded = evaluate(load_adapter(again, out / "adapter"), held_out)
        if not abs(reloaded - after) < 1e-5 * after or abs(before - after) < 1e-3:
            sys.exit(f"the reloaded adapter gives the loss {reloaded}, the trained one {after}, the start {before}")
        np.savetxt(out / "losses.txt", losses)
    say(f"the reloaded adapter gives the same loss; it is in {out / 'adapter'}")
    accelerator.end_training()


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/14_multi_node_torch", help="folder that all hosts see (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="steps of the adapter, in all (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="at most 8 steps of everything, as a test")
    return parser.parse_args()


def connect() -> Accelerator:
    """Join the other processes, on accelerators or, without any, on CPUs."""
    cpu = not torch.accelerator.is_available()
    fsdp, deepspeed = (cpu and os.environ.get(f"ACCELERATE_USE_{name}") == "true" for name in ("FSDP", "DEEPSPEED"))
    accelerator = Accelerator(
        cpu=cpu and not deepspeed,  # cpu=True would turn DeepSpeed off
        kwargs_handlers=[InitProcessGroupKwargs(backend="gloo")] if deepspeed else None,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
    )
    tasks = int(os.environ.get("SLURM_NTASKS", 1))
    if accelerator.num_processes < tasks:
        sys.exit(f"{tasks} tasks of Slurm, each on its own: start one `accelerate launch` per node (docs/clusters.md).")
    if BATCH_SIZE % accelerator.num_processes:
        sys.exit(f"{accelerator.num_processes} processes: their number must divide the batch of {BATCH_SIZE}.")
    if fsdp:  # on CPUs, Accelerate 1.15 reads a config that says FSDP and runs DDP; told so here, it shards
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin()  # as the config says
    return accelerator


def crops(text: bytes, step: int) -> Tensor:
    """The global batch of a step, (B, T): random pieces of the text, the same in every process."""
    starts = np.random.default_rng(step).integers(len(text) - LENGTH, size=BATCH_SIZE)
    return torch.tensor([list(text[start : start + LENGTH]) for start in starts])


def train_base(text: bytes, steps: int, device: torch.device) -> LlamaForCausalLM:
    """A small Llama over bytes; of a real one, you have the folder."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)).to(device)
    optimizer = AdamW(model.parameters(), lr=3e-3)
    for step in range(steps):
        batch = crops(text, step).to(device)
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@torch.no_grad()
def evaluate(model: nn.Module, batch: Tensor) -> float:
    """The loss; every process computes it, as every one holds a part of a sharded model."""
    model.eval()
    return model(input_ids=batch, labels=batch).loss.item()


def newest_checkpoint(out: Path) -> tuple[int, Path | None]:
    """How many steps were made, and the folder of the last complete checkpoint."""
    complete = {int(file.parent.name.split("-")[1]): file.parent for file in out.glob("checkpoint-*/optimizer.pt")}
    return max(complete.items(), default=(0, None))


def save(accelerator: Accelerator, adapted: nn.Module, optimizer: Any, folder: Path) -> None:
    """The adapter and its optimizer's state, whole, whatever is sharded. The base is not written."""
    adapted.save_pretrained(folder, is_main_process=accelerator.is_main_process)  # all gather, one writes
    if accelerator.distributed_type is not DistributedType.DEEPSPEED:  # whose optimizer's state is in parts
        whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = get_optimizer_state_dict(adapted, optimizer.optimizer, options=whole)
        if accelerator.is_main_process:
            torch.save(state, folder / "optimizer.part")
            (folder / "optimizer.part").replace(folder / "optimizer.pt")  # now the checkpoint is complete


def restore(accelerator: Accelerator, adapted: nn.Module, optimizer: Any, folder: Path) -> None:
    """What `save` wrote, into a model that is sharded or not."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        sys.exit(f"{folder}: under DeepSpeed, this script does not go on from checkpoints. Give another --out.")
    adapted.restore_adapter(folder)
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    set_optimizer_state_dict(adapted, optimizer.optimizer, state, options=StateDictOptions(full_state_dict=True))


if __name__ == "__main__":
    main()
