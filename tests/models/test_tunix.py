"""Tunix's models, loaded from a transformers folder: PEFT's adapters do there what they do in transformers, and Tunix's
own trainer trains them. Run by `make test-models`, in an environment of its own.

Quirks of Tunix 0.1.7 that these tests work around:
- Llama3 and Qwen3 do not pass `rope_theta` on: they rotate with 1e6 whatever the config says, so the folders say 1e6.
- Gemma3 holds k and v in one kernel, and q, k and v if there are as many kv heads as heads: one kernel, several names.
- Gemma3's parameters are bfloat16 unless `param_dtype` says otherwise, and every sixth layer is global, the others
  local, whatever the folder says: with two layers, all are local.
"""

import copy
import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("tunix", reason="Tunix has an environment of its own: make test-models")

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
import peft
import torch
import transformers
from flax import nnx
from tunix.models.gemma3 import model as gemma3
from tunix.models.gemma3 import params_safetensors as gemma3_params
from tunix.models.llama3 import model as llama3
from tunix.models.llama3 import params as llama3_params
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import randlora_jax
from randlora_jax import Layout, RandLoraConfig, RandLoraParam, attach, extract

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Tunix 0.1.7 lags behind jax and flax
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # PEFT expects a copy of the bases per layer
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),  # Orbax, where a test reads without a target
]

# Logits are below 1. PEFT's and ours are each 2e-7 to 7e-7 away from PEFT's in float64.
LOGITS = {"rtol": 0, "atol": 2e-6}
VOCABULARY, BATCH, LENGTH, WINDOW, THETA = 128, 4, 12, 8, 1_000_000
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DEFAULT = None  # PEFT's default for all three: q_proj and v_proj, so one of the two weights in Gemma3's kv kernel

# Kernel name -> its layout, with the names that its weights have in the folder: one for each of a fused kernel.
MLP = {r"layers\.(\d+)\.mlp\.(gate|up|down)_proj": Layout((0,), (1,), modules=(r"model.layers.\1.mlp.\2_proj",))}
LLAMA_LIKE = MLP | {
    r"layers\.(\d+)\.attn\.([qkv]_proj)": Layout((0,), (1, 2), modules=(r"model.layers.\1.self_attn.\2",)),
    r"layers\.(\d+)\.attn\.(o_proj)": Layout((0, 1), (2,), modules=(r"model.layers.\1.self_attn.\2",)),
}
GEMMA = MLP | {
    r"layers\.(\d+)\.attn\.q_einsum": Layout((1,), (0, 2), modules=(r"model.layers.\1.self_attn.q_proj",)),
    r"layers\.(\d+)\.attn\.kv_einsum": Layout(
        (2,), (1, 3), (0,), modules=tuple(rf"model.layers.\1.self_attn.{name}_proj" for name in "kv")
    ),
    r"layers\.(\d+)\.attn\.qkv_einsum": Layout(
        (2,), (1, 3), (0,), modules=tuple(rf"model.layers.\1.self_attn.{name}_proj" for name in "qkv")
    ),
    r"layers\.(\d+)\.attn\.attn_vec_einsum": Layout((0, 1), (2,), modules=(r"model.layers.\1.self_attn.o_proj",)),
}

SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def sizes_in_tunix(config):
    return {
        "num_layers": config.num_hidden_layers,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def llama_config(rope_theta=THETA):
    return transformers.LlamaConfig(rope_theta=rope_theta, rms_norm_eps=1e-5, **SIZES)


def load_llama(folder, config, rope_theta=THETA):
    options = {"vocab_size": VOCABULARY, "rope_theta": rope_theta, "norm_eps": config.rms_norm_eps}
    model_config = llama3.ModelConfig(**options, **sizes_in_tunix(config))
    return llama3_params.create_model_from_safe_tensors(str(folder), model_config)


def qwen_config(rope_theta=THETA):
    return transformers.Qwen3Config(rope_theta=rope_theta, tie_word_embeddings=False, **SIZES)


def load_qwen(folder, config, rope_theta=THETA):
    options = {"vocab_size": VOCABULARY, "rope_theta": rope_theta, "norm_eps": config.rms_norm_eps}
    model_config = qwen3.ModelConfig(**options, **sizes_in_tunix(config))
    return qwen3_params.create_model_from_safe_tensors(str(folder), model_config)


def gemma_config(**sizes):
    return transformers.Gemma3TextConfig(sliding_window=WINDOW, query_pre_attn_scalar=16, **{**SIZES, **sizes})


def load_gemma(folder, config):
    model_config = gemma3.ModelConfig(
        num_embed=VOCABULARY,
        sliding_window_size=WINDOW,
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
        param_dtype=jnp.float32,
        **sizes_in_tunix(config),
    )
    return gemma3_params.create_model_from_safe_tensors(str(folder), model_config)


class Family(NamedTuple):
    """A kind of model in both libraries: its transformers config, Tunix's loader, and the layouts of its kernels."""

    config: Callable[..., transformers.PreTrainedConfig]
    load: Callable[..., nnx.Module]
    layouts: dict[str, Layout]


FAMILIES = {
    "llama3": Family(llama_config, load_llama, LLAMA_LIKE),
    "qwen3": Family(qwen_config, load_qwen, LLAMA_LIKE),
    "gemma3": Family(gemma_config, load_gemma, GEMMA),
    "gemma3-fused-qkv": Family(functools.partial(gemma_config, num_key_value_heads=4), load_gemma, GEMMA),
}


class Folder(NamedTuple):
    """A transformers folder, the torch model that was saved in it, and what is needed to load it in Tunix."""

    path: Any
    model: transformers.PreTrainedModel
    family: Family

    def in_tunix(self):
        return self.family.load(self.path, self.model.config)


def save_model(family, path, **options):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(family.config(**options)).eval()
    with torch.no_grad():  # norms are created at one or zero, which a converter could get away with ignoring
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.2 * torch.randn(parameter.shape))
    model.save_pretrained(path)
    return Folder(path, model, family)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of each family, written once."""
    return functools.cache(lambda name: save_model(FAMILIES[name], tmp_path_factory.mktemp(name)))


@pytest.fixture(autouse=True)
def _as_precise_as_the_oracle():
    """Accelerators round float32 products to fewer bits by default. Tiny models want one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield
    torch.set_num_threads(threads)


def tokens():
    return np.random.default_rng(1).integers(1, VOCABULARY, (BATCH, LENGTH), dtype=np.int32)


def model_inputs(input_tokens):
    """What Tunix's models take besides the tokens: positions, and which tokens (B, T, S) each may look at."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), input_tokens.shape)
    return positions, None, jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))


def forward(model, input_tokens):
    return model(input_tokens, *model_inputs(input_tokens))[0]


def jax_logits(model):
    return np.asarray(nnx.jit(forward)(model, tokens()))


@torch.no_grad()
def torch_logits(model):
    return model(input_ids=torch.from_numpy(tokens()).long()).logits.numpy()


def layouts_of(model, family):
    """The layouts of a model's kernels by name, from the table of its family."""
    layouts = {}
    for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        name = ".".join(map(str, path[:-1]))
        for pattern, layout in family.layouts.items():
            if match := re.fullmatch(pattern, name):
                layouts[name] = dataclasses.replace(layout, modules=tuple(map(match.expand, layout.modules)))
    return layouts


def adapted_by_peft(folder, target_modules, path):
    """PEFT's model with a random adapter, as after training, which is also saved at `path`.

    lambda is such that dW is about as large as W. Attention saturates much above that, and rounding errors grow.
    """
    config = peft.RandLoraConfig(r=6, randlora_alpha=12, target_modules=target_modules, projection_prng_key=3)
    model = peft.get_peft_model(copy.deepcopy(folder.model), config).eval()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "randlora_lambda" in name:
                parameter.normal_(0, 0.05, generator=generator)
            elif "randlora_gamma" in name:
                parameter.mul_(1 + 0.5 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(path)
    return model


def arrays(model, *filters):
    """Copies of a model's arrays by path."""
    return {path: np.array(leaf[...]) for path, leaf in nnx.to_flat_state(nnx.state(model, *filters))}


def assert_same_arrays(got, expected):
    assert got.keys() == expected.keys()
    for path, array in expected.items():
        np.testing.assert_array_equal(got[path], array, err_msg=str(path))


@pytest.mark.parametrize("name", FAMILIES)
def test_tunix_computes_the_logits_of_transformers(name, folder_of):
    folder = folder_of(name)
    np.testing.assert_allclose(jax_logits(folder.in_tunix()), torch_logits(folder.model), **LOGITS)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_tunix_ignores_rope_theta(name, tmp_path):
    """When this fails, Tunix passes rope_theta on: drop the workaround, which is to use 1e6 only."""
    family = FAMILIES[name]
    folder = save_model(family, tmp_path, rope_theta=10_000)
    model = family.load(tmp_path, folder.model.config, rope_theta=10_000)
    assert np.abs(jax_logits(model) - torch_logits(folder.model)).max() > 10 * LOGITS["atol"]


@pytest.mark.parametrize("target_modules", [LINEAR, DEFAULT], ids=["linear", "default"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_by_peft_gives_the_same_logits_in_tunix(name, target_modules, folder_of, tmp_path):
    folder = folder_of(name)
    by_peft = adapted_by_peft(folder, target_modules, tmp_path)
    model = folder.in_tunix()
    attach(model, tmp_path, layouts=layouts_of(model, folder.family))

    expected = torch_logits(by_peft)
    assert np.abs(expected - torch_logits(folder.model)).max() > 0.3
    np.testing.assert_allclose(jax_logits(model), expected, **LOGITS)


@pytest.mark.parametrize("target_modules", [LINEAR, DEFAULT], ids=["linear", "default"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_an_adapter_comes_back_out_of_tunix_as_peft_wrote_it(name, target_modules, folder_of, tmp_path):
    folder = folder_of(name)
    by_peft = adapted_by_peft(folder, target_modules, tmp_path / "in")
    model = folder.in_tunix()
    attach(model, tmp_path / "in", layouts=layouts_of(model, folder.family))
    extract(model).save_pretrained(tmp_path / "out")

    again = peft.PeftModel.from_pretrained(copy.deepcopy(folder.model), tmp_path / "out").eval()
    expected, got = by_peft.state_dict(), again.state_dict()
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(got[key], value, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", FAMILIES)
def test_tracing_finds_the_layouts_of_the_table(name, folder_of):
    """All but which axis of a fused kernel numbers its weights: the model slices the product along it, not the kernel,
    so that it is one of the produced axes until someone who knows the names says otherwise."""
    folder = folder_of(name)
    model = folder.in_tunix()
    graph, params = nnx.split(model)
    traced = randlora_jax.infer_layouts(lambda params, x: forward(nnx.merge(graph, params), x), params, tokens())

    table = layouts_of(model, folder.family)
    assert len(table) == 2 * (5 if name == "gemma3-fused-qkv" else 6 if name == "gemma3" else 7)
    assert set(traced) - set(table) <= {"lm_head"}
    for kernel, layout in table.items():
        assert traced[kernel].in_axes == layout.in_axes
        assert traced[kernel].out_axes == tuple(sorted(layout.out_axes + layout.stack_axes))


def sft_batch(input_tokens):
    """What `PeftTrainer`'s own loss takes."""
    positions, _, attention_mask = model_inputs(input_tokens)
    mask = jnp.ones_like(input_tokens)
    return {
        "input_tokens": input_tokens,
        "input_mask": mask,
        "positions": positions,
        "attention_mask": attention_mask,
    }


STEPS, FINAL_LOSS = 20, 4.0  # from 4.85, that of guessing among 128 tokens


def trainer_of(model, directory):
    config = TrainingConfig(eval_every_n_steps=100, max_steps=STEPS, checkpoint_root_directory=str(directory))
    return PeftTrainer(model, optax.adam(2e-2), config).with_gen_model_input_fn(sft_batch)


def cross_entropy(logits):
    labels = optax.softmax_cross_entropy_with_integer_labels(logits[:, :-1], tokens()[:, 1:])
    return float(labels.mean())


def stored_arrays(directory):
    """Arrays of an Orbax checkpoint by path."""
    leaves = jax.tree_util.tree_leaves_with_path(ocp.PyTreeCheckpointer().restore(directory))
    return {jax.tree_util.keystr(path, simple=True, separator="."): np.asarray(leaf) for path, leaf in leaves}


@pytest.fixture(scope="module", params=["qwen3", "gemma3"])
def trained(request, folder_of, tmp_path_factory):
    """A model that `PeftTrainer` trained with a new adapter on all its linear layers; and its arrays from before."""
    folder = folder_of(request.param)
    directory = tmp_path_factory.mktemp("checkpoints")
    model = folder.in_tunix()
    attach(model, NEW_ADAPTER, layouts=layouts_of(model, folder.family))
    before = arrays(model)
    with jax.default_matmul_precision("highest"):
        trainer_of(model, directory).train([tokens()] * STEPS)
    return folder, model, before, directory


NEW_ADAPTER = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")


def test_peft_trainer_trains_the_adapter_and_nothing_else(trained):
    folder, model, before, _ = trained
    base = arrays(folder.in_tunix())
    adapter = arrays(model, RandLoraParam)
    after = arrays(model)

    np.testing.assert_allclose(cross_entropy(torch_logits(folder.model)), np.log(VOCABULARY), atol=0.1)
    assert cross_entropy(jax_logits(model)) < FINAL_LOSS
    assert len(after) == len(base) + len(adapter) + 2  # and the two bases
    assert_same_arrays(*({path: state[path] for path in after.keys() - adapter.keys()} for state in (after, before)))
    for path, array in adapter.items():
        assert np.abs(array - before[path]).max() > 1e-3, path


def test_the_checkpoint_of_peft_trainer_holds_the_adapter_only(trained):
    _, model, _, directory = trained
    adapter = {".".join(map(str, path)): array for path, array in arrays(model, RandLoraParam).items()}
    stored = stored_arrays(directory / str(STEPS) / "model_params")
    assert_same_arrays({path.removesuffix(".value"): array for path, array in stored.items()}, adapter)

    optimizer = stored_arrays(directory / str(STEPS) / "optimizer_state")
    moments = [array.shape for array in optimizer.values() if array.ndim]  # besides Adam's step counts
    assert sorted(moments) == sorted(2 * [array.shape for array in adapter.values()])


def test_peft_trainer_resumes_from_its_checkpoint(trained):
    folder, model, _, directory = trained
    resumed = folder.in_tunix()
    attach(resumed, NEW_ADAPTER, layouts=layouts_of(resumed, folder.family))
    assert trainer_of(resumed, directory).train_steps == STEPS
    assert_same_arrays(arrays(resumed), arrays(model))


def test_an_adapter_trained_by_tunix_gives_the_same_logits_in_peft(trained, tmp_path):
    folder, model, _, _ = trained
    extract(model).save_pretrained(tmp_path)
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(folder.model), tmp_path).eval()
    np.testing.assert_allclose(jax_logits(model), torch_logits(in_peft), **LOGITS)
