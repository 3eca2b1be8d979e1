import numpy as np
import torch
from stacks import Stack, UpdateLaws

from randlora_torch import apply_delta, delta_weight, layer_bases
from randlora_torch.bases import to_numpy, to_torch


class TorchStack(Stack):
    cast, numpy = staticmethod(to_torch), staticmethod(to_numpy)
    delta_weight, apply_delta, layer_bases = map(staticmethod, (delta_weight, apply_delta, layer_bases))

    def gradients(self, function, *arguments):
        leaves = [argument.detach().clone().requires_grad_() for argument in arguments]
        return torch.autograd.grad(function(*leaves).sum(), leaves, allow_unused=True)


class TestUpdate(UpdateLaws):
    stack = TorchStack()
