"""The frozen bases as torch tensors: made by `interop`, stored once per adapter, sliced per layer."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor, nn

from interop.bases import DEFAULT_RECIPE, Bases
from interop.bases import make_bases as make_numpy_bases
from interop.config import RandLoraConfig
from interop.shapes import num_bases
from randlora_torch.sparse import SparseBasis, sparse_basis


class Prefix(NamedTuple):
    """The part of a pair of bases that one layer uses."""

    A: Float[Tensor, "r d"]
    B: Shaped[Tensor, "D n r"]


class LayerBases(NamedTuple):
    """The part of the bases that one layer uses, as they are stored."""

    A: Float[Tensor, "r d"]
    B: Shaped[Tensor, "D n r"]  # perhaps the int8 codes of a ternary basis
    scale: float = 1.0  # what B is to be multiplied by


def to_torch(array: Any) -> Tensor:
    """A copy of a numpy array, or of what becomes one (`LazyTensor`), in its dtype; torch cannot read ml_dtypes'."""
    array = np.asarray(array)
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


def layer_bases(bases: Bases, shape: tuple[int, int]) -> Prefix:
    """The prefix of A and B that a layer of shape (out, in) uses: d = min(shape), D = max(shape), n = ceil(d / r)."""
    n = num_bases(min(shape), bases.A.shape[0])
    return Prefix(bases.A[:, 0, : min(shape)], bases.B[: max(shape), :n])


class BufferDict(nn.Module, MutableMapping[str, Tensor]):
    """Frozen tensors by adapter name, shared by all layers that hold this module: one copy of each per device.

    They are no buffers in torch's sense: they join no state dict, are not broadcast by DistributedDataParallel nor
    sharded by FSDP, and follow a move of the model to another device, but never a change of dtype (rounded bases are
    other bases) nor a move to the meta device (the data would be lost). Names may share a tensor.

    A ternary basis is held as int8 codes and their scale. `held[name]` gives its numbers all the same, in float32 and
    computed each time; layers use `on` and `scale`. Of the bases of a model's adapter, the part is here that its layers
    use; `extract` gives all of them. What is held in 16 bits is held in float32 from the moment on in which the CPU
    multiplies in float32: at each use, converting it would cost a step of few tokens up to a sixth of its time.
    """

    def __init__(self, tensors: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self._tensors: dict[str, Tensor] = dict(tensors or {})
        self._scales: dict[str, float] = {}  # of codes
        self._copies: dict[tuple[str, torch.device], Tensor] = {}
        self._narrow: dict[str, torch.dtype] = {}  # of what is held in float32 and loses nothing in 16 bits
        self._sparse: dict[tuple[str, tuple[int, ...]], SparseBasis | None] = {}

    def on(self, name: str, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor as it is stored, on a device, for products in `dtype`; a copy on another device is kept."""
        if dtype == torch.float32 and device.type == "cpu" and not torch.compiler.is_compiling():
            self._widen(name)
        tensor = self._tensors[name]
        if tensor.device == device:
            return tensor
        if device.type == "meta":
            return tensor.to(device)
        if (name, device) not in self._copies:
            twins = (key for key in self._copies if key[1] == device and self._tensors[key[0]] is tensor)
            twin = next(twins, None)
            with torch.inference_mode(False):  # a copy made while serving must also serve training
                copy = self._copies[twin] if twin else tensor.to(device, self._narrow.get(name))
            self._copies[name, device] = copy
        return self._copies[name, device]

    def _widen(self, name: str) -> None:
        tensor = self._tensors[name]
        if tensor.device.type == "cpu" and tensor.dtype in (torch.bfloat16, torch.float16):
            with torch.inference_mode(False):
                wide = tensor.float()
            for twin in [twin for twin, other in self._tensors.items() if other is tensor]:
                self._tensors[twin], self._narrow[twin] = wide, tensor.dtype

    def sparse_basis(self, name: str, part: Tensor) -> SparseBasis | None:
        """A part (D, n, r) of the stored tensor for sparse products, if they pay: made when it is first asked for."""
        if torch.compiler.is_compiling():
            return None
        key = (name, tuple(part.shape))
        if key not in self._sparse:
            self._sparse[key] = sparse_basis(part)
        return self._sparse[key]

    def stored(self, name: str) -> Tensor:
        """The tensor as it is stored, where it is."""
        return self._tensors[name]

    def scale(self, name: str) -> float:
        """What the stored tensor is to be multiplied by."""
        return self._scales.get(name, 1.0)

    def hold(self, name: str, tensor: Tensor, scale: float) -> None:
        """Hold a tensor that stands for `tensor * scale`, as it is; int8 for codes."""
        self[name] = tensor
        if scale != 1.0:
            self._scales[name] = scale

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name]
        return tensor.float() * self.scale(name) if tensor.dtype == torch.int8 else tensor

    def __setitem__(self, name: str, tensor: Tensor) -> None:
        self._forget(name)
        self._tensors[name] = tensor

    def __delitem__(self, name: str) -> None:
        del self._tensors[name]
        self._forget(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    __hash__ = nn.Module.__hash__  # a module is itself, not its content

    def __eq__(self, other: object) -> bool:
        return self is other

    @property
    def nbytes(self) -> int:
        """Bytes of all distinct tensors as they are stored, copies on other devices included."""
        return sum({id(tensor): tensor.nbytes for tensor in (*self._tensors.values(), *self._copies.values())}.values())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}, "_sparse": {}}

    def _forget(self, name: str) -> None:
        """Drop what belongs to the tensor that a name had."""
        self._scales.pop(name, None)
        self._narrow.pop(name, None)
        self._copies = {key: copy for key, copy in self._copies.items() if key[0] != name}
        self._sparse = {key: basis for key, basis in self._sparse.items() if key[0] != name}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "BufferDict":
        """Follow a change of device (`model.to`, `.cuda`); `fn` itself (`.half`, `to_empty`) might destroy the data."""
        moved: dict[int, Tensor] = {}
        for name, tensor in self._tensors.items():
            device = fn(tensor.new_empty(0)).device
            stays = device.type == "meta" or device == tensor.device
            moved.setdefault(id(tensor), tensor if stays else tensor.to(device, self._narrow.get(name)))
        if any(moved[id(tensor)] is not tensor for tensor in self._tensors.values()):
            self._tensors = {name: moved[id(tensor)] for name, tensor in self._tensors.items()}
            self._copies, self._sparse, self._narrow = {}, {}, {}
        return self
