"""RandLoRA on bitsandbytes layers: the only module that knows bitsandbytes."""

import copy

import bitsandbytes
import torch
from bitsandbytes.nn import Linear4bit as Base4bit
from bitsandbytes.nn import Linear8bitLt as Base8bit  # noqa: F401  (named by randlora_torch.model)
from bitsandbytes.nn import Params4bit
from torch import Tensor, nn

from randlora_torch.layer import RandLoraLayer


class Linear4bit(RandLoraLayer):
    """RandLoRA on a 4-bit layer. Merging requantizes with the base's own settings; unmerging restores its very bytes.

    The packed weight is kept aside while an adapter is merged: half a byte per weight.

    Raises:
        ValueError: bitsandbytes' CPU kernels compute this shape wrongly.
    """

    def __init__(self, base_layer: Base4bit, *args, **kwargs) -> None:
        super().__init__(base_layer, *args, **kwargs)
        self._before_merge: tuple[Params4bit] | None = None  # in a tuple, so that it is no parameter of this module
        if base_layer.weight.quant_state is None:
            raise ValueError("the 4-bit layer is not quantized yet: move the model to its device first (model.to).")
        blocksize = base_layer.weight.quant_state.blocksize
        on_cpu = base_layer.weight.device.type == "cpu"
        if on_cpu and self.in_features % 16 == 0 and self.in_features % blocksize and blocksize < 2048:
            raise ValueError(
                f"in_features={self.in_features} is a multiple of 16 but not of the 4-bit blocksize {blocksize}:"
                " bitsandbytes' AVX512 kernel dequantizes such layers wrongly on CPU. Leave this layer out of the"
                " quantization, or run on a GPU."
            )

    def _read_weight(self) -> Tensor:
        return dequantize_4bit(self.base_layer.weight).float()

    def _weight_dtype(self) -> torch.dtype:
        return self.base_layer.weight.quant_state.dtype

    def _write_weight(self, weight: Tensor) -> None:
        old = self.base_layer.weight
        self._before_merge = self._before_merge or (old,)
        state = old.quant_state
        unpacked = Params4bit(
            weight.to(self._weight_dtype()),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=self.base_layer,
        )
        self.base_layer.weight = unpacked.to(old.device)  # moving to a device is what quantizes

    def _restore_weight(self, delta: Tensor) -> None:
        (self.base_layer.weight,), self._before_merge = self._before_merge, None
        self.base_layer.quant_state = self.base_layer.weight.quant_state


def dequantize_4bit(weight: Params4bit) -> Tensor:
    """The (out, in) weight in its quant_state's dtype.

    bitsandbytes 0.50's AVX512 kernel reads the wrong scales if a row is no multiple of the blocksize; as one long row
    every shape is right.
    """
    state = copy.copy(weight.quant_state)
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return bitsandbytes.functional.dequantize_4bit(weight.data, state).reshape(shape)


def protect_from_repacking(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking 4-bit weights in place at the first eval forward on AVX512-BF16 CPUs.

    A repacked weight dequantizes to garbage and passes no gradient on. Weights repacked before are unpacked.
    """
    for module in model.modules():
        if isinstance(module, Base4bit):
            if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
                unpack = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse
                module.weight.data, module.weight.quant_state = unpack(module.weight.data, module.weight.quant_state)
            module.support_avx512bf16_for_cpu = False
