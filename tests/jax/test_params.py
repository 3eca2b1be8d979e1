"""Adapters on plain pytrees: which kernels are found, in which layout, and what merging makes of them."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from stacks import without_type_checks
from tolerances import TOLERANCE

import interop
from interop import DEFAULT_RECIPE, RECIPES, Factors, RandLoraConfig, bases_digest
from interop.shapes import count_trainable as count_layer
from randlora_jax import (
    Layout,
    RandLoraAdapter,
    attach,
    count_trainable,
    delta_weight,
    effective_params,
    extract,
    init,
    layer_bases,
    merge,
    print_trainable_parameters,
    unmerge,
)
from randlora_jax.layouts import IN_OUT, OUT_IN, default_layout, module_name
from tests.jax.programs import equations


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def model_params(dtype=jnp.float32):
    """Two blocks of linear layers between an embedding and a head, as linen names them."""
    return {
        "embed": {"embedding": array(9, 8, dtype=dtype)},
        "layers_0": {
            "attn": {"q_proj": {"kernel": array(8, 6, dtype=dtype), "bias": array(6, dtype=dtype)}},
            "up": {"kernel": array(8, 12, dtype=dtype)},
        },
        "layers_1": {
            "attn": {"q_proj": {"kernel": array(8, 6, seed=1, dtype=dtype), "bias": array(6, dtype=dtype)}},
            "up": {"kernel": array(8, 12, seed=1, dtype=dtype)},
        },
        "norm": {"scale": array(8, dtype=dtype)},
        "lm_head": {"kernel": array(8, 9, dtype=dtype)},
    }


Q_PROJS = ("layers_0.attn.q_proj", "layers_1.attn.q_proj")
UPS = ("layers_0.up", "layers_1.up")


def config(*targets, **fields):
    """A small config; alpha = r keeps updates of order 1."""
    wanted = targets[0] if targets == ("all-linear",) else targets
    return RandLoraConfig(**{"r": 3, "randlora_alpha": 3, "target_modules": wanted, **fields})


def trained(adapter, seed=7):
    """The adapter with random lambda and gamma, as after training."""
    rng = np.random.default_rng(seed)
    return adapter.with_trainable(
        jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype), adapter.trainable)
    )


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"target_modules": ["q_proj"]}, Q_PROJS),
        ({"target_modules": ["attn.q_proj", "layers_1.up"]}, (*Q_PROJS, "layers_1.up")),
        ({"target_modules": r"layers_0\..*"}, ("layers_0.attn.q_proj", "layers_0.up")),
        ({"target_modules": "all-linear"}, (*Q_PROJS, *UPS)),
        ({"target_modules": "all-linear", "exclude_modules": ["up"]}, Q_PROJS),
        ({"target_modules": ["lm_head"]}, ("lm_head",)),
    ],
    ids=str,
)
def test_targets_are_suffixes_a_regular_expression_or_all_linear_layers_but_the_head(fields, chosen):
    adapter = init(RandLoraConfig(r=3, **fields), model_params())
    assert adapter.modules == tuple(sorted(chosen))


def test_a_new_adapter_has_pefts_starting_values_and_changes_nothing():
    params = model_params()
    adapter = init(config("q_proj", "up"), params)
    assert dict(adapter.shapes) == {**dict.fromkeys(Q_PROJS, (6, 8)), **dict.fromkeys(UPS, (12, 8))}
    for name, (lam, gamma) in adapter.factors.items():
        short = min(dict(adapter.shapes)[name])
        n = -(-short // 3)
        assert (lam.dtype, gamma.dtype) == (jnp.float32, jnp.float32)
        np.testing.assert_array_equal(lam, np.zeros((3, n)))
        np.testing.assert_array_equal(gamma, np.full((n, short), np.float32(1 / max(n, short))))
    chex.assert_trees_all_equal(effective_params(params, adapter), params)


def test_init_weights_false_draws_lambda_from_the_key_and_starts_at_some_update():
    wanted = config("up", init_weights=False)
    params = model_params()
    first, again, other = (init(wanted, params, key=jax.random.key(seed)) for seed in (0, 0, 1))
    chex.assert_trees_all_equal(first, again)
    chex.assert_trees_all_equal(init(wanted, params, key=jax.random.PRNGKey(0)), first)
    for name in UPS:
        lam, gamma = first.factors[name]
        assert np.any(np.asarray(lam) != np.asarray(other.factors[name].lam))
        np.testing.assert_array_equal(gamma, np.float32(1 / 12))
    assert np.any(np.asarray(first.factors[UPS[0]].lam) != np.asarray(first.factors[UPS[1]].lam))
    with pytest.raises(ValueError, match=r"init_weights=False draws lambda at random: pass"):
        init(wanted, params)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_bases_are_drawn_by_the_recipe_for_the_largest_of_the_layers(recipe):
    adapter = init(config("q_proj", "up", projection_prng_key=5), model_params(), recipe=recipe)
    want = interop.make_bases(adapter.config, max_dim=12, min_dim=8, recipe=recipe)
    assert bases_digest(adapter.to_interop().bases) == bases_digest(want)
    assert adapter.recipe == recipe
    assert init(config("up"), model_params()).recipe == DEFAULT_RECIPE


def test_shapes_alone_are_enough_to_make_an_adapter():
    params = model_params()
    abstract = jax.eval_shape(lambda: params)
    chex.assert_trees_all_equal(init(config("all-linear"), abstract), init(config("all-linear"), params))


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(12, name="up")(x))
        return linen.Dense(5, name="down")(x)


def test_linen_params_are_adapted_with_and_without_their_collection():
    net, x = Net(), array(4, 8)
    variables = net.init(jax.random.key(0), x)
    with_collection = init(config("all-linear"), variables)
    chex.assert_trees_all_equal(with_collection, init(config("all-linear"), variables["params"]))
    assert with_collection.modules == ("down", "up")
    adapter = trained(with_collection)
    effective = effective_params(variables, adapter)
    chex.assert_trees_all_equal(effective["params"], effective_params(variables["params"], adapter))

    def dense(name, x):
        layer = variables["params"][name]
        return x @ layer["kernel"] + x @ adapter.delta_weight(name).T + layer["bias"]

    want = dense("down", linen.relu(dense("up", x)))
    chex.assert_trees_all_close(net.apply(effective, x), want, **TOLERANCE["float32", "forward"])


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TorchLikeLinear:
    """A layer as equinox keeps it: attributes, weight (out, in)."""

    weight: jax.Array
    bias: jax.Array


def test_leaves_named_weight_are_out_in_and_those_named_w_or_kernel_are_in_out():
    params = {
        "a": {"weight": array(12, 8)},
        "b": {"w": array(8, 12)},
        "c": {"kernel": array(8, 12)},
        "d": [TorchLikeLinear(array(12, 8), array(12))],
    }
    adapter = trained(init(config("a", "b", "c", "d.0"), params))
    assert adapter.shapes == tuple((name, (12, 8)) for name in ("a", "b", "c", "d.0"))
    effective = effective_params(params, adapter)
    for got, base, name, transposed in (
        (effective["a"]["weight"], params["a"]["weight"], "a", False),
        (effective["b"]["w"], params["b"]["w"], "b", True),
        (effective["c"]["kernel"], params["c"]["kernel"], "c", True),
        (effective["d"][0].weight, params["d"][0].weight, "d.0", False),
    ):
        delta = adapter.delta_weight(name)
        want = base + (delta.T if transposed else delta)
        chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "merge"])
        assert np.any(np.abs(np.asarray(got - base)) > 0.1)
    assert effective["d"][0].bias is params["d"][0].bias


HEADS = {"q": {"kernel": array(8, 2, 5)}, "out": {"kernel": array(2, 5, 8)}, "norm": {"scale": array(8)}}
HEAD_LAYOUTS = {"q": Layout((0,), (1, 2)), "out": Layout((0, 1), (2,))}


def test_layouts_adapt_attention_kernels_with_heads_as_torchs_matrices():
    adapter = trained(init(config("all-linear"), HEADS, layouts=HEAD_LAYOUTS))
    assert dict(adapter.shapes) == {"q": (10, 8), "out": (8, 10)}
    assert dict(adapter.layouts) == HEAD_LAYOUTS
    effective = effective_params(HEADS, adapter)
    x, heads = array(3, 8), array(3, 2, 5)
    want_q = jnp.einsum("td,dhk->thk", x, HEADS["q"]["kernel"]) + (x @ adapter.delta_weight("q").T).reshape(3, 2, 5)
    got_q = jnp.einsum("td,dhk->thk", x, effective["q"]["kernel"])
    chex.assert_trees_all_close(got_q, want_q, **TOLERANCE["float32", "forward"])
    flat = heads.reshape(3, 10)
    want_out = jnp.einsum("thk,hkd->td", heads, HEADS["out"]["kernel"]) + flat @ adapter.delta_weight("out").T
    got_out = jnp.einsum("thk,hkd->td", heads, effective["out"]["kernel"])
    chex.assert_trees_all_close(got_out, want_out, **TOLERANCE["float32", "forward"])


def test_a_layout_in_any_order_of_axes_is_the_transposed_torch_weight():
    weight = array(6, 20)  # out = (2, 3), in = (4, 5)
    kernel = Layout(in_axes=(3, 1), out_axes=(2, 0)).to_kernel(weight, (3, 5, 2, 4))
    assert Layout((3, 1), (2, 0)).torch_shape((3, 5, 2, 4)) == (6, 20)
    for o2, o0, i3, i1 in np.ndindex(2, 3, 4, 5):
        assert kernel[o0, i1, o2, i3] == weight[o2 * 3 + o0, i3 * 5 + i1]
    np.testing.assert_array_equal(IN_OUT.to_kernel(weight, (20, 6)), weight.T)
    np.testing.assert_array_equal(OUT_IN.to_kernel(weight, (6, 20)), weight)


@pytest.mark.parametrize(
    ("kernel_shape", "layout"),
    [
        ((20, 6), IN_OUT),
        ((6, 20), IN_OUT),
        ((20, 6), OUT_IN),
        ((6, 20), OUT_IN),
        ((8, 2, 5), HEAD_LAYOUTS["q"]),
        ((2, 5, 8), HEAD_LAYOUTS["out"]),
    ],
)
def test_the_update_comes_out_of_its_product_in_the_order_of_the_kernel(kernel_shape, layout):
    """A transposition would be moved to the frozen kernels by XLA, which on GPU copied those of all scanned layers."""
    kernel = array(*kernel_shape)
    params = {"layer": {"kernel": kernel}}
    adapter = init(config("layer"), params, layouts={"layer": layout})

    def loss(trainable):
        return (effective_params(params, adapter.with_trainable(trainable))["layer"]["kernel"] * kernel).sum()

    program = equations(jax.make_jaxpr(jax.value_and_grad(loss))(adapter.trainable))
    moved = [equation.invars[0].aval.size for equation in program if equation.primitive.name == "transpose"]
    assert max(moved, default=0) < kernel.size


@pytest.mark.parametrize(
    "axes", [((0,), (0,)), ((0,), (2,)), ((), (0, 1)), ((0, 1), ()), ((0,), (1, 3)), ((-1,), (0,))]
)
def test_a_layout_must_name_every_axis_once(axes):
    with pytest.raises(ValueError, match=r"in_axes=.*, out_axes=.*: together they must name every axis 0\.\.ndim-1"):
        Layout(*axes)


def test_a_layout_refuses_a_kernel_with_another_number_of_axes():
    with pytest.raises(ValueError, match=r"a kernel of shape \(8, 2, 5\) does not have the axes of Layout\(in_axes="):
        init(config("q"), HEADS, layouts={"q": Layout((0,), (1,))})


def test_layouts_for_names_that_do_not_exist_are_refused_with_the_names_that_do():
    message = r"layouts are given for \['queries'\], which are no parameters\. Names are \['out', 'q', 'norm\.scale'\]"
    with pytest.raises(ValueError, match=message):
        init(config("q"), HEADS, layouts={"queries": Layout((0,), (1, 2)), **HEAD_LAYOUTS})


def test_names_are_dotted_paths_without_the_name_of_the_leaf():
    assert module_name(("layers", "0", "q", "kernel")) == "layers.0.q"
    assert module_name(("w",)) == "w"
    assert module_name(("norm", "scale")) == "norm.scale"
    assert default_layout(("q", "kernel"), 3) is None
    assert default_layout((), 2) is None


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        (
            ["embedding"],
            r"entry 'embedding' matches none .* It matches 'embed\.embedding', which is not a linear layer",
        ),
        (["norm.scale"], r"It matches 'norm\.scale', which is not a linear layer"),
        (["q_proi"], r"matches none of the 5 adaptable layers\. Did you mean 'q_proj'\?"),
        (["nothing_like_it"], r"matches none of the 5 adaptable layers\. Adaptable layers end in: q_proj, up, lm_head"),
        ("(", r"target_modules='\(' is not a valid regular expression"),
        (None, r"target_modules=None: name the layers to adapt, or use 'all-linear'"),
    ],
    ids=str,
)
def test_a_target_that_adapts_nothing_is_refused(wanted, message):
    with pytest.raises(ValueError, match=message):
        init(RandLoraConfig(r=3, target_modules=wanted), model_params())


def test_effective_params_adds_the_update_to_adapted_kernels_and_leaves_the_rest_alone():
    params = model_params()
    adapter = trained(init(config("q_proj"), params))
    effective = effective_params(params, adapter)
    for block in ("layers_0", "layers_1"):
        delta = adapter.delta_weight(f"{block}.attn.q_proj")
        layer = effective[block]["attn"]["q_proj"]
        want = params[block]["attn"]["q_proj"]["kernel"] + delta.T
        chex.assert_trees_all_close(layer["kernel"], want, **TOLERANCE["float32", "merge"])
        assert layer["bias"] is params[block]["attn"]["q_proj"]["bias"]
        assert effective[block]["up"]["kernel"] is params[block]["up"]["kernel"]
    assert effective["lm_head"]["kernel"] is params["lm_head"]["kernel"]
    chex.assert_trees_all_equal(params, model_params())


def test_effective_params_under_jit_equal_eager_and_send_gradients_to_the_factors():
    params = model_params()
    adapter = trained(init(config("q_proj", "up"), params))
    got = jax.jit(effective_params)(params, adapter)
    chex.assert_trees_all_close(got, effective_params(params, adapter), **TOLERANCE["float32", "merge"])

    def loss(trainable):
        effective = effective_params(params, adapter.with_trainable(trainable))
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(effective))

    def written_out(trainable):
        candidate = adapter.with_trainable(trainable)
        kernels = {name: params[name.split(".")[0]]["up"]["kernel"] for name in UPS}
        kernels |= {name: params[name.split(".")[0]]["attn"]["q_proj"]["kernel"] for name in Q_PROJS}
        return sum(((kernel + candidate.delta_weight(name).T) ** 2).sum() for name, kernel in kernels.items())

    got, want = (jax.jit(jax.grad(f))(adapter.trainable) for f in (loss, written_out))
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32", "gradient"])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_merging_keeps_the_dtype_of_a_kernel_and_rounds_once(dtype):
    params = model_params(jnp.dtype(dtype))
    adapter = trained(init(config("up"), params))
    merged = merge(params, adapter)
    chex.assert_trees_all_equal(merged, effective_params(params, adapter))
    for block in ("layers_0", "layers_1"):
        kernel = params[block]["up"]["kernel"]
        got = merged[block]["up"]["kernel"]
        assert got.dtype == dtype
        exact = np.asarray(kernel, np.float64) + np.asarray(adapter.delta_weight(f"{block}.up"), np.float64).T
        half_unit = float(jnp.finfo(dtype).eps) / 2
        np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=1.01 * half_unit, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_unmerge_undoes_merge_up_to_a_rounding_in_the_dtype_of_the_kernel(dtype):
    params = model_params(jnp.dtype(dtype))
    adapter = init(config("q_proj", "up"), params)
    tenth = jax.tree.map(lambda leaf: 0.1 * leaf, trained(adapter).trainable)
    adapter = adapter.with_trainable(tenth)
    merged = merge(params, adapter)
    restored = unmerge(merged, adapter)
    size = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves((params, merged)))
    assert size < 4
    wide, original = (jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree) for tree in (restored, params))
    # A rounding of W + dW, below 4, is at most 2 eps; the last one to W's dtype the same.
    atol = 4 * float(jnp.finfo(dtype).eps)
    chex.assert_trees_all_close(wide, original, rtol=0, atol=atol)
    chex.assert_trees_all_equal_dtypes(restored, params)


def test_a_float64_kernel_is_merged_in_float64():
    with jax.enable_x64(True):
        params = {"up": {"kernel": array(8, 12, dtype=jnp.float64)}}
        adapter = trained(init(config("up"), params))
        merged = merge(params, adapter)
        assert merged["up"]["kernel"].dtype == jnp.float64
        chex.assert_trees_all_close(unmerge(merged, adapter), params, **TOLERANCE["float64", "merge"])


@pytest.mark.parametrize("function", [effective_params, merge, unmerge])
def test_params_without_an_adapted_layer_are_refused(function):
    params = model_params()
    adapter = init(config("q_proj", "up"), params)
    del params["layers_1"]
    with pytest.raises(ValueError, match=r"lack these adapted layers:\n  - layers_1\.attn\.q_proj\n  - layers_1\.up$"):
        function(params, adapter)


@pytest.mark.parametrize("function", [effective_params, merge, unmerge])
def test_params_with_an_adapted_layer_of_another_shape_are_refused(function):
    params = model_params()
    adapter = init(config("up"), params)
    params["layers_0"]["up"]["kernel"] = array(8, 13)
    message = r"layers_0\.up has shape \(8, 13\), in torch's terms \(13, 8\); the adapter was made for \(12, 8\)\. Use"
    with pytest.raises(ValueError, match=message):
        function(params, adapter)


def test_an_adapter_of_unknown_shapes_is_checked_against_its_factors():
    params = model_params()
    known = trained(init(config("up"), params))
    adapter = dataclasses.replace(known, shapes=None)
    chex.assert_trees_all_equal(effective_params(params, adapter), effective_params(params, known))
    params["layers_0"]["up"]["kernel"] = array(7, 12)
    with pytest.raises(ValueError, match=r"layers_0\.up has shape \(7, 12\)"):
        effective_params(params, adapter)


def test_an_adapter_from_torch_needs_no_layouts_for_plain_kernels():
    params = model_params()
    here = trained(init(config("q_proj"), params))
    moved = RandLoraAdapter.from_interop(here.to_interop())
    assert moved.layouts == ()
    chex.assert_trees_all_equal(effective_params(params, moved), effective_params(params, here))


@pytest.mark.parametrize("r", [1, 3, 4, 20])
def test_the_trainable_count_is_the_closed_form(r):
    adapter = init(config("q_proj", "up", r=r), model_params())
    assert count_trainable(adapter) == 2 * count_layer((6, 8), r) + 2 * count_layer((12, 8), r)
    assert count_trainable(adapter) == adapter.to_interop().num_trainable


def test_the_printed_line_is_pefts_with_the_bytes_of_the_bases_below(capsys):
    params = {"up": {"kernel": array(40, 50)}, "down": {"kernel": array(50, 40)}}
    adapter = init(config("all-linear", r=4), params)
    print_trainable_parameters(adapter, params)
    # n = 10 bases: lambda 4 x 10 and gamma 10 x 40 in each of two layers, over 4000 weights.
    # PEFT's bases are for 50 x 50, n = 13. Here is what the layers use, in bfloat16: A 4 x 40, B 50 x 10 x 4.
    assert capsys.readouterr().out == (
        "trainable params: 880 || all params: 4,880 || trainable%: 18.0328\n"
        "frozen bases: 4,320 bytes, shared by 2 layers\n"
    )


def test_factors_in_half_precision_update_a_float32_kernel_in_float32():
    params = model_params()
    adapter = trained(init(config("up"), params))
    half = adapter.with_trainable(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), adapter.trainable))
    rounded = adapter.with_trainable(
        {name: Factors(*(part.astype(jnp.float32) for part in pair)) for name, pair in half.trainable.items()}
    )
    got, want = effective_params(params, half), effective_params(params, rounded)
    chex.assert_trees_all_equal_dtypes(got, params)
    chex.assert_trees_all_close(got, want, **TOLERANCE["float32"])


def test_all_linear_refuses_to_guess_among_leaves_named_weight():
    params = {"embed": {"weight": array(20, 8)}, "up": {"weight": array(12, 8)}}
    with pytest.raises(ValueError, match=r"'all-linear' cannot tell layers from embeddings .*'embed', 'up'"):
        init(RandLoraConfig(r=4, target_modules="all-linear"), params)
    assert init(RandLoraConfig(r=4, target_modules=["up"]), params).modules == ("up",)


def test_two_parameters_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"two parameters are called 'a', one of them by its leaf 'w': rename one\."):
        init(RandLoraConfig(r=4, target_modules=["a"]), {"a": {"kernel": array(8, 12), "w": array(8, 12)}})


def test_an_adapter_from_torch_finds_a_3d_kernel_once_it_knows_the_layout():
    wanted = RandLoraConfig(r=2, target_modules=["q"], init_weights=False)
    made = interop.init_adapter(wanted, {"q": (10, 8)}, rng=np.random.default_rng(0))
    adapter = interop.convert(made, to="jax")
    params = {"q": {"kernel": array(8, 2, 5)}}
    with pytest.raises(ValueError, match=r"- q: it has no known layout, see adapter\.with_layouts"):
        effective_params(params, adapter)
    with pytest.raises(ValueError, match=r"layouts are given for \['k'\], which are not adapted"):
        adapter.with_layouts({"k": IN_OUT})
    known = adapter.with_layouts({"q": Layout(in_axes=(0,), out_axes=(1, 2))})
    got = effective_params(params, known)["q"]["kernel"] - params["q"]["kernel"]
    np.testing.assert_allclose(got.reshape(8, 10).T, made.delta_weight("q"), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bias": "all"}, r"bias='all': this stack trains with bias='none' only\. Set that\."),
        (
            {"modules_to_save": ["head"]},
            r"modules_to_save=\('head',\): this stack trains with modules_to_save=None only",
        ),
        (
            {"randlora_dropout": 0.1},
            r"randlora_dropout=0\.1: W \+ dW has no place for dropout\. Build the model from",
        ),
    ],
)
def test_what_this_stack_cannot_train_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        init(RandLoraConfig(r=4, target_modules=["up"], **fields), {"up": {"kernel": array(8, 12)}})


def test_leaves_that_are_no_arrays_are_left_alone():
    params = {"up": {"kernel": array(8, 12)}, "act": jax.nn.relu, "step": 3}
    adapter = init(config("up"), params)
    assert adapter.modules == ("up",)
    assert effective_params(params, adapter)["act"] is jax.nn.relu


def test_an_nnx_state_is_a_pytree_like_any_other():
    from flax import nnx

    model = nnx.Sequential(nnx.Linear(8, 12, rngs=nnx.Rngs(0)))
    state = nnx.state(model, nnx.Param)
    adapter = trained(init(config("layers.0"), state))
    got = effective_params(state, adapter)["layers"][0]["kernel"][...]
    want = state["layers"][0]["kernel"][...] + adapter.delta_weight("layers.0").T
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-4)


def test_a_kernel_of_integers_is_refused():
    params = {"up": {"kernel": jnp.ones((8, 12), jnp.int8)}}
    with pytest.raises(ValueError, match=r"a kernel of dtype int8 cannot hold W \+ dW: dequantize it to float first"):
        effective_params(params, init(config("up"), params))


def test_trainables_of_other_layers_are_refused():
    adapter = init(config("up"), {"up": {"kernel": array(8, 12)}})
    with pytest.raises(ValueError, match=r"trainable must hold the 1 adapted layers; these differ: \['up'\]"):
        adapter.with_trainable({})
    lam, gamma = adapter.trainable["up"]
    with pytest.raises(ValueError, match=r"go with lambda \(\d+, \d+\) and gamma \(\d+, 8\), not \(\d+, 1\) and"):
        with without_type_checks():
            delta_weight(*layer_bases(adapter.bases, (12, 8)), lam[:, :1], gamma, scaling=1.0)


def test_a_key_must_be_concrete():
    params = {"up": {"kernel": array(8, 12)}}
    with pytest.raises(TypeError, match=r"pass a concrete jax\.random\.key\(0\), outside of jit"):
        jax.jit(lambda key: init(config("up", init_weights=False), params, key=key))(jax.random.key(0))


def test_the_line_counts_an_nnx_models_own_parameters_and_its_adapter_once(capsys):
    model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.Linear(16, 4, rngs=nnx.Rngs(0)))
    attach(model, RandLoraConfig(r=2, target_modules="all-linear"))
    print_trainable_parameters(extract(model), model)
    trainable, base = 4 * (2 + 8) + 2 * (2 + 4), 8 * 16 + 16 + 16 * 4 + 4
    want = f"trainable params: {trainable} || all params: {trainable + base} || "
    assert capsys.readouterr().out.startswith(want)
