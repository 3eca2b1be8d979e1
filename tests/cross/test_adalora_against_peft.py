"""AdaLoRA's training beside PEFT's, step by step over a full schedule, and torch's beside JAX's."""

import dataclasses
import warnings

import jax
import jax.numpy as jnp
import models
import numpy as np
import optax
import peft
import pytest
import torch

import interop
import randlora_jax
from interop import AdaLoraConfig, SVDFactors
from randlora_jax import adalora
from randlora_torch import extract, get_peft_model
from randlora_torch.bases import to_numpy
from tests.cross.test_adalora_files_against_peft import convolutions

PREFIX = "base_model.model."
SCHEDULE = {"init_r": 6, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12, "lora_alpha": 16}
LLAMA = {"target_modules": ["q_proj", "v_proj", "down_proj"], "task_type": "CAUSAL_LM"}
# name -> (base model, fields of the config); without a task type PEFT forgets the orthogonal regularization
CASES = {
    "llama": (models.llama, LLAMA),
    "llama, every third step": (models.llama, {**LLAMA, "deltaT": 3, "beta1": 0.5, "beta2": 0.9}),
    "gpt2": (models.gpt2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "task_type": "CAUSAL_LM"}),
    "mlp": (models.mlp, {"target_modules": ["wide", "square", "tall"], "orth_reg_weight": 0.0}),
    "conv": (convolutions, {"target_modules": ["first", "second", "out"], "orth_reg_weight": 0.0}),
    "no pause at either end": (models.mlp, {"target_modules": ["wide", "tall"], "tinit": 0, "tfinal": 0}),
}


def loss_of(model, input_ids):
    """A causal language model's own loss (with the regularization), or how far another model is from a fixed target."""
    if any(name.endswith("lm_head") for name, _ in model.named_modules()):
        return model(input_ids=input_ids, labels=input_ids).loss
    out = models.logits(model, input_ids)
    return (out - torch.cos(torch.arange(float(out.numel()))).reshape(out.shape)).square().mean()


class Theirs:
    """PEFT's model and what it knows after each step, by the names of the base model."""

    def __init__(self, base, fields):
        self.model = peft.get_peft_model(base, peft.AdaLoraConfig(**fields)).train()
        self.allocator = self.model.base_model.rankallocator

    def update_and_allocate(self, step):
        self.model.base_model.update_and_allocate(step)

    def rank_pattern(self):
        pattern = self.model.peft_config["default"].rank_pattern
        return pattern and {key.replace(".default", ""): tuple(mask) for key, mask in pattern.items()}

    def parameters(self):
        named = ((name, p) for name, p in self.model.named_parameters() if p.requires_grad)
        return {name.removeprefix(PREFIX).removesuffix(".default"): p for name, p in named}

    def averages(self, which):
        return {name.removesuffix(".default"): value for name, value in getattr(self.allocator, which).items()}

    def threshold(self, budget):
        """The score that PEFT compares with, from its own averages."""
        products = {
            name: value * self.averages("exp_avg_unc")[name] for name, value in self.averages("exp_avg_ipt").items()
        }
        scores = []
        for name in products:
            if name.endswith("lora_E"):
                A, B = (products[name.replace("lora_E", part)] for part in ("lora_A", "lora_B"))
                scores.append(products[name][:, 0] + (A.mean(1) + B.mean(0)))
        return torch.cat(scores).sort().values[self.allocator.init_bgt - budget - 1].item()


def pair(case):
    """PEFT's model and ours on the same base, with the same starting values."""
    make, fields = CASES[case]
    fields = {**SCHEDULE, **fields}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = Theirs(make(), fields)
    ours = get_peft_model(make(), AdaLoraConfig(**fields)).train()
    with torch.no_grad():
        for name, parameter in our_parameters(ours).items():
            parameter.copy_(theirs.parameters()[name])
    return theirs, ours


def our_parameters(model):
    return {name.removesuffix(".default"): p for name, p in model.named_parameters() if p.requires_grad}


def our_averages(model, which):
    found = {}
    for name, importance in model.rankallocator.importance.items():
        found |= {f"{name}.lora_{part}": v for part, v in getattr(importance, which)._asdict().items()}
    return found


@pytest.mark.parametrize("case", CASES)
def test_every_step_of_a_schedule_is_that_of_peft(case):
    theirs, ours = pair(case)
    config = ours.peft_config["default"]
    optimizers = [torch.optim.AdamW(p.values(), lr=2e-2) for p in (theirs.parameters(), our_parameters(ours))]
    thresholds = pruned = 0
    for step in range(1, config.total_step + 3):
        losses = [loss_of(model, models.tokens()) for model in (theirs.model, ours)]
        np.testing.assert_allclose(losses[1].item(), losses[0].item(), rtol=1e-5)
        for loss, optimizer in zip(losses, optimizers, strict=True):
            loss.backward()
            optimizer.step()
        theirs.update_and_allocate(step)
        allocation = ours.update_and_allocate(step)["default"]
        budget, masks = theirs.allocator.budget_schedule(step)
        assert allocation.budget == budget
        assert (allocation.kept is not None) == (
            (masks and step <= config.last_allocation) or step == config.last_allocation
        )
        if step < config.last_allocation:
            for which in ("exp_avg_ipt", "exp_avg_unc"):
                want, got = theirs.averages(which), our_averages(ours, which)
                assert got.keys() == want.keys()
                for name in want:
                    np.testing.assert_allclose(got[name], want[name], rtol=1e-4, atol=1e-9)
            if masks:
                thresholds += 1
                np.testing.assert_allclose(ours.rankallocator.threshold, theirs.threshold(budget), rtol=1e-4)
        assert ours.peft_config["default"].rank_pattern == theirs.rank_pattern()
        pruned += ours.peft_config["default"].rank_pattern is not None
        for name, parameter in theirs.parameters().items():
            np.testing.assert_allclose(
                our_parameters(ours)[name].detach(), parameter.detach(), rtol=1e-3, atol=2e-5, err_msg=f"{step} {name}"
            )
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert thresholds > 1
    assert pruned > 4
    assert sum(ours.ranks().values()) <= config.target_r * len(ours.ranks()) < config.init_r * len(ours.ranks())


def test_a_model_trained_by_us_and_by_peft_is_saved_alike(tmp_path):
    theirs, ours = pair("llama")
    optimizers = [torch.optim.SGD(p.values(), lr=1e-1) for p in (theirs.parameters(), our_parameters(ours))]
    for step in range(1, SCHEDULE["total_step"] + 1):
        for host, model, optimizer in zip((theirs, ours), (theirs.model, ours), optimizers, strict=True):
            loss_of(model, models.tokens()).backward()
            optimizer.step()
            host.update_and_allocate(step)
            optimizer.zero_grad()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs.model.save_pretrained(tmp_path / "theirs")
    ours.save_pretrained(tmp_path / "ours")
    mine, other = interop.load(tmp_path / "ours"), interop.load(tmp_path / "theirs")
    assert mine.config.rank_pattern == other.config.rank_pattern is not None
    for name in other.modules:
        for a, b in zip(mine.factors[name], other.factors[name], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    again = peft.PeftModel.from_pretrained(models.llama(), tmp_path / "ours")
    with torch.no_grad():
        got, want = (models.logits(model.eval(), models.tokens()) for model in (again, ours))
    np.testing.assert_allclose(got, want, atol=2e-6)


# Torch beside JAX. Both are given the same numbers by the hub; then each goes its own way.


def mlp_parameters(base):
    """The AwkwardMLP as a pytree of (in, out) kernels."""
    layers = {name: base.get_submodule(name) for name in ("wide", "square", "tall")}
    return {
        name: {"kernel": jnp.array(to_numpy(layer.weight).T), "bias": jnp.array(to_numpy(layer.bias))}
        for name, layer in layers.items()
    }


def mlp_in_jax(params, input_ids):
    def layer(name, x):
        return x @ params[name]["kernel"] + params[name]["bias"]

    x = jnp.sin(input_ids[..., None] * jnp.arange(1.0, 24.0))  # (B, T) -> (B, T, 23)
    return layer("tall", jax.nn.relu(layer("square", jax.nn.relu(layer("wide", x)))))


@pytest.mark.parametrize(
    "fields", [pytest.param({}, marks=pytest.mark.slow), {"deltaT": 3}, {"tinit": 0, "tfinal": 0}], ids=str
)
def test_every_step_in_torch_is_that_in_jax(fields):
    config = AdaLoraConfig(**{**SCHEDULE, **fields}, target_modules=("square", "tall", "wide"))
    model = get_peft_model(models.mlp(), config).train()
    params = mlp_parameters(models.mlp())
    adapter = randlora_jax.load_adapter(interop.convert(model, to="peft"), params)
    adapter = dataclasses.replace(adapter, config=config)
    ids, target = models.tokens(), np.cos(np.arange(3 * 11 * 37, dtype=np.float32)).reshape(3, 11, 37)
    ours = torch.optim.Adam(our_parameters(model).values(), lr=2e-2)
    optimizer = adalora.rank_allocator(optax.adam(2e-2), adapter)

    @jax.jit
    def train(trainable, state):
        def loss(trainable):
            now = adapter.with_trainable(trainable)
            out = mlp_in_jax(randlora_jax.effective_params(params, now), jnp.array(to_numpy(ids)))
            return ((out - target) ** 2).mean() + adalora.orthogonal_loss(now)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    trainable, state = adapter.trainable, optimizer.init(adapter.trainable)
    for step in range(1, config.total_step + 3):
        loss = (models.logits(model, ids) - torch.from_numpy(target)).square().mean() + model.orthogonal_loss()
        loss.backward()
        ours.step()
        model.update_and_allocate(step)
        trainable, state, value = train(trainable, state)
        np.testing.assert_allclose(value, loss.item(), rtol=1e-5)
        for name in config.target_modules:
            assert state.mask[name].tolist() == list(model._randlora.adapters["default"].rows_kept(name)), step
            layer = model.get_submodule(name).factors("default")
            for got, want in zip(trainable[name], map(to_numpy, layer), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-3, atol=2e-5)
            if step < config.last_allocation:
                for which in ("exp_avg_ipt", "exp_avg_unc"):
                    theirs = getattr(model.rankallocator.importance[name], which)
                    for got, want in zip(getattr(state, which)[name], theirs, strict=True):
                        np.testing.assert_allclose(got, want, rtol=2e-3, atol=1e-8)
        ours.zero_grad()
    pruned = adalora.prune(adapter.with_trainable(trainable), state).to_interop()
    kept = extract(model).to_interop()
    assert pruned.config.rank_pattern == kept.config.rank_pattern is not None
    assert {name: SVDFactors(*(part.shape for part in parts)) for name, parts in pruned.factors.items()} == {
        name: SVDFactors(*(part.shape for part in parts)) for name, parts in kept.factors.items()
    }
    for name in kept.modules:
        np.testing.assert_allclose(pruned.delta_weight(name), kept.delta_weight(name), atol=1e-4)
