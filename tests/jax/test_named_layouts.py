"""The built-in tables: how each library keeps transformers' weights, written out in numpy a second time, is where dW
of an adapter goes; every weight of the adapter is used and comes back as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx, traverse_util
from strategies import draw_adalora, draw_adapter
from tolerances import TOLERANCE

import randlora_jax
from randlora_jax import AdaLoraConfig, Layout, RandLoraConfig, adalora

MODEL, HEADS, KEYS, HEAD, MLP, LAYERS, VOCABULARY = 8, 4, 2, 6, 12, 2, 10
SIZES = {
    "self_attn.q_proj": (HEADS * HEAD, MODEL),
    "self_attn.k_proj": (KEYS * HEAD, MODEL),
    "self_attn.v_proj": (KEYS * HEAD, MODEL),
    "self_attn.o_proj": (MODEL, HEADS * HEAD),
    "mlp.gate_proj": (MLP, MODEL),
    "mlp.up_proj": (MLP, MODEL),
    "mlp.down_proj": (MODEL, MLP),
}
SHAPES = {f"model.layers.{i}.{name}": shape for i in range(LAYERS) for name, shape in SIZES.items()}
HEAD_SHAPE = {"lm_head": (VOCABULARY, MODEL)}


def dnh(weight):
    """(model, heads, head_dim) of a projection to heads."""
    return weight.reshape(-1, HEAD, MODEL).transpose(2, 0, 1)


def ndh(weight):
    return weight.reshape(-1, HEAD, MODEL).transpose(0, 2, 1)


def nhd(weight):
    """(heads, head_dim, model) of a projection from heads."""
    return weight.reshape(MODEL, HEADS, HEAD).transpose(1, 2, 0)


def interleaved(kernel):
    """The two halves of the last axis, taken in turns."""
    return np.stack([kernel[..., : HEAD // 2], kernel[..., HEAD // 2 :]], axis=-1).reshape(kernel.shape)


def by_layer(place):
    """What `place` makes of the weights of each layer, by its short names; and lm_head."""

    def all_layers(weights):
        params = {}
        for i in range(LAYERS):
            layer = {name.split(".")[1]: weights[f"model.layers.{i}.{name}"] for name in SIZES}
            params |= place(i, layer)
        return params

    return all_layers


@by_layer
def tunix(i, w):
    at = f"layers/{i}"
    heads = {f"{at}/attn/{name}/w": dnh(w[name]) for name in ("q_proj", "k_proj", "v_proj")}
    mlp = {f"{at}/mlp/{name}/kernel": w[name].T for name in ("gate_proj", "up_proj", "down_proj")}
    return heads | mlp | {f"{at}/attn/o_proj/w": nhd(w["o_proj"])}


@by_layer
def tunix_gemma3(i, w):
    at = f"layers/{i}"
    mlp = {f"{at}/mlp/{name}/kernel": w[name].T for name in ("gate_proj", "up_proj", "down_proj")}
    return mlp | {
        f"{at}/attn/q_einsum/w": ndh(w["q_proj"]),
        f"{at}/attn/kv_einsum/w": np.stack([ndh(w["k_proj"]), ndh(w["v_proj"])]),
        f"{at}/attn/attn_vec_einsum/w": nhd(w["o_proj"]),
    }


@by_layer
def keras_hub_llama(i, w):
    at = f"transformer_layer_{i}"
    return {
        f"{at}/self_attention/query/kernel": dnh(w["q_proj"]),
        f"{at}/self_attention/key/kernel": dnh(w["k_proj"]),
        f"{at}/self_attention/value/kernel": dnh(w["v_proj"]),
        f"{at}/self_attention/attention_output/kernel": nhd(w["o_proj"]),
        f"{at}/feedforward_gate_dense/kernel": w["gate_proj"].T,
        f"{at}/feedforward_intermediate_dense/kernel": w["up_proj"].T,
        f"{at}/feedforward_output_dense/kernel": w["down_proj"].T,
    }


@by_layer
def keras_hub_gemma3(i, w):
    at = f"gemma3_backbone/decoder_block_{i}"
    return {
        f"{at}/attention/query/kernel": ndh(w["q_proj"]),
        f"{at}/attention/key/kernel": ndh(w["k_proj"]),
        f"{at}/attention/value/kernel": ndh(w["v_proj"]),
        f"{at}/attention/attention_output/kernel": nhd(w["o_proj"]),
        f"{at}/ffw_gating/kernel": w["gate_proj"].T,
        f"{at}/ffw_gating_2/kernel": w["up_proj"].T,
        f"{at}/ffw_linear/kernel": w["down_proj"].T,
    }


def maxtext_layer(w, *, rotary):
    """One layer of MaxText; `rotary` as for llama3.1."""
    q, k = dnh(w["q_proj"]), dnh(w["k_proj"])
    if rotary:
        q, k = interleaved(q) / np.sqrt(HEAD), interleaved(k)
    return {
        "self_attention/query/kernel": q,
        "self_attention/key/kernel": k,
        "self_attention/value/kernel": dnh(w["v_proj"]),
        "self_attention/out/kernel": nhd(w["o_proj"]),
        "mlp/wi_0/kernel": w["gate_proj"].T,
        "mlp/wi_1/kernel": w["up_proj"].T,
        "mlp/wo/kernel": w["down_proj"].T,
    }


def maxtext(*, rotary, scanned):
    @by_layer
    def unscanned(i, w):
        return {f"params/decoder/layers_{i}/{name}": array for name, array in maxtext_layer(w, rotary=rotary).items()}

    def stacked(weights):
        layers, params = unscanned(weights), {}
        for name in maxtext_names(layers):
            both = [layers[f"params/decoder/layers_{i}/{name}"] for i in range(LAYERS)]
            params[f"params/decoder/layers/{name}"] = np.stack(both, axis=1)
        return params

    return stacked if scanned else unscanned


def maxtext_names(layers):
    return [path.removeprefix("params/decoder/layers_0/") for path in layers if "layers_0" in path]


@by_layer
def linen_names(i, w):
    groups = {name.split(".")[1]: name.split(".")[0] for name in SIZES}
    return {f"params/model/layers_{i}/{groups[name]}/{name}/kernel": weight.T for name, weight in w.items()}


@by_layer
def nnx_names(i, w):
    groups = {name.split(".")[1]: name.split(".")[0] for name in SIZES}
    return {f"model/layers/{i}/{groups[name]}/{name}/kernel": weight.T for name, weight in w.items()}


def scanned_names(weights):
    return {
        f"params/model/layers/{name.replace('.', '/')}/kernel": np.stack(
            [weights[f"model.layers.{i}.{name}"].T for i in range(LAYERS)]
        )
        for name in SIZES
    }


# table -> how the library keeps the weights of the layers, and where its lm_head is, (model, vocabulary)
MODELS = {
    "tunix-llama3": ("tunix-llama3", tunix, "lm_head/w"),
    "tunix-qwen2": ("tunix-qwen2", tunix, "lm_head/w"),
    "tunix-qwen3": ("tunix-qwen3", tunix, None),
    "tunix-gemma3": ("tunix-gemma3", tunix_gemma3, None),
    "keras-hub-llama": ("keras-hub-llama", keras_hub_llama, "token_embedding/reverse_embeddings"),
    "keras-hub-gemma3": ("keras-hub-gemma3", keras_hub_gemma3, None),
    "maxtext-llama3.1": ("maxtext-llama3.1", maxtext(rotary=True, scanned=True), "params/decoder/logits_dense/kernel"),
    "maxtext-llama3.1, no scan": ("maxtext-llama3.1", maxtext(rotary=True, scanned=False), None),
    "maxtext-qwen": ("maxtext-qwen", maxtext(rotary=False, scanned=True), None),
    "maxtext-qwen, no scan": ("maxtext-qwen", maxtext(rotary=False, scanned=False), None),
    "huggingface, linen": ("huggingface", linen_names, "params/lm_head/kernel"),
    "huggingface, nnx": ("huggingface", nnx_names, "lm_head/kernel"),
    "huggingface, scan": ("huggingface", scanned_names, None),
}
LIKE_ANOTHER = ("tunix-qwen2", "tunix-qwen3", "maxtext-qwen, no scan")
every_model = pytest.mark.parametrize(
    "model", [pytest.param(model, marks=[pytest.mark.slow] * (model in LIKE_ANOTHER)) for model in MODELS]
)


def weights_like(shapes, seed=0):
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


def shapes_of(model):
    return SHAPES | (HEAD_SHAPE if MODELS[model][2] else {})


def params_of(model, weights):
    """The library's parameters, with others around its kernels, from torch's weights."""
    _, place, head = MODELS[model]
    params = place(weights) | ({head: weights["lm_head"].T} if head else {})
    within = "params/" if any(path.startswith("params/") for path in params) else ""
    params |= {
        f"{within}token_embedder/embedding": np.zeros((VOCABULARY, MODEL)),
        f"{within}norm/scale": np.ones(MODEL),
    }
    arrays = {tuple(path.split("/")): jnp.asarray(array, jnp.float32) for path, array in params.items()}
    return traverse_util.unflatten_dict(arrays)


def assert_trees_close(got, want):
    got, want = traverse_util.flatten_dict(got), traverse_util.flatten_dict(want)
    assert got.keys() == want.keys()
    for path, array in want.items():
        np.testing.assert_allclose(got[path], array, **TOLERANCE["float32", "forward"], err_msg=str(path))


def oracle_delta(adapter, name):
    return oracle.delta_weight(
        *adapter.bases, *adapter.factors[name], scaling=adapter.config.scaling, shape=adapter.shapes[name]
    )


def test_there_is_a_model_for_every_table():
    assert {table for table, _, _ in MODELS.values()} == set(randlora_jax.LAYOUTS)


@every_model
def test_an_adapter_changes_the_librarys_kernels_as_it_changes_torchs_weights(model):
    shapes = shapes_of(model)
    base, adapter = weights_like(shapes), draw_adapter(shapes=shapes, r=3, randlora_alpha=2)
    changed = {name: weight + oracle_delta(adapter, name) for name, weight in base.items()}

    params = params_of(model, base)
    loaded = randlora_jax.load_adapter(adapter, params, layouts=MODELS[model][0])
    assert_trees_close(jax.jit(randlora_jax.merge)(params, loaded), params_of(model, changed))

    again = loaded.to_interop()
    assert again.shapes == adapter.shapes
    for name, factors in adapter.factors.items():
        for got, want in zip(again.factors[name], factors, strict=True):
            np.testing.assert_array_equal(got, want)


@every_model
def test_a_new_adapter_is_for_all_linear_layers_under_the_names_of_files(model):
    config = RandLoraConfig(r=3, target_modules="all-linear")
    params = jax.eval_shape(lambda: params_of(model, weights_like(shapes_of(model))))
    assert randlora_jax.find_targets(config, params, layouts=MODELS[model][0]) == SHAPES


def test_the_fused_projections_of_gemma3_with_as_many_keys_as_queries_have_names_of_their_own():
    w = {name: np.random.default_rng(i).standard_normal((HEADS * HEAD, MODEL)) for i, name in enumerate("qkv")}
    params = {"layers": {0: {"attn": {"qkv_einsum": {"w": jnp.stack([ndh(w[name]) for name in "qkv"])}}}}}
    layouts = randlora_jax.name_layouts(params, "tunix-gemma3")
    names = tuple(f"model.layers.0.self_attn.{name}_proj" for name in "qkv")
    assert layouts == {"layers.0.attn.qkv_einsum": Layout((2,), (1, 3), (0,), names)}
    torchs = layouts["layers.0.attn.qkv_einsum"].to_torch(params["layers"][0]["attn"]["qkv_einsum"]["w"])
    np.testing.assert_allclose(torchs, np.stack(list(w.values())), rtol=1e-6)


def test_an_adapter_of_adalora_goes_where_it_does_in_torch():
    shapes = shapes_of("tunix-gemma3")
    base, adapter = weights_like(shapes), draw_adalora(shapes=shapes)
    scaling = adapter.config.scaling
    deltas = {name: oracle.svd_delta_weight(*parts, scaling=scaling) for name, parts in adapter.factors.items()}
    changed = {name: weight + deltas[name] for name, weight in base.items()}

    params = params_of("tunix-gemma3", base)
    loaded = randlora_jax.load_adapter(adapter, params, layouts="tunix-gemma3")
    assert_trees_close(jax.jit(randlora_jax.merge)(params, loaded), params_of("tunix-gemma3", changed))

    config = AdaLoraConfig(init_r=3, target_r=2, tinit=1, tfinal=1, total_step=9, target_modules=["v_proj"])
    fresh = adalora.init(config, params, layouts="tunix-gemma3", key=jax.random.key(0))
    assert sorted(fresh.to_interop().factors) == [f"model.layers.{i}.self_attn.v_proj" for i in range(LAYERS)]


class Block(nnx.Module):
    def __init__(self, rngs):
        self.q_proj = nnx.Linear(4, 6, rngs=rngs)
        self.kv = nnx.Param(jax.random.normal(rngs.params(), (2, 6, 4)))

    def __call__(self, x):
        k, v = jnp.einsum("bi,kio->kbo", self.q_proj(x), self.kv[...])
        return k + v


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([Block(rngs), Block(rngs)])

    def __call__(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


RULES = [
    {"kernel": r"(layers\.\d+)\.q_proj", "modules": r"\1.attn.q"},
    {"kernel": r"(layers\.\d+)\.kv", "modules": [r"\1.attn.k", r"\1.attn.v"], "fused_axis": 0},
]


def test_rules_name_the_kernels_of_an_nnx_model_whose_axes_are_traced():
    model = Net(nnx.Rngs(0))
    layouts = randlora_jax.model_layouts(model, jnp.ones((3, 4))).named(RULES)
    assert dict(layouts) == {
        name: layout
        for i in range(2)
        for name, layout in {
            f"layers.{i}.q_proj": Layout((0,), (1,), modules=(f"layers.{i}.attn.q",)),
            f"layers.{i}.kv": Layout((1,), (2,), (0,), modules=(f"layers.{i}.attn.k", f"layers.{i}.attn.v")),
        }.items()
    }
    assert "in (1,), out (2,), stack (0,): layers.0.attn.k, layers.0.attn.v" in str(layouts)

    adapter = draw_adapter(shapes={"layers.0.attn.q": (6, 4), "layers.1.attn.v": (4, 6)})
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 4)), jnp.float32)
    W = [np.asarray(layer.q_proj.kernel[...], np.float64) for layer in model.layers]
    kv = [np.asarray(layer.kv[...], np.float64) for layer in model.layers]
    W[0] += oracle_delta(adapter, "layers.0.attn.q").T
    kv[1][1] += oracle_delta(adapter, "layers.1.attn.v").T
    want = np.asarray(x, np.float64)
    for q, (k, v) in zip(W, kv, strict=True):
        want = want @ q @ (k + v)
    randlora_jax.attach(model, adapter, layouts=layouts)
    np.testing.assert_allclose(model(x), want, rtol=1e-4, atol=1e-3)
    assert sorted(randlora_jax.extract(model).to_interop().factors) == ["layers.0.attn.q", "layers.1.attn.v"]


def test_attaching_by_the_name_of_a_table_needs_no_trace():
    class Model(nnx.Module):
        def __init__(self, rngs):
            self.model = nnx.Dict(layers=nnx.List([Block(rngs)]))

    model = Model(nnx.Rngs(0))
    randlora_jax.attach(model, RandLoraConfig(r=2, target_modules=["q_proj"]), layouts="huggingface")
    assert list(randlora_jax.extract(model).to_interop().factors) == ["model.layers.0.q_proj"]
