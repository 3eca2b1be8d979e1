"""Layouts by name: the kernels of models of known libraries, and what transformers calls their weights.

Each table is data: `LayoutRule`s with the library's names on the left, those of adapter files on the right.
"""

from typing import Any

from randlora_jax.layout_rules import HEAD_SCALE, LayoutRule

# q, k and v from (model) to (heads, head_dim); o from (heads, head_dim) to (model); all others are matrices.
_SPLIT, _JOINED, _MATRIX = (((0,), (1, 2)), ((0, 1), (2,)), ((0,), (1,)))

# google-tunix 0.1.7, tunix/models/{llama3,qwen2,qwen3}/model.py; lm_head is absent where it is tied.
_TUNIX_MLP = LayoutRule(r"layers/(\d+)/mlp/(gate|up|down)_proj", r"model.layers.\1.mlp.\2_proj", *_MATRIX)
_TUNIX = (
    LayoutRule(r"layers/(\d+)/attn/([qkv]_proj)", r"model.layers.\1.self_attn.\2", *_SPLIT),
    LayoutRule(r"layers/(\d+)/attn/o_proj", r"model.layers.\1.self_attn.o_proj", *_JOINED),
    _TUNIX_MLP,
    LayoutRule(r"lm_head", "lm_head", *_MATRIX),
)

# google-tunix 0.1.7, tunix/models/gemma3/model.py: (heads, model, head_dim) einsums, k and v in one array, or q, k and
# v where there are as many of each. The names are those of Gemma3ForCausalLM; lm_head is tied.
_TUNIX_GEMMA3 = (
    LayoutRule(r"layers/(\d+)/attn/q_einsum", r"model.layers.\1.self_attn.q_proj", (1,), (0, 2)),
    *(
        LayoutRule(
            rf"layers/(\d+)/attn/{fused}_einsum",
            [rf"model.layers.\1.self_attn.{name}_proj" for name in fused],
            *((2,), (1, 3)),
            fused_axis=0,
        )
        for fused in ("kv", "qkv")
    ),
    LayoutRule(r"layers/(\d+)/attn/attn_vec_einsum", r"model.layers.\1.self_attn.o_proj", *_JOINED),
    _TUNIX_MLP,
)

# keras-hub 0.32, models/llama/llama_decoder.py: paths of variables below a model or backbone.
_KERAS_LLAMA = r"(?:.*/)?transformer_layer_(\d+)/"
_KERAS_HUB_LLAMA = (
    LayoutRule(_KERAS_LLAMA + "self_attention/([qkv])(?:uery|ey|alue)", r"model.layers.\1.self_attn.\2_proj", *_SPLIT),
    LayoutRule(_KERAS_LLAMA + "self_attention/attention_output", r"model.layers.\1.self_attn.o_proj", *_JOINED),
    *(
        LayoutRule(f"{_KERAS_LLAMA}feedforward_{theirs}_dense", rf"model.layers.\1.mlp.{name}_proj", *_MATRIX)
        for theirs, name in (("gate", "gate"), ("intermediate", "up"), ("output", "down"))
    ),
    LayoutRule("(?:.*/)?token_embedding/reverse_embeddings", "lm_head", *_MATRIX),
)

# keras-hub 0.32, models/gemma3/gemma3_attention.py and gemma3_decoder_block.py.
_KERAS_GEMMA3 = r"(?:.*/)?decoder_block_(\d+)/"
_KERAS_HUB_GEMMA3 = (
    LayoutRule(_KERAS_GEMMA3 + "attention/([qkv])(?:uery|ey|alue)", r"model.layers.\1.self_attn.\2_proj", (1,), (0, 2)),
    LayoutRule(_KERAS_GEMMA3 + "attention/attention_output", r"model.layers.\1.self_attn.o_proj", *_JOINED),
    *(
        LayoutRule(f"{_KERAS_GEMMA3}ffw_{theirs}", rf"model.layers.\1.mlp.{name}_proj", *_MATRIX)
        for theirs, name in (("gating", "gate"), ("gating_2", "up"), ("linear", "down"))
    ),
)


Axes = tuple[tuple[int, ...], tuple[int, ...]]  # of inputs, of outputs


def _maxtext(**rotary: dict[str, Any]) -> tuple[LayoutRule, ...]:
    """MaxText, src/maxtext/checkpoint_conversion/utils/param_mapping.py at 0647496f: layers scanned on axis 1, or not.

    Args:
        **rotary: What is done to the query and the key besides.
    """
    rules: list[tuple[str, str, Axes, dict[str, Any]]] = []
    axes: Axes
    for theirs, name in (("query", "q"), ("key", "k"), ("value", "v"), ("out", "o")):
        axes = ((0,), (2, 3)) if name != "o" else ((0, 2), (3,))
        rules.append((f"self_attention/{theirs}", f"self_attn.{name}_proj", axes, rotary.get(theirs, {})))
    for theirs, name in (("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")):
        rules.append((f"mlp/{theirs}", f"mlp.{name}_proj", ((0,), (2,)), {}))
    return (
        *(
            LayoutRule(f"(?:base/)?decoder/layers/{theirs}", f"model.layers.{{i}}.{name}", *axes, 1, **other)
            for theirs, name, axes, other in rules
        ),
        *(
            LayoutRule(
                rf"(?:base/)?decoder/layers_(\d+)/{theirs}", rf"model.layers.\1.{name}", *_unscanned(axes), **other
            )
            for theirs, name, axes, other in rules
        ),
        LayoutRule("(?:base/)?decoder/logits_dense", "lm_head", *_MATRIX),
    )


def _unscanned(axes: Axes) -> Axes:
    """The axes of a kernel without axis 1."""
    inputs, outputs = (tuple(axis - (axis > 1) for axis in group) for group in axes)
    return inputs, outputs


# Models of any library whose modules have transformers' names, but for how they count layers: "layers_0" by linen,
# "layers.0" by NNX (examples/demo/llama_nnx.py), or "layers" for a stack of all that is scanned or vmapped.
_STACKS = "(.*/)?(layers?|h|blocks?)"
_HUGGING_FACE = (
    LayoutRule(_STACKS + r"_(\d+)/(.+)", r"\1\2.\3.\4"),
    LayoutRule(_STACKS + r"/(\d+)/(.+)", r"\1\2.\3.\4"),
    LayoutRule(_STACKS + r"/((?!\d+(?:/|$)).+)", r"\1\2.{i}.\3"),
    LayoutRule("lm_head|score|classifier", r"\g<0>"),
)

TABLES: dict[str, tuple[LayoutRule, ...]] = {
    "huggingface": _HUGGING_FACE,
    "keras-hub-gemma3": _KERAS_HUB_GEMMA3,
    "keras-hub-llama": _KERAS_HUB_LLAMA,
    "maxtext-llama3.1": _maxtext(query={"scale": HEAD_SCALE, "interleaved": True}, key={"interleaved": True}),
    "maxtext-qwen": _maxtext(),
    "tunix-gemma3": _TUNIX_GEMMA3,
    "tunix-llama3": _TUNIX,
    "tunix-qwen2": _TUNIX,
    "tunix-qwen3": _TUNIX,
}
LAYOUTS = tuple(TABLES)
