"""The frozen bases as torch tensors: made by `interop`, stored once per adapter, sliced per layer."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from interop.bases import DEFAULT_RECIPE, Bases
from interop.bases import make_bases as make_numpy_bases
from interop.config import RandLoraConfig
from interop.shapes import num_bases


class LayerBases(NamedTuple):
    """The part of the shared bases that one layer uses."""

    A: Float[Tensor, "r d"]
    B: Float[Tensor, "D n r"]


def to_torch(array: np.ndarray) -> Tensor:
    """A copy of a numpy array as a tensor of the same dtype; torch has no constructor for ml_dtypes' bfloat16."""
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(array.copy())


def to_numpy(tensor: Tensor) -> np.ndarray:
    """A tensor as a numpy array of the same dtype, with ml_dtypes' bfloat16."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def make_bases(config: RandLoraConfig, *, max_dim: int, min_dim: int, recipe: str = DEFAULT_RECIPE) -> Bases:
    """The bases of `interop.make_bases` (same bits, same errors) on the CPU: A (r, 1, min_dim), B (max_dim, n, r)."""
    return Bases(*map(to_torch, make_numpy_bases(config, max_dim=max_dim, min_dim=min_dim, recipe=recipe)))


def layer_bases(bases: Bases, shape: tuple[int, int]) -> LayerBases:
    """The prefix of A and B that a layer of shape (out, in) uses: d = min(shape), D = max(shape), n = ceil(d / r)."""
    n = num_bases(min(shape), bases.A.shape[0])
    return LayerBases(bases.A[:, 0, : min(shape)], bases.B[: max(shape), :n])


class BufferDict(nn.Module):
    """Tensors by adapter name, shared by all layers that hold this module; never part of a state dict.

    Moving the model moves them, once; converting the model to another dtype does not convert them, because rounded
    bases are other bases.
    """

    def __init__(self, tensors: dict[str, Tensor] | None = None) -> None:
        super().__init__()
        for name, tensor in (tensors or {}).items():
            self[name] = tensor

    def __getitem__(self, name: str) -> Tensor:
        return self._buffers[name]

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self.register_buffer(name, tensor, persistent=False)

    def __delitem__(self, name: str) -> None:
        del self._buffers[name]

    def __contains__(self, name: str) -> bool:
        return name in self._buffers

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __len__(self) -> int:
        return len(self._buffers)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BufferDict":
        """Follow a change of device (`model.to`, `.cuda`), not one of dtype (`.half`, `.bfloat16`)."""
        moved = {}
        for name, buffer in self._buffers.items():
            changed = fn(buffer)
            moved[name] = changed if changed.dtype == buffer.dtype else buffer.to(changed.device)
        self._buffers.update(moved)
        return self
