"""Moving an adapter: trained in JAX, read by PEFT and by torch; made by PEFT, read by JAX; and back, byte for byte."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import models
import numpy as np
import optax
import peft
import pytest
import torch
from flax import nnx
from llama_nnx import load_llama, next_token_loss

import interop
import randlora_jax
import randlora_torch

FIELDS = models.CASES["llama"][1]


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    models.llama().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained_in_jax(base_folder):
    """A Flax Llama with an adapter after ten optimizer steps."""
    model = randlora_jax.attach(load_llama(base_folder), models.our_config(FIELDS))
    optimizer = nnx.Optimizer(model, optax.adam(3e-2), wrt=randlora_jax.RandLoraParam)
    ids = jnp.asarray(models.tokens(length=17).numpy())

    @nnx.jit
    def step(model, optimizer, ids):
        diff = nnx.DiffState(0, randlora_jax.RandLoraParam)
        loss, grads = nnx.value_and_grad(next_token_loss, argnums=diff)(model, ids)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer, ids) for _ in range(10)]
    assert losses[0] - losses[-1] > 0.3
    return model


def flax_logits(model):
    return np.asarray(model(jnp.asarray(models.tokens().numpy())))


def torch_logits(model):
    with torch.no_grad():
        return models.logits(model.eval(), models.tokens()).numpy()


def test_an_adapter_trained_in_jax_gives_the_same_logits_in_peft_and_in_torch(trained_in_jax, tmp_path):
    randlora_jax.extract(trained_in_jax).save_pretrained(tmp_path)
    want, base = flax_logits(trained_in_jax), torch_logits(models.llama())
    assert np.abs(want - base).max() > 0.1
    in_peft = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    in_torch = randlora_torch.load_adapter(models.llama(), tmp_path)
    np.testing.assert_allclose(torch_logits(in_peft), want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(torch_logits(in_torch), want, rtol=0, atol=2e-6)


def test_peft_reads_what_jax_saved_without_its_bases(base_folder, tmp_path):
    config = models.our_config({**FIELDS, "save_projection": False, "init_weights": False})
    model = randlora_jax.attach(load_llama(base_folder), config, rngs=nnx.Rngs(0))
    randlora_jax.extract(model).save_pretrained(tmp_path)
    in_peft = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    np.testing.assert_allclose(torch_logits(in_peft), flax_logits(model), rtol=0, atol=2e-6)


def test_an_adapter_saved_by_peft_gives_the_same_logits_in_jax_and_in_torch(base_folder, tmp_path):
    in_peft = peft.get_peft_model(models.llama(), models.peft_config(FIELDS))
    models.randomize((n, p) for n, p in in_peft.named_parameters() if "randlora_" in n)
    in_peft.save_pretrained(tmp_path)
    want = torch_logits(in_peft)
    in_jax = randlora_jax.attach(load_llama(base_folder), tmp_path)
    in_torch = randlora_torch.load_adapter(models.llama(), tmp_path)
    np.testing.assert_allclose(flax_logits(in_jax), want, rtol=0, atol=2e-6)
    np.testing.assert_allclose(torch_logits(in_torch), want, rtol=0, atol=2e-6)


def file_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("way", [("jax",), ("torch",), ("jax", "peft", "torch", "jax", "peft")], ids="-".join)
@pytest.mark.parametrize("save_projection", [True, False])
@pytest.mark.parametrize("kind", ["dense", "sparse"])
def test_round_trips_give_the_same_bytes(trained_in_jax, tmp_path, way, save_projection, kind):
    shapes = {name: (12, 8) if "up" in name else (8, 12) for name in ("a.up", "a.down", "b.up")}
    config = interop.RandLoraConfig(
        r=5, target_modules=["up", "down"], sparse=kind == "sparse", save_projection=save_projection, init_weights=False
    )
    adapter = interop.init_adapter(config, shapes, rng=np.random.default_rng(0))
    interop.save(adapter, tmp_path / "first")
    moved = tmp_path / "first"
    for stack in way:
        moved = interop.convert(moved, to=stack)
    interop.save(interop.convert(moved, to="peft"), tmp_path / "second")
    assert file_bytes(tmp_path / "first") == file_bytes(tmp_path / "second")


@pytest.mark.parametrize("stack", ["jax", "torch"])
def test_half_precision_factors_survive_a_round_trip(tmp_path, stack):
    config = interop.RandLoraConfig(r=2, target_modules=["x"], init_weights=False)
    adapter = interop.init_adapter(config, {"x": (6, 4)}, rng=np.random.default_rng(0))
    for dtype in (ml_dtypes.bfloat16, np.float16):
        halved = interop.Adapter(
            config=config,
            factors={"x": interop.Factors(*(part.astype(dtype) for part in adapter.factors["x"]))},
            bases=adapter.bases,
            recipe=adapter.recipe,
            shapes=adapter.shapes,
        )
        back = interop.convert(interop.convert(halved, to=stack), to="peft")
        for got, want in zip(back.factors["x"], halved.factors["x"], strict=True):
            assert got.dtype == dtype
            assert got.tobytes() == want.tobytes()


def test_a_model_with_an_adapter_converts_without_losing_a_bit(trained_in_jax):
    adapter = interop.convert(trained_in_jax, to="peft")
    model = randlora_torch.load_adapter(models.llama(), interop.convert(trained_in_jax, to="torch"))
    back = interop.convert(model, to="peft")
    assert back.config == adapter.config
    assert back.shapes == adapter.shapes
    for name in adapter.modules:
        for got, want in zip(back.factors[name], adapter.factors[name], strict=True):
            assert got.tobytes() == want.tobytes()
    assert interop.bases_digest(back.bases) == interop.bases_digest(adapter.bases)


def test_the_same_config_makes_the_same_file_in_both_stacks(base_folder, tmp_path):
    config = models.our_config({**FIELDS, "task_type": "CAUSAL_LM"})  # without, PEFT's files name the torch class
    randlora_jax.extract(randlora_jax.attach(load_llama(base_folder), config)).save_pretrained(tmp_path / "jax")
    randlora_torch.get_peft_model(models.llama(), config).save_pretrained(tmp_path / "torch")
    written = {stack: file_bytes(tmp_path / stack) for stack in ("jax", "torch")}
    assert written["jax"]["adapter_model.safetensors"] == written["torch"]["adapter_model.safetensors"]
    configs = {stack: json.loads(files["adapter_config.json"]) for stack, files in written.items()}
    assert configs["jax"] == configs["torch"]


def test_the_functional_core_and_the_attached_model_compute_the_same(base_folder, trained_in_jax):
    adapter = randlora_jax.extract(trained_in_jax)
    plain = load_llama(base_folder)
    graph, params = nnx.split(plain)
    effective = randlora_jax.effective_params(nnx.to_pure_dict(params), adapter)
    nnx.replace_by_pure_dict(params, effective)
    merged = nnx.merge(graph, params)
    np.testing.assert_allclose(flax_logits(merged), flax_logits(trained_in_jax), rtol=0, atol=2e-6)


@pytest.mark.parametrize("code", ["import randlora_jax as s", "import randlora_torch as s"])
def test_a_stack_converts_without_importing_the_other(tmp_path, code):
    config = interop.RandLoraConfig(r=2, target_modules=["x"], init_weights=False)
    interop.save(interop.init_adapter(config, {"x": (6, 4)}, rng=np.random.default_rng(0)), tmp_path / "a")
    own = "jax" if "jax" in code else "torch"
    other = {"jax": "torch", "torch": "jax"}[own]
    script = (
        f"{code}, interop, sys; a = interop.convert(sys.argv[1], to={own!r});"
        f" a.save_pretrained(sys.argv[2]); assert {other!r} not in sys.modules, 'imported the other stack'"
    )
    run = [sys.executable, "-c", script, str(tmp_path / "a"), str(tmp_path / "b")]
    subprocess.run(run, check=True, capture_output=True, text=True)
    assert file_bytes(tmp_path / "a") == file_bytes(tmp_path / "b")


def test_vmapped_adapters_in_jax_equal_one_after_the_other(base_folder):
    """Two adapters over one base: a batch of models, each the same as alone."""
    params = {"a": {"kernel": jnp.ones((8, 12))}}
    config = interop.RandLoraConfig(r=3, target_modules=["a"], init_weights=False)
    adapters = [randlora_jax.init(config, params, key=jax.random.key(seed)) for seed in (0, 1)]
    stacked = jax.tree.map(lambda *parts: jnp.stack(parts), *(adapter.trainable for adapter in adapters))
    both = jax.vmap(lambda t: randlora_jax.effective_params(params, adapters[0].with_trainable(t))["a"]["kernel"])(
        stacked
    )
    for got, adapter in zip(both, adapters, strict=True):
        want = randlora_jax.effective_params(params, adapter)["a"]["kernel"]
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-5)  # entries of order 10, summed in another order


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": "all-linear"},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": ["layers.0.mlp.up_proj"]},
    ],
    ids=["all-linear", "exclude_modules"],
)
def test_peft_adapts_the_layers_that_we_adapted(tmp_path, fields):
    """PEFT reads "all-linear" by other rules and ignores exclude_modules: the file names the layers."""
    config = models.our_config({**FIELDS, **fields, "save_projection": False, "init_weights": False})
    ours = randlora_torch.get_peft_model(models.llama(), config)
    ours.save_pretrained(tmp_path)
    theirs = peft.PeftModel.from_pretrained(models.llama(), tmp_path)
    wrapped = [n for n, m in theirs.named_modules() if isinstance(m, peft.tuners.randlora.RandLoraLayer)]
    assert sorted(n.removeprefix("base_model.model.") for n in wrapped) == sorted(randlora_torch.extract(ours).modules)
    np.testing.assert_allclose(torch_logits(theirs), torch_logits(ours), rtol=0, atol=2e-6)
