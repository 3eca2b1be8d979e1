"""Bases in torch, and `BufferDict`, which all layers of a model share."""

import copy
import io

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

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
    """A parent and two children that hold the same BufferDict, as adapted layers do; two names share a tensor."""

    def __init__(self):
        super().__init__()
        self.bases = BufferDict(held())
        self.first, self.second = nn.Linear(2, 2), nn.Linear(2, 2)
        self.first.bases = self.second.bases = self.bases


def held():
    shared = torch.arange(12.0).reshape(4, 3) / 7
    return {"a": shared, "b": torch.tensor([0.3, 70000.0], dtype=torch.bfloat16), "c": shared}


def assert_holds(bases, wanted=None):
    for name, tensor in (wanted or held()).items():
        torch.testing.assert_close(bases[name], tensor, rtol=0, atol=0)
    assert bases["a"] is bases["c"]


CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")


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
    with pytest.raises(KeyError, match="a"):
        del bases["a"]


def test_a_buffer_dict_is_equal_to_itself_only_whatever_it_holds():
    first, second = BufferDict(), BufferDict()
    assert first != second
    assert [first, second].index(second) == 1
    assert len({first, second}) == 2


def test_what_a_buffer_dict_holds_is_neither_parameter_nor_buffer_nor_state():
    holder = Holder()
    linear = ["weight", "bias"]
    assert list(holder.state_dict()) == [f"{layer}.{name}" for layer in ("first", "second") for name in linear]
    assert list(holder.buffers()) == []
    assert list(holder.bases.parameters()) == []
    holder.load_state_dict(holder.state_dict())


CONVERSIONS = {
    "half": nn.Module.half,
    "bfloat16": nn.Module.bfloat16,
    "double": nn.Module.double,
    "to float16": lambda model: model.to(torch.float16),
    "to meta": lambda model: model.to("meta"),
    "to meta and float16": lambda model: model.to("meta", torch.float16),
    "to_empty meta": lambda model: model.to_empty(device="meta"),
    "to_empty": lambda model: model.to_empty(device="cpu"),
    "meta and back": lambda model: model.to("meta").to_empty(device="cpu"),
    "share_memory": lambda model: model.share_memory(),
}


@pytest.mark.parametrize("how", CONVERSIONS)
def test_no_conversion_of_a_model_rounds_or_destroys_its_bases(how):
    holder = Holder()
    before = dict(holder.bases)
    CONVERSIONS[how](holder)
    assert all(holder.bases[name] is tensor for name, tensor in before.items())
    assert_holds(holder.bases)
    assert holder.first.bases is holder.second.bases is holder.bases


def test_moving_a_model_moves_what_its_layers_share_once_and_drops_the_copies():
    with FakeTensorMode():  # a CUDA device without one
        holder = nn.Module()
        holder.bases, holder.layer = BufferDict(held()), nn.Module()
        holder.layer.bases = bases = holder.bases
        bases.on("b", torch.device("cuda:1"))
        holder.to("cuda:0", torch.float16)
        assert {name: tensor.device.type for name, tensor in bases.items()} == dict.fromkeys("abc", "cuda")
        assert {name: tensor.dtype for name, tensor in bases.items()} == {n: t.dtype for n, t in held().items()}
        assert bases["a"] is bases["c"]
        assert bases.nbytes == 12 * 4 + 2 * 2
        assert bases.on("a", CPU).device == CPU
        moved = bases["a"]
        holder.half()
        assert bases["a"] is moved


def test_a_tensor_is_given_as_it_is_stored_or_as_a_copy_on_another_device_that_is_made_once():
    with FakeTensorMode():
        bases = BufferDict(held())
        assert bases.on("a", CPU) is bases["a"]
        copy_of_a = bases.on("a", CUDA)
        assert (copy_of_a.device, copy_of_a.dtype) == (CUDA, torch.float32)
        assert bases.on("a", CUDA) is bases.on("c", CUDA) is copy_of_a
        assert bases.on("b", CUDA).dtype == torch.bfloat16
        assert bases.nbytes == 2 * (12 * 4 + 2 * 2)
        assert bases.on("a", torch.device("meta")).device.type == "meta"
        assert bases.nbytes == 2 * (12 * 4 + 2 * 2)


def test_a_copy_is_not_kept_longer_than_what_it_is_a_copy_of():
    with FakeTensorMode():
        bases = BufferDict(held())
        copies = {name: bases.on(name, CUDA) for name in bases}
        bases["a"] = torch.full((2,), 5.0)
        assert bases.on("a", CUDA).shape == (2,)
        assert bases.on("c", CUDA) is copies["c"]
        del bases["b"], bases["c"]
        assert bases.nbytes == 2 * (2 * 4)


def test_a_copy_that_was_made_while_serving_trains_later():
    with FakeTensorMode():
        bases = BufferDict(held())
        with torch.inference_mode():
            assert not bases.on("a", CUDA).is_inference()


def test_codes_are_given_as_numbers_and_move_and_are_counted_as_codes():
    bases = BufferDict()
    codes = torch.tensor([[1, 0, -1], [0, 0, 1]], dtype=torch.int8)
    bases.hold("a", codes, 0.3)
    bases["b"] = torch.ones(2)
    torch.testing.assert_close(bases["a"], codes.float() * torch.tensor(0.3), rtol=0, atol=0)
    assert bases.on("a", CPU) is bases.stored("a") is codes
    assert [bases.scale(name) for name in bases] == [0.3, 1.0]
    assert bases.nbytes == 6 + 2 * 4
    nn.ModuleList([bases]).half()
    assert bases.stored("a") is codes
    twin = copy.deepcopy(bases)
    torch.testing.assert_close(twin["a"], bases["a"], rtol=0, atol=0)
    bases["a"] = torch.zeros(1)
    assert (bases.scale("a"), twin.scale("a")) == (1.0, 0.3)
    del twin["a"]
    twin["a"] = torch.ones(1)
    assert twin.scale("a") == 1.0


def through_pickle(module):
    buffer = io.BytesIO()
    torch.save(module, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_a_duplicate_shares_its_own_bases_among_its_layers_and_names_without_the_copies(duplicate):
    holder = Holder()
    holder.bases._copies["a", CUDA] = torch.ones(5)  # as a layer on that device had it made
    twin = duplicate(holder)
    assert twin.first.bases is twin.second.bases is twin.bases
    assert twin.bases is not holder.bases
    assert twin.bases["a"].data_ptr() != holder.bases["a"].data_ptr()
    assert_holds(twin.bases)
    assert twin.bases.nbytes == 12 * 4 + 2 * 2
    twin.bases["a"].zero_()
    assert_holds(holder.bases)


def test_on_a_cpu_that_multiplies_in_float32_sixteen_bits_are_widened_once_and_elsewhere_they_are_not():
    with FakeTensorMode():
        narrow = torch.ones(2, 3, dtype=torch.bfloat16)
        bases = BufferDict({"a": narrow, "twin": narrow})
        assert bases.on("a", CPU, torch.bfloat16) is bases.on("a", CPU) is narrow
        wide = bases.on("a", CPU, torch.float32)
        assert wide.dtype == torch.float32
        assert bases.on("twin", CPU, torch.bfloat16) is bases.stored("twin") is wide
        assert bases.nbytes == 6 * 4  # the one copy
        assert bases.on("a", CUDA, torch.float32).dtype == torch.bfloat16
        nn.ModuleList([bases]).to("cuda:0")
        assert (bases.stored("twin").dtype, bases.nbytes) == (torch.bfloat16, 6 * 2)
        bases["a"] = torch.ones(2, dtype=torch.float16)
        bases.hold("codes", torch.ones(4, dtype=torch.int8), 0.5)
        assert bases.on("codes", CPU, torch.float32).dtype == torch.int8
