"""AdaLoRA adapters on pytrees: the update in every kind of kernel, the regularization, what is refused."""

import dataclasses

import adalora_oracle
import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import pytest
from flax import linen, nnx
from stacks import without_type_checks
from strategies import KEPT, LAYERS, draw_adalora, draw_adapter
from tolerances import TOLERANCE

import interop
from interop import RandLoraConfig, SVDFactors, init_adapter
from randlora_jax import (
    AdaLoraAdapter,
    Layout,
    RandLoraAdapter,
    RandLoraBases,
    accumulate_gradients,
    adalora,
    count_trainable,
    effective_params,
    find_targets,
    init,
    lazy_params,
    load_adapter,
    merge,
    print_trainable_parameters,
    unmerge,
)
from randlora_jax.kernels import fits_weight
from randlora_jax.layouts import IN_OUT, OUT_IN
from randlora_jax.linen import insert_adapter
from randlora_jax.quantized import dequantize, from_bnb
from tests.jax.adalora_models import (
    LAYOUTS,
    MIXES,
    WEIGHTS,
    array,
    by_weight,
    config,
    new_adapter,
    params,
    trained,
)
from tests.jax.programs import equations
from tests.jax.test_adapter import assert_same_bits
from tests.jax.test_quantized import KINDS, every_kind

UPDATE, GRADIENT = TOLERANCE["float32"], TOLERANCE["float32", "gradient"]


def delta_of(factors, scaling):
    return oracle.svd_delta_weight(*factors, scaling=scaling)


def test_a_new_adapter_has_the_values_of_the_hub_and_changes_nothing():
    adapter = new_adapter()
    assert type(adapter) is AdaLoraAdapter
    assert adapter.modules == ("down", "mix", "up")
    assert adapter.weight_names == {"down": ["down"], "mix": list(MIXES), "up": ["up"]}
    assert dict(adapter.shapes) == {"down": (6, 12), "mix": (8, 8), "up": (12, 6)}
    rng = np.random.default_rng(np.asarray(jax.random.key_data(jax.random.key(0))).tolist())
    want = init_adapter(config(), WEIGHTS, rng=rng)
    got = adapter.to_interop()
    assert (got.modules, got.shapes, got.config) == (want.modules, want.shapes, config(target_modules=list(WEIGHTS)))
    for name in WEIGHTS:
        assert_same_bits(got.factors[name], want.factors[name])
        np.testing.assert_array_equal(got.factors[name].E, np.zeros((4, 1)))
    chex.assert_trees_all_equal(effective_params(params(), adapter), params())


def test_the_key_decides_the_values():
    first, again, other = (
        adalora.init(config(), params(), layouts=LAYOUTS, key=jax.random.key(seed)) for seed in (0, 0, 1)
    )
    chex.assert_trees_all_equal(first, again)
    assert np.all(np.asarray(first.factors["up"].A != other.factors["up"].A))
    random = new_adapter(init_lora_weights=False)
    assert np.all(np.asarray(random.factors["mix"].E) != 0)


@pytest.mark.parametrize("module", LAYERS)
@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_delta_weight_is_the_sum_over_triplets(module, kept):
    hub = draw_adalora(kept=kept)
    got = AdaLoraAdapter.from_interop(hub).delta_weight(module)
    assert (got.shape, got.dtype) == (LAYERS[module], jnp.float32)
    np.testing.assert_allclose(got, delta_of(hub.factors[module], hub.config.scaling), **UPDATE)


def test_the_scaling_is_alpha_over_the_initial_rank_also_when_few_triplets_are_left():
    hub = draw_adalora(kept=KEPT, lora_alpha=6)
    want = 6 / (4 + 1e-5) * delta_of(hub.factors["block.0.up"], 1.0)
    np.testing.assert_allclose(AdaLoraAdapter.from_interop(hub).delta_weight("block.0.up"), want, **UPDATE)


def test_effective_params_add_the_update_of_each_weight_and_leave_the_rest_alone():
    adapter, base = trained(new_adapter()), params()
    effective = jax.jit(effective_params)(base, adapter)
    chex.assert_trees_all_close(effective, effective_params(base, adapter), **TOLERANCE["float32", "merge"])
    want = {
        name: delta_of(factors, adapter.config.scaling).T
        for name, factors in by_weight(adapter, adapter.trainable).items()
    }
    for name in ("up", "down"):
        np.testing.assert_allclose(effective[name]["kernel"] - base[name]["kernel"], want[name], **UPDATE)
        np.testing.assert_allclose(adapter.delta_weight(name), want[name].T, **UPDATE)
    mixes = np.stack([want[name] for name in MIXES])
    np.testing.assert_allclose(effective["mix"]["kernel"] - base["mix"]["kernel"], mixes, **UPDATE)
    np.testing.assert_allclose(adapter.delta_weight("mix"), mixes.mT, **UPDATE)
    np.testing.assert_array_equal(effective["up"]["bias"], base["up"]["bias"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_oracle_in_the_dtype_of_the_factors(dtype):
    adapter = trained(new_adapter())
    adapter = adapter.with_trainable(jax.tree.map(lambda leaf: leaf.astype(dtype), adapter.trainable))
    upstream = {name: array(*leaf["kernel"].shape, seed=3) for name, leaf in params().items()}

    @jax.jit
    @jax.grad
    def grads(trainable):
        effective = effective_params(params(), adapter.with_trainable(trainable))
        return sum((effective[name]["kernel"] * upstream[name]).sum() for name in upstream)

    got = grads(adapter.trainable)
    assert {leaf.dtype for leaf in jax.tree.leaves(got)} == {jnp.dtype(dtype)}
    by_name = {"up": upstream["up"], "down": upstream["down"], **dict(zip(MIXES, upstream["mix"], strict=True))}
    for name, grad in by_weight(adapter, got).items():
        factors = by_weight(adapter, adapter.trainable)[name]
        want = adalora_oracle.delta_gradients(factors, adapter.config.scaling, np.asarray(by_name[name], np.float64).T)
        for mine, theirs in zip(grad, want, strict=True):
            np.testing.assert_allclose(mine.astype(np.float64), theirs, **TOLERANCE[dtype, "gradient"])


def test_the_update_of_a_stack_is_that_of_its_weights_one_by_one():
    base, adapter = params(), trained(new_adapter())
    apart = {f"mix.{i}": {"kernel": base["mix"]["kernel"][i]} for i in range(3)}
    hub = adapter.to_interop()
    separate = load_adapter(hub, {**base, **apart} | {"mix": {"bias": array(8)}})
    assert separate.modules == tuple(sorted(WEIGHTS))
    merged = merge({**base, **apart}, separate)
    whole = merge(base, adapter)["mix"]["kernel"]
    for i, name in enumerate(MIXES):
        np.testing.assert_array_equal(merged[name]["kernel"], whole[i])


@pytest.mark.parametrize("layout", [IN_OUT, OUT_IN, Layout((0,), (1, 2)), Layout((0, 1), (2,))], ids=str)
def test_the_product_has_the_kernels_order_of_inputs_and_outputs_from_the_start(layout):
    kernel = array(*{2: (20, 6), 3: (4, 5, 8)}[layout.ndim])
    base = {"layer": {"kernel": kernel}}
    wanted = config(target_modules=["layer"], init_r=2, target_r=1)
    adapter = adalora.init(wanted, base, layouts={"layer": layout}, key=jax.random.key(0))

    def loss(trainable):
        return (effective_params(base, adapter.with_trainable(trainable))["layer"]["kernel"] * kernel).sum()

    program = equations(jax.make_jaxpr(jax.value_and_grad(loss))(adapter.trainable))
    moved = [equation.invars[0].aval.size for equation in program if equation.primitive.name == "transpose"]
    assert max(moved, default=0) < kernel.size


def test_a_convolution_is_torchs_matrix_by_an_explicit_layout():
    height, width, inputs, outputs = 3, 2, 5, 7
    module = linen.Conv(outputs, (height, width), padding="VALID", use_bias=False)
    image, base = array(2, 6, 6, inputs), {"conv": {"kernel": array(height, width, inputs, outputs)}}
    layouts, wanted = {"conv": Layout((2, 0, 1), (3,))}, config(target_modules=["conv"])
    adapter = trained(adalora.init(wanted, base, layouts=layouts, key=jax.random.key(0)))
    assert dict(adapter.shapes) == {"conv": (outputs, inputs * height * width)}
    delta = delta_of(by_weight(adapter, adapter.trainable)["conv"], adapter.config.scaling)
    delta = delta.reshape(outputs, inputs, height, width)  # as torch's Conv2d has it
    apply = jax.jit(lambda params: module.apply({"params": params["conv"]}, image))
    got = apply(effective_params(base, adapter)) - apply(base)
    want = np.zeros(got.shape)
    for y, x in np.ndindex(*got.shape[1:3]):
        patch = np.asarray(image, np.float64)[:, y : y + height, x : x + width]
        want[:, y, x] = np.einsum("byxi,oiyx->bo", patch, delta)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-4)
    with pytest.raises(ValueError, match=r"'conv'.* need layouts=|matches none of the 0 adaptable layers"):
        adalora.init(wanted, base, key=jax.random.key(0))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_unmerge_undoes_merge_up_to_a_rounding_in_the_dtype_of_the_kernel(dtype):
    base = params(jnp.dtype(dtype))
    adapter = trained(new_adapter())
    merged = merge(base, adapter)
    chex.assert_trees_all_equal_dtypes(merged, base)
    delta = np.asarray(adapter.delta_weight("up"), np.float64).T
    exact = np.asarray(base["up"]["kernel"], np.float64) + delta
    eps = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(merged["up"]["kernel"], np.float64), exact, rtol=0.51 * eps, atol=1e-6)
    restored = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), unmerge(merged, adapter))
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(merged))
    wanted = jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), base)
    chex.assert_trees_all_close(restored, wanted, rtol=0, atol=size * eps)


def test_a_float64_kernel_is_merged_in_float64():
    with jax.enable_x64(True):
        base = params(jnp.float64)
        adapter = trained(new_adapter(jnp.float64))
        wide = adapter.with_trainable(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), adapter.trainable))
        merged = merge(base, wide)
        delta = delta_of(wide.factors["up"], wide.config.scaling).T
        np.testing.assert_allclose(merged["up"]["kernel"] - base["up"]["kernel"], delta, **TOLERANCE["float64"])


def test_the_dtype_of_an_adapter_rounds_the_operands_of_the_product_and_nothing_else():
    made = adalora.init(config(), params(), layouts=LAYOUTS, key=jax.random.key(0), dtype=jnp.bfloat16)
    adapter = trained(made)
    A, E, B = (np.asarray(part) for part in adapter.factors["up"])
    rounded = [part.astype(ml_dtypes.bfloat16).astype(np.float64) for part in (E * A, B)]
    want = adapter.config.scaling * rounded[1] @ rounded[0]
    got = jax.jit(lambda adapter: adapter.delta_weight("up"))(adapter)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, **UPDATE)
    kernel = effective_params(
        {"up": {"kernel": jnp.zeros((6, 12))}} | {n: params()[n] for n in ("down", "mix")}, adapter
    )
    np.testing.assert_allclose(kernel["up"]["kernel"], want.T, **UPDATE)
    grads = jax.jit(jax.grad(lambda adapter: adapter.delta_weight("up").sum()))(adapter).factors["up"]
    exact = adalora_oracle.delta_gradients((A, E, B), adapter.config.scaling, np.ones((12, 6)))
    for mine, theirs in zip(grads, exact, strict=True):
        np.testing.assert_allclose(mine, theirs, **TOLERANCE["bfloat16", "gradient"])


@every_kind
def test_a_quantized_kernel_is_adapted_as_the_array_it_stands_for(kind):
    weight = KINDS[kind]()  # torch's (6, 32)
    quantized = {"up": {"kernel": from_bnb(weight)}}
    plain = {"up": {"kernel": dequantize(quantized["up"]["kernel"])}}
    wanted = config(target_modules=["up"])
    adapter = trained(adalora.init(wanted, quantized, key=jax.random.key(0)))
    chex.assert_trees_all_equal(effective_params(quantized, adapter), effective_params(plain, adapter))
    moved = effective_params(quantized, adapter)["up"]["kernel"] - plain["up"]["kernel"]
    np.testing.assert_allclose(moved.T, delta_of(adapter.factors["up"], adapter.config.scaling), **UPDATE)


def test_an_nnx_model_is_adapted_by_its_state():
    model = nnx.Sequential(nnx.Linear(8, 12, rngs=nnx.Rngs(0)), nnx.Linear(12, 8, rngs=nnx.Rngs(1)))
    graph, state = nnx.split(model)
    wanted = config(target_modules="all-linear")
    adapter = trained(adalora.init(wanted, state, key=jax.random.key(0)))
    assert adapter.modules == ("layers.0", "layers.1")
    x = array(3, 8)

    @jax.jit
    def forward(trainable, state):
        return nnx.merge(graph, effective_params(state, adapter.with_trainable(trainable)))(x)

    hidden = x @ model.layers[0].kernel + x @ adapter.delta_weight("layers.0").T
    want = hidden @ model.layers[1].kernel + hidden @ adapter.delta_weight("layers.1").T
    np.testing.assert_allclose(forward(adapter.trainable, state), want, rtol=1e-4, atol=1e-3)
    grads = jax.jit(jax.grad(lambda trainable: forward(trainable, state).sum()))(adapter.trainable)
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(grads))


class Block(linen.Module):
    @linen.compact
    def __call__(self, x, _):
        hidden = linen.relu(linen.Dense(12, name="up")(x))
        return x + linen.Dense(8, name="down")(hidden), None


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x):
        layer = linen.scan(
            linen.remat(Block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
            in_axes=linen.broadcast,
        )
        return layer(name="blocks")(x, None)[0]


LAZY_KEPT = {"blocks.up.1": (True, False, True, False), "blocks.down.0": (False,) * 4}


@pytest.mark.parametrize("kept", [pytest.param(None, marks=pytest.mark.slow), LAZY_KEPT], ids=["whole", "pruned"])
def test_lazy_params_compute_the_update_inside_scan_and_remat(kept):
    net, x = Scanned(), array(4, 8)
    variables = net.init(jax.random.key(0), x)
    layouts = {f"blocks.{name}": Layout((1,), (2,), stack_axes=(0,)) for name in ("up", "down")}
    adapter = trained(
        adalora.init(config(target_modules=["up", "down"]), variables, layouts=layouts, key=jax.random.key(0))
    )
    if kept:
        hub = adapter.to_interop()
        factors = {
            name: interop.adalora.keep_triplets(hub.factors[name], kept.get(name, (True,) * 4)) for name in hub.modules
        }
        hub = dataclasses.replace(hub, config=hub.config.with_kept(kept), factors=factors)
        adapter = load_adapter(hub, variables, layouts=layouts)

    def lazy(trainable):
        return net.apply(lazy_params(variables, adapter.with_trainable(trainable)), x)

    def eager(trainable):
        return net.apply(effective_params(variables, adapter.with_trainable(trainable)), x)

    def loss(forward):
        return jax.jit(jax.value_and_grad(lambda trainable: (forward(trainable) ** 2).mean()))

    chex.assert_trees_all_close(loss(lazy)(adapter.trainable), loss(eager)(adapter.trainable), rtol=1e-4, atol=1e-3)


def test_an_adalora_adapter_is_no_part_of_randloras_explicit_layers():
    with pytest.raises(TypeError, match=r"one of AdaLoRA, .*: randlora_jax\.adalora adapts the layers of a model as"):
        with without_type_checks():
            RandLoraBases(config(), [(8, 8)])
    with pytest.raises(TypeError, match=r"one of AdaLoRA, .*: lazy_params\(params, adapter\) adapts linen layers as"):
        insert_adapter({"params": {}}, draw_adalora(), RandLoraConfig(r=4))


def test_micro_batches_give_the_gradient_of_the_large_batch():
    adapter, batch = trained(new_adapter()), array(12, 6)

    def loss(effective, x):
        hidden = jnp.tanh(x @ effective["up"]["kernel"]) @ effective["down"]["kernel"]
        return (hidden**2).mean() + (effective["mix"]["kernel"] ** 2).mean()

    whole = lambda t: loss(effective_params(params(), adapter.with_trainable(t)), batch)  # noqa: E731
    want = jax.jit(jax.value_and_grad(whole))(adapter.trainable)
    split = jax.jit(lambda a: accumulate_gradients(loss, a, params(), batch.reshape(4, 3, 6)))(adapter)
    chex.assert_trees_all_close(split, want, **GRADIENT)


def test_the_trainable_count_is_the_closed_form_and_the_line_is_pefts(capsys):
    adapter = new_adapter()
    assert count_trainable(adapter) == 4 * sum(out + inp + 1 for out, inp in WEIGHTS.values())
    assert count_trainable(adapter) == adapter.to_interop().num_trainable
    print_trainable_parameters(adapter, params())
    total = 356 + sum(leaf.size for leaf in jax.tree.leaves(params()))
    assert (
        capsys.readouterr().out
        == f"trainable params: 356 || all params: {total:,d} || trainable%: {35600 / total:.4f}\n"
    )


def test_find_targets_says_what_init_would_adapt():
    assert find_targets(config(), params(), layouts=LAYOUTS) == dict(WEIGHTS)


def test_an_adapter_is_a_pytree_of_its_factors_and_of_static_knowledge():
    adapter, other = new_adapter(), new_adapter()
    leaves, structure = jax.tree.flatten(adapter)
    assert len(leaves) == 9
    assert jax.tree.structure(other) == structure
    assert jax.tree.structure(new_adapter(lora_alpha=5)) != structure
    doubled = jax.tree.map(lambda leaf: 2 * leaf, trained(adapter))
    assert isinstance(doubled, AdaLoraAdapter)
    chex.assert_trees_all_close(doubled.delta_weight("up"), 8 * trained(adapter).delta_weight("up"), rtol=1e-6)
    update = jax.jit(lambda adapter: adapter.delta_weight("mix"))
    for each in (adapter, other, doubled):
        chex.assert_trees_all_close(update(each), each.delta_weight("mix"), **UPDATE)
    assert update._cache_size() == 1
    with pytest.raises(ValueError, match=r"trainable must hold the 3 adapted layers; these differ: \['mix', 'up'\]"):
        adapter.with_trainable({"down": adapter.trainable["down"]})
    with pytest.raises(ValueError, match=r"layouts are given for \['k'\], which are not adapted"):
        adapter.with_layouts({"k": IN_OUT})


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["whole", "pruned"])
def test_from_and_to_interop_are_exact_inverses_and_convert_finds_the_class(dtype, kept):
    hub = draw_adalora(kept=kept, dtype=dtype)
    adapter = interop.convert(hub, to="jax")
    assert type(adapter) is AdaLoraAdapter
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(adapter))
    for again in (adapter.to_interop(), interop.convert(adapter, to="peft")):
        assert (again.config, again.shapes, again.modules) == (hub.config, hub.shapes, hub.modules)
        for name in hub.modules:
            assert_same_bits(again.factors[name], hub.factors[name])


STACKED = {f"layers.q.{i}": (6, 8) for i in range(4)}
# The second and the last are pruned to fewer triplets than the first, the third has none left.
STACK_KEPT = {
    "layers.q.0": (True, True, False, True),
    "layers.q.1": (False, True, False, False),
    "layers.q.2": (False,) * 4,
    "layers.q.3": (True, False, False, True),
}
EMPTY = {name: (False,) * 4 for name in STACKED}
STACK_LAYOUT = {"layers.q": Layout((1,), (2,), stack_axes=(0,))}


@pytest.mark.parametrize("kept", [None, STACK_KEPT, EMPTY], ids=["whole", "pruned", "empty"])
@pytest.mark.parametrize("stacked", [False, True], ids=["plain", "stacked"])
def test_a_folder_loaded_and_saved_again_has_the_same_bytes(tmp_path, kept, stacked):
    hub = draw_adalora(shapes=STACKED, kept=kept)
    interop.save(hub, tmp_path / "first")
    plain = {name: {"kernel": array(8, 6)} for name in STACKED}
    one = {"layers": {"q": {"kernel": array(4, 8, 6)}}}
    adapter = load_adapter(tmp_path / "first", one if stacked else plain, layouts=STACK_LAYOUT if stacked else None)
    adapter.save_pretrained(tmp_path / "second")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()
    effective = effective_params(one if stacked else plain, adapter)
    for i, name in enumerate(STACKED):
        kernels = [
            tree["layers"]["q"]["kernel"][i] if stacked else tree[name]["kernel"]
            for tree in (effective, one if stacked else plain)
        ]
        np.testing.assert_allclose((kernels[0] - kernels[1]).T, hub.delta_weight(name), **UPDATE)


def test_weights_of_one_array_are_padded_with_zeros_to_the_largest_rank():
    hub = draw_adalora(shapes=STACKED, kept=STACK_KEPT)
    adapter = load_adapter(hub, {"layers": {"q": {"kernel": array(4, 8, 6)}}}, layouts=STACK_LAYOUT)
    A, E, B = adapter.factors["layers.q"]
    assert (A.shape, E.shape, B.shape) == ((4, 3, 8), (4, 3, 1), (4, 6, 3))
    present = [[True] * 3, [True, False, False], [False] * 3, [True, True, False]]
    np.testing.assert_array_equal(adapter.present["layers.q"], present)
    for i, name in enumerate(STACKED):
        rank = hub.config.rank(name)
        assert_same_bits([np.asarray(A[i, :rank]), np.asarray(E[i, :rank])], hub.factors[name][:2])
        np.testing.assert_array_equal(A[i, rank:], np.zeros((3 - rank, 8)))
        np.testing.assert_array_equal(B[i, :, rank:], np.zeros((6, 3 - rank)))


def test_a_kernel_of_which_some_weights_are_adapted_has_factors_for_those():
    names = ("q", None, "v")
    layouts = {"qkv": Layout((1,), (2,), stack_axes=(0,), modules=names)}
    base = {"qkv": {"kernel": array(3, 8, 6)}}
    adapter = trained(adalora.init(config(target_modules=["q", "v"]), base, layouts=layouts, key=jax.random.key(0)))
    assert adapter.weight_names == {"qkv": ["q", "v"]}
    moved = effective_params(base, adapter)["qkv"]["kernel"] - base["qkv"]["kernel"]
    factors = by_weight(adapter, adapter.trainable)
    for i, name in ((0, "q"), (2, "v")):
        np.testing.assert_allclose(moved[i].T, delta_of(factors[name], adapter.config.scaling), **UPDATE)
    np.testing.assert_array_equal(moved[1], np.zeros((8, 6)))


def assert_orthogonal_loss_is_the_oracles(adapter):
    want = adalora_oracle.orthogonal_loss(by_weight(adapter, adapter.trainable), adapter.config.orth_reg_weight)
    np.testing.assert_allclose(jax.jit(adalora.orthogonal_loss)(adapter), want, rtol=1e-5)


@pytest.mark.parametrize("weight", [0.5, 0.01, 0])
def test_the_orthogonal_loss_is_the_mean_distance_from_orthogonal(weight):
    assert_orthogonal_loss_is_the_oracles(trained(new_adapter(orth_reg_weight=weight)))


@pytest.mark.parametrize("kept", [STACK_KEPT, EMPTY], ids=["padded", "empty"])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_padding_is_no_part_of_the_orthogonal_loss_or_its_gradient(kept, noise):
    hub = draw_adalora(shapes=STACKED, kept=kept)
    adapter = load_adapter(hub, {"layers": {"q": {"kernel": array(4, 8, 6)}}}, layouts=STACK_LAYOUT)
    A, E, B = adapter.factors["layers.q"]
    padding = noise * ~adapter.present["layers.q"]
    adapter = adapter.with_trainable({"layers.q": SVDFactors(A + padding[..., None], E, B + padding[:, None])})
    assert_orthogonal_loss_is_the_oracles(adapter)
    grads = jax.jit(jax.grad(adalora.orthogonal_loss))(adapter).factors["layers.q"]
    chex.assert_tree_all_finite(grads)
    for i, rows in enumerate(adapter.present["layers.q"]):
        assert not np.any(np.asarray(grads.A[i])[~rows])
        assert not np.any(np.asarray(grads.B[i])[:, ~rows])


def test_the_gradient_of_the_orthogonal_loss_is_central_differences():
    with jax.enable_x64(True):
        adapter = trained(new_adapter(target_modules=["mix"]))
        wide = adapter.with_trainable(jax.tree.map(lambda leaf: leaf.astype(jnp.float64), adapter.trainable))
        loss = jax.jit(lambda trainable: adalora.orthogonal_loss(wide.with_trainable(trainable)))
        grads, rng = jax.jit(jax.grad(loss))(wide.trainable), np.random.default_rng(0)
        direction = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape)), grads)
        moved = [loss(jax.tree.map(lambda a, d, s=s: a + s * d, wide.trainable, direction)) for s in (1e-6, -1e-6)]
        along = sum((a * b).sum() for a, b in zip(*map(jax.tree.leaves, (grads, direction)), strict=True))
        np.testing.assert_allclose(along, (moved[0] - moved[1]) / 2e-6, **TOLERANCE["float64", "finite_difference"])


def test_where_all_is_orthogonal_the_loss_is_zero_with_a_gradient_of_zero():
    adapter = new_adapter(target_modules=["mix"])
    eye = lambda leaf, rows: jnp.broadcast_to(jnp.eye(*leaf.shape[-2:]), leaf.shape)  # noqa: E731
    factors = {name: SVDFactors(eye(f.A, 0), f.E, eye(f.B, 0)) for name, f in adapter.factors.items()}
    value, grads = jax.jit(jax.value_and_grad(adalora.orthogonal_loss))(adapter.with_trainable(factors))
    assert value == 0
    chex.assert_trees_all_equal(grads, jax.tree.map(jnp.zeros_like, grads))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, r"bias='all': this stack trains with bias='none' only\. Set that\."),
        ({"modules_to_save": ["head"]}, r"modules_to_save=\('head',\): this stack trains with modules_to_save=None"),
        ({"lora_dropout": 0.1}, r"lora_dropout=0\.1: W \+ dW has no place for dropout\. Set lora_dropout=0\.0\."),
        ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS': for it PEFT trains the head"),
        ({"target_modules": ["upp"]}, r"matches none of the 3 adaptable layers\. Did you mean 'up'\?"),
        ({"rank_pattern": {"up.lora_E": [True] * 4}}, r"a new adapter starts with rank_pattern=None"),
        ({"total_step": None, "inference_mode": True}, r"total_step=None: set it to the number of optimizer steps"),
    ],
    ids=str,
)
def test_what_a_new_adapter_cannot_be_made_of_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        new_adapter(**fields)


def test_each_method_has_its_own_init():
    with pytest.raises(
        TypeError, match=r"config is a RandLoraConfig: pass an AdaLoraConfig, or use randlora_jax\.init"
    ):
        adalora.init(RandLoraConfig(r=4, target_modules=["up"]), params(), key=jax.random.key(0))
    with pytest.raises(TypeError, match=r"one of AdaLoRA, .*: randlora_jax\.adalora\.init\(config, params, key=key\)"):
        with without_type_checks():
            init(config(), params(), layouts=LAYOUTS)
    with pytest.raises(ValueError, match=r"AdaLoRA draws A and B at random: pass key=jax\.random\.key\(0\), or rngs="):
        adalora.init(config(), params(), layouts=LAYOUTS)


def test_each_class_takes_the_adapters_of_its_method():
    with pytest.raises(TypeError, match=r"one of RandLoRA: use RandLoraAdapter\.from_interop, or interop\.convert"):
        AdaLoraAdapter.from_interop(draw_adapter())
    with pytest.raises(TypeError, match=r"one of AdaLoRA: use AdaLoraAdapter\.from_interop, or interop\.convert"):
        RandLoraAdapter.from_interop(draw_adalora())
    hub = draw_adalora()
    saved = {"block.0.up.bias": np.zeros(12, np.float32)}
    hub = dataclasses.replace(hub, config=dataclasses.replace(hub.config, bias="all"), saved_weights=saved)
    with pytest.raises(ValueError, match=r"holds \['block\.0\.up\.bias'\] besides A, E and B \(bias='all'"):
        AdaLoraAdapter.from_interop(hub)


def test_a_loaded_adapter_says_that_its_dropout_has_no_effect():
    hub = draw_adalora(shapes={"up": (12, 6)}, lora_dropout=0.1)
    with pytest.warns(UserWarning, match=r"^lora_dropout=0\.1 has no effect in this stack\. Training goes on without"):
        load_adapter(hub, {"up": {"kernel": array(6, 12)}})


def test_factors_belong_to_weights_of_one_shape_only():
    factors = draw_adalora().factors["block.0.up"]
    assert fits_weight(factors, (12, 6))
    for shape in ((6, 12), (12, 7), (11, 6)):
        assert not fits_weight(factors, shape)
    assert not fits_weight(factors._replace(E=factors.E[:2]), (12, 6))
    assert not fits_weight(factors._replace(B=factors.B[:, :2]), (12, 6))


def test_kernels_of_another_shape_are_refused():
    adapter = new_adapter()
    base = params() | {"up": {"kernel": array(7, 12)}}
    with pytest.raises(
        ValueError, match=r"up has shape \(7, 12\), in torch's terms \(12, 7\); the adapter was made for"
    ):
        effective_params(base, adapter)
    base = params() | {"mix": {"kernel": array(4, 8, 8)}}
    with pytest.raises(ValueError, match=r"mix has shape \(4, 8, 8\)"):
        effective_params(base, adapter)
    with pytest.raises(ValueError, match=r"lack these adapted layers:\n  - down\n  - mix$"):
        effective_params({"up": params()["up"]}, adapter)
    with pytest.raises(ValueError, match=r"shape=\(8, 12\) does not fit 'up': it must be \(12, 6\)"):
        adapter.delta_weight("up", (8, 12))
    with pytest.raises(KeyError, match=r"module 'head' is not adapted"):
        adapter.delta_weight("head")
