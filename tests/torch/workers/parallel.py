"""Run under torchrun by test_distributed.py, never imported by it: what each of two processes does with a model.

Usage: parallel.py FOLDER. The folder holds batch.pt, and for each scenario <scenario>.pt, a whole adapted model as the
test pickled it. Every process writes what it found to FOLDER/<scenario>-<rank>.pt.
"""

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer, TrainingArguments

from randlora_torch import extract, fold_once, load_adapter


def load(folder, scenario):
    """The pickled model and this process's half of the batch."""
    model = torch.load(folder / f"{scenario}.pt", weights_only=False)
    batch = torch.load(folder / "batch.pt")
    return model, batch.chunk(dist.get_world_size())[dist.get_rank()]


def train(model, batch, steps=3):
    """The losses of some steps; the optimizer is made for the parameters as they are now, sharded or not."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(steps):
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach().clone()


def trainable(model):
    return {name: whole(p) for name, p in model.named_parameters() if p.requires_grad}


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def ddp(folder):
    """Half a batch each; rank 1 starts from other factors and other (unused) bases, to see what is synchronized."""
    rank, (model, batch) = dist.get_rank(), load(folder, "ddp")
    bases = [*model.randlora_A.values(), *model.randlora_B.values()]
    if rank == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
            model.randlora_A["unused"].add_(1.0)
    unused = model.randlora_A["unused"].clone()
    wrapped = DistributedDataParallel(model)
    losses = train(wrapped, batch)
    synchronized = storages([*wrapped.parameters(), *wrapped.buffers(), *wrapped.modules_buffers])
    wrapped.module.save_pretrained(folder / f"ddp-saved-by-{rank}", is_main_process=rank == 0)
    return {
        "losses": losses,
        "trainable": trainable(model),
        "bases are synchronized": bool(storages(bases) & synchronized),
        "unused bases stayed": torch.equal(model.randlora_A["unused"], unused),
    }


def once(folder):
    """DDP over micro-batches that share W': gradients are exchanged at the end of the block."""
    model, batch = load(folder, "once")
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(3):
        *early, last = batch.chunk(2)
        with fold_once(wrapped):
            with wrapped.no_sync():
                for part in early:
                    (wrapped(input_ids=part, labels=part).loss / 2).backward()
            (wrapped(input_ids=last, labels=last).loss / 2).backward()
        optimizer.step()
        optimizer.zero_grad()
    shard(model)
    try:
        with fold_once(model):
            pass
    except ValueError as error:
        return {"trainable": trainable(model), "sharded": str(error)}


def shard(model):
    mesh = dist.device_mesh.init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def fsdp(folder):
    """Sharded block by block; then saved, restored, and asked for what a sharded model cannot do."""
    rank, (model, batch) = dist.get_rank(), load(folder, "fsdp")
    bases = [*model.randlora_A.values(), *model.randlora_B.values()]
    shapes = [basis.shape for basis in bases]
    shard(model)
    found = {"losses": train(model, batch), "trainable": trainable(model)}
    found["all parameters are sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    found["bases are whole"] = all(type(b) is torch.Tensor for b in bases) and [b.shape for b in bases] == shapes
    model.save_pretrained(folder / f"fsdp-saved-by-{rank}", is_main_process=rank == 0)
    with torch.no_grad():
        found["logits"] = model(input_ids=batch).logits
    train(model, batch, steps=1)
    found["moved"] = trainable(model)
    model.restore_adapter(folder / "fsdp-saved-by-0")
    found["restored"] = trainable(model)
    found["still sharded"] = all(isinstance(p, DTensor) for p in model.parameters())
    try:
        model.merge_adapter()
    except ValueError as error:
        found["merging"] = str(error)
    # As transformers' Trainer saves: the gathered parameters are at hand, and rank 0 is alone with them.
    gathered = {name: whole(value) for name, value in model.state_dict().items()}
    if rank == 0:
        found["saved alone"] = saved_without_gathering(model, folder / "saved-alone", gathered)
    dist.barrier()
    found["attached late"] = attached_after_sharding(folder)
    return found


def attached_after_sharding(folder):
    """The trained factors of an adapter that a model got when it was sharded already, or why it did not."""
    model, batch = load(folder, "fsdp")
    adapter, base = extract(model, "unused"), model.unload()
    shard(base)
    try:
        model = load_adapter(base, adapter, is_trainable=True)
    except ValueError as error:
        return str(error)
    train(model, batch, steps=1)
    return trainable(model)


def saved_without_gathering(model, folder, state_dict):
    """Saving by one process; a collective operation would wait for the others forever, so it is an error here."""

    def refuse(self):
        raise RuntimeError("full_tensor was called by one process alone")

    gather, DTensor.full_tensor = DTensor.full_tensor, refuse
    try:
        model.save_pretrained(folder, state_dict=state_dict)
    except RuntimeError as error:
        return str(error)
    finally:
        DTensor.full_tensor = gather
    return "saved"


def trainer(folder):
    """transformers' Trainer: once to the end, and once resumed from the checkpoint in the middle."""
    rows = [{"input_ids": row, "labels": row} for row in torch.load(folder / "batch.pt").tolist()]
    options = {"max_steps": 4, "save_steps": 2, "per_device_train_batch_size": 1, "learning_rate": 1e-2}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True, "ddp_backend": "gloo"}
    found = {}
    for name, checkpoint in (("out", None), ("again", str(folder / "out" / "checkpoint-2"))):
        pickled, _ = load(folder, "trainer")
        adapter = extract(pickled, "default")
        model = load_adapter(pickled.unload(), adapter, is_trainable=True)
        arguments = TrainingArguments(output_dir=str(folder / name), **options, **quiet)
        Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=checkpoint)
        found[name] = trainable(model)
    return found


def adalora(folder):
    """DDP with half a batch each, through a whole schedule; then what a sharded model answers."""
    rank, (model, batch) = dist.get_rank(), load(folder, "adalora")
    if rank == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(1.0)
    wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, model.peft_config["default"].total_step + 1):
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        model.update_and_allocate(step)
        optimizer.zero_grad()
    found = {"trainable": trainable(model), "pattern": model.peft_config["default"].rank_pattern}
    shard(model)
    for name, call in (
        ("loss", lambda: model(input_ids=batch, labels=batch)),
        ("step", lambda: model.update_and_allocate(9)),
    ):
        try:
            call()
        except ValueError as error:
            found[name] = str(error)
    return found


if __name__ == "__main__":
    place = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    for scenario in (ddp, once, fsdp, trainer, adalora):
        torch.save(scenario(place), place / f"{scenario.__name__}-{dist.get_rank()}.pt")
    dist.destroy_process_group()
