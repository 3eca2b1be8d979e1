"""bitsandbytes' quantized weights as kernels read them: plain tensors, no class of bitsandbytes.

Scales that are quantized themselves (double quantization) are dequantized by whoever makes a `Packed4bit`.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Packed4bit(NamedTuple):
    """An NF4 or FP4 weight; number `f` of the flattened weight is `code[nibble f] * absmax[f // blocksize]`.

    Attributes:
        packed: uint8, two codes a byte, the earlier one in the high half.
        absmax: float32 (ceil(out*in / blocksize),).
        code: float32 (16,), the numbers that the codes stand for.
        blocksize: How many numbers share a scale; blocks go on across rows.
        shape: (out, in).
    """

    packed: Tensor
    absmax: Tensor
    code: Tensor
    blocksize: int
    shape: tuple[int, int]

    def dequantize(self) -> Tensor:
        """The weight (out, in) in float32, before it is rounded to any dtype."""
        packed = self.packed.reshape(-1)
        nibbles = torch.stack((packed >> 4, packed & 15), dim=1).reshape(-1)[: self.shape[0] * self.shape[1]]
        scales = self.absmax.repeat_interleave(self.blocksize)[: nibbles.numel()]
        return (self.code[nibbles.long()] * scales).reshape(self.shape)


class Rows8bit(NamedTuple):
    """An LLM.int8() weight: `codes * SCB / 127`, one scale per row.

    Attributes:
        codes: int8 (out, in).
        SCB: float32 (out,), the row maxima that bitsandbytes keeps.
    """

    codes: Tensor
    SCB: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.codes.shape[0], self.codes.shape[1]

    def dequantize(self) -> Tensor:
        """The weight (out, in) in float32, before it is rounded to any dtype."""
        return self.codes.float().mul_((self.SCB.float() * (1 / 127))[:, None])
