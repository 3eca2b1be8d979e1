"""The folded weight and the gradients of its factors, by Triton's kernels where they pay and by torch elsewhere."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from randlora_torch.kernel_choice import TORCH, Call, chooser
from randlora_torch.packed import Packed4bit, Rows8bit

_DEVICES = ("cuda",)  # ROCm goes by this name as well
_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fold(
    weight: Tensor | Packed4bit | Rows8bit | None,
    bases_A: Tensor,
    bases_B: Tensor,
    lam: Tensor,
    gamma: Tensor,
    *,
    out_features: int,
    scaling: float,
    dtype: torch.dtype,
    torch_way: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """`W + scaling * dW` (out, in) in `dtype`: `torch_way(lam, gamma)`, or `triton_kernels.folded_weight`.

    That describes the other arguments. `torch_way` is also called with other factors than these, for comparison.
    """
    kernels = _kernels_for(weight, bases_A, bases_B, lam, gamma, dtype=dtype)
    if kernels is None:
        return torch_way(lam, gamma)
    options = {"scaling": scaling, "dtype": dtype, "out_features": out_features}
    triton_way = functools.partial(kernels.folded_weight, weight, bases_A, bases_B, **options)

    def draw() -> tuple[Tensor, Tensor]:
        spread = _typical(weight) / math.sqrt(lam.numel()) / (abs(scaling) or 1)  # makes dW about as large as W
        return spread * _random(lam), _random(gamma)

    call = _call("fold", out_features, bases_B, gamma, weight, dtype)
    return _compute(call, (lam, gamma), torch_way, triton_way, kernels.fold_tiles(dtype), draw)


def project(
    grad_weight: Tensor,
    bases_A: Tensor,
    bases_B: Tensor,
    lam: Tensor,
    gamma: Tensor,
    *,
    scaling: float,
    dtype: torch.dtype,
    torch_way: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
) -> tuple[Tensor, Tensor]:
    """Gradients (lambda, gamma): `torch_way(grad_weight, lam, gamma)`, or `triton_kernels.projected_gradient`.

    That describes the other arguments. `torch_way` is also called with other tensors than these, for comparison.
    """
    kernels = _kernels_for(grad_weight, bases_A, bases_B, lam, gamma, dtype=dtype)
    if kernels is None:
        return torch_way(grad_weight, lam, gamma)

    def triton_way(grad: Tensor, lam: Tensor, gamma: Tensor, *, tiles: Any) -> tuple[Tensor, Tensor]:
        options = {"scaling": scaling, "dtype": dtype, "tiles": tiles}
        return kernels.projected_gradient(grad, bases_A, bases_B, lam, gamma, **options)

    def draw() -> tuple[Tensor, Tensor, Tensor]:
        return _random(grad_weight), _random(lam), _random(gamma)

    call = _call("project", grad_weight.shape[0], bases_B, gamma, grad_weight, dtype)
    tiles = kernels.projection_tiles(dtype)
    return _compute(call, (grad_weight, lam, gamma), torch_way, triton_way, tiles, draw)


def on_gpu(tensor: Tensor) -> bool:
    """Whether it is where the kernels run."""
    return tensor.device.type in _DEVICES


def _compute(
    call: Call,
    arguments: tuple[Tensor, ...],
    torch_way: Callable[..., Any],
    triton_way: Callable[..., Any],
    tiles: tuple[Any, ...],
    draw: Callable[[], tuple[Tensor, ...]],
) -> Any:
    """The result of the way that is chosen."""
    ways = {TORCH: torch_way}
    ways |= {" ".join(map(str, each)): functools.partial(triton_way, tiles=each) for each in tiles}
    with torch.cuda.device_of(arguments[0]):
        may_try = not (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
        return chooser.choose(call, ways, draw, may_try=may_try)(*arguments)


def _kernels_for(weight: Any, *factors: Tensor, dtype: torch.dtype) -> ModuleType | None:
    """The module of the kernels, if they may and can compute with these tensors, and here and now."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or chooser.kernels == TORCH:
        return None
    if chooser.kernels == "auto" and torch.are_deterministic_algorithms_enabled():
        return None
    parts = (weight,) if isinstance(weight, Tensor) else weight or ()
    tensors = [*factors, *(part for part in parts if isinstance(part, Tensor))]
    if dtype not in _FLOATS or not all(map(_readable, tensors)) or factors[1].stride()[1:] != (factors[1].shape[2], 1):
        return None
    return _kernels()


def _readable(tensor: Tensor) -> bool:
    """Whether it is plain memory of a GPU, in a dtype that kernels read, and nothing is to be differentiated by it."""
    plain = type(tensor) in (Tensor, nn.Parameter) and on_gpu(tensor)
    differentiated = torch.is_grad_enabled() and tensor.requires_grad
    return plain and not differentiated and tensor.dtype in (*_FLOATS, torch.int8, torch.uint8)


@functools.cache
def _kernels() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("randlora_torch.triton_kernels")


def _call(product: str, out_features: int, bases_B: Tensor, gamma: Tensor, weight: Any, dtype: torch.dtype) -> Call:
    long, short, r = bases_B.shape[0], gamma.shape[1], bases_B.shape[2]
    shape = (long, short) if out_features == long else (short, long)
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.allow_tf32
    stored = {Packed4bit: "4bit", Rows8bit: "8bit", type(None): "none"}.get(type(weight)) or _short(weight.dtype)
    in_short = "tf32" if tf32 else _short(dtype)
    return Call(product, shape, r, stored, _short(bases_B.dtype), in_short, str(bases_B.device))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _random(like: Tensor) -> Tensor:
    """Normal numbers in its shape, dtype and strides; no other random numbers change by it."""
    generator = torch.Generator(like.device).manual_seed(0)
    return torch.empty_like(like).normal_(generator=generator)


def _typical(weight: Tensor | Packed4bit | Rows8bit | None) -> float:
    """The order of magnitude of its numbers; 1 if they are all 0."""
    if weight is None:
        return 1.0
    scales = weight.absmax if isinstance(weight, Packed4bit) else weight.SCB if isinstance(weight, Rows8bit) else weight
    norm = torch.linalg.vector_norm(scales, dtype=torch.float32).item() / math.sqrt(scales.numel())
    return norm / (1 if scales is weight else 3) or 1.0  # the largest of many normal numbers is about 3
