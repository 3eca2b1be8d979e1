import dataclasses

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from strategies import LAYERS, draw_adapter
from tolerances import TOLERANCE

import interop
from interop import Adapter, Factors, RandLoraConfig
from randlora_jax import RandLoraAdapter


def adapter_in_jax(seed=0, **fields):
    return RandLoraAdapter.from_interop(draw_adapter(seed, **fields))


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
    assert (got.shape, got.dtype) == (LAYERS[module], jnp.float32)
    np.testing.assert_allclose(got, hub.delta_weight(module), **TOLERANCE["float32", "gradient"])


def test_delta_weight_refuses_a_module_that_is_not_adapted():
    with pytest.raises(KeyError, match=r"module 'lm_head' is not adapted; adapter\.modules lists the 3 that are\."):
        adapter_in_jax().delta_weight("lm_head")


@pytest.mark.parametrize("shape", [(40, 6), (6, 12), (11, 6), (12, 7)])
def test_delta_weight_refuses_a_shape_that_contradicts_the_recorded_one(shape):
    with pytest.raises(ValueError, match=r"does not fit 'block\.0\.up'"):
        adapter_in_jax().delta_weight("block.0.up", shape)


def test_the_shape_can_be_given_if_the_adapter_does_not_know_it():
    known = adapter_in_jax()
    adapter = RandLoraAdapter.from_interop(dataclasses.replace(draw_adapter(), shapes=None))
    assert adapter.shapes is None
    for module, shape in LAYERS.items():
        np.testing.assert_array_equal(adapter.delta_weight(module, shape), known.delta_weight(module))
    with pytest.raises(ValueError, match=r"the shape of 'block\.0\.up' is not recorded in this adapter: pass shape="):
        adapter.delta_weight("block.0.up")
    assert_same_adapter(adapter.to_interop(), dataclasses.replace(draw_adapter(), shapes=None))


def test_the_leaves_of_an_adapter_are_its_arrays_and_the_rest_is_static():
    adapter = adapter_in_jax()
    leaves, structure = jax.tree.flatten(adapter)
    assert len(leaves) == 2 * len(LAYERS) + 2
    again = jax.tree.unflatten(structure, leaves)
    assert (again.config, again.shapes, again.layouts, again.recipe) == (
        adapter.config,
        adapter.shapes,
        adapter.layouts,
        adapter.recipe,
    )
    assert jax.tree.structure(adapter_in_jax(1)) == structure
    assert jax.tree.structure(adapter_in_jax(r=3)) != structure


def test_tree_map_changes_the_arrays_and_keeps_the_rest():
    adapter = adapter_in_jax()
    doubled = jax.tree.map(lambda leaf: 2 * leaf, adapter)
    assert isinstance(doubled, RandLoraAdapter)
    assert (doubled.config, doubled.shapes, doubled.recipe) == (adapter.config, adapter.shapes, adapter.recipe)
    # dW is linear in lambda, gamma, A and B.
    want = 16 * adapter.delta_weight("block.0.up")
    chex.assert_trees_all_close(doubled.delta_weight("block.0.up"), want, rtol=1e-6, atol=0)


def test_trainable_and_with_trainable_are_a_round_trip():
    adapter, other = adapter_in_jax(0), adapter_in_jax(1)
    assert len(jax.tree.leaves(adapter.trainable)) == 2 * len(LAYERS)
    chex.assert_trees_all_equal(adapter.with_trainable(adapter.trainable), adapter)
    changed = adapter.with_trainable(other.trainable)
    chex.assert_trees_all_equal(changed.trainable, other.trainable)
    chex.assert_trees_all_equal(changed.bases, adapter.bases)
    chex.assert_trees_all_equal(adapter, adapter_in_jax(0))


def test_an_optimizer_state_covers_lambda_and_gamma_only_and_training_moves_nothing_else():
    target, adapter = adapter_in_jax(0), adapter_in_jax(1)
    wanted = {module: target.delta_weight(module) for module in LAYERS}
    optimizer = optax.adam(0.02)
    state = optimizer.init(adapter.trainable)
    moments = sorted(leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == sorted(2 * [leaf.shape for leaf in jax.tree.leaves(adapter.trainable)])

    @jax.jit
    def step(trainable, frozen, state):
        def loss(trainable):
            candidate = frozen.with_trainable(trainable)
            return sum(((candidate.delta_weight(m) - wanted[m]) ** 2).mean() for m in LAYERS)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    trainable, first = adapter.trainable, None
    for _ in range(150):
        trainable, state, value = step(trainable, adapter, state)
        first = first or value
    assert step._cache_size() == 1
    assert value < 0.05 * first
    chex.assert_trees_all_equal(adapter, adapter_in_jax(1))


def test_several_adapters_at_once_are_a_vmap_over_stacked_factors():
    adapters = [adapter_in_jax(seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[adapter.trainable for adapter in adapters])
    got = jax.vmap(lambda trainable: adapters[0].with_trainable(trainable).delta_weight("block.0.down"))(stacked)
    want = jnp.stack([adapter.delta_weight("block.0.down") for adapter in adapters])
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("fields", [{}, {"sparse": True}, {"recipe": "torch<=2.11-fp16"}], ids=str)
def test_from_and_to_interop_are_exact_inverses(dtype, fields):
    hub = stored_in(draw_adapter(**fields), dtype)
    adapter = RandLoraAdapter.from_interop(hub)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(adapter))
    assert adapter.modules == hub.modules
    assert_same_adapter(adapter.to_interop(), hub)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_a_saved_adapter_loads_as_it_was(tmp_path, dtype):
    hub = stored_in(draw_adapter(), dtype)
    RandLoraAdapter.from_interop(hub).save_pretrained(tmp_path / "adapter")
    loaded = interop.load(tmp_path / "adapter")
    again = RandLoraAdapter.from_interop(loaded.bind(LAYERS)).to_interop()
    for module in LAYERS:
        assert_same_bits(again.factors[module], hub.factors[module])
        np.testing.assert_array_equal(again.delta_weight(module), hub.delta_weight(module))


def test_an_adapter_without_bases_is_refused_with_the_two_remedies():
    message = (
        r"holds no bases .*: attach it to its model \(randlora_jax\.attach\), or give .*: adapter\.bind\(shapes\)\."
    )
    with pytest.raises(ValueError, match=message):
        RandLoraAdapter.from_interop(dataclasses.replace(draw_adapter(), bases=None))


def test_an_adapter_that_trains_other_weights_is_refused():
    hub = draw_adapter()
    config = dataclasses.replace(hub.config, bias="all")
    hub = dataclasses.replace(hub, config=config, saved_weights={"block.0.up.bias": np.zeros(12, np.float32)})
    message = (
        r"holds \['block\.0\.up\.bias'\] besides lambda and gamma \(bias='all', modules_to_save=None\).*merge those"
    )
    with pytest.raises(ValueError, match=message):
        RandLoraAdapter.from_interop(hub)


def test_delta_weight_differentiates_to_the_dtype_of_the_factors_and_leaves_the_bases_alone():
    adapter = RandLoraAdapter.from_interop(stored_in(draw_adapter(), ml_dtypes.bfloat16))
    grads = jax.grad(lambda adapter: adapter.delta_weight("block.0.up").sum())(adapter)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads.trainable)} == {jnp.dtype("bfloat16")}
    assert np.any(np.asarray(grads.factors["block.0.up"].lam) != 0)
    for untouched in (grads.bases, grads.factors["block.0.down"], grads.factors["block.1.mix"]):
        chex.assert_trees_all_equal(untouched, jax.tree.map(jnp.zeros_like, untouched))


def test_a_config_with_unknown_fields_is_still_static_and_hashable():
    adapter = adapter_in_jax(unknown_fields={"new_field": {"nested": [1]}}, auto_mapping={"base_model_class": "Net"})
    update = jax.jit(lambda adapter: adapter.delta_weight("block.1.mix"))
    chex.assert_trees_all_close(update(adapter), adapter.delta_weight("block.1.mix"), **TOLERANCE["float32"])
    assert isinstance(adapter.to_interop(), Adapter)
    assert adapter.to_interop().config.unknown_fields == {"new_field": {"nested": [1]}}
    assert isinstance(adapter.config, RandLoraConfig)
