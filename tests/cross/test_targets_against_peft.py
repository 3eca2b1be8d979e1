"""`interop.resolve_targets` against the modules that PEFT really wraps, in three models."""

import functools
import warnings

import pytest

from interop import RandLoraConfig, resolve_targets

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")


def tree_of(names):
    """A model with a Linear at each of the dotted names."""
    root = torch.nn.Module()
    for name in names:
        *path, last = name.split(".")
        module = root
        for part in path:
            if not hasattr(module, part):
                module.add_module(part, torch.nn.Module())
            module = getattr(module, part)
        module.add_module(last, torch.nn.Linear(4, 4, bias=False))
    return root


def llama():
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=3, vocab_size=16)
    return transformers.LlamaForCausalLM(config)


MIXTURE = [
    f"model.layers.{i}.{name}"
    for i in range(3)
    for name in ("attn.q_proj", "attn.xq_proj", "experts.0.up", "experts.1.up", "experts.2.up")
]
AT_ROOT = [
    f"{blocks}.{i}.{name}" for blocks in ("layers", "tail") for i in range(2) for name in ("q", "attn.q", "attn.k")
]
MODELS = {
    "llama": llama,
    "mixture": functools.partial(tree_of, [*MIXTURE, "model.head"]),
    "at_root": functools.partial(tree_of, [*AT_ROOT, "q"]),
}


def wrapped_by_peft(model, fields):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.RandLoraConfig(r=4, **fields))
    layers = adapted.base_model.model.named_modules()
    return {name for name, module in layers if isinstance(module, peft.tuners.randlora.RandLoraLayer)}


def resolved_by_us(model, fields):
    layers = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    heads = [name for name, module in model.named_modules() if module is head]
    return set(resolve_targets(RandLoraConfig(r=4, **fields), layers, output_layers=heads))


CASES = [
    ("llama", {"target_modules": ["q_proj", "v_proj"]}),
    ("llama", {"target_modules": ["mlp.up_proj", "lm_head"]}),
    ("llama", {"target_modules": ["model.layers.1.mlp.up_proj", "o_proj"]}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "All-Linear"}),
    ("llama", {"target_modules": "all-linear", "layers_to_transform": 1}),
    ("llama", {"target_modules": "lm_head"}),
    ("llama", {"target_modules": r".*\.(q|v)_proj"}),
    ("llama", {"target_modules": r"model\.layers\.[02]\.mlp\.(up|down)_proj"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 1}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [0, 2]}),
    ("llama", {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": [2], "layers_pattern": "layers"}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": ["h", "layers"]}),
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": 0, "layers_pattern": []}),
    ("llama", {"target_modules": ["q_proj", "lm_head"], "modules_to_save": ["embed_tokens"]}),
    ("mixture", {"target_modules": ["q_proj"]}),
    ("mixture", {"target_modules": ["up"]}),
    ("mixture", {"target_modules": ["1.up"]}),
    ("mixture", {"target_modules": r".*experts\.[12]\.up"}),
    ("mixture", {"target_modules": ["up", "q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("mixture", {"target_modules": ["up"], "layers_to_transform": [1, 2], "layers_pattern": "experts"}),
    ("at_root", {"target_modules": ["q"]}),
    ("at_root", {"target_modules": "q"}),
]


@pytest.mark.parametrize(("model", "fields"), CASES, ids=lambda value: str(value)[:80])
def test_the_layers_are_those_that_peft_wraps(model, fields):
    wrapped = wrapped_by_peft(MODELS[model](), fields)
    assert wrapped
    assert resolved_by_us(MODELS[model](), fields) == wrapped


RARER = [  # see peft.tuners.tuners_utils.check_target_module_exists
    # The index of a layer is the first number on its path: "layers.1.experts.0.up" is layer 1.
    ("mixture", {"target_modules": ["up"], "layers_to_transform": 1}),
    ("mixture", {"target_modules": ["up", "q_proj"], "layers_to_transform": [0, 2]}),
    # layers_pattern may match at the start of a name.
    ("at_root", {"target_modules": ["q"], "layers_to_transform": 1, "layers_pattern": "layers"}),
    ("at_root", {"target_modules": ["attn.k"], "layers_to_transform": [0, 1], "layers_pattern": ["tail"]}),
    # Layers named in full are adapted whatever layers_to_transform says.
    ("llama", {"target_modules": ["model.layers.0.self_attn.q_proj", "up_proj"], "layers_to_transform": 1}),
    # An empty list of indices restricts nothing.
    ("llama", {"target_modules": ["q_proj"], "layers_to_transform": []}),
    # What modules_to_save names trains in full and is never adapted.
    ("mixture", {"target_modules": ["head", "q_proj"], "modules_to_save": ["head"]}),
    ("mixture", {"target_modules": "all-linear", "modules_to_save": ["head"]}),
    ("mixture", {"target_modules": r".*(up|q_proj)", "modules_to_save": ["experts"]}),
]


@pytest.mark.parametrize(("model", "fields"), RARER, ids=lambda value: str(value)[:80])
def test_the_layers_are_those_that_peft_wraps_in_its_rarer_rules(model, fields):
    wrapped = wrapped_by_peft(MODELS[model](), fields)
    assert wrapped
    assert resolved_by_us(MODELS[model](), fields) == wrapped
