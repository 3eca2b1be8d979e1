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
from collections.abc import Callable
from typing import NamedTuple

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
from tunix.models.qwen2 import model as qwen2
from tunix.models.qwen2 import params as qwen2_params
from tunix.models.qwen3 import model as qwen3
from tunix.models.qwen3 import params as qwen3_params
from tunix.sft.peft_trainer import PeftTrainer, TrainingConfig

import randlora_jax
from randlora_jax import RandLoraConfig, RandLoraParam, attach, extract
from randlora_jax.named_layouts import TABLES
from tests.models.in_torch import (
    BATCH,
    DEFAULT,
    LENGTH,
    LINEAR,
    LOGITS,
    THETA,
    VOCABULARY,
    WINDOW,
    adapted_by_adalora,
    adapted_by_peft,
    assert_peft_has,
    gemma3_config,
    llama_config,
    qwen2_config,
    qwen3_config,
    save_model,
    tokens,
    torch_logits,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # Tunix 0.1.7 lags behind jax and flax
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # PEFT expects a copy of the bases per layer
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),  # Orbax, where a test reads without a target
]


def sizes_in_tunix(config):
    return {
        "num_layers": config.num_hidden_layers,
        "embed_dim": config.hidden_size,
        "hidden_dim": config.intermediate_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
    }


def loader(library, params):
    """A function that loads a folder with one of Tunix's modules of Llama's kind."""

    def load(folder, config, rope_theta=THETA):
        options = {"vocab_size": VOCABULARY, "rope_theta": rope_theta, "norm_eps": config.rms_norm_eps}
        model_config = library.ModelConfig(**options, **sizes_in_tunix(config))
        return params.create_model_from_safe_tensors(str(folder), model_config)

    return load


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
    """A kind of model in both libraries: its transformers config, Tunix's loader, and the name of its layouts."""

    config: Callable[..., transformers.PreTrainedConfig]
    load: Callable[..., nnx.Module]
    layouts: str


FAMILIES = {
    "llama3": Family(functools.partial(llama_config, rms_norm_eps=1e-5), loader(llama3, llama3_params), "tunix-llama3"),
    "qwen2": Family(qwen2_config, loader(qwen2, qwen2_params), "tunix-qwen2"),
    "qwen3": Family(qwen3_config, loader(qwen3, qwen3_params), "tunix-qwen3"),
    "gemma3": Family(gemma3_config, load_gemma, "tunix-gemma3"),
    "gemma3-fused-qkv": Family(functools.partial(gemma3_config, num_key_value_heads=4), load_gemma, "tunix-gemma3"),
}


def in_tunix(folder, name):
    return FAMILIES[name].load(folder.path, folder.model.config)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of each family, written once."""
    return functools.cache(lambda name: save_model(FAMILIES[name].config(), tmp_path_factory.mktemp(name)))


@pytest.fixture(autouse=True)
def _as_precise_as_the_oracle():
    """Accelerators round float32 products to fewer bits by default. Tiny models want one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with jax.default_matmul_precision("highest"):
        yield
    torch.set_num_threads(threads)


def model_inputs(input_tokens):
    """What Tunix's models take besides the tokens: positions, and which tokens (B, T, S) each may look at."""
    positions = jnp.broadcast_to(jnp.arange(LENGTH), input_tokens.shape)
    return positions, None, jnp.broadcast_to(jnp.tril(jnp.ones((LENGTH, LENGTH), bool)), (BATCH, LENGTH, LENGTH))


def forward(model, input_tokens):
    return model(input_tokens, *model_inputs(input_tokens))[0]


def jax_logits(model):
    return np.asarray(nnx.jit(forward)(model, tokens()))


def traced_layouts(model):
    graph, params = nnx.split(model)
    return randlora_jax.infer_layouts(lambda params, x: forward(nnx.merge(graph, params), x), params, tokens())


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
    np.testing.assert_allclose(jax_logits(in_tunix(folder, name)), torch_logits(folder.model), **LOGITS)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_tunix_ignores_rope_theta(name, tmp_path):
    """When this fails, Tunix passes rope_theta on: drop the workaround, which is to use 1e6 only."""
    family = FAMILIES[name]
    folder = save_model(family.config(rope_theta=10_000), tmp_path)
    model = family.load(tmp_path, folder.model.config, rope_theta=10_000)
    assert np.abs(jax_logits(model) - torch_logits(folder.model)).max() > 10 * LOGITS["atol"]


@pytest.mark.parametrize("target_modules", [LINEAR, DEFAULT], ids=["linear", "default"])
@pytest.mark.parametrize("name", FAMILIES)
def test_an_adapter_by_peft_gives_the_same_logits_in_tunix(name, target_modules, folder_of, tmp_path):
    folder = folder_of(name)
    by_peft = adapted_by_peft(folder, target_modules, tmp_path)
    model = in_tunix(folder, name)
    attach(model, tmp_path, layouts=FAMILIES[name].layouts)

    expected = torch_logits(by_peft)
    assert np.abs(expected - torch_logits(folder.model)).max() > 0.25
    np.testing.assert_allclose(jax_logits(model), expected, **LOGITS)


@pytest.mark.parametrize("target_modules", [LINEAR, DEFAULT], ids=["linear", "default"])
@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_an_adapter_comes_back_out_of_tunix_as_peft_wrote_it(name, target_modules, folder_of, tmp_path):
    folder = folder_of(name)
    by_peft = adapted_by_peft(folder, target_modules, tmp_path / "in")
    model = in_tunix(folder, name)
    attach(model, tmp_path / "in", layouts=FAMILIES[name].layouts)
    extract(model).save_pretrained(tmp_path / "out")
    assert_peft_has(by_peft, folder, tmp_path / "out")


@pytest.mark.parametrize("target_modules", [LINEAR, ["q_proj", "v_proj"]], ids=["linear", "q and v"])
def test_an_adapter_of_adalora_gives_the_same_logits_in_tunix_and_comes_back(target_modules, folder_of, tmp_path):
    folder = folder_of("gemma3")
    by_peft = adapted_by_adalora(folder, target_modules, tmp_path / "in")
    graph, state = nnx.split(in_tunix(folder, "gemma3"))
    adapter = randlora_jax.load_adapter(tmp_path / "in", state, layouts="tunix-gemma3")

    expected = torch_logits(by_peft)
    assert np.abs(expected - torch_logits(folder.model)).max() > 0.25
    model = nnx.merge(graph, randlora_jax.effective_params(state, adapter))
    np.testing.assert_allclose(jax_logits(model), expected, **LOGITS)
    adapter.save_pretrained(tmp_path / "out")
    assert_peft_has(by_peft, folder, tmp_path / "out")


@pytest.mark.parametrize("name", FAMILIES)
def test_tracing_finds_the_layouts_of_the_table(name, folder_of):
    """All but which axis of a fused kernel numbers its weights: the model slices the product along it, not the kernel,
    so that it is one of the produced axes until someone who knows the names says otherwise."""
    model = in_tunix(folder_of(name), name)
    traced = traced_layouts(model)
    table = randlora_jax.name_layouts(nnx.state(model, nnx.Param), FAMILIES[name].layouts)
    kernels = 2 * (5 if name == "gemma3-fused-qkv" else 6 if name == "gemma3" else 7)
    assert len(table) == kernels + ("lm_head" in table)
    assert set(traced) == set(table)
    for kernel, layout in table.items():
        assert traced[kernel].in_axes == layout.in_axes
        assert traced[kernel].out_axes == tuple(sorted(layout.out_axes + layout.stack_axes))
    assert traced.named(FAMILIES[name].layouts) == table


@pytest.mark.parametrize("name", ["qwen3", "gemma3"])
def test_with_traced_layouts_only_names_and_fused_kernels_need_a_rule(name, folder_of):
    model = in_tunix(folder_of(name), name)
    axes = {"in_axes": None, "out_axes": None, "stack_axes": None}
    rules = [dataclasses.replace(rule, **axes, optional=True) for rule in TABLES[FAMILIES[name].layouts]]
    assert traced_layouts(model).named(rules) == traced_layouts(model).named(FAMILIES[name].layouts)


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
    model = in_tunix(folder, request.param)
    attach(model, NEW_ADAPTER, layouts=FAMILIES[request.param].layouts)
    before = arrays(model)
    with jax.default_matmul_precision("highest"):
        trainer_of(model, directory).train([tokens()] * STEPS)
    return request.param, model, before, directory


NEW_ADAPTER = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")


def test_peft_trainer_trains_the_adapter_and_nothing_else(trained, folder_of):
    name, model, before, _ = trained
    folder = folder_of(name)
    base = arrays(in_tunix(folder, name))
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


def test_peft_trainer_resumes_from_its_checkpoint(trained, folder_of):
    name, model, _, directory = trained
    resumed = in_tunix(folder_of(name), name)
    attach(resumed, NEW_ADAPTER, layouts=FAMILIES[name].layouts)
    assert trainer_of(resumed, directory).train_steps == STEPS
    assert_same_arrays(arrays(resumed), arrays(model))


def test_an_adapter_trained_by_tunix_gives_the_same_logits_in_peft(trained, folder_of, tmp_path):
    name, model, _, _ = trained
    extract(model).save_pretrained(tmp_path)
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(folder_of(name).model), tmp_path).eval()
    np.testing.assert_allclose(jax_logits(model), torch_logits(in_peft), **LOGITS)
