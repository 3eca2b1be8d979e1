"""Adapters attached to NNX models: the model stays what it is, and only lambda and gamma train."""

import copy
import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from stacks import without_type_checks
from tolerances import TOLERANCE

from interop import Adapter, AdapterFormatError, Factors, RandLoraConfig
from randlora_jax import (
    Layout,
    RandLoraAdapter,
    RandLoraParam,
    attach,
    detach,
    effective_params,
    extract,
)
from randlora_jax.nnx_weight import RandLoraBasis, RandLoraWeight


class Net(nnx.Module):
    """Two linear layers of different shapes in a list, attention-like layers with heads, and a head to leave out."""

    def __init__(self, rngs, dtype=jnp.float32):
        make = {"rngs": rngs, "param_dtype": dtype, "dtype": dtype}
        self.layers = nnx.List([nnx.Linear(8, 12, **make), nnx.Linear(12, 8, use_bias=False, **make)])
        self.query = nnx.LinearGeneral(8, (2, 5), **make)
        self.out = nnx.LinearGeneral((2, 5), 8, axis=(-2, -1), **make)
        self.mix = nnx.Einsum("td,dhk->thk", (8, 2, 5), (2, 5), **make)
        self.lm_head = nnx.Linear(8, 6, **make)

    def __call__(self, x):
        x = self.layers[1](nnx.relu(self.layers[0](x)))
        return self.lm_head(self.out(self.query(x) + self.mix(x)))


LAYOUTS = {"query": Layout((0,), (1, 2)), "out": Layout((0, 1), (2,)), "mix": Layout((0,), (1, 2))}
SHAPES = {"layers.0": (12, 8), "layers.1": (8, 12), "query": (10, 8), "out": (8, 10), "mix": (10, 8)}
CONFIG = RandLoraConfig(r=3, randlora_alpha=3, target_modules="all-linear")


@functools.cache
def abstract_net(dtype):
    return nnx.split(nnx.eval_shape(lambda: Net(nnx.Rngs(0), dtype)))


def net(seed=0, dtype=jnp.float32):
    """A `Net` with numpy's random weights: flax's own would be compiled for every shape and dtype."""
    graph, state = abstract_net(dtype)
    rng = np.random.default_rng(seed)
    return nnx.merge(
        graph, jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype), state)
    )


def batch(seed=0, rows=4):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, 8)), jnp.float32)


def randomized(adapter, seed=7):
    """The adapter with random lambda and gamma, as after training."""
    rng = np.random.default_rng(seed)
    leaves = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 4, leaf.dtype), adapter.trainable)
    return adapter.with_trainable(leaves)


def trained_adapter(**options):
    """An adapter for `Net`, as after training."""
    return randomized(extract(attach(net(**options), CONFIG, layouts=LAYOUTS)))


def attached(seed=0, **options):
    return attach(net(seed, **options), trained_adapter(**options), layouts=LAYOUTS)


def pure(model, *filters):
    """The state as nested dicts of arrays."""
    return nnx.to_pure_dict(nnx.state(model, *filters))


def kernel_of(params, name):
    for part in name.split("."):
        params = params[int(part) if part.isdigit() else part]
    return params["kernel"]


def test_attaching_a_new_adapter_changes_the_output_by_no_bit_and_the_model_not_at_all():
    model = net()
    want, layers = model(batch()), [*model.layers, model.query]
    assert attach(model, CONFIG, layouts=LAYOUTS) is model
    assert type(model) is Net
    assert [*model.layers, model.query] == layers
    np.testing.assert_array_equal(model(batch()), want)


def test_an_attached_model_computes_with_the_effective_kernels():
    params, adapter = pure(net(), nnx.Param), trained_adapter()
    effective = effective_params(params, adapter)
    plain = net()
    nnx.update(plain, effective)
    want = plain(batch())
    model = attach(net(), adapter, layouts=LAYOUTS)
    chex.assert_trees_all_close(model(batch()), want, **TOLERANCE["float32", "forward"])
    assert np.any(np.abs(np.asarray(want - net()(batch()))) > 0.1)


def test_every_kind_of_layer_gives_its_base_output_plus_x_times_the_transposed_update():
    base, model = net(), attached()
    adapter, x, heads = extract(model), batch(), jnp.asarray(np.random.default_rng(1).standard_normal((4, 2, 5)))
    heads = heads.astype(jnp.float32)
    for name, layer, plain, inputs in (
        ("layers.0", model.layers[0], base.layers[0], x),
        ("query", model.query, base.query, x),
        ("mix", model.mix, base.mix, x),
        ("out", model.out, base.out, heads),
    ):
        update = inputs.reshape(4, -1) @ adapter.delta_weight(name).T
        want = plain(inputs) + update.reshape(plain(inputs).shape)
        chex.assert_trees_all_close(layer(inputs), want, **TOLERANCE["float32", "forward"])


def test_a_half_precision_model_keeps_its_dtype_and_float32_factors():
    dtype = jnp.bfloat16
    model = attached(dtype=dtype)
    adapter = extract(model)
    assert {leaf.dtype for leaf in jax.tree.leaves(adapter.trainable)} == {jnp.dtype("float32")}
    assert model.layers[0].kernel.dtype == model.layers[0].kernel[...].dtype == dtype
    assert model(batch().astype(dtype)).dtype == dtype
    delta = adapter.delta_weight("layers.0").T
    want = (net(dtype=dtype).layers[0].kernel[...].astype(jnp.float32) + delta).astype(dtype)
    np.testing.assert_array_equal(model.layers[0].kernel[...], want)


def test_the_replaced_kernel_answers_like_the_param_it_stands_for():
    model = attached()
    kernel, base = model.query.kernel, net().query.kernel
    assert isinstance(kernel, RandLoraWeight)
    assert (kernel.shape, kernel.dtype, kernel.ndim) == (base.shape, base.dtype, base.ndim)
    effective = kernel.get_value()
    np.testing.assert_array_equal(kernel[...], effective)
    np.testing.assert_array_equal(kernel.value, effective)
    np.testing.assert_array_equal(jnp.asarray(kernel), effective)
    np.testing.assert_array_equal(kernel[1:3], effective[1:3])
    np.testing.assert_array_equal(kernel.astype(jnp.bfloat16), effective.astype(jnp.bfloat16))


def test_there_are_two_trainable_leaves_per_layer_and_one_pair_of_bases_per_model():
    model = attached()
    trainable = jax.tree.leaves(nnx.state(model, RandLoraParam))
    assert len(trainable) == 2 * len(SHAPES)
    assert sum(leaf.size for leaf in trainable) == sum(leaf.size for leaf in jax.tree.leaves(extract(model).trainable))
    bases = jax.tree.leaves(nnx.state(model, RandLoraBasis))
    assert sorted(leaf.shape for leaf in bases) == [(3, 1, 8), (12, 3, 3)]  # what layers use of (3, 1, 12), (12, 4, 3)
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 2 * len(SHAPES)
    everything = len(jax.tree.leaves(nnx.state(model)))
    assert everything == len(jax.tree.leaves(nnx.state(net()))) + 2 * len(SHAPES) + 2


def test_lambda_and_gamma_are_lora_params_and_the_bases_are_no_params():
    kernel = attached().layers[0].kernel.adapters["default"]
    assert isinstance(kernel.randlora_lambda, nnx.LoRAParam)
    assert isinstance(kernel.randlora_gamma, RandLoraParam)
    assert not isinstance(kernel.randlora_A, nnx.Param)


def train(model, steps=40, jit=True):
    """Fit random targets; returns the losses before each step."""
    optimizer = nnx.Optimizer(model, optax.adam(0.02), wrt=RandLoraParam)
    target = jnp.asarray(np.random.default_rng(3).standard_normal((4, 6)), jnp.float32)

    def step(model, optimizer, x):
        def loss(model):
            return ((model(x) - target) ** 2).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
        optimizer.update(model, grads)
        return value

    step = nnx.jit(step) if jit else step
    return [float(step(model, optimizer, batch())) for _ in range(steps)]


def test_training_moves_exactly_lambda_and_gamma_of_every_layer():
    model = attach(net(), CONFIG, layouts=LAYOUTS)
    before = jax.tree.map(np.array, pure(model))
    losses = train(model)
    assert losses[-1] < 0.2 * losses[0]
    moved = {
        path
        for (path, old), (_, new) in zip(
            jax.tree_util.tree_leaves_with_path(before), jax.tree_util.tree_leaves_with_path(pure(model)), strict=True
        )
        if np.asarray(old).tobytes() != np.asarray(new).tobytes()
    }
    names = sorted(jax.tree_util.keystr(path, simple=True, separator=".") for path in moved)
    parts = ("randlora_gamma", "randlora_lambda")
    assert names == sorted(f"{layer}.kernel.adapters.default.{part}" for layer in SHAPES for part in parts)


def test_gradients_reach_the_factors_as_through_the_written_out_model():
    model, adapter, params = attached(), trained_adapter(), pure(net(), nnx.Param)

    def loss(model):
        return (model(batch()) ** 2).sum()

    def functional(trainable):
        plain = net()
        nnx.update(plain, effective_params(params, adapter.with_trainable(trainable)))
        return loss(plain)

    value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model)
    want_value, want = jax.value_and_grad(functional)(adapter.trainable)
    chex.assert_trees_all_close(value, want_value, **TOLERANCE["float32", "gradient"])
    grads = nnx.to_pure_dict(grads)
    for name in SHAPES:
        got = kernel_of(grads, name)["adapters"]["default"]
        got = Factors(got["randlora_lambda"], got["randlora_gamma"])
        chex.assert_trees_all_close(got, want[name], **TOLERANCE["float32", "gradient"])


def test_jit_equals_eager_and_does_not_compile_again_for_new_factors():
    model = attached()
    traces = []

    @nnx.jit
    def forward(model, x):
        traces.append(1)
        return model(x)

    chex.assert_trees_all_close(forward(model, batch()), model(batch()), **TOLERANCE["float32", "forward"])
    other = attach(net(1), randomized(trained_adapter(), 8), layouts=LAYOUTS)
    chex.assert_trees_all_close(forward(other, batch()), other(batch()), **TOLERANCE["float32", "forward"])
    assert len(traces) == 1


def test_remat_of_an_attached_model_has_its_value_and_gradients():
    model = attached()

    def loss(model, forward):
        return (forward(model, batch()) ** 2).sum()

    def gradients(forward):
        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model, forward)

    plain, remat = gradients(lambda m, x: m(x)), gradients(nnx.remat(lambda m, x: m(x)))
    chex.assert_trees_all_close(
        nnx.to_pure_dict(remat[1]), nnx.to_pure_dict(plain[1]), **TOLERANCE["float32", "gradient"]
    )
    chex.assert_trees_all_close(remat[0], plain[0], **TOLERANCE["float32", "gradient"])


def test_split_and_merge_are_a_round_trip():
    model = attached()
    graph, trainable, frozen = nnx.split(model, RandLoraParam, ...)
    assert len(jax.tree.leaves(trainable)) == 2 * len(SHAPES)
    again = nnx.merge(graph, trainable, frozen)
    np.testing.assert_array_equal(again(batch()), model(batch()))
    chex.assert_trees_all_equal(extract(again), extract(model))
    zero = nnx.merge(graph, jax.tree.map(jnp.zeros_like, trainable), frozen)
    np.testing.assert_array_equal(zero(batch()), net()(batch()))


def test_a_state_put_into_a_freshly_attached_model_makes_it_the_same_model():
    model, fresh = attached(), attach(net(5), CONFIG, layouts=LAYOUTS)
    nnx.update(fresh, nnx.state(model))
    np.testing.assert_array_equal(fresh(batch()), model(batch()))
    assert nnx.graphdef(fresh) == nnx.graphdef(model)


@pytest.mark.parametrize("copied", [copy.deepcopy, nnx.clone], ids=["deepcopy", "clone"])
def test_a_copy_computes_the_same_shares_its_own_bases_and_trains_apart(copied):
    model = attached()
    want = model(batch())
    twin = copied(model)
    np.testing.assert_array_equal(twin(batch()), want)
    assert len(jax.tree.leaves(nnx.state(twin, RandLoraBasis))) == 2
    assert basis(twin.layers[0]) is basis(twin.query)
    train(twin, steps=1)
    assert np.any(np.asarray(twin(batch()) != want))
    np.testing.assert_array_equal(model(batch()), want)


def basis(layer):
    return layer.kernel.adapters["default"].randlora_B


def test_extract_gives_back_the_adapter_that_was_attached():
    adapter = trained_adapter()
    again = extract(attach(net(), adapter, layouts=LAYOUTS))
    chex.assert_trees_all_equal(again, adapter)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)
    assert dict(again.shapes) == SHAPES
    assert dict(again.layouts) == {**dict.fromkeys(["layers.0", "layers.1"], Layout((0,), (1,))), **LAYOUTS}
    assert again.config == CONFIG


def test_detach_gives_back_the_base_model_bit_for_bit():
    model, base = attached(), net()
    assert detach(model) is model
    assert nnx.graphdef(model) == nnx.graphdef(base)
    chex.assert_trees_all_equal(pure(model), pure(base))


def test_detach_with_merge_leaves_a_plain_model_with_the_effective_kernels():
    model = attached()
    want, adapter = model(batch()), extract(model)
    assert detach(model, merge=True) is model
    assert nnx.graphdef(model) == nnx.graphdef(net())
    np.testing.assert_array_equal(model(batch()), want)
    expected = effective_params(pure(net(), nnx.Param), adapter)
    chex.assert_trees_all_close(pure(model, nnx.Param), expected, **TOLERANCE["float32", "merge"])


def test_a_detached_model_can_be_adapted_again():
    model = detach(attached())
    attach(model, trained_adapter(), layouts=LAYOUTS)
    np.testing.assert_array_equal(model(batch()), attached()(batch()))


def test_an_adapter_of_any_form_attaches_alike(tmp_path):
    adapter = trained_adapter()
    want = attached()(batch())
    adapter.save_pretrained(tmp_path / "folder")
    hub = adapter.to_interop()
    bare = dataclasses.replace(hub, bases=None, shapes=None)
    for source in (
        adapter,
        hub,
        bare,
        tmp_path / "folder",
        str(tmp_path / "folder"),
        RandLoraAdapter.from_interop(hub),
    ):
        np.testing.assert_array_equal(attach(net(), source, layouts=LAYOUTS)(batch()), want)
    assert isinstance(hub, Adapter)


@pytest.mark.parametrize("wrong", [None, 3, {"r": 4}])
def test_attaching_something_else_is_a_type_error(wrong):
    message = r"config_or_adapter is a (NoneType|int|dict): pass a RandLoraConfig, an adapter, or an adapter folder\."
    with without_type_checks(), pytest.raises(TypeError, match=message):
        attach(net(), wrong)


def test_a_second_adapter_is_refused_and_the_first_stays():
    model = attached()
    want = model(batch())
    with pytest.raises(ValueError, match=r"already has an adapter attached under the name 'default': pass another"):
        attach(model, CONFIG, layouts=LAYOUTS)
    np.testing.assert_array_equal(model(batch()), want)


@pytest.mark.parametrize("function", [extract, detach])
def test_a_model_without_an_adapter_has_none_to_give(function):
    with pytest.raises(ValueError, match=r"the model has no adapter attached: attach\(model, config\) adds one"):
        function(net())


def test_an_adapter_for_another_model_is_refused_and_the_model_stays_as_it_was():
    class Other(nnx.Module):
        def __init__(self, rngs):
            self.query = nnx.Linear(8, 11, rngs=rngs)

    model = Other(nnx.Rngs(0))
    with pytest.raises(AdapterFormatError, match=r"(?s)the model lacks these adapted layers .*:\n  - layers\.0\n"):
        attach(model, trained_adapter())
    adapter = extract(attach(net(), dataclasses.replace(CONFIG, target_modules=["query"]), layouts=LAYOUTS))
    with pytest.raises(AdapterFormatError, match=r"query: the model has \(11, 8\), the adapter was made for \(10, 8\)"):
        attach(model, adapter)
    assert type(model.query.kernel) is nnx.Param


def test_targets_without_a_layout_or_a_kernel_are_refused():
    with pytest.raises(
        ValueError, match=r"entry 'query' matches none of the 3 .* such as \['mix', 'out', 'query'\], need layouts="
    ):
        attach(net(), dataclasses.replace(CONFIG, target_modules=["query"]))
    with pytest.raises(ValueError, match=r"layouts are given for \['quarry'\], which are no parameters"):
        attach(net(), CONFIG, layouts={"quarry": Layout((0,), (1, 2))})


def test_all_linear_leaves_out_the_head_and_what_has_no_layout():
    assert extract(attach(net(), CONFIG)).modules == ("layers.0", "layers.1")


def test_init_weights_false_needs_rngs_and_follows_them():
    config = dataclasses.replace(CONFIG, init_weights=False)
    with pytest.raises(ValueError, match=r"init_weights=False draws lambda at random: pass key=.* or rngs="):
        attach(net(), config)
    first, again, other = (extract(attach(net(), config, rngs=nnx.Rngs(seed))) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert np.any(np.asarray(first.factors["layers.0"].lam != other.factors["layers.0"].lam))
    model = attach(net(), config, rngs=nnx.Rngs(0))
    assert np.any(np.abs(np.asarray(model(batch()) - net()(batch()))) > 1e-3)


def test_the_recipe_of_the_bases_can_be_chosen():
    adapter = extract(attach(net(), CONFIG, recipe="torch<=2.11"))
    assert adapter.recipe == "torch<=2.11"
    assert np.any(np.asarray(adapter.bases.B != extract(attach(net(), CONFIG)).bases.B))


def test_a_model_that_is_itself_a_linear_layer_can_be_adapted():
    layer = nnx.Linear(8, 12, rngs=nnx.Rngs(0))
    want = layer(batch())
    attach(layer, CONFIG)
    np.testing.assert_array_equal(layer(batch()), want)
    adapter = randomized(extract(layer))
    assert adapter.modules == ("kernel",)
    detach(layer)
    got = attach(layer, adapter)(batch())
    want = want + batch() @ adapter.delta_weight("kernel").T
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "forward"])


def test_layers_stacked_by_nnx_vmap_are_not_taken_for_linear_layers():
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key):
        return nnx.Linear(8, 8, rngs=nnx.Rngs(key))

    class Stacked(nnx.Module):
        def __init__(self):
            self.blocks = make(jax.random.split(jax.random.key(0), 3))

    with pytest.raises(ValueError, match=r"such as \['blocks'\], need layouts="):
        attach(Stacked(), dataclasses.replace(CONFIG, target_modules=["blocks"]))


def test_a_loaded_adapter_with_dropout_says_that_it_has_no_effect():
    adapter = extract(attach(net(), CONFIG)).to_interop()
    dropped = dataclasses.replace(adapter, config=dataclasses.replace(CONFIG, randlora_dropout=0.2))
    with pytest.warns(UserWarning, match=r"randlora_dropout=0\.2 has no effect in this stack"):
        attach(net(), dropped)


def test_an_adapter_brings_the_layouts_that_it_was_made_with():
    adapter = trained_adapter()
    assert extract(attach(net(), adapter)).layouts == extract(attach(net(), adapter, layouts=LAYOUTS)).layouts


def test_merging_does_not_touch_a_layer_that_is_tied_to_the_adapted_one():
    first, second = (nnx.Linear(8, 8, rngs=nnx.Rngs(seed)) for seed in (0, 1))
    second.kernel = first.kernel
    model = nnx.Sequential(first, second)
    config = dataclasses.replace(CONFIG, target_modules=["layers.0"], init_weights=False)
    attach(model, config, rngs=nnx.Rngs(0))
    x = jnp.ones((2, 8))
    want, base = model(x), np.asarray(second.kernel[...])
    detach(model, merge=True)
    np.testing.assert_allclose(model(x), want, rtol=1e-5, atol=1e-4)
    np.testing.assert_array_equal(second.kernel[...], base)


def test_an_adapted_kernel_behaves_as_the_array_it_stands_for():
    model = nnx.Sequential(nnx.Linear(8, 5, rngs=nnx.Rngs(0)))
    config = dataclasses.replace(CONFIG, target_modules="all-linear", init_weights=False)
    kernel = attach(model, config, rngs=nnx.Rngs(0)).layers[0].kernel
    value = np.asarray(kernel.get_value())
    assert len(kernel) == 8
    assert kernel.size == 40
    for got, want in (
        (np.stack(list(kernel)), value),
        (kernel.T, value.T),
        (2 * kernel + kernel, 3 * value),
        (-kernel, -value),
        (kernel.sum(axis=0), value.sum(axis=0)),
        (jnp.ones((2, 8)) @ kernel, np.ones((2, 8)) @ value),
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match=r"this kernel is adapted: detach\(model\) before writing to it"):
        kernel.value = value
    with pytest.raises(AttributeError, match="'RandLoraWeight' object has no attribute 'nonsense'"):
        _ = kernel.nonsense


def test_all_linear_names_the_kernels_that_it_cannot_place():
    with pytest.warns(UserWarning, match=r"adapts 2 kernels\. Kernels with more than two axes, such as \['mix', 'out'"):
        attach(net(), dataclasses.replace(CONFIG, target_modules="all-linear"))
