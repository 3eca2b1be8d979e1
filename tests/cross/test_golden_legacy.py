"""Adapters saved under torch 2.11 without bases give the same updates in both stacks, and in PEFT on this torch."""

import warnings

import numpy as np
import peft
import pytest
import torch
from torch import nn

import interop
import randlora_torch
from tests.interop.golden import FOLDER, KINDS, LEGACY, SHAPES, golden


class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        for name, (out, inp) in SHAPES.items():
            setattr(self, name, nn.Linear(inp, out, bias=False))


def assert_golden(kind, delta_of, *, bound=5e-7):
    for name, want in golden(kind)[0].items():
        got = np.asarray(delta_of(name), np.float64)
        assert np.linalg.norm(got - want) / np.linalg.norm(want) < bound, name


@pytest.mark.parametrize("stack", ["jax", "torch"])
@pytest.mark.parametrize("kind", KINDS)
def test_both_stacks_compute_the_updates_of_then(kind, stack):
    adapter = interop.load(FOLDER / kind, recipe=LEGACY).bind(SHAPES)
    assert_golden(kind, interop.convert(adapter, stack).delta_weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_torch_stack_attaches_the_folder_itself(kind):
    model = randlora_torch.load_adapter(Layers(), FOLDER / kind, recipe=LEGACY)
    assert_golden(kind, lambda name: model.get_submodule(name).get_delta_weight("default").detach())


def by_peft(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what PEFT says about keys and versions
        model = peft.PeftModel.from_pretrained(Layers(), folder)
    return lambda name: model.base_model.model.get_submodule(name).get_delta_weight("default").detach()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_again_with_its_bases_an_adapter_is_the_same_in_peft_on_this_torch(kind, tmp_path):
    interop.save(interop.load(FOLDER / kind, recipe=LEGACY).bind(SHAPES), tmp_path, bases="one")
    assert_golden(kind, by_peft(tmp_path))


def test_peft_itself_draws_other_bases_on_this_torch():
    assert_golden("sparse", by_peft(FOLDER / "sparse"))
    if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 12):
        pytest.skip("this torch draws the bases of then")
    with pytest.raises(AssertionError):
        assert_golden("dense", by_peft(FOLDER / "dense"), bound=0.5)
