"""A Llama computed as MaxText does: the layers are scanned on axis 1 of the parameters, rotary pairs lie next to each
other, and the query kernel holds the attention's 1/sqrt(head_dim). An adapter by PEFT gives PEFT's logits there.

MaxText itself needs a newer Python than ours; the model below is written from what its converter for llama3.1 does.
"""

import copy
import filecmp

import jax
import jax.numpy as jnp
import models
import numpy as np
import peft
import pytest
import torch
from flax import linen as nn
from flax import traverse_util

import interop
import randlora_jax
from randlora_jax import RandLoraConfig
from randlora_jax.linen import lazy_params

HEADS, KEYS, HEAD, LAYERS, EPS, THETA = 4, 2, 16, 2, 1e-6, 10_000
LAYOUTS = "maxtext-llama3.1"
LOGITS = {"rtol": 0, "atol": 2e-6}  # of logits below 1: the rounding of float32, in both libraries


def turned(x):
    """Positions (B, T, N, H) turned, channel 2i together with 2i + 1."""
    angles = np.outer(np.arange(x.shape[1]), THETA ** -(np.arange(0, HEAD, 2) / HEAD))[:, None]  # (T, 1, H/2)
    pairs = x.reshape(*x.shape[:-1], HEAD // 2, 2)
    a, b = pairs[..., 0], pairs[..., 1]
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    return jnp.stack([a * cos - b * sin, b * cos + a * sin], axis=-1).reshape(x.shape)


class Attention(nn.Module):
    @nn.compact
    def __call__(self, x):
        heads = lambda name, count: nn.DenseGeneral((count, HEAD), use_bias=False, name=name)(x)  # noqa: E731
        q, k, v = turned(heads("query", HEADS)), turned(heads("key", KEYS)), heads("value", KEYS)
        k, v = (jnp.repeat(part, HEADS // KEYS, axis=2) for part in (k, v))
        scores = jnp.einsum("btnh,bsnh->bnts", q, k)  # no scale: the query kernel has it
        seen = jnp.tril(jnp.ones((x.shape[1], x.shape[1]), bool))
        y = jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(jnp.where(seen, scores, -1e30)), v)
        return nn.DenseGeneral(x.shape[-1], axis=(-2, -1), use_bias=False, name="out")(y)


class MLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        gate, up = (nn.Dense(96, use_bias=False, name=name)(x) for name in ("wi_0", "wi_1"))
        return nn.Dense(x.shape[-1], use_bias=False, name="wo")(jax.nn.silu(gate) * up)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        norm = lambda name: nn.RMSNorm(epsilon=EPS, name=name)  # noqa: E731
        x = x + Attention(name="self_attention")(norm("pre_self_attention_layer_norm")(x))
        return x + MLP(name="mlp")(norm("post_self_attention_layer_norm")(x)), None


class Decoder(nn.Module):
    @nn.compact
    def __call__(self, x):
        scan = nn.scan(nn.remat(Layer), variable_axes={"params": 1}, split_rngs={"params": True}, length=LAYERS)
        x = nn.RMSNorm(epsilon=EPS, name="decoder_norm")(scan(name="layers")(x, None)[0])
        return nn.Dense(models.VOCABULARY, use_bias=False, name="logits_dense")(x)


class MaxTextLlama(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        return Decoder(name="decoder")(nn.Embed(models.VOCABULARY, 64, name="token_embedder")(tokens))


def neighbors(weight):
    """A weight (heads * H, in) with the output channels of each head in the order 0, H/2, 1, H/2 + 1, ..."""
    order = [i // 2 + (i % 2) * (HEAD // 2) for i in range(HEAD)]
    return weight.reshape(-1, HEAD, weight.shape[-1])[:, order].reshape(weight.shape)


# MaxText name -> transformers name, and how the former is made of the latter; pre-scaled by 1/sqrt(16)
CONVERSIONS = {
    "self_attention/query/kernel": ("self_attn.q_proj", lambda w: (neighbors(w).T / 4).reshape(64, HEADS, HEAD)),
    "self_attention/key/kernel": ("self_attn.k_proj", lambda w: neighbors(w).T.reshape(64, KEYS, HEAD)),
    "self_attention/value/kernel": ("self_attn.v_proj", lambda w: w.T.reshape(64, KEYS, HEAD)),
    "self_attention/out/kernel": ("self_attn.o_proj", lambda w: w.T.reshape(HEADS, HEAD, 64)),
    "mlp/wi_0/kernel": ("mlp.gate_proj", np.transpose),
    "mlp/wi_1/kernel": ("mlp.up_proj", np.transpose),
    "mlp/wo/kernel": ("mlp.down_proj", np.transpose),
    "pre_self_attention_layer_norm/scale": ("input_layernorm", np.asarray),
    "post_self_attention_layer_norm/scale": ("post_attention_layernorm", np.asarray),
}


@pytest.fixture(scope="module")
def llama():
    model = models.llama()
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # norms start at one, where mistakes would not show
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def variables(llama):
    """The parameters of the model above, from those of transformers."""
    tensors = {name: tensor.numpy() for name, tensor in llama.state_dict().items()}
    flat = {
        "params/token_embedder/embedding": tensors["model.embed_tokens.weight"],
        "params/decoder/decoder_norm/scale": tensors["model.norm.weight"],
        "params/decoder/logits_dense/kernel": tensors["lm_head.weight"].T,
    }
    for path, (name, convert) in CONVERSIONS.items():
        layers = [convert(tensors[f"model.layers.{i}.{name}.weight"]) for i in range(LAYERS)]
        flat[f"params/decoder/layers/{path}"] = np.stack(layers, axis=1)
    made = traverse_util.unflatten_dict({tuple(path.split("/")): jnp.asarray(a) for path, a in flat.items()})
    expected = jax.eval_shape(MaxTextLlama().init, jax.random.key(0), tokens())
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, expected)
    return made


def tokens():
    return np.random.default_rng(1).integers(0, models.VOCABULARY, (2, 12), dtype=np.int32)


@torch.no_grad()
def torch_logits(model):
    return model(input_ids=torch.from_numpy(tokens()).long()).logits.numpy()


@pytest.fixture(scope="module")
def by_peft(llama, tmp_path_factory):
    """PEFT's model with an adapter as after training, dW about as large as W; and the folder that PEFT wrote."""
    targets = [*models.LLAMA_TARGETS, "lm_head"]
    config = peft.RandLoraConfig(r=6, randlora_alpha=12, target_modules=targets, projection_prng_key=3)
    model = peft.get_peft_model(copy.deepcopy(llama), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name:
                parameter.normal_(0, 0.05, generator=generator)
            elif "randlora_gamma" in name:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    folder = tmp_path_factory.mktemp("peft")
    model.save_pretrained(folder, save_embedding_layers=False)  # not the frozen lm_head as well
    return model, folder


def merged_logits(variables, adapter):
    return MaxTextLlama().apply(randlora_jax.effective_params(variables, adapter), tokens())


def lazy_logits(variables, adapter):
    return MaxTextLlama().apply(lazy_params(variables, adapter), tokens())


def test_the_model_of_this_file_gives_the_logits_of_transformers(llama, variables):
    np.testing.assert_allclose(MaxTextLlama().apply(variables, tokens()), torch_logits(llama), **LOGITS)


@pytest.mark.parametrize("compute", [merged_logits, lazy_logits])
def test_an_adapter_by_peft_gives_the_same_logits_in_maxtext(compute, llama, variables, by_peft):
    model, folder = by_peft
    adapter = randlora_jax.load_adapter(folder, variables, layouts=LAYOUTS)
    expected = torch_logits(model)
    assert np.abs(expected - torch_logits(llama)).max() > 0.3
    np.testing.assert_allclose(jax.jit(compute)(variables, adapter), expected, **LOGITS)


def test_an_adapter_comes_out_of_maxtext_with_the_bytes_that_went_in(llama, variables, by_peft, tmp_path):
    _, folder = by_peft
    adapter = interop.load(folder)
    shapes = {name: tuple(llama.get_submodule(name).weight.shape) for name in adapter.modules}
    interop.save(adapter.bind(shapes), tmp_path / "in")
    randlora_jax.load_adapter(folder, variables, layouts=LAYOUTS).save_pretrained(tmp_path / "out")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert filecmp.cmp(tmp_path / "in" / name, tmp_path / "out" / name, shallow=False), name


def test_an_adapter_made_for_maxtext_gives_the_same_logits_in_peft(llama, variables, tmp_path):
    config = RandLoraConfig(r=6, randlora_alpha=12, target_modules="all-linear", init_weights=False)
    adapter = randlora_jax.init(config, variables, layouts=LAYOUTS, key=jax.random.key(0))
    trained = {name: factors._replace(gamma=factors.gamma / 4) for name, factors in adapter.trainable.items()}
    adapter = adapter.with_trainable(trained)
    adapter.save_pretrained(tmp_path)
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(llama), tmp_path).eval()
    expected = torch_logits(in_peft)
    assert np.abs(expected - torch_logits(llama)).max() > 0.3
    np.testing.assert_allclose(jax.jit(merged_logits)(variables, adapter), expected, **LOGITS)
