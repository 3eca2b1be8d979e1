"""Adapters on bitsandbytes layers: the only module that knows bitsandbytes."""

import copy
import logging
from typing import Any

import bitsandbytes
import torch
from bitsandbytes.nn.modules import Int8Params, Params4bit
from bitsandbytes.nn.modules import Linear4bit as Base4bit
from bitsandbytes.nn.modules import Linear8bitLt as Base8bit
from torch import Tensor, nn

from randlora_torch.adalora import AdaLoraLayer
from randlora_torch.gradients import product_dtype
from randlora_torch.layer import AdapterLayer, Frozen, is_bare
from randlora_torch.packed import Packed4bit, Rows8bit
from randlora_torch.randlora import RandLoraLayer

logger = logging.getLogger(__name__)


class Int8Weight(AdapterLayer):
    """The weight of an LLM.int8() layer. Merging requantizes row by row; the int8 weight before it can be kept.

    Raises:
        ValueError: the layer is not quantized (`has_fp16_weights=True`, or not moved to its device yet).
    """

    def __init__(self, base_layer: Base8bit, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        if base_layer.weight.device.type != "meta" and base_layer.weight.dtype != torch.int8:
            raise ValueError(
                "the 8-bit layer is not quantized: load it with has_fp16_weights=False and move the model to its"
                " device first (model.to)."
            )

    def _codes(self) -> tuple[Tensor, Tensor]:
        """The int8 weight (out, in) and its row scales (out,), wherever bitsandbytes holds them at the moment."""
        weight, state = self.base_layer.weight, self.base_layer.state
        scales = weight.SCB if weight.SCB is not None else state.SCB
        return weight.data, scales.to(weight.device)

    def _frozen(self, x: Tensor) -> Frozen | None:
        """Folded, the layer computes with the dequantized weight: unlike bitsandbytes, it does not round x to int8."""
        return _frozen_quantized(self, x, product_dtype(x))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in), in a new tensor."""
        return self._read_weight().to(dtype)

    def packed(self) -> Rows8bit:
        """The int8 weight and its row scales."""
        return Rows8bit(*self._codes())

    def _read_weight(self) -> Tensor:
        return self.packed().dequantize()

    def _weight_dtype(self) -> torch.dtype:
        return torch.float16  # what bitsandbytes quantizes from

    def _write_weight(self, weight: Tensor) -> None:
        codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(self._weight_dtype()).contiguous())
        self._put_back((codes, scales))

    def _current(self) -> tuple[Tensor, Tensor]:
        return self._codes()

    def _put_back(self, kept: tuple[Tensor, Tensor]) -> None:
        codes, scales = (part.to(self.base_layer.weight.device) for part in kept)
        self.base_layer.state.reset_grads()  # it holds the codes and scales of the weight before
        self.base_layer.weight = Int8Params(codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales)


class PackedWeight(AdapterLayer):
    """The weight of a 4-bit layer. Merging requantizes with the base's own settings; the packed weight can be kept.

    Raises:
        ValueError: the layer is not quantized yet, or bitsandbytes' CPU kernels compute its shape wrongly.
    """

    def __init__(self, base_layer: Base4bit, *args: Any, **kwargs: Any) -> None:
        super().__init__(base_layer, *args, **kwargs)
        device, weight = base_layer.weight.device.type, self.base_layer.weight
        if device != "meta":
            if weight.quant_state is None:
                raise ValueError("the 4-bit layer is not quantized yet: move the model to its device first (model.to).")
            if device == "cpu":
                _check_cpu_kernels(self.in_features, weight.quant_state.blocksize)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """See `AdapterLayer.forward`. Before it, the base weight is brought into the one packing that trains."""
        keep_packing(self.base_layer)
        return super().forward(x, *args, **kwargs)

    def _frozen(self, x: Tensor) -> Frozen | None:
        if not self.base_layer.compute_type_is_set:  # which bitsandbytes does in the first call
            return None
        under_autocast = product_dtype(x) != x.dtype
        computes_in = None if under_autocast else self.base_layer.compute_dtype
        return _frozen_quantized(self, x, computes_in or product_dtype(x))

    def dense(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in), in a new tensor."""
        return dequantize_4bit(self.base_layer.weight).to(dtype)

    def packed(self) -> Packed4bit:
        """The packed weight, its scales in float32, and the numbers that its codes stand for."""
        state, absmax = self.base_layer.weight.quant_state, self.base_layer.weight.quant_state.absmax
        if state.nested:
            absmax = bitsandbytes.functional.dequantize_blockwise(absmax, state.state2) + state.offset
        packed = self.base_layer.weight.data.view(torch.uint8)
        return Packed4bit(packed, absmax.float(), state.code.float(), state.blocksize, tuple(state.shape))

    def _read_weight(self) -> Tensor:
        keep_packing(self.base_layer)
        return self.dense(torch.float32)

    def _weight_dtype(self) -> torch.dtype:
        return self.base_layer.weight.quant_state.dtype

    def _write_weight(self, weight: Tensor) -> None:
        old = self.base_layer.weight
        state = old.quant_state
        unpacked: Any = Params4bit(
            weight.to(self._weight_dtype()),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=old.quant_storage,
            module=self.base_layer,
        )
        self.base_layer.weight = unpacked.to(old.device)  # moving to a device is what quantizes

    def _current(self) -> tuple[Params4bit]:
        return (self.base_layer.weight,)

    def _put_back(self, kept: tuple[Params4bit]) -> None:
        weight: Any = kept[0]
        device = self.base_layer.weight.device
        self.base_layer.weight = weight if weight.device == device else weight.to(device)
        self.base_layer.quant_state = self.base_layer.weight.quant_state


class Linear8bitLt(Int8Weight, RandLoraLayer):
    """RandLoRA on bitsandbytes' `Linear8bitLt`."""


class Linear4bit(PackedWeight, RandLoraLayer):
    """RandLoRA on bitsandbytes' `Linear4bit`."""


class SVDLinear8bitLt(Int8Weight, AdaLoraLayer):
    """AdaLoRA on bitsandbytes' `Linear8bitLt`; unlike PEFT's, it merges, and answers in the dtype of its base."""


class SVDLinear4bit(PackedWeight, AdaLoraLayer):
    """AdaLoRA on bitsandbytes' `Linear4bit`; unlike PEFT's, it merges."""


def _frozen_quantized(layer: Int8Weight | PackedWeight, x: Tensor, dtype: torch.dtype) -> Frozen | None:
    base = layer.base_layer
    if not is_bare(base) or type(base).forward not in (Base8bit.forward, Base4bit.forward):
        return None
    if base.weight.device != x.device or dtype == torch.float64:
        return None
    return Frozen(layer, base.bias, dtype, x.dtype)


def _check_cpu_kernels(in_features: int, blocksize: int) -> None:
    if in_features % 16 == 0 and in_features % blocksize and blocksize < 2048:
        raise ValueError(
            f"in_features={in_features} is a multiple of 16 but not of the 4-bit blocksize {blocksize}: bitsandbytes'"
            " AVX512 kernel dequantizes such layers wrongly on CPU. Leave this layer out of the quantization, or run on"
            " a GPU."
        )


def dequantize_4bit(weight: Params4bit) -> Tensor:
    """The (out, in) weight in its quant_state's dtype.

    bitsandbytes 0.50's AVX512 kernel reads the wrong scales if a row is no multiple of the blocksize; as one long row
    every shape is right.
    """
    state = copy.copy(weight.quant_state)
    shape, state.shape = state.shape, torch.Size((1, state.shape.numel()))
    return bitsandbytes.functional.dequantize_4bit(weight.data, state).reshape(shape)


def keep_packing(layer: Base4bit) -> bool:
    """Keep bitsandbytes from repacking a 4-bit weight in place at its first eval forward on AVX512-BF16 CPUs.

    A repacked weight dequantizes to garbage and passes no gradient on. A weight repacked before is unpacked; its scales
    were rounded to bfloat16 when it was packed.

    Returns:
        Whether the weight had been repacked.
    """
    layer.support_avx512bf16_for_cpu = False
    weight: Any = layer.weight
    state = weight.quant_state
    repacked = getattr(state, "packing_format_for_cpu", False)
    if repacked:
        unpack = bitsandbytes.functional._convert_weight_packed_for_cpu_inverse
        weight.data, state = unpack(weight.data, state)
        weight.quant_state = state
    if state is not None and not state.nested and state.absmax.dim() == 2:
        # bitsandbytes 0.50 unpacks scales that are not quantized themselves in transposed order.
        state.absmax = state.absmax.T.reshape(-1).float()
    return repacked


def protect_from_repacking(model: nn.Module) -> None:
    """`keep_packing` for every 4-bit layer of a model, adapted or not."""
    repacked = [keep_packing(module) for module in model.modules() if isinstance(module, Base4bit)]
    if any(repacked):
        logger.warning(
            "bitsandbytes repacked %d 4-bit weights in an eval forward and rounded their scales to bfloat16 (relative"
            " error up to 0.004). For the exact weights, load the model again and attach adapters before the first"
            " forward.",
            sum(repacked),
        )
