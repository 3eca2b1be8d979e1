"""Both implementations of RandLoRA behind one interface: the laws that PEFT 0.21.2 breaks are written once for both."""

import hashlib
from typing import Any, NamedTuple

import numpy as np
import oracle
import peft
import pytest
import torch
from torch import nn

import interop
import randlora_torch
from randlora_torch.bases import to_numpy

PREFIX = "base_model.model."  # PEFT's wrapper in the names of modules
KNOWN = "0.21.2"  # the release whose defects are known


class Stack(NamedTuple):
    """An implementation. Methods of adapted models (add_adapter, merge_adapter, ...) have the same names in both."""

    name: str
    Config: Any
    attach: Any  # (model, config, adapter_name="default") -> adapted model
    load: Any  # (model, folder, adapter_name="default") -> adapted model
    Layer: type

    def config(self, **fields):
        """A small config with updates of the size of the weights."""
        given = {"r": 5, "randlora_alpha": fields.get("r", 5), "target_modules": ["lin1"], **fields}
        return self.Config(**given)

    def layers(self, model):
        """The adapted layers by their names in the base model."""
        found = ((name, module) for name, module in model.named_modules() if isinstance(module, self.Layer))
        return {name.removeprefix(PREFIX): module for name, module in found if ".base_layer" not in name}

    def bases(self, model, adapter_name="default"):
        """A and B of an adapter, as the model holds them."""
        owner = model.base_model if self.name == "peft" else model
        return owner.randlora_A[adapter_name], owner.randlora_B[adapter_name]


OURS = Stack(
    "randlora",
    interop.RandLoraConfig,
    randlora_torch.get_peft_model,
    randlora_torch.load_adapter,
    randlora_torch.RandLoraLayer,
)
PEFT = Stack(
    "peft",
    peft.RandLoraConfig,
    peft.get_peft_model,
    peft.PeftModel.from_pretrained,
    peft.tuners.randlora.RandLoraLayer,
)


def broken_in_peft(reason, raises=AssertionError, stacks=(OURS, PEFT)):
    """Run a law over both; PEFT must break it, by the given kind of exception: else the law does not see the defect."""
    marks = [
        pytest.mark.skipif(peft.__version__ != KNOWN, reason=f"what peft {peft.__version__} does is not known"),
        pytest.mark.xfail(strict=True, raises=raises, reason=f"peft {KNOWN}: {reason}"),
    ]
    both = [pytest.param(stacks[0], id="randlora"), pytest.param(stacks[1], id="peft", marks=marks)]
    return pytest.mark.parametrize("stack", both)


class MLP(nn.Module):
    """Three layers; the tests adapt the square one in the middle, and others where bases are shared."""

    def __init__(self, a=10, b=20, c=20, d=2):
        super().__init__()
        self.lin0, self.lin1, self.lin2 = nn.Linear(a, b), nn.Linear(b, c), nn.Linear(c, d)

    def forward(self, x):
        return self.lin2(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


def mlp(*sizes, kind=MLP):
    torch.manual_seed(0)
    return kind(*sizes).eval()


X = torch.randn(3, 10, generator=torch.Generator().manual_seed(1))


def randomize(stack, model, adapter_name="default"):
    """Lambda and gamma as after training; they follow from the names of layer and adapter alone."""
    for name, layer in stack.layers(model).items():
        for held, scale in ((layer.randlora_lambda, 0.5), (layer.randlora_gamma, 1.0)):
            if adapter_name in held:
                place = held[adapter_name]
                seed = hashlib.sha256(f"{name} {adapter_name} {scale}".encode()).digest()[:4]
                generator = torch.Generator().manual_seed(int.from_bytes(seed, "big"))
                value = torch.randn(place.shape, generator=generator) * scale
                value /= place.shape[-1] if scale == 1.0 else 1
                if place.is_meta:
                    held[adapter_name] = nn.Parameter(value)
                else:
                    place.data.copy_(value)
    return model


def outputs(model, x=X):
    with torch.no_grad():
        return model(x)


def delta(layer, adapter_name="default"):
    """The update of an adapted layer by the paper's sum, float64, (out, in); from what the layer holds."""
    held = (layer.randlora_A, layer.randlora_B, layer.randlora_lambda, layer.randlora_gamma)
    shape = (layer.out_features, layer.in_features)
    parts = [to_numpy(part[adapter_name]) for part in held]
    return oracle.delta_weight(*parts, scaling=layer.scaling[adapter_name], shape=shape)


def with_updates(model, updates, x=X):
    """The outputs of a model whose weights are W + dW, computed in float64."""
    model = model.double()
    with torch.no_grad():
        for name, update in updates.items():
            model.get_submodule(name).weight += torch.from_numpy(update)
    return outputs(model, x.double()).float()


def norm(array):
    return np.linalg.norm(np.asarray(array, np.float64))
