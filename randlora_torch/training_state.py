"""The third file in the folder of an AdaLoRA adapter whose training is not finished; PEFT passes it over.

The adapter's own file holds the triplets that are left, as PEFT's does. To go on exactly, training also needs those
that were taken away, which may come back and take part in the regularization, and what the allocator measured.
"""

import contextlib
import dataclasses
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from interop.adalora import AdaLoraConfig, SVDFactors, factor_shapes
from interop.adapter import Adapter
from interop.errors import AdapterFormatError
from randlora_torch.attach import AttachedAdapter
from randlora_torch.bases import to_numpy, to_torch
from randlora_torch.rank_allocator import Importance, RankAllocator
from randlora_torch.structure import adapted_layers

STATE_NAME = "adalora_state.safetensors"
_ALLOCATOR = "allocator."


@dataclasses.dataclass(frozen=True)
class TrainingState:
    """What training of an AdaLoRA adapter goes on from.

    Attributes:
        path: The file it was read from.
        factors: All triplets in the layers' parameters, also those taken away.
        held: Which of the `init_r` triplets these are, by layer.
        allocator: The `state_dict` of the `RankAllocator`.
    """

    path: Path
    factors: Mapping[str, SVDFactors]
    held: Mapping[str, tuple[int, ...]]
    allocator: Mapping[str, Tensor]

    def complete(self, adapter: Adapter) -> Adapter:
        """The adapter of the same folder with all its triplets.

        Raises:
            AdapterFormatError: the state does not belong to this adapter.
        """
        config = adapter.config
        if set(self.factors) != set(adapter.factors) or not all(self._agrees(adapter, name) for name in self.factors):
            raise AdapterFormatError(
                f"{self.path} belongs to another save than the adapter beside it. Delete it to go on from the adapter"
                " alone: the triplets that were taken away are then lost, and importance is measured anew."
            )
        every = {name: [i in held for i in range(config.init_r)] for name, held in self.held.items()}
        factors = {name: SVDFactors(*map(to_numpy, parts)) for name, parts in self.factors.items()}
        return dataclasses.replace(adapter, config=config.with_kept(every), factors=factors)

    def _agrees(self, adapter: Adapter, name: str) -> bool:
        kept = adapter.config.kept(name)
        rows = [row for row, i in enumerate(self.held[name]) if i < len(kept) and kept[i]]
        A, E, B = self.factors[name]
        mine, others = (A[rows], E[rows], B[:, rows]), map(to_torch, adapter.factors[name])
        return all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))

    def resume(self, model: nn.Module, adapter_name: str, info: AttachedAdapter) -> AttachedAdapter:
        """The attached adapter with its allocator as it was."""
        allocator = RankAllocator(model, info.adalora_config, adapter_name)
        allocator.load_state_dict(self.allocator)
        config = info.config_keeping(allocator.kept) if allocator.kept else info.config
        return dataclasses.replace(info, config=config, allocator=allocator)


def save_state(model: nn.Module, adapter_name: str, info: AttachedAdapter, directory: Path) -> None:
    """Write the state of an attached adapter into a folder, or remove an older one if no training is under way."""
    if directory.exists() and not directory.is_dir():
        return  # for `interop.save` to refuse
    step = None if info.allocator is None else info.allocator.step
    if info.allocator is None or step is None or step >= (info.adalora_config.total_step or 0):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory / STATE_NAME)
        return
    layers = adapted_layers(model)
    tensors = {f"{_ALLOCATOR}{key}": value for key, value in info.allocator.state_dict().items()}
    for name in info.modules:
        factors = layers[name].factors(adapter_name)._asdict().items()
        tensors |= {f"{name}.lora_{part}": value.detach() for part, value in factors}
        tensors[f"{name}.held"] = torch.tensor(info.held[name], dtype=torch.int64)
    directory.mkdir(parents=True, exist_ok=True)
    handle, path = tempfile.mkstemp(dir=directory, prefix=f".{STATE_NAME}.", suffix=".new")
    os.close(handle)
    try:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, path)
        os.replace(path, directory / STATE_NAME)
    except BaseException:
        os.unlink(path)
        raise


def with_state(source: Any, adapter: Adapter) -> tuple[Adapter, TrainingState | None]:
    """An adapter with all its triplets, and the state beside it in its folder; as it is, and None, if there is none.

    Raises:
        AdapterFormatError: the state is damaged, or does not belong to this adapter.
    """
    state = _load_state(source, adapter.config)
    return (adapter, None) if state is None else (state.complete(adapter), state)


def _load_state(source: Any, config: Any) -> TrainingState | None:
    if not isinstance(source, str | os.PathLike) or not isinstance(config, AdaLoraConfig):
        return None
    path = Path(source) / STATE_NAME
    if not path.is_file():
        return None
    try:
        tensors = load_file(path)
        names = [key.removesuffix(".held") for key in tensors if key.endswith(".held")]
        parts = [f"lora_{field}" for field in SVDFactors._fields]
        state = TrainingState(
            path,
            {name: SVDFactors(*(tensors[f"{name}.{part}"] for part in parts)) for name in names},
            {name: tuple(tensors[f"{name}.held"].tolist()) for name in names},
            {key.removeprefix(_ALLOCATOR): tensors[key] for key in tensors if key.startswith(_ALLOCATOR)},
        )
        for misfit in _misfits(state, config.init_r):
            raise ValueError(misfit)
    except (SafetensorError, KeyError, ValueError) as error:
        raise AdapterFormatError(f"{path} is damaged ({error}): delete it to go on from the adapter alone.") from error
    return state


def _misfits(state: TrainingState, init_r: int) -> Iterator[str]:
    """What in a state contradicts the rest of it."""
    if state.allocator["step"].shape != ():
        yield "its step is no number"
    expected = {"step"}
    for name, factors in state.factors.items():
        rank, shapes = len(state.held[name]), [tuple(part.shape) for part in factors]
        if list(state.held[name]) != sorted(set(state.held[name]) & set(range(init_r))):
            yield f"{name} holds the triplets {state.held[name]}, not some of 0 to {init_r - 1} in order"
        if [len(shape) for shape in shapes] != [2] * 3 or shapes != [
            *factor_shapes(rank, (shapes[2][0], shapes[0][1]))
        ]:
            yield f"{name} has shapes {shapes} for {rank} triplets"
        wanted = {f"{name}.kept": (rank,)}
        for average in Importance._fields:
            wanted |= {f"{name}.{average}.{part}": shape for part, shape in zip(factors._fields, shapes, strict=True)}
        wrong = [key for key in wanted if key in state.allocator and tuple(state.allocator[key].shape) != wanted[key]]
        if wrong:
            yield f"{wrong[0]} has another shape than {wanted[wrong[0]]}"
        expected |= wanted.keys()
    left_over = sorted(state.allocator.keys() - expected)
    if left_over:
        yield f"{left_over[:4]} belong to no layer"
