"""RandLoraLinear of NNX and linen: the laws of the update, and dropout on the adapter's branch alone."""

import dataclasses
import functools
import warnings

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from flax import linen, nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from stacks import formula
from strategies import draw_adapter
from tolerances import TOLERANCE

import interop
from interop import AdapterFormatError, RandLoraConfig
from interop.adapter import init_adapter
from randlora_jax import (
    Layout,
    RandLoraBasis,
    RandLoraParam,
    adapter_names,
    attach,
    bound_bases,
    delete_adapter,
    detach,
    disable_adapters,
    effective_params,
    enable_adapters,
    extract,
    layer_bases,
    set_adapter,
)
from randlora_jax import linen_linear as explicit_linen
from randlora_jax.explicit import add_update, start_factors
from randlora_jax.linen_linear import extract_adapter, insert_adapter
from randlora_jax.nnx_linear import RandLoraBases, RandLoraLinear

CONFIG = RandLoraConfig(r=3, randlora_alpha=3)
DROPOUT = dataclasses.replace(CONFIG, randlora_dropout=0.5)
SHAPES = [(12, 8), (8, 12), (8, 8)]  # (out, in); r divides neither short side
SIDES = {"up": (12, 8), "down": (8, 12), "mix": (8, 8)}


def key(seed):
    """A random key whose numbers take less to compile than those of the default, threefry."""
    return jax.random.key(seed, impl="unsafe_rbg")


KEY = key(3)
UNIFORM = nnx.initializers.uniform(0.7)  # compiles faster than a normal distribution


class Net(nnx.Module):
    """A tall, a wide and a square layer."""

    def __init__(self, config, rngs, **options):
        options = {"bases": RandLoraBases(config, SHAPES), "rngs": rngs, "kernel_init": UNIFORM, **options}
        self.up = RandLoraLinear(8, 12, **options)
        self.down = RandLoraLinear(12, 8, use_bias=False, **options)
        self.mix = RandLoraLinear(8, 8, **options)

    def __call__(self, x):
        return self.mix(nnx.relu(self.down(nnx.relu(self.up(x)))))


class PlainNet(Net):
    """`Net` of nnx.Linear layers."""

    def __init__(self, rngs):
        options = {"rngs": rngs, "kernel_init": UNIFORM}
        self.up = nnx.Linear(8, 12, **options)
        self.down = nnx.Linear(12, 8, use_bias=False, **options)
        self.mix = nnx.Linear(8, 8, **options)


class LinenNet(linen.Module):
    """The same in linen; `plain` makes the layers nn.Dense."""

    config: RandLoraConfig
    plain: bool = False

    @linen.compact
    def __call__(self, x, deterministic=None):
        bases = None if self.plain else explicit_linen.RandLoraBases(self.config, SHAPES, name="bases")()

        def layer(features, name, x):
            options = {"use_bias": name != "down", "name": name, **({} if name == "mix" else {"kernel_init": UNIFORM})}
            if self.plain:
                return linen.Dense(features, **options)(x)
            return explicit_linen.RandLoraLinear(features, **options)(x, bases, deterministic)

        return layer(8, "mix", linen.relu(layer(8, "down", linen.relu(layer(12, "up", x)))))


def batch(rows=4, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng(seed).standard_normal((rows, 8)), dtype)


def shaken(tree, seed=7):
    """The same tree with random numbers, as after training."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype), tree)


@functools.cache
def split_net(config, dtype):
    graph, state = nnx.split(Net(config, nnx.Rngs(params=key(0), dropout=key(1)), dtype=dtype, param_dtype=dtype))
    return graph, nnx.to_pure_dict(state)


def trained(config=CONFIG, dtype=jnp.float32):
    """A `Net` with random factors and biases."""
    graph, state = split_net(config, dtype)
    model = nnx.merge(graph, state)
    nnx.update(model, shaken(nnx.state(model, RandLoraParam)))
    model.up.bias[...] = shaken(model.up.bias[...])
    return model


@functools.cache
def new_linen(config=CONFIG):
    """Variables of a `LinenNet`."""
    return LinenNet(config).init(key(0), batch(), deterministic=True)


def trained_linen(config=CONFIG):
    """Variables of a `LinenNet` with random factors and biases."""
    variables = new_linen(config)
    up = {**variables["params"]["up"], "bias": shaken(variables["params"]["up"]["bias"])}
    return {**variables, "params": {**variables["params"], "up": up}, "randlora": shaken(variables["randlora"])}


def pure(model, *filters):
    return nnx.to_pure_dict(nnx.state(model, *filters))


def hub_delta(adapter, name):
    """The update (in, out) of one layer by the oracle, float64."""
    hub = adapter.to_interop()
    lam, gamma = hub.factors[name]
    A, B = hub.bases
    return oracle.delta_weight(A, B, lam, gamma, scaling=hub.config.scaling, shape=hub.shapes[name]).T


def captured_mask(x, rate=0.5):
    """What flax's dropout makes of x with `KEY`."""
    keep = jax.random.bernoulli(KEY, 1 - rate, x.shape)
    return np.where(keep, np.asarray(x, np.float64) / (1 - rate), 0)


# Start


def test_an_nnx_model_starts_as_the_model_of_plain_layers_bit_for_bit():
    plain, model = PlainNet(nnx.Rngs(key(0))), Net(CONFIG, nnx.Rngs(key(0)))
    np.testing.assert_array_equal(model(batch()), plain(batch()))
    np.testing.assert_array_equal(detach(model).up.kernel[...], plain.up.kernel[...])


def test_a_linen_model_starts_as_the_model_of_plain_layers_bit_for_bit():
    plain, model = LinenNet(CONFIG, plain=True), LinenNet(CONFIG)
    variables = new_linen(CONFIG)
    want = plain.init(key(0), batch())
    chex.assert_trees_all_equal(variables["params"], want["params"])
    np.testing.assert_array_equal(model.apply(variables, batch()), plain.apply(want, batch()))


def test_with_dropout_a_new_model_gives_its_base_output_bit_for_bit():
    model = Net(DROPOUT, nnx.Rngs(key(0)))
    want = model.mix(batch(), deterministic=True)
    np.testing.assert_array_equal(model.mix(batch()), want)
    net, variables = LinenNet(DROPOUT), new_linen(DROPOUT)
    got = net.apply(variables, batch(), False, rngs={"dropout": KEY})
    np.testing.assert_array_equal(got, net.apply(variables, batch(), True))


@pytest.mark.parametrize("shape", SHAPES)
def test_lambda_and_gamma_start_as_in_the_other_stacks(shape):
    want = init_adapter(CONFIG, {"layer": shape}).factors["layer"]
    chex.assert_trees_all_equal(tuple(start_factors(CONFIG, shape, lambda: KEY)), tuple(map(jnp.asarray, want)))
    random = dataclasses.replace(CONFIG, init_weights=False)
    want = init_adapter(random, {"layer": shape}, rng=np.random.default_rng(0)).factors["layer"]
    got = start_factors(random, shape, lambda: KEY)
    np.testing.assert_array_equal(got.gamma, want.gamma)
    assert got.lam.shape == want.lam.shape
    assert got.lam.dtype == want.lam.dtype
    many = start_factors(dataclasses.replace(random, r=100), (10_000, 10_000), lambda: KEY).lam
    np.testing.assert_allclose([many.mean(), many.std()], [0, 1], atol=0.05)


def test_random_starting_values_follow_the_rngs_and_differ_between_layers():
    random = dataclasses.replace(CONFIG, init_weights=False)
    first, again, other = (extract(Net(random, nnx.Rngs(key(seed)))) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    assert np.all(np.asarray(first.factors["up"].lam != other.factors["up"].lam))
    assert np.all(np.asarray(first.factors["up"].lam != first.factors["mix"].lam))
    factors = LinenNet(random).init(key(0), batch())["randlora"]
    assert np.all(np.asarray(factors["up"]["randlora_lambda"] != factors["mix"]["randlora_lambda"]))


# The written-out formula


@pytest.mark.parametrize("name", SIDES)
def test_without_dropout_each_nnx_layer_computes_the_written_out_formula(name):
    model = trained(DROPOUT)
    model.eval()
    layer, x = getattr(model, name), batch() if SIDES[name][1] == 8 else jnp.tile(batch(), (1, 2))[:, :12]
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...])
    want = np.asarray(x, np.float64) @ (np.asarray(layer.kernel.base[...]) + hub_delta(extract(model), name)) + bias
    np.testing.assert_allclose(layer(x), want, **TOLERANCE["float32", "forward"])


@pytest.mark.parametrize("name", SIDES)
def test_with_dropout_each_nnx_layer_computes_the_written_out_formula_of_its_key(name):
    model = trained(DROPOUT)
    layer, x = getattr(model, name), batch() if SIDES[name][1] == 8 else jnp.tile(batch(), (1, 2))[:, :12]
    bias = 0 if layer.bias is None else np.asarray(layer.bias[...])
    dropped = captured_mask(x)
    want = np.asarray(x, np.float64) @ np.asarray(layer.kernel.base[...]) + dropped @ hub_delta(extract(model), name)
    np.testing.assert_allclose(layer(x, rngs=KEY), want + bias, **TOLERANCE["float32", "forward"])
    assert 0 < np.mean(dropped == 0) < 1


def linen_layer_inputs(variables, rng):
    """Input of each layer of `LinenNet` and what its dropout makes of it."""
    seen = {}

    def spy(call, args, kwargs, context):
        result = call(*args, **kwargs)
        if isinstance(context.module, linen.Dropout):
            seen[context.module.path[0]] = (args[0], result)
        return result

    with linen.intercept_methods(spy):
        y = LinenNet(DROPOUT).apply(variables, batch(), False, rngs={"dropout": rng})
    return seen, y


def test_with_dropout_a_linen_model_computes_the_written_out_formula_of_its_masks():
    variables = trained_linen(DROPOUT)
    seen, y = linen_layer_inputs(variables, KEY)
    adapter, params = extract_adapter(variables, DROPOUT), variables["params"]
    assert set(seen) == set(SIDES)
    want = {}
    for name, (x, dropped) in seen.items():
        x, dropped = np.asarray(x, np.float64), np.asarray(dropped, np.float64)
        kept = dropped != 0
        np.testing.assert_allclose(dropped[kept], 2 * x[kept], rtol=1e-6)
        want[name] = x @ np.asarray(params[name]["kernel"]) + dropped @ hub_delta(adapter, name)
        want[name] += np.asarray(params[name].get("bias", 0))
    np.testing.assert_allclose(seen["down"][0], np.maximum(want["up"], 0), **TOLERANCE["float32", "forward"])
    np.testing.assert_allclose(seen["mix"][0], np.maximum(want["down"], 0), **TOLERANCE["float32", "forward"])
    np.testing.assert_allclose(y, want["mix"], **TOLERANCE["float32", "forward"])
    assert np.any(np.asarray(y != linen_layer_inputs(variables, key(4))[1]))


def test_without_dropout_a_linen_model_computes_with_the_effective_kernels():
    variables = trained_linen(DROPOUT)
    effective = effective_params({"params": variables["params"]}, extract_adapter(variables, DROPOUT))
    want = LinenNet(DROPOUT, plain=True).apply(effective, batch())
    np.testing.assert_array_equal(LinenNet(DROPOUT).apply(variables, batch(), True), want)
    np.testing.assert_array_equal(LinenNet(CONFIG).apply(variables, batch()), want)
    for name in SIDES:
        want = np.asarray(variables["params"][name]["kernel"]) + hub_delta(extract_adapter(variables, DROPOUT), name)
        np.testing.assert_allclose(effective["params"][name]["kernel"], want, **TOLERANCE["float32"])


def test_an_r_above_the_short_side_is_one_basis():
    bases = RandLoraBases(dataclasses.replace(CONFIG, r=9), SHAPES)
    layer = RandLoraLinear(8, 12, bases=bases, rngs=nnx.Rngs(key(0)))
    nnx.update(layer, shaken(nnx.state(layer, RandLoraParam)))
    adapter = extract(layer)
    assert adapter.factors["kernel"].lam.shape == (9, 1)
    want = batch() @ (layer.kernel.base[...] + hub_delta(adapter, "kernel"))
    np.testing.assert_allclose(layer(batch()), want, **TOLERANCE["float32", "forward"])


def test_over_many_masks_the_mean_is_the_output_without_dropout():
    layer = trained(DROPOUT).mix
    rows = 4000
    x = jnp.broadcast_to(batch(1), (rows, 8))
    outputs = np.asarray(layer(x, rngs=KEY))
    want = np.asarray(layer(x[:1], deterministic=True))[0]
    standard_error = outputs.std(axis=0) / np.sqrt(rows)
    assert np.all(standard_error > 0)
    assert np.all(np.abs(outputs.mean(axis=0) - want) < 5 * standard_error)


# Dtypes


@pytest.mark.parametrize("options", [{"dtype": jnp.bfloat16}, {"param_dtype": jnp.bfloat16}], ids=str)
@pytest.mark.parametrize("train", [False, True])
def test_dtypes_are_those_of_a_plain_layer_and_factors_stay_float32(options, train):
    bases = RandLoraBases(DROPOUT, SHAPES)
    layer = RandLoraLinear(8, 12, bases=bases, rngs=nnx.Rngs(key(0)), **options)
    plain = nnx.Linear(8, 12, rngs=nnx.Rngs(key(0)), **options)
    nnx.update(layer, shaken(nnx.state(layer, RandLoraParam)))
    x = batch()
    got = layer(x, deterministic=not train, rngs=KEY)
    assert got.dtype == plain(x).dtype
    assert layer.kernel.dtype == plain.kernel.dtype
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(layer, RandLoraParam))} == {jnp.dtype("float32")}
    branch = captured_mask(x) if train else np.asarray(x, np.float64)
    want = np.asarray(x, np.float64) @ np.asarray(plain.kernel[...], np.float64)
    want = want + branch @ hub_delta(extract(layer), "kernel")
    np.testing.assert_allclose(np.asarray(got, np.float64), want, **TOLERANCE["bfloat16", "forward"])

    module = explicit_linen.RandLoraLinear(12, **options)
    shared = explicit_linen.RandLoraBases(DROPOUT, SHAPES)
    bases, _ = shared.init_with_output({})
    variables = module.init(key(0), x, bases, True)
    linen_plain = linen.Dense(12, **options)
    y = module.apply(variables, x, bases, not train, rngs={"dropout": KEY})
    want = linen_plain.apply({"params": variables["params"]}, x)
    assert y.dtype == want.dtype
    np.testing.assert_array_equal(y, want)  # lambda is zero


# Gradients and training


def written_out(params, trainable, bases, masks):
    """The net of `LinenNet` and `Net` from the formula alone, differentiable by JAX."""

    def layer(name, x):
        parts = layer_bases(bases, SIDES[name])
        delta = formula(*(part.astype(jnp.float32) for part in parts), *trainable[name], 1.0)  # (long, short)
        delta = delta.T if SIDES[name][0] >= SIDES[name][1] else delta
        branch = masks[name] * x if masks else x
        return x @ params[name]["kernel"] + branch @ delta + params[name].get("bias", 0)

    return lambda x: layer("mix", jax.nn.relu(layer("down", jax.nn.relu(layer("up", x)))))


@pytest.mark.parametrize("train", [False, True])
def test_a_jitted_linen_model_has_the_eager_output_and_the_gradients_of_the_written_out_formula(train):
    variables = trained_linen(DROPOUT)
    seen, eager = linen_layer_inputs(variables, KEY)
    masks = {name: 2.0 * _kept(dropped, x) for name, (x, dropped) in seen.items()} if train else None
    adapter = extract_adapter(variables, DROPOUT)

    def loss(trainable, x):
        net = LinenNet(DROPOUT)
        y = net.apply({**variables, "randlora": trainable}, x, not train, rngs={"dropout": KEY})
        return (y**2).sum(), y

    def expected(trainable, x):
        y = written_out(variables["params"], trainable, adapter.bases, masks)(x)
        return (y**2).sum(), y

    (got, got_x), y = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables["randlora"], batch())
    (want, want_x), want_y = jax.jit(jax.grad(expected, argnums=(0, 1), has_aux=True))(adapter.trainable, batch())
    np.testing.assert_allclose(y, want_y, **TOLERANCE["float32", "forward"])
    if train:
        np.testing.assert_allclose(y, eager, **TOLERANCE["float32", "forward"])
    got = {name: (part["randlora_lambda"], part["randlora_gamma"]) for name, part in got.items()}
    chex.assert_trees_all_close(got, {name: tuple(part) for name, part in want.items()}, rtol=1e-3, atol=1e-2)
    chex.assert_trees_all_close(got_x, want_x, rtol=1e-3, atol=1e-2)


def _kept(dropped, x):
    """1 where dropout kept x; an x of zero tells nothing and needs nothing."""
    return jnp.asarray((np.asarray(dropped) != 0) | (np.asarray(x) == 0), jnp.float32)


@pytest.mark.parametrize("train", [False, True])
def test_nnx_gradients_are_those_of_the_written_out_formula_with_the_same_mask(train):
    model = trained(DROPOUT)
    layer, adapter, x = model.down, extract(model), jnp.tile(batch(), (1, 2))[:, :12]
    mask = jnp.asarray(captured_mask(np.ones_like(x)), jnp.float32) if train else 1.0
    parts = layer_bases(adapter.bases, SIDES["down"])

    def loss(layer, x):
        return (layer(x, deterministic=not train, rngs=KEY) ** 2).sum()

    def expected(factors, x):
        delta = formula(*(part.astype(jnp.float32) for part in parts), *factors, 1.0)
        return ((x @ layer.kernel.base[...] + (mask * x) @ delta) ** 2).sum()

    grads = nnx.grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(layer, x)
    got = nnx.to_pure_dict(grads)["kernel"]["adapters"]["default"]
    want = jax.grad(expected)(adapter.factors["down"], x)
    chex.assert_trees_all_close(
        (got["randlora_lambda"], got["randlora_gamma"]), tuple(want), **TOLERANCE["float32", "gradient"]
    )


def test_training_an_nnx_model_with_dropout_moves_lambda_and_gamma_only():
    model = Net(DROPOUT, nnx.Rngs(key(0)))
    optimizer = nnx.Optimizer(model, optax.adam(0.05), wrt=RandLoraParam)
    before = flatten_dict(jax.tree.map(np.array, pure(model, nnx.Not(nnx.RngState))))
    target = batch(seed=1)

    @nnx.jit
    def step(model, optimizer):
        loss = lambda model: ((model(batch()) - target) ** 2).mean()  # noqa: E731
        optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, RandLoraParam))(model))

    error = lambda: float(((nnx.view(model, deterministic=True)(batch()) - target) ** 2).mean())  # noqa: E731
    start = error()
    for _ in range(60):
        step(model, optimizer)
    assert error() < 0.6 * start
    after = flatten_dict(pure(model, nnx.Not(nnx.RngState)))
    moved = {path for path in before if np.asarray(before[path]).tobytes() != np.asarray(after[path]).tobytes()}
    factors = ("randlora_lambda", "randlora_gamma")
    assert moved == {(name, "kernel", "adapters", "default", part) for name in SIDES for part in factors}
    assert len(jax.tree.leaves(nnx.state(model, RandLoraBasis))) == 2


class OneLayer(linen.Module):
    """One layer, which compiles faster than three."""

    @linen.compact
    def __call__(self, x, deterministic):
        bases = explicit_linen.RandLoraBases(DROPOUT, [(8, 8)])()
        return explicit_linen.RandLoraLinear(8, kernel_init=UNIFORM)(x, bases, deterministic)


def test_training_a_linen_model_needs_the_collection_randlora_only():
    net = OneLayer()
    variables = net.init(key(0), batch(), True)
    assert set(variables) == {"params", "randlora", "randlora_bases"}
    frozen, trainable, tx = variables, variables["randlora"], optax.sgd(0.05)
    state, target, before = tx.init(trainable), batch(seed=1), jax.tree.map(np.array, variables["params"])

    @jax.jit
    def step(trainable, state, frozen, rng):
        def loss(trainable):
            y = net.apply({**frozen, "randlora": trainable}, batch(), False, rngs={"dropout": rng})
            return ((y - target) ** 2).mean()

        updates, state = tx.update(jax.grad(loss)(trainable), state)
        return optax.apply_updates(trainable, updates), state

    def error(trainable):
        return float(((net.apply({**frozen, "randlora": trainable}, batch(), True) - target) ** 2).mean())

    start = error(trainable)
    for rng in jax.random.split(KEY, 60):
        trainable, state = step(trainable, state, frozen, rng)
    assert error(trainable) < 0.6 * start
    chex.assert_trees_all_equal(frozen["params"], before)


@pytest.mark.parametrize("train", [False, True])
def test_a_jitted_nnx_layer_has_the_eager_output(train):
    layer = trained(DROPOUT).up
    forward = lambda layer, x: layer(x, deterministic=not train, rngs=KEY)  # noqa: E731
    got = nnx.jit(forward)(layer, batch())
    np.testing.assert_allclose(got, forward(layer, batch()), **TOLERANCE["float32", "forward"])


# Switches of NNX


def test_train_eval_and_view_switch_dropout_and_every_call_draws_anew():
    model = trained(DROPOUT)
    first, second = model(batch()), model(batch())
    assert np.any(np.asarray(first != second))
    model.eval()
    want = model(batch())
    np.testing.assert_array_equal(model(batch()), want)
    model.train()
    assert np.any(np.asarray(model(batch()) != want))
    np.testing.assert_array_equal(nnx.view(model, deterministic=True)(batch()), want)
    plain = trained(CONFIG)
    np.testing.assert_allclose(want, plain(batch()), **TOLERANCE["float32", "forward"])


def test_without_dropout_there_is_no_rng_state_and_none_is_needed():
    model = Net(CONFIG, nnx.Rngs(params=key(0)))
    assert jax.tree.leaves(nnx.state(model, nnx.RngState)) == []
    np.testing.assert_array_equal(model(batch()), model(batch()))


def test_adapters_are_switched_off_deleted_and_merged_as_on_any_model():
    model, x = trained(DROPOUT), batch()
    plain = PlainNet(nnx.Rngs(params=key(0), dropout=key(1)))
    plain.up.bias[...] = model.up.bias[...]
    np.testing.assert_array_equal(disable_adapters(model)(x), plain(x))
    effective = enable_adapters(model).up(x, deterministic=True)
    assert np.any(np.asarray(effective != plain.up(x)))
    np.testing.assert_array_equal(detach(model, merge=True).up(x), effective)
    np.testing.assert_array_equal(delete_adapter(trained(DROPOUT), "default")(x), plain(x))


def test_another_adapter_is_attached_beside_the_first_and_brings_its_own_rate():
    model, x = trained(DROPOUT), batch()
    model.eval()
    want = model(x)
    other = draw_adapter(shapes=SIDES, r=3, randlora_alpha=3)
    attach(model, other, adapter_name="other")
    effective = model.up(x)
    model.train()
    np.testing.assert_array_equal(model.up(x), effective)  # its randlora_dropout is 0
    np.testing.assert_allclose(
        effective - (x @ model.up.kernel.base[...] + model.up.bias[...]),
        np.asarray(x, np.float64) @ other.delta_weight("up").T,
        **TOLERANCE["float32", "forward"],
    )
    np.testing.assert_array_equal(nnx.view(set_adapter(model, "default"), deterministic=True)(x), want)


def test_split_and_merge_and_clone_keep_the_model():
    model = trained(DROPOUT)
    again = nnx.merge(*nnx.split(model))
    np.testing.assert_array_equal(again.up(batch(), rngs=KEY), model.up(batch(), rngs=KEY))
    chex.assert_trees_all_equal(extract(nnx.clone(model)), extract(model))


def test_a_state_of_one_model_makes_another_the_same():
    model, fresh = trained(CONFIG), Net(CONFIG, nnx.Rngs(key(5)))
    nnx.update(fresh, nnx.state(model))
    np.testing.assert_array_equal(fresh(batch()), model(batch()))


# Files


def test_an_nnx_model_is_saved_under_the_names_of_its_layers_and_loaded_into_another(tmp_path):
    targets = dataclasses.replace(CONFIG, target_modules=["nothing_like_this"])
    model = trained(targets)
    extract(model).save_pretrained(tmp_path)
    hub = interop.load(tmp_path)
    assert hub.modules == ("down", "mix", "up")
    assert dict(hub.shapes) == SIDES
    assert RandLoraConfig.from_pretrained(tmp_path).target_modules == hub.modules
    chex.assert_trees_all_equal(dict(hub.factors), jax.tree.map(np.asarray, dict(extract(model).factors)))
    assert hub.recipe == interop.DEFAULT_RECIPE
    fresh = Net(targets, nnx.Rngs(params=key(0), dropout=key(1)))
    fresh.up.bias[...] = model.up.bias[...]
    attach(delete_adapter(fresh, "default"), tmp_path)
    np.testing.assert_array_equal(fresh(batch()), model(batch()))


def test_the_bases_have_the_sizes_that_every_stack_gives_a_model_of_these_layers(tmp_path):
    made = init_adapter(CONFIG, SIDES).bases
    chex.assert_trees_all_equal(extract(Net(CONFIG, nnx.Rngs(key(0)))).to_interop().bases, made)
    bare = dataclasses.replace(CONFIG, save_projection=False)
    extract(trained(bare)).save_pretrained(tmp_path)
    chex.assert_trees_all_equal(tuple(interop.load(tmp_path).bases), tuple(made))


def test_a_linen_model_is_saved_and_loaded_into_other_variables(tmp_path):
    variables, net = trained_linen(DROPOUT), LinenNet(DROPOUT)
    extract_adapter(variables, DROPOUT).save_pretrained(tmp_path)
    hub = interop.load(tmp_path)
    assert dict(hub.shapes) == SIDES
    assert hub.config.randlora_dropout == 0.5
    fresh = {**variables, "randlora": new_linen(DROPOUT)["randlora"]}
    loaded = insert_adapter(fresh, tmp_path, DROPOUT)
    chex.assert_trees_all_equal(loaded["randlora"], variables["randlora"])
    np.testing.assert_array_equal(net.apply(loaded, batch(), True), net.apply(variables, batch(), True))
    np.testing.assert_array_equal(fresh["randlora"]["up"]["randlora_lambda"], np.zeros((3, 3)))


def test_an_inserted_adapter_brings_its_bases():
    source = draw_adapter(shapes=SIDES, r=3, randlora_alpha=3, projection_prng_key=9)
    loaded = insert_adapter(trained_linen(CONFIG), source, CONFIG)
    for name, (out, _) in SIDES.items():
        delta = extract_adapter(loaded, CONFIG, recipe=None).delta_weight(name)
        assert len(delta) == out
        np.testing.assert_allclose(delta, source.delta_weight(name), **TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"r": 4},
            r"the adapter has r=4 and randlora_alpha=3, the model was built with r=3 and randlora_alpha=3: build",
        ),
        ({"shapes": {"up": (12, 8)}}, r"(?s)leaves out these RandLoraLinear layers, .*- down\n  - mix$"),
        ({"shapes": {**SIDES, "more": (8, 8)}}, r"(?s)the model lacks these adapted layers .*- more"),
        ({"shapes": {**SIDES, "up": (11, 8)}}, r"up: the model has \(12, 8\), the adapter was made for \(11, 8\)"),
    ],
)
def test_an_adapter_of_another_model_is_not_inserted(fields, message):
    adapter = draw_adapter(**{"shapes": SIDES, "r": 3, "randlora_alpha": 3, **fields})
    with pytest.raises((ValueError, AdapterFormatError), match=message):
        insert_adapter(trained_linen(CONFIG), adapter, CONFIG)


def test_an_adapter_with_dropout_is_loaded_without_a_warning_and_keeps_its_rate(tmp_path):
    model = trained(DROPOUT)
    extract(model).save_pretrained(tmp_path)
    fresh = delete_adapter(trained(DROPOUT), "default")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        attach(fresh, tmp_path)
    assert extract(fresh).config.randlora_dropout == 0.5
    np.testing.assert_array_equal(fresh.up(batch(), rngs=KEY), model.up(batch(), rngs=KEY))
    beside = dataclasses.replace(DROPOUT, target_modules=["up"], randlora_dropout=0.25)
    assert extract(attach(fresh, beside, adapter_name="beside")).config == beside


def test_dropout_in_a_layer_that_has_no_place_for_it_is_refused():
    class Mixed(nnx.Module):
        def __init__(self):
            self.up = RandLoraLinear(8, 12, bases=RandLoraBases(CONFIG, SHAPES), rngs=nnx.Rngs(key(0)))
            self.head = nnx.Linear(12, 8, rngs=nnx.Rngs(key(0)))

    config = dataclasses.replace(DROPOUT, target_modules="all-linear")
    with pytest.raises(
        ValueError, match=r"has no place for dropout\. .* Of the targets, these have none: \['head'\]\."
    ):
        attach(Mixed(), config, adapter_name="other")


# Transformations


# Rules for the names in files


NAMES = [{"kernel": "(up|down|mix)", "modules": r"model.\1"}]
SCALED = [{"kernel": "(up|down|mix)", "modules": r"model.\1", "scale": 2}]


def test_rules_name_the_layers_of_a_linen_model_in_files(tmp_path):
    variables = trained_linen(CONFIG)
    adapter = extract_adapter(variables, CONFIG, layouts=NAMES)
    adapter.save_pretrained(tmp_path)
    assert set(interop.load(tmp_path).modules) == {f"model.{name}" for name in SIDES}
    fresh = LinenNet(CONFIG).init(key(5), batch())
    loaded = insert_adapter(fresh, tmp_path, CONFIG, layouts=NAMES)
    chex.assert_trees_all_equal(loaded["randlora"], variables["randlora"])


def test_layers_that_apply_the_update_by_themselves_refuse_a_scaled_kernel():
    message = r"is a RandLoraLinear layer, which takes no Layout\(.*scale=2\.0.*: leave out its scale\."
    with pytest.raises(ValueError, match=message):
        extract_adapter(trained_linen(CONFIG), CONFIG, layouts=SCALED)
    model = Net(CONFIG, nnx.Rngs(key(0)))
    adapter = extract(model)
    with pytest.raises(ValueError, match=message):
        attach(detach(model), dataclasses.replace(adapter, layouts=()), layouts=[{**SCALED[0], "modules": r"\1"}])
    assert not adapter_names(model)


class Block(linen.Module):
    """A residual block of two explicit layers."""

    @linen.compact
    def __call__(self, x, bases, deterministic):
        y = linen.relu(explicit_linen.RandLoraLinear(12, name="up")(x, bases, deterministic))
        return x + explicit_linen.RandLoraLinear(8, name="down")(y, bases, deterministic), None


class Scanned(linen.Module):
    """Three blocks under nn.scan and nn.remat, kernels stacked on `axis`; or written out one by one."""

    axis: int = 0

    @linen.compact
    def __call__(self, x, deterministic=True):
        bases = explicit_linen.RandLoraBases(DROPOUT, ((12, 8), (8, 12)))()
        blocks = linen.scan(
            linen.remat(Block, static_argnums=(3,)),
            variable_axes={"params": self.axis, "randlora": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=(linen.broadcast, linen.broadcast),
            length=3,
        )
        return blocks(name="blocks")(x, bases, deterministic)[0]


@functools.cache
def scanned_variables(axis):
    variables = jax.jit(Scanned(axis).init)(key(0), batch())
    return {**variables, "randlora": shaken(variables["randlora"])}


STACKED = {  # by axis of the kernels
    0: None,
    1: {name: Layout((0,), (2,), stack_axes=(1,)) for name in ("blocks.up", "blocks.down")},
}


@pytest.mark.parametrize("axis", STACKED)
def test_scan_and_remat_compute_with_the_effective_kernels_of_each_layer(axis):
    variables = scanned_variables(axis)
    adapter = extract_adapter(variables, DROPOUT, layouts=STACKED[axis])
    assert adapter.factors["blocks.up"].lam.shape == (3, 3, 3)

    def loss(trainable):
        return (Scanned(axis).apply({**variables, "randlora": trainable}, batch()) ** 2).sum()

    def expected(trainable):
        params = effective_params({"params": variables["params"]}, adapter.with_trainable(trainable))
        x, blocks = batch(), params["params"]["blocks"]
        for i in range(3):
            layer = jax.tree.map(functools.partial(jnp.take, indices=i, axis=axis), blocks)
            y = jax.nn.relu(x @ layer["up"]["kernel"] + layer["up"]["bias"])
            x = x + y @ layer["down"]["kernel"] + layer["down"]["bias"]
        return (x**2).sum()

    if axis:  # kernels elsewhere than the factors: the value says whether they meet
        np.testing.assert_allclose(loss(variables["randlora"]), jax.jit(expected)(adapter.trainable), rtol=1e-4)
        return
    got, grads = jax.jit(jax.value_and_grad(loss))(variables["randlora"])
    want, want_grads = jax.jit(jax.value_and_grad(expected))(adapter.trainable)
    np.testing.assert_allclose(got, want, rtol=1e-4)
    for name in ("up", "down"):
        pair = (grads["blocks"][name]["randlora_lambda"], grads["blocks"][name]["randlora_gamma"])
        scale = max(float(jnp.abs(part).max()) for part in pair)
        chex.assert_trees_all_close(pair, tuple(want_grads[f"blocks.{name}"]), rtol=1e-3, atol=1e-5 * scale)


def test_under_scan_and_remat_dropout_follows_the_key_and_the_backward_pass_repeats_its_masks():
    variables, seen = scanned_variables(0), batch(seed=2)
    trainable = variables["randlora"]

    @jax.jit
    @jax.value_and_grad
    def loss(trainable, rng):
        y = Scanned().apply({**variables, "randlora": trainable}, batch(), False, rngs={"dropout": rng})
        return (y * seen).sum()

    value, grads = loss(trainable, KEY)
    assert loss(trainable, KEY)[0] == value
    assert loss(trainable, key(1))[0] != value
    # The last layer's lambda enters linearly: with the same masks, any finite difference is the gradient.
    last = ("blocks", "down", "randlora_lambda")
    direction = shaken(flatten_dict(trainable)[last]).at[:2].set(0)
    ends = [
        loss(unflatten_dict({**flatten_dict(trainable), last: flatten_dict(trainable)[last] + step * direction}), KEY)[
            0
        ]
        for step in (0.5, -0.5)
    ]
    along = (flatten_dict(grads)[last] * direction).sum()
    np.testing.assert_allclose(along, ends[0] - ends[1], rtol=1e-3)


def test_scanned_layers_are_saved_one_by_one_and_loaded_again(tmp_path):
    variables = scanned_variables(0)
    extract_adapter(variables, DROPOUT).save_pretrained(tmp_path / "by path")
    assert "blocks.up.2" in interop.load(tmp_path / "by path").modules
    layouts = {
        f"blocks.{name}": Layout((1,), (2,), (0,), modules=tuple(f"layers.{i}.{name}" for i in range(3)))
        for name in ("up", "down")
    }
    extract_adapter(variables, DROPOUT, layouts=layouts).save_pretrained(tmp_path / "by name")
    assert "layers.2.down" in interop.load(tmp_path / "by name").modules
    zero = {**variables, "randlora": jax.tree.map(jnp.zeros_like, variables["randlora"])}
    for folder, named in (("by path", None), ("by name", layouts)):
        loaded = insert_adapter(zero, tmp_path / folder, DROPOUT, layouts=named)
        chex.assert_trees_all_equal(loaded["randlora"], variables["randlora"])


class NnxBlock(nnx.Module):
    def __init__(self, bases, rngs):
        self.up = RandLoraLinear(8, 12, bases=bases, rngs=rngs, kernel_init=UNIFORM)
        self.down = RandLoraLinear(12, 8, bases=bases, rngs=rngs, kernel_init=UNIFORM)

    def __call__(self, x):
        return x + self.down(nnx.relu(self.up(x)))


class NnxScanned(nnx.Module):
    """Three blocks stacked by nnx.vmap and run by nnx.scan; the bases are marked as shared, or bound by the caller."""

    def __init__(self, rngs):
        axes = nnx.StateAxes({RandLoraBasis: None, ...: 0})
        make = nnx.split_rngs(splits=3)(nnx.vmap(NnxBlock, in_axes=(None, 0), out_axes=axes))
        self.blocks = make(RandLoraBases(DROPOUT, [(12, 8), (8, 12)]), rngs)

    def __call__(self, x, axes):
        run = nnx.scan(nnx.remat(lambda block, x: block(x)), in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
        return run(self.blocks, x)


def test_nnx_layers_stacked_by_vmap_run_under_scan_and_remat_with_shared_or_bound_bases():
    model = NnxScanned(nnx.Rngs(key(0)))
    nnx.update(model, shaken(nnx.state(model, RandLoraParam)))

    @nnx.jit
    def shared(model, x):
        return model(x, nnx.StateAxes({RandLoraBasis: None, ...: 0}))

    @nnx.jit
    def bound(model, x):
        with bound_bases(model):
            return model(x, 0)

    assert np.any(np.asarray(shared(model, batch()) != shared(model, batch())))
    model.eval()
    x = np.asarray(batch(), np.float64)
    for i in range(3):

        def layer(layer, x, i=i):
            part = layer.kernel.adapters["default"]
            lam, gamma = part.randlora_lambda[...][i], part.randlora_gamma[...][i]
            kernel, bias = (np.asarray(variable[...][i], np.float64) for variable in (layer.kernel.base, layer.bias))
            delta = oracle.delta_weight(*part.bases, lam, gamma, scaling=1.0, shape=kernel.shape[::-1])
            return x @ (kernel + delta.T) + bias

        x = x + layer(model.blocks.down, np.maximum(layer(model.blocks.up, x), 0))
    want = bound(model, batch())
    np.testing.assert_allclose(want, x, rtol=1e-4, atol=1e-3)

    adapter = extract(model)
    assert dict(adapter.layouts) == dict.fromkeys(["blocks.down", "blocks.up"], Layout((1,), (2,), stack_axes=(0,)))
    assert adapter.to_interop().modules == tuple(f"blocks.{name}.{i}" for name in ("down", "up") for i in range(3))
    attach(delete_adapter(model, "default"), adapter)
    np.testing.assert_array_equal(bound(model, batch()), want)


def test_on_a_mesh_with_explicit_axes_the_branch_has_the_sharding_of_the_output():
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    adapter = extract(trained(CONFIG))
    rows = jax.sharding.NamedSharding(mesh, jax.P("data"))  # of the batch and of B, as under FSDP
    with jax.set_mesh(mesh):
        x, y, B = (jax.device_put(array, rows) for array in (batch(), jnp.ones((4, 12)), adapter.bases.B))
        add = jax.jit(functools.partial(add_update, scaling=1.0))
        got = add(y, x, adapter.bases._replace(B=B), adapter.factors["up"])
        assert got.sharding.spec == jax.P("data", None)
    want = 1 + np.asarray(batch(), np.float64) @ hub_delta(adapter, "up")
    np.testing.assert_allclose(got, want, **TOLERANCE["float32", "forward"])


# Misuse


@pytest.mark.parametrize(("inputs", "outputs"), [(13, 8), (8, 13)])
def test_a_layer_that_the_bases_were_not_made_for_is_refused(inputs, outputs):
    message = (
        rf"a layer with out_features={outputs} and in_features={inputs} does not fit bases made for at most out=12 and"
        rf" in=12: add \({outputs}, {inputs}\) to the shapes, \(out, in\), given to RandLoraBases\."
    )
    with pytest.raises(ValueError, match=message):
        RandLoraLinear(inputs, outputs, bases=RandLoraBases(CONFIG, SHAPES), rngs=nnx.Rngs(key(0)))
    shared, _ = explicit_linen.RandLoraBases(CONFIG, SHAPES).init_with_output({})
    with pytest.raises(ValueError, match=message):
        explicit_linen.RandLoraLinear(outputs).init(key(0), jnp.ones((2, inputs)), shared)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, r"bias='all': this stack trains with bias='none' only\. Set that\."),
        (
            {"modules_to_save": ["head"]},
            r"modules_to_save=\('head',\): this stack trains with modules_to_save=None only",
        ),
        ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS': for it PEFT trains the head"),
    ],
)
def test_what_only_torch_can_train_is_refused(fields, message):
    config = dataclasses.replace(CONFIG, **fields)
    with pytest.raises(ValueError, match=message):
        RandLoraBases(config, SHAPES)
    with pytest.raises(ValueError, match=message):
        explicit_linen.RandLoraBases(config, SHAPES).init({})


def test_bases_without_layers_are_refused():
    with pytest.raises(ValueError, match=r"shapes is empty"):
        RandLoraBases(CONFIG, [])


def test_dropout_without_a_stream_is_refused_where_it_can_be_mended():
    bases = RandLoraBases(DROPOUT, SHAPES)
    with pytest.raises(ValueError, match=r"randlora_dropout=0\.5, but rngs has the streams \['params'\] only: add one"):
        RandLoraLinear(8, 12, bases=bases, rngs=nnx.Rngs(params=key(0)))
    layer = trained(DROPOUT).up
    layer.dropout.rngs = nnx.data(None)
    message = (
        r"has randlora_dropout=0\.5, but this layer was made without .* call model\.eval\(\) for inference, or pass"
    )
    with pytest.raises(ValueError, match=message):
        layer(batch())
    layer(batch(), rngs=nnx.Rngs(dropout=0))
    net, variables = LinenNet(DROPOUT), trained_linen(DROPOUT)
    with pytest.raises(ValueError, match=r"randlora_dropout=0\.5: say deterministic=False for training or"):
        net.apply(variables, batch())
    with pytest.raises(
        ValueError, match=r"needs random numbers: pass rngs=\{'dropout': jax\.random\.key\(0\)\} to apply"
    ):
        net.apply(variables, batch(), False)


def test_variables_of_another_model_are_refused():
    variables = trained_linen(CONFIG)
    with pytest.raises(
        ValueError, match=r"lack the collections \['randlora', 'randlora_bases'\], they have \['params'\]"
    ):
        extract_adapter({"params": variables["params"]}, CONFIG)
    with pytest.raises(
        ValueError, match=r"layouts are given for \['upp'\], which are no RandLoraLinear layers: \['down'"
    ):
        extract_adapter(variables, CONFIG, layouts={"upp": Layout((0,), (1,))})
    twice = {**variables, "randlora_bases": {"a": variables["randlora_bases"]["bases"], **variables["randlora_bases"]}}
    with pytest.raises(ValueError, match=r"has RandLoraBases in 2 places, \['a', 'bases'\]: one adapter shares one"):
        extract_adapter(twice, CONFIG)
