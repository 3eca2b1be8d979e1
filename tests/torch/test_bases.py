"""Bases in torch, and `BufferDict`, which all layers of a model share."""

import copy

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

import interop
from interop import RECIPES, RandLoraConfig
from randlora_torch import BufferDict, make_bases
from randlora_torch.bases import to_numpy, to_torch

KINDS = [{}, {"sparse": True}, {"very_sparse": True}, {"projection_prng_key": -17}]


@pytest.mark.parametrize("fields", KINDS, ids=str)
@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bases_are_those_of_interop_bit_for_bit(recipe, fields):
    config = RandLoraConfig(r=4, **fields)
    ours = make_bases(config, max_dim=24, min_dim=17, recipe=recipe)
    theirs = interop.make_bases(config, max_dim=24, min_dim=17, recipe=recipe)
    for mine, numpys in zip(ours, theirs, strict=True):
        assert isinstance(mine, torch.Tensor)
        assert to_numpy(mine).dtype == numpys.dtype
        assert to_numpy(mine).tobytes() == numpys.tobytes()


def test_bases_that_cannot_be_made_raise_the_errors_of_interop():
    with pytest.raises(ValueError, match=r"recipe='torch' is not known: choose one of"):
        make_bases(RandLoraConfig(r=4), max_dim=8, min_dim=8, recipe="torch")
    with pytest.raises(ValueError, match=r"max_dim=4, min_dim=8: needs 1 <= min_dim <= max_dim\. Swap them\?"):
        make_bases(RandLoraConfig(r=4), max_dim=4, min_dim=8)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ml_dtypes.bfloat16, np.uint8])
def test_numpy_to_torch_and_back_keeps_every_bit_and_shares_no_memory(dtype):
    array = np.arange(24).reshape(2, 3, 4).astype(dtype)
    tensor = to_torch(array)
    assert str(tensor.dtype) == f"torch.{array.dtype.name}"
    again = to_numpy(tensor)
    assert again.dtype == array.dtype
    assert again.tobytes() == array.tobytes()
    tensor.zero_()
    assert array.any()


def test_a_transposed_tensor_with_gradient_becomes_the_array_of_its_values():
    tensor = torch.arange(6.0).reshape(2, 3).requires_grad_()
    np.testing.assert_array_equal(to_numpy(tensor.T), np.arange(6.0).reshape(2, 3).T)
    np.testing.assert_array_equal(to_numpy(tensor.T.bfloat16()).astype(np.float32), np.arange(6.0).reshape(2, 3).T)


class Holder(nn.Module):
    """A parent and two children that hold the same BufferDict, as adapted layers do."""

    def __init__(self):
        super().__init__()
        self.bases = BufferDict({"a": torch.ones(4, 3), "b": torch.ones(2, dtype=torch.bfloat16)})
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.first.bases = self.second.bases = self.bases


def test_a_buffer_dict_is_a_mapping_from_names_to_tensors():
    tensor = torch.ones(3)
    bases = BufferDict({"a": tensor})
    assert bases["a"] is tensor
    bases["b"] = torch.zeros(2)
    assert list(bases) == ["a", "b"]
    assert len(bases) == 2
    assert "b" in bases
    del bases["a"]
    assert list(bases) == ["b"]
    assert "a" not in bases
    with pytest.raises(KeyError, match="a"):
        bases["a"]


def test_a_buffer_dict_is_no_part_of_a_state_dict_and_has_no_parameters():
    holder = Holder()
    assert [name for name in holder.state_dict() if "bases" in name] == []
    assert list(holder.bases.parameters()) == []
    holder.load_state_dict(holder.state_dict())


def test_moving_a_model_moves_the_one_tensor_that_all_layers_share():
    holder = Holder().to("meta")
    assert holder.bases["a"].device.type == "meta"
    assert holder.first.bases is holder.second.bases is holder.bases
    assert len({id(buffer) for buffer in holder.buffers()}) == 2


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, nn.Module.float, lambda m: m.to(torch.float16)]
)
def test_converting_a_model_to_another_dtype_leaves_the_bases_as_they_are(convert):
    holder = Holder()
    a, b = holder.bases["a"], holder.bases["b"]
    convert(holder)
    assert holder.bases["a"] is a
    assert holder.bases["b"] is b


def test_moving_and_converting_at_once_only_moves():
    holder = Holder().to("meta", torch.float16)
    assert (holder.bases["a"].device.type, holder.bases["a"].dtype) == ("meta", torch.float32)
    assert holder.bases["b"].dtype == torch.bfloat16
    assert holder.first.weight.dtype == torch.float16


def test_a_deep_copy_shares_its_own_bases_among_its_layers():
    holder = Holder()
    twin = copy.deepcopy(holder)
    assert twin.first.bases is twin.second.bases is twin.bases
    assert twin.bases is not holder.bases
    assert twin.bases["a"].data_ptr() != holder.bases["a"].data_ptr()
    torch.testing.assert_close(twin.bases["a"], holder.bases["a"], rtol=0, atol=0)
