"""KerasHub's models, loaded from a transformers folder: PEFT's adapters do there what they do in transformers. Run by
`make test-models`, in an environment of its own.

A model of Keras becomes a function of its variables, by their paths, with `stateless_call`; what adapts pytrees adapts
those. KerasHub 0.32 ignores `rms_norm_eps`: it adds 1e-6 whatever the folder says, so the folders say 1e-6.
"""

import copy
import functools
import os
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
pytest.importorskip("keras_hub", reason="KerasHub has an environment of its own: make test-models")

import jax
import jax.numpy as jnp
import keras_hub
import optax
import peft
import transformers

import randlora_jax
from randlora_jax import RandLoraConfig
from tests.models.in_torch import (
    DEFAULT,
    LINEAR,
    LOGITS,
    VOCABULARY,
    adapted_by_peft,
    assert_peft_has,
    gemma3_config,
    llama_config,
    save_model,
    tokens,
    torch_logits,
)

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Found missing adapter keys"),  # PEFT expects a copy of the bases per layer
]


class Family(NamedTuple):
    """A kind of model in both libraries: its transformers config, KerasHub's classes, and the name of its layouts."""

    config: Callable[..., transformers.PreTrainedConfig]
    backbone: type
    language_model: type
    layouts: str


FAMILIES = {
    "llama": Family(
        functools.partial(llama_config, rms_norm_eps=1e-6),
        *(keras_hub.models.LlamaBackbone, keras_hub.models.LlamaCausalLM, "keras-hub-llama"),
    ),
    "gemma3": Family(
        gemma3_config, keras_hub.models.Gemma3Backbone, keras_hub.models.Gemma3CausalLM, "keras-hub-gemma3"
    ),
}
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """The folder of each family, written once."""
    return functools.cache(lambda name: save_model(FAMILIES[name].config(), tmp_path_factory.mktemp(name)))


@pytest.fixture(autouse=True)
def _as_precise_as_the_oracle():
    with jax.default_matmul_precision("highest"):
        yield


def in_keras(folder, name):
    """The model as a function of its variables by path and of tokens, and these variables."""
    family = FAMILIES[name]
    backbone = family.backbone.from_preset(str(folder.path), dtype="float32")
    model = family.language_model(backbone=backbone, preprocessor=None)
    params = {variable.path: variable.value for variable in model.variables}
    assert len(params) == len(model.variables)

    def logits(params, x):
        groups = (model.trainable_variables, model.non_trainable_variables)
        values = [[params[variable.path] for variable in group] for group in groups]
        return model.stateless_call(*values, {"token_ids": x, "padding_mask": jnp.ones_like(x)})[0]

    return logits, params


@every_family
def test_keras_hub_computes_the_logits_of_transformers(name, folder_of):
    folder = folder_of(name)
    logits, params = in_keras(folder, name)
    np.testing.assert_allclose(logits(params, tokens()), torch_logits(folder.model), **LOGITS)


def test_keras_hub_ignores_rms_norm_eps(tmp_path):
    """When this fails, KerasHub reads rms_norm_eps: drop the workaround, which is to use 1e-6 only."""
    folder = save_model(llama_config(rms_norm_eps=1e-5), tmp_path)
    logits, params = in_keras(folder, "llama")
    assert np.abs(logits(params, tokens()) - torch_logits(folder.model)).max() > 10 * LOGITS["atol"]


@pytest.mark.parametrize("target_modules", [LINEAR, DEFAULT], ids=["linear", "default"])
@every_family
def test_an_adapter_by_peft_gives_the_same_logits_in_keras_hub_and_comes_back(
    name, target_modules, folder_of, tmp_path
):
    folder = folder_of(name)
    by_peft = adapted_by_peft(folder, target_modules, tmp_path / "in")
    logits, params = in_keras(folder, name)
    adapter = randlora_jax.load_adapter(tmp_path / "in", params, layouts=FAMILIES[name].layouts)

    expected = torch_logits(by_peft)
    assert np.abs(expected - torch_logits(folder.model)).max() > 0.25
    adapted = jax.jit(lambda params, adapter: logits(randlora_jax.effective_params(params, adapter), tokens()))
    np.testing.assert_allclose(adapted(params, adapter), expected, **LOGITS)

    adapter.save_pretrained(tmp_path / "out")
    assert_peft_has(by_peft, folder, tmp_path / "out")


@every_family
def test_an_adapter_trained_in_keras_hub_gives_the_same_logits_in_peft(name, folder_of, tmp_path):
    folder = folder_of(name)
    logits, params = in_keras(folder, name)
    config = RandLoraConfig(r=8, randlora_alpha=16, target_modules="all-linear")
    adapter = randlora_jax.init(config, params, layouts=FAMILIES[name].layouts)
    optimizer = optax.adam(2e-2)

    def loss(trainable, params, adapter):
        out = logits(randlora_jax.effective_params(params, adapter.with_trainable(trainable)), tokens())
        return optax.softmax_cross_entropy_with_integer_labels(out[:, :-1], tokens()[:, 1:]).mean()

    @jax.jit
    def step(trainable, state, params, adapter):
        value, grads = jax.value_and_grad(loss)(trainable, params, adapter)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    trainable, state = adapter.trainable, optimizer.init(adapter.trainable)
    for _ in range(15):
        trainable, state, value = step(trainable, state, params, adapter)
    assert value < np.log(VOCABULARY) - 0.5  # from that of guessing among all tokens

    adapter = adapter.with_trainable(trainable)
    adapter.save_pretrained(tmp_path)
    in_peft = peft.PeftModel.from_pretrained(copy.deepcopy(folder.model), tmp_path).eval()
    got = logits(randlora_jax.effective_params(params, adapter), tokens())
    np.testing.assert_allclose(got, torch_logits(in_peft), **LOGITS)


@every_family
def test_tracing_finds_the_layouts_of_the_table(name, folder_of):
    logits, params = in_keras(folder_of(name), name)
    traced = randlora_jax.infer_layouts(logits, params, tokens())
    table = randlora_jax.name_layouts(params, FAMILIES[name].layouts)
    assert len(table) == 2 * 7 + (name == "llama")
    assert set(traced) == set(table)
    for kernel, layout in table.items():
        assert (traced[kernel].in_axes, traced[kernel].out_axes) == (layout.in_axes, layout.out_axes)
    assert traced.named(FAMILIES[name].layouts) == table
