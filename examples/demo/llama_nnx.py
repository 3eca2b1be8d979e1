"""A Llama in Flax NNX that reads a transformers folder and gives transformers' logits.

Modules carry transformers' names: "model.layers.0.self_attn.q_proj" is the same layer in both, its `kernel` (in, out)
the transpose of torch's `weight` (out, in). Shapes: B sequences, T positions, D hidden size, N query heads, K key/value
heads, H head size, V vocabulary.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int
from safetensors import safe_open


@dataclass(frozen=True)
class Rope:
    """Rotary position embedding: `kind` "default", or "llama3" with slowed-down low frequencies for long texts."""

    theta: float
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True)
class LlamaConfig:
    """The fields of config.json that decide what the model computes."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rope: Rope
    rms_norm_eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False

    @classmethod
    def from_json(cls, path: Path, *, quantized: bool = False) -> "LlamaConfig":
        """Read transformers' config.json, of version 4 or 5; of a quantized model only if told so.

        Raises:
            ValueError: the model is no Llama, or one with a part that this file does not compute.
        """
        given = {name: value for name, value in json.loads(path.read_text()).items() if value is not None}
        if quantized:
            given.pop("quantization_config", None)
        for name, only in (("model_type", "llama"), ("hidden_act", "silu"), ("quantization_config", None)):
            if given.get(name, only) != only:
                raise ValueError(f"{path}: {name}={given[name]!r}, but this example supports only {only!r}.")
        heads = given["num_attention_heads"]
        given = {"num_key_value_heads": heads, "head_dim": given["hidden_size"] // heads} | given
        given["rope"] = _read_rope(given, path)
        return cls(**{field.name: given[field.name] for field in fields(cls) if field.name in given})


def _read_rope(given: Mapping[str, Any], path: Path) -> Rope:
    """Version 5 of transformers writes `rope_parameters`; version 4 wrote `rope_theta` and perhaps `rope_scaling`."""
    scaling = given.get("rope_parameters", given.get("rope_scaling", {}))
    rope = {"rope_theta": given.get("rope_theta", 10000.0)} | scaling
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return Rope(rope["rope_theta"])
    if kind != "llama3":
        raise ValueError(f"{path}: rope_type={kind!r}, but this example supports only 'default' and 'llama3'.")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    return Rope(rope["rope_theta"], kind, *(rope[name] for name in names))


def rotation(config: LlamaConfig, length: int) -> tuple[Float[Array, "T 1 H"], Float[Array, "T 1 H"]]:
    """`(cos, sin)` of the angle by which each position turns each pair of channels, in float32."""
    rope = config.rope
    turns = 1.0 / rope.theta ** (np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim)  # (H/2,)
    if rope.kind == "llama3":
        periods = rope.original_max_position_embeddings * turns / (2 * np.pi)  # how often the old context turned
        smooth = (periods - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        smooth = np.clip(smooth, 0, 1)  # 0: a slow channel, all of the factor; 1: a fast one, none of it
        turns = (1 - smooth) * turns / rope.factor + smooth * turns
    angles = jnp.outer(jnp.arange(length, dtype=jnp.float32), jnp.asarray(np.tile(turns, 2), jnp.float32))  # (T, H)
    return jnp.cos(angles)[:, None], jnp.sin(angles)[:, None]


def rotate(x: Float[Array, "B T N H"], cos: Array, sin: Array) -> Float[Array, "B T N H"]:
    """Turn channel i together with channel i + H/2: transformers' pairing, not the original Llama's (2i, 2i + 1)."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate((-second, first), axis=-1)
    return x * cos[None].astype(x.dtype) + turned * sin[None].astype(x.dtype)


class RMSNorm(nnx.Module):
    """Divide by the root mean square, computed in float32, then scale."""

    def __init__(self, size: int, eps: float, dtype: Any):
        self.eps = eps
        self.weight = nnx.Param(jnp.ones(size, dtype))

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Normalize every position by itself."""
        wide = x.astype(jnp.float32)
        normed = wide * jax.lax.rsqrt(jnp.mean(wide**2, axis=-1, keepdims=True) + self.eps)
        return self.weight[...][None, None] * normed.astype(x.dtype)


class Attention(nnx.Module):
    """Causal self-attention; several query heads share one key/value head."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=config.attention_bias, param_dtype=dtype, rngs=rngs)
        self.head_dim = config.head_dim
        queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = linear(config.hidden_size, queries)
        self.k_proj = linear(config.hidden_size, keys)
        self.v_proj = linear(config.hidden_size, keys)
        self.o_proj = linear(queries, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"], cos: Array, sin: Array) -> Float[Array, "B T D"]:
        """Mix each position with those before it."""
        batch, length, _ = x.shape
        heads = (batch, length, -1, self.head_dim)
        q = rotate(self.q_proj(x).reshape(heads), cos, sin)  # (B, T, N*H) -> (B, T, N, H)
        k = rotate(self.k_proj(x).reshape(heads), cos, sin)  # (B, T, K*H) -> (B, T, K, H)
        v = self.v_proj(x).reshape(heads)  # (B, T, K*H) -> (B, T, K, H)
        y = jax.nn.dot_product_attention(q, k, v, is_causal=True)  # (B, T, N, H); masks and normalizes in float32
        return self.o_proj(y.reshape(batch, length, -1))  # (B, T, N, H) -> (B, T, N*H)


class MLP(nnx.Module):
    """The gated feed-forward layer."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        linear = partial(nnx.Linear, use_bias=config.mlp_bias, param_dtype=dtype, rngs=rngs)
        self.gate_proj = linear(config.hidden_size, config.intermediate_size)
        self.up_proj = linear(config.hidden_size, config.intermediate_size)
        self.down_proj = linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """`down(silu(gate(x)) * up(x))`."""
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderLayer(nnx.Module):
    """Attention, then feed-forward, each on a normalized copy and added to the stream."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        self.self_attn = Attention(config, dtype, rngs)
        self.mlp = MLP(config, dtype, rngs)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)

    def __call__(self, x: Float[Array, "B T D"], cos: Array, sin: Array) -> Float[Array, "B T D"]:
        """One layer of the stream."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nnx.Module):
    """Embedding, layers and last norm: what transformers calls `model`."""

    def __init__(self, config: LlamaConfig, dtype: Any, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = nnx.Embed(config.vocab_size, config.hidden_size, param_dtype=dtype, rngs=rngs)
        self.layers = nnx.List([DecoderLayer(config, dtype, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype)
        self.remat = False  # True: the backward pass computes each layer anew, and so keeps little of the forward pass

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """The last hidden states."""
        cos, sin = rotation(self.config, tokens.shape[1])
        x = self.embed_tokens(tokens)
        call = nnx.remat(DecoderLayer.__call__) if self.remat else DecoderLayer.__call__
        for layer in self.layers:
            x = call(layer, x, cos, sin)
        return self.norm(x)


class Llama(nnx.Module):
    """The language model; `lm_head` is absent where the word embeddings are tied."""

    def __init__(self, config: LlamaConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs):
        self.config = config
        self.model = Decoder(config, dtype, rngs)
        if not config.tie_word_embeddings:
            linear = partial(nnx.Linear, use_bias=False, param_dtype=dtype, rngs=rngs)
            self.lm_head = linear(config.hidden_size, config.vocab_size)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T V"]:
        """The logits of the token that follows each position."""
        hidden = self.model(tokens)
        return self.model.embed_tokens.attend(hidden) if self.config.tie_word_embeddings else self.lm_head(hidden)


def next_token_loss(model: Llama, tokens: Int[Array, "B T+1"]) -> Float[Array, ""]:
    """Mean cross entropy, in nats, of every token given those before it."""
    logits = model(tokens[:, :-1]).astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]).mean()


def load_llama(
    folder: str | os.PathLike, dtype: Any = jnp.float32, *, weights: Mapping[str, Any] | None = None
) -> Llama:
    """The Llama that transformers' `save_pretrained` wrote to `folder`, stored and computed in `dtype`.

    Args:
        folder: Holds config.json and, without `weights`, the tensors.
        dtype: Of all parameters that are not quantized.
        weights: The tensors by their names in torch, as `randlora_jax.quantized.load_quantized(folder)` reads them.
            Quantized kernels among them stay so; `attach` lets the layers read them.

    Raises:
        ValueError: the model is not supported, or its tensors are not exactly those of its config.json.
    """
    folder = Path(folder)
    config = LlamaConfig.from_json(folder / "config.json", quantized=weights is not None)
    model = nnx.eval_shape(lambda: Llama(config, dtype=dtype, rngs=nnx.Rngs(0)))  # shapes only, no memory
    tensors = _read_tensors(folder, config) if weights is None else dict(weights)
    params = {_torch_name(path): param for path, param in nnx.to_flat_state(nnx.state(model, nnx.Param))}
    missing, left_over = sorted(params.keys() - tensors.keys()), sorted(tensors.keys() - params.keys())
    if missing or left_over:
        raise ValueError(
            f"{folder}: the tensors do not fit config.json. Missing: {missing}. Left over: {left_over}."
            " The folder is incomplete, or its config.json belongs to another model."
        )
    for name, param in params.items():
        tensor = tensors.pop(name)
        quantized = hasattr(tensor, "dequantize")  # such a tensor is a kernel (in, out) already
        if tensor.ndim == 2 and not quantized and "embed_tokens" not in name:
            tensor = tensor.T  # torch's (out, in) -> kernel (in, out)
        if tensor.shape != param.shape:
            raise ValueError(
                f"{folder}: {name} has shape {tensor.shape}, config.json wants {param.shape} (as kernels)."
            )
        param.set_value(tensor if quantized else jnp.asarray(tensor, dtype))
    return model


def _torch_name(path: tuple[str | int, ...]) -> str:
    """("model", "layers", 0, ..., "kernel") -> "model.layers.0. ... .weight"; norms and biases have torch's names."""
    *module, leaf = path
    return ".".join(map(str, (*module, {"kernel": "weight", "embedding": "weight"}.get(leaf, leaf))))


def _read_tensors(folder: Path, config: LlamaConfig) -> dict[str, np.ndarray]:
    """Every tensor of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    files, index = [folder / "model.safetensors"], folder / "model.safetensors.index.json"
    if not files[0].exists():
        if not index.exists():
            raise FileNotFoundError(f"{folder}: neither {files[0].name} nor {index.name}. Save with save_pretrained.")
        files = [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    tensors: dict[str, np.ndarray] = {}
    for file in files:
        with safe_open(file, framework="np") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    # Some folders also store what follows from the rest: the rotary frequencies, and a tied head once more.
    head, embedding = tensors.get("lm_head.weight"), tensors.get("model.embed_tokens.weight")
    if config.tie_word_embeddings and np.array_equal(head, embedding):
        tensors.pop("lm_head.weight", None)
    return {name: tensor for name, tensor in tensors.items() if not name.endswith("rotary_emb.inv_freq")}
