"""Weights that are not quantized: how those of a linear layer and of a convolution are read and written."""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from randlora_torch.gradients import product_dtype
from randlora_torch.layer import AdapterLayer, Frozen, is_bare
from randlora_torch.merging import is_sharded


class PlainWeight(AdapterLayer):
    """The weight of `nn.Linear`, or of transformers' `Conv1D`, which stores it (in, out)."""

    @property
    def weight(self) -> Tensor:
        """The weight that the layer computes with, W + dW, for code that reads it instead of calling the layer.

        In a mixed batch there is no such weight: what is read has its dtype, device and shape, and is not a number.
        """
        if self.rows is not None:
            weight = self.base_layer.weight
            return weight.new_full((), torch.nan).expand(weight.shape)
        names = self._applied()
        if not names:
            return self.base_layer.weight
        weight = self._read_weight() + sum(self.get_delta_weight(name) for name in names)
        return self._stored(weight).to(self._weight_dtype())

    def _frozen(self, x: Tensor) -> Frozen | None:
        base, dtype = self.base_layer, product_dtype(x)
        weight = base._parameters.get("weight")
        if not is_bare(base) or type(base).forward not in (nn.Linear.forward, Conv1D.forward) or weight is None:
            return None
        same = weight.dtype == x.dtype or (dtype != x.dtype and weight.dtype != torch.float64)  # else it complains
        if not same or not weight.is_floating_point() or weight.device != x.device or is_sharded(weight):
            return None
        return Frozen(self._stored(weight), base.bias, dtype, dtype)

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.T if isinstance(self.base_layer, Conv1D) else weight

    def _read_weight(self) -> Tensor:
        weight = self.base_layer.weight
        return self._stored(weight.to(torch.promote_types(weight.dtype, torch.float32)))

    def _weight_dtype(self) -> torch.dtype:
        return self.base_layer.weight.dtype

    def _write_weight(self, weight: Tensor) -> None:
        old = self.base_layer.weight
        if self._kept is not None:
            stored = self._stored(weight).to(old.dtype).contiguous()
            self.base_layer.weight = nn.Parameter(stored, requires_grad=old.requires_grad)
        else:
            old.data.copy_(self._stored(weight))

    def _current(self) -> tuple[nn.Parameter]:
        return (self.base_layer.weight,)

    def _put_back(self, kept: tuple[nn.Parameter]) -> None:
        now, (before,) = self.base_layer.weight, kept
        if (before.device, before.dtype) != (now.device, now.dtype):  # the model was moved or converted meanwhile
            before = nn.Parameter(before.detach().to(now.device, now.dtype), requires_grad=now.requires_grad)
        self.base_layer.weight = before


class ConvolutionWeight(PlainWeight):
    """The weight of `nn.Conv2d`, (out, in, height, width), read as the matrix (out, in * height * width)."""

    def _stored(self, weight: Tensor) -> Tensor:
        return weight.reshape(self.base_layer.weight.shape)

    def _read_weight(self) -> Tensor:
        weight = self.base_layer.weight
        return weight.to(torch.promote_types(weight.dtype, torch.float32)).flatten(start_dim=1)
