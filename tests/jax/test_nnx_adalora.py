"""AdaLoRA attached to NNX models: all that RandLoRA can do there, and the allocation of ranks."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from strategies import draw_adalora
from tolerances import TOLERANCE

import interop
from interop import RandLoraConfig, SVDFactors
from randlora_jax import (
    AdaLoraAdapter,
    Layout,
    RandLoraAdapter,
    RandLoraBases,
    RandLoraBasis,
    RandLoraLinear,
    RandLoraParam,
    active_adapter,
    adalora,
    adapter_names,
    attach,
    bound_bases,
    delete_adapter,
    detach,
    disable_adapters,
    effective_params,
    enable_adapters,
    extract,
    model_layouts,
    print_trainable_parameters,
    set_adapter,
)
from tests.jax.adalora_models import SCHEDULE, config

FIELDS = {"target_modules": ["up", "down"]}
SHAPES = {"down": (8, 12), "up": (12, 8)}
KEPT = {"down": (False,) * 4, "up": (True, False, False, True)}
CLOSE, GRADIENT = TOLERANCE["float32", "forward"], TOLERANCE["float32", "gradient"]
X = jnp.asarray(np.random.default_rng(1).standard_normal((4, 8)), jnp.float32)


class Net(nnx.Module):
    def __init__(self, rngs, layer=nnx.Linear):
        self.up, self.down = layer(8, 12, rngs=rngs), layer(12, 8, rngs=rngs)

    def __call__(self, x):
        return self.down(jnp.tanh(self.up(x)))


@functools.cache
def abstract(make):
    return nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))


def made(make):
    """A model with numpy's random weights: flax's own would be compiled for every shape."""
    graph, state = abstract(make)
    rng = np.random.default_rng(0)
    return nnx.merge(
        graph, jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 3, leaf.dtype), state)
    )


def net():
    return made(Net)


def scanned():
    return made(Scanned)


def pure(model, *filters):
    return nnx.to_pure_dict(nnx.state(model, *filters))


def hub(kept=None, **fields):
    return draw_adalora(shapes=SHAPES, kept=kept, lora_alpha=1, **fields)


def functional(model, adapter, x=X):
    """The outputs of a bare model with W + dW in place of each adapted W."""
    plain = nnx.clone(model)
    nnx.update(plain, effective_params(pure(model, nnx.Param), adapter))
    return plain(x)


def test_a_new_adapter_draws_from_rngs_and_changes_the_output_by_no_bit():
    want = net()(X)
    with pytest.raises(ValueError, match=r"AdaLoRA draws A and B at random: pass key=.*, or rngs=nnx\.Rngs\(0\)\."):
        attach(net(), config(**FIELDS))
    model, again, other = (attach(net(), config(**FIELDS), rngs=nnx.Rngs(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(model(X), want)
    chex.assert_trees_all_equal(extract(model), extract(again))
    assert np.any(np.asarray(extract(model).factors["up"].A != extract(other).factors["up"].A))
    with pytest.raises(ValueError, match=r"lora_dropout=0\.1: W \+ dW has no place for dropout"):
        attach(net(), config(**FIELDS, lora_dropout=0.1), rngs=nnx.Rngs(0))


@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_an_attached_model_computes_with_the_effective_kernels_and_gives_the_adapter_back(kept, tmp_path):
    source = hub(kept)
    interop.save(source, tmp_path / "first")
    for form in (source, AdaLoraAdapter.from_interop(source), tmp_path / "first"):
        model = attach(net(), form)
        adapter = extract(model)
        assert type(adapter) is AdaLoraAdapter
        chex.assert_trees_all_close(model(X), functional(net(), adapter), **CLOSE)
    assert np.abs(np.asarray(model(X) - net()(X))).max() > 0.1
    adapter.save_pretrained(tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    again = extract(attach(net(), adapter))
    chex.assert_trees_all_equal(again, adapter)
    assert jax.tree.structure(again) == jax.tree.structure(adapter)


def test_its_factors_are_lora_params_called_as_in_files_and_there_are_no_bases(capsys):
    model = attach(net(), hub())
    part = model.up.kernel.adapters["default"]
    for name in ("lora_A", "lora_E", "lora_B"):
        assert type(getattr(part, name)) is RandLoraParam
    assert len(jax.tree.leaves(nnx.state(model, nnx.LoRAParam))) == 6
    assert not jax.tree.leaves(nnx.state(model, RandLoraBasis))
    assert nnx.graphdef(nnx.clone(model)) == nnx.graphdef(model)
    print_trainable_parameters(extract(model), model)
    trainable, total = 4 * (20 + 1 + 20 + 1), 2 * 96 + 20
    line = f"trainable params: {trainable} || all params: {trainable + total} || trainable%: "
    assert capsys.readouterr().out.startswith(line)


def loss_of(model):
    return (model(X) ** 2).mean() + adalora.orthogonal_loss(extract(model))


def test_gradients_also_of_the_orthogonal_loss_are_those_of_the_written_out_model():
    adapter, diff = AdaLoraAdapter.from_interop(hub()), nnx.DiffState(0, RandLoraParam)
    value, grads = nnx.jit(nnx.value_and_grad(loss_of, argnums=diff))(attach(net(), adapter))

    def written_out(trainable):
        adapted = adapter.with_trainable(trainable)
        return (functional(net(), adapted) ** 2).mean() + adalora.orthogonal_loss(adapted)

    want_value, want = jax.jit(jax.value_and_grad(written_out))(adapter.trainable)
    chex.assert_trees_all_close(value, want_value, **GRADIENT)
    for name in SHAPES:
        got = nnx.to_pure_dict(grads)[name]["kernel"]["adapters"]["default"]
        got = SVDFactors(got["lora_A"], got["lora_E"], got["lora_B"])
        chex.assert_trees_all_close(got, want[name], **GRADIENT)
    orthogonal = jax.grad(adalora.orthogonal_loss)(adapter).factors
    assert np.abs(orthogonal["up"].A).max() > 0.01


def trained(model, optimizer, steps):
    @nnx.jit
    def step(model, optimizer):
        value, grads = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, RandLoraParam))(model)
        optimizer.update(model, grads)
        return value

    return [float(step(model, optimizer)) for _ in range(steps)]


def test_plain_training_moves_exactly_the_factors_of_the_active_adapter():
    model = attach(net(), hub(), adapter_name="first")
    attach(model, config(**FIELDS), adapter_name="second", rngs=nnx.Rngs(0))
    before = jax.tree.map(np.array, pure(model))
    losses = trained(model, nnx.Optimizer(model, optax.adam(0.02), wrt=RandLoraParam), 10)
    assert losses[-1] < 0.9 * losses[0]
    leaves = zip(*map(jax.tree_util.tree_leaves_with_path, (before, pure(model))), strict=True)
    moved = {jax.tree_util.keystr(path, simple=True, separator=".") for (path, a), (_, b) in leaves if np.any(a != b)}
    parts = ("lora_A", "lora_B", "lora_E")
    assert moved == {f"{layer}.kernel.adapters.second.{part}" for layer in SHAPES for part in parts}


def test_ranks_are_allocated_in_a_jitted_step_and_pruned_from_the_state_of_nnx_optimizer():
    model = attach(net(), config(target_modules=["up"]), rngs=nnx.Rngs(1))
    optimizer = adalora.on_model(adalora.rank_allocator(optax.adam(0.02), extract(model)), model)
    optimizer = nnx.Optimizer(model, optimizer, wrt=RandLoraParam)
    trained(model, optimizer, SCHEDULE["total_step"])
    pruned = adalora.prune(extract(model), optimizer.opt_state)
    assert len(pruned.factors["up"].E) == sum(pruned.config.rank_pattern["up.lora_E"]) == SCHEDULE["target_r"]
    chex.assert_trees_all_close(attach(net(), pruned)(X), model(X), **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("stacked", [False, True], ids=["plain", "stacked"])
def test_ranks_are_allocated_as_on_the_pytree_step_by_step(stacked):
    make, layouts = (scanned, SCANNED) if stacked else (net, None)
    fields = {"target_modules": ["layers"]} if stacked else FIELDS
    model = attach(make(), config(**fields), layouts=layouts, rngs=nnx.Rngs(1))
    adapter = extract(model)
    tx = adalora.rank_allocator(optax.adam(0.02), adapter)
    optimizer = nnx.Optimizer(model, adalora.on_model(tx, model), wrt=RandLoraParam)
    base = make()

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            adapted = adapter.with_trainable(trainable)
            return (functional(base, adapted) ** 2).mean() + adalora.orthogonal_loss(adapted)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = tx.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    trainable, state, want = adapter.trainable, tx.init(adapter.trainable), []
    for _ in range(SCHEDULE["total_step"]):
        trainable, state, value = step(trainable, state)
        want.append(float(value))
    np.testing.assert_allclose(trained(model, optimizer, SCHEDULE["total_step"]), want, rtol=1e-4)
    pruned = adalora.prune(extract(model), optimizer.opt_state)
    expected = adalora.prune(adapter.with_trainable(trainable), state)
    assert pruned.config.rank_pattern == expected.config.rank_pattern is not None
    chex.assert_trees_all_close(pruned, expected, rtol=1e-2, atol=1e-4)
    weights = sum(map(len, pruned.weight_names.values()))
    assert sum(map(sum, pruned.config.rank_pattern.values())) == SCHEDULE["target_r"] * weights


def test_an_optimizer_of_the_pytree_needs_an_active_adapter():
    model = attach(net(), hub(), adapter_name="first")
    delete_adapter(attach(model, hub(), adapter_name="second"), "second")
    with pytest.raises(ValueError, match=r"no adapter is active: it has \('first',\)\. set_adapter\(model, name\)"):
        adalora.on_model(optax.sgd(1.0), model)


def test_an_optimizer_of_the_pytree_gives_an_inner_one_what_it_asks_for():
    seen = []

    def update(grads, state, params, *, value):
        seen.append((grads, params, value))
        return grads, state

    model = nnx.Dict(mix=nnx.Dict(kernel=nnx.Param(jnp.ones((8, 3, 8)))))  # stacked in the middle
    source = draw_adalora(shapes={f"mix.{i}": (8, 8) for i in range(3)})
    attach(model, source, layouts={"mix": Layout((0,), (2,), (1,))})
    inner = optax.GradientTransformationExtraArgs(lambda params: seen.append(params) or (), update)
    tx, state = adalora.on_model(inner, model), nnx.state(model, RandLoraParam)
    tx.init(state)
    updates, _ = tx.update(state, (), state, value=3)
    chex.assert_trees_all_equal(updates, state)
    for tree in (seen[0], *seen[1][:2]):
        chex.assert_trees_all_equal(tree, extract(model).trainable)
    assert seen[1][2] == 3


RANDLORA = RandLoraConfig(r=3, randlora_alpha=1, target_modules=["up"], init_weights=False)


def with_both():
    model = attach(net(), RANDLORA, adapter_name="rand", rngs=nnx.Rngs(5))
    return attach(model, hub(KEPT), adapter_name="ada")


def test_adapters_of_both_methods_on_one_model_are_switched_disabled_and_deleted():
    model, base = with_both(), net()(X)
    alone = {"rand": attach(net(), RANDLORA, rngs=nnx.Rngs(5)), "ada": attach(net(), hub(KEPT))}
    assert (set(adapter_names(model)), active_adapter(model)) == ({"rand", "ada"}, "ada")
    for name, kind in (("rand", RandLoraAdapter), ("ada", AdaLoraAdapter)):
        np.testing.assert_array_equal(set_adapter(model, name)(X), alone[name](X))
        adapter = extract(model, name)
        assert type(adapter) is kind
        chex.assert_trees_all_equal(adapter, extract(alone[name]))
        assert jax.tree.structure(nnx.state(model, RandLoraParam)).num_leaves == {"rand": 2, "ada": 6}[name]
        np.testing.assert_array_equal(disable_adapters(model)(X), base)
        np.testing.assert_array_equal(enable_adapters(model)(X), alone[name](X))
    with bound_bases(model):
        np.testing.assert_array_equal(model(X), alone["ada"](X))
    np.testing.assert_array_equal(set_adapter(delete_adapter(model, "ada"), "rand")(X), alone["rand"](X))
    assert isinstance(model.down.kernel, nnx.Param)
    np.testing.assert_array_equal(delete_adapter(model, "rand")(X), base)


def test_detach_gives_the_base_back_or_merges():
    model, want = with_both(), with_both()(X)
    chex.assert_trees_all_equal(pure(detach(with_both())), pure(net()))
    np.testing.assert_array_equal(detach(model, merge=True)(X), want)
    assert nnx.graphdef(model) == nnx.graphdef(net())


class Scanned(nnx.Module):
    """Three layers in one, called by a scan over them."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap(in_axes=(0,), out_axes=0)
        def make(rngs):
            return nnx.Linear(8, 8, rngs=rngs)

        self.layers = make(rngs)

    def __call__(self, x):
        def step(x, layer):
            return x + nnx.tanh(layer(x))

        return nnx.scan(step, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers)


SCANNED = {"layers": Layout((1,), (2,), (0,))}
STACKED = {f"layers.{i}": (8, 8) for i in range(3)}
STACK_KEPT = {"layers.0": (True, False, False, True), "layers.1": (False,) * 4, "layers.2": (True,) * 4}


@pytest.mark.parametrize("kept", [None, STACK_KEPT], ids=["whole", "pruned"])
def test_layers_that_are_scanned_over_need_nothing_around_them(kept, tmp_path):
    source = draw_adalora(shapes=STACKED, kept=kept, lora_alpha=1)
    interop.save(source, tmp_path / "first")
    found = model_layouts(scanned(), X)
    assert found["layers"] == SCANNED["layers"]
    model = attach(scanned(), tmp_path / "first", layouts=found)
    adapter = extract(model)
    adapter.save_pretrained(tmp_path / "second")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "second" / name).read_bytes() == (tmp_path / "first" / name).read_bytes()
    want = functional(scanned(), adapter)
    chex.assert_trees_all_close(model(X), want, **GRADIENT)
    assert np.abs(np.asarray(want - scanned()(X))).max() > 0.1


def test_beside_an_adapter_with_bases_a_scan_is_told_of_those_alone():
    model = attach(scanned(), draw_adalora(shapes=STACKED, lora_alpha=1), layouts=SCANNED)
    want = model(X)
    attach(
        model,
        dataclasses.replace(RANDLORA, target_modules=["layers"]),
        adapter_name="rand",
        rngs=nnx.Rngs(0),
        layouts=SCANNED,
    )
    with bound_bases(set_adapter(model, "default")):
        np.testing.assert_array_equal(model(X), want)


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
def test_it_lies_beside_kernels_on_a_mesh(kind):
    mesh = jax.make_mesh((2, 2), ("fsdp", "tp"), axis_types=(kind, kind), devices=jax.devices()[:4])
    model, want = net(), attach(net(), hub())(X)
    for layer in (model.up, model.down):
        layer.kernel.set_value(jax.device_put(layer.kernel[...], NamedSharding(mesh, PartitionSpec("fsdp", "tp"))))
    part = attach(model, hub()).up.kernel.adapters["default"]
    assert part.lora_A[...].sharding.spec == PartitionSpec(None, "fsdp")
    assert part.lora_B[...].sharding.spec == PartitionSpec("tp", None)
    with jax.set_mesh(mesh):
        effective = jax.device_get(nnx.jit(lambda model: model.up.kernel[...])(model))
    chex.assert_trees_all_close(effective, attach(net(), hub()).up.kernel[...], **TOLERANCE["float32", "delta_weight"])
    assert want.shape == (4, 8)


def test_explicit_layers_of_randlora_take_no_adalora_and_stay_as_they_are():
    bases = RandLoraBases(RandLoraConfig(r=3), shapes=[(12, 8), (8, 12)])
    model = Net(nnx.Rngs(0), layer=functools.partial(RandLoraLinear, bases=bases))
    want = model(X)
    for source in (hub(), config(**FIELDS)):
        with pytest.raises(
            TypeError, match=r"one of AdaLoRA, but \['down', 'up'\] are RandLoraLinear layers, which take RandLoRA only"
        ):
            attach(model, source, adapter_name="ada", rngs=nnx.Rngs(0))
    assert adapter_names(model) == ("default",)
    np.testing.assert_array_equal(model(X), want)
