import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
from strategies import LAYERS, draw_adapter
from tolerances import TOLERANCE

import interop
from interop import Factors
from randlora_torch import RandLoraAdapter


def stored_in(adapter, dtype):
    """The same adapter with its factors rounded to another dtype."""
    factors = {name: Factors(*(part.astype(dtype) for part in pair)) for name, pair in adapter.factors.items()}
    return dataclasses.replace(adapter, factors=factors)


def assert_same_bits(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        assert (mine.dtype, mine.shape) == (other.dtype, other.shape)
        assert mine.tobytes() == other.tobytes()


def assert_same_adapter(ours, theirs):
    """Two adapters of the hub are equal to the last bit, in dtypes, names, shapes and config."""
    assert (ours.config, ours.recipe, ours.modules) == (theirs.config, theirs.recipe, theirs.modules)
    assert ours.shapes == theirs.shapes
    assert_same_bits(ours.bases, theirs.bases)
    for module in ours.modules:
        assert_same_bits(ours.factors[module], theirs.factors[module])


@pytest.mark.parametrize("module", LAYERS)
def test_delta_weight_is_that_of_the_hub_in_torch_orientation(module):
    hub = draw_adapter()
    got = RandLoraAdapter.from_interop(hub).delta_weight(module)
    assert (tuple(got.shape), got.dtype) == (LAYERS[module], torch.float32)
    np.testing.assert_allclose(got, hub.delta_weight(module), **TOLERANCE["float32", "gradient"])


def test_delta_weight_refuses_a_module_that_is_not_adapted():
    with pytest.raises(KeyError, match=r"module 'lm_head' is not adapted; adapter\.modules lists the 3 that are\."):
        RandLoraAdapter.from_interop(draw_adapter()).delta_weight("lm_head")


@pytest.mark.parametrize("shape", [(40, 6), (6, 12), (11, 6), (12, 7)])
def test_delta_weight_refuses_a_shape_that_contradicts_the_recorded_one(shape):
    with pytest.raises(ValueError, match=r"does not fit 'block\.0\.up'"):
        RandLoraAdapter.from_interop(draw_adapter()).delta_weight("block.0.up", shape)


def test_the_shape_can_be_given_if_the_adapter_does_not_know_it():
    hub = dataclasses.replace(draw_adapter(), shapes=None)
    adapter, known = RandLoraAdapter.from_interop(hub), RandLoraAdapter.from_interop(draw_adapter())
    assert adapter.shapes is None
    for module, shape in LAYERS.items():
        np.testing.assert_array_equal(adapter.delta_weight(module, shape), known.delta_weight(module))
    with pytest.raises(ValueError, match=r"the shape of 'block\.0\.up' is not recorded in this adapter: pass shape="):
        adapter.delta_weight("block.0.up")
    assert_same_adapter(adapter.to_interop(), hub)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"sparse": True}, {"recipe": "torch<=2.11-fp16"}], ids=str)
def test_from_and_to_interop_are_exact_inverses(dtype, fields):
    hub = stored_in(draw_adapter(**fields), dtype)
    adapter = RandLoraAdapter.from_interop(hub)
    assert adapter.modules == hub.modules
    assert all(isinstance(part, torch.Tensor) for pair in (*adapter.factors.values(), adapter.bases) for part in pair)
    assert_same_adapter(adapter.to_interop(), hub)


def test_an_adapter_from_interop_has_its_own_memory():
    hub = draw_adapter()
    adapter = RandLoraAdapter.from_interop(hub)
    for pair in (*adapter.factors.values(), adapter.bases):
        for part in pair:
            part.zero_()
    assert_same_adapter(hub, draw_adapter())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_saved_adapter_loads_as_it_was(tmp_path, dtype):
    hub = stored_in(draw_adapter(), dtype)
    RandLoraAdapter.from_interop(hub).save_pretrained(tmp_path / "adapter")
    again = RandLoraAdapter.from_interop(interop.load(tmp_path / "adapter").bind(LAYERS)).to_interop()
    for module in LAYERS:
        assert_same_bits(again.factors[module], hub.factors[module])
        np.testing.assert_array_equal(again.delta_weight(module), hub.delta_weight(module))


def test_an_adapter_without_bases_is_refused_with_the_two_remedies():
    message = r"holds no bases .*: attach it to its model \(randlora_torch\.load_adapter\), or give .*adapter\.bind\("
    with pytest.raises(ValueError, match=message):
        RandLoraAdapter.from_interop(dataclasses.replace(draw_adapter(), bases=None))


def with_saved_weights():
    """An adapter of the hub that also trains biases and a head, in three dtypes."""
    hub = draw_adapter()
    config = dataclasses.replace(hub.config, bias="all", modules_to_save=("head",))
    saved = {
        "base_model.model.block.0.up.base_layer.bias": np.arange(12, dtype=np.float32),
        "base_model.model.head.weight": np.arange(6).reshape(2, 3).astype(ml_dtypes.bfloat16),
        "base_model.model.head.num_batches_tracked": np.array(7),
    }
    return dataclasses.replace(hub, config=config, saved_weights=saved)


def test_what_an_adapter_trains_besides_is_carried_both_ways_and_through_files(tmp_path):
    hub = with_saved_weights()
    adapter = RandLoraAdapter.from_interop(hub)
    assert {key: value.dtype for key, value in adapter.saved_weights.items()} == dict(
        zip(hub.saved_weights, (torch.float32, torch.bfloat16, torch.int64), strict=True)
    )
    adapter.save_pretrained(tmp_path)
    for again in (adapter.to_interop(), interop.load(tmp_path)):
        assert set(again.saved_weights) == set(hub.saved_weights)
        assert_same_bits([again.saved_weights[key] for key in hub.saved_weights], hub.saved_weights.values())


def test_what_an_adapter_trains_besides_is_copied_by_every_conversion():
    hub = with_saved_weights()
    adapter = RandLoraAdapter.from_interop(hub)
    back = adapter.to_interop()
    for value in adapter.saved_weights.values():
        value.zero_()
    for kept in (hub, back):
        assert_same_bits(kept.saved_weights.values(), with_saved_weights().saved_weights.values())
