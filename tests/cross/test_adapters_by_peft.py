"""Adapters made by PEFT: both stacks, the numpy hub and the oracle agree on them, and train as PEFT does."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import models
import numpy as np
import oracle
import peft
import pytest
import torch
from crossing import cross

import interop
import randlora_jax
import randlora_torch
from randlora_torch.layer import layer_shape


@pytest.fixture(scope="module", params=list(models.CASES))
def case(request):
    return request.param


@pytest.fixture(scope="module")
def peft_model(case):
    make, fields = models.CASES[case]
    model = peft.get_peft_model(make(), models.peft_config(fields))
    models.randomize((n, p) for n, p in model.named_parameters() if "randlora_" in n)
    return model


@pytest.fixture(scope="module")
def folder(peft_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("peft")
    peft_model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(folder, case):
    base = models.CASES[case][0]()
    loaded = interop.load(folder)
    return loaded.bind({name: layer_shape(base.get_submodule(name)) for name in loaded.modules})


def peft_layers(model):
    return {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, peft.tuners.randlora.RandLoraLayer)
    }


def relative_error(got, want):
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / np.linalg.norm(want)


def oracle_delta(adapter, name):
    return oracle.delta_weight(
        *adapter.bases, *adapter.factors[name], scaling=adapter.config.scaling, shape=adapter.shapes[name]
    )


def test_the_file_names_its_recipe_once_it_is_loaded(adapter, peft_model):
    assert adapter.recipe == interop.DEFAULT_RECIPE
    assert set(adapter.modules) == set(peft_layers(peft_model))


def test_delta_weights_agree_between_oracle_numpy_jax_torch_and_peft(adapter, peft_model):
    in_jax, in_torch = interop.convert(adapter, "jax"), interop.convert(adapter, "torch")
    for name, layer in peft_layers(peft_model).items():
        want = oracle_delta(adapter, name)
        by_peft = layer.get_delta_weight("default").detach().numpy()
        by_peft = by_peft.T if layer.fan_in_fan_out else by_peft
        for got in (adapter.delta_weight(name), in_jax.delta_weight(name), in_torch.delta_weight(name), by_peft):
            assert got.shape == want.shape == adapter.shapes[name]
            assert relative_error(got, want) < 1e-6, name


def test_gradients_of_lambda_and_gamma_agree_with_the_oracle_and_with_peft(adapter, peft_model, rng):
    in_jax, in_torch = interop.convert(adapter, "jax"), interop.convert(adapter, "torch")
    for name, layer in peft_layers(peft_model).items():
        shape, bases, pair = adapter.shapes[name], adapter.bases, adapter.factors[name]
        upstream = rng.standard_normal(shape).astype(np.float32)
        scaling = adapter.config.scaling
        want = oracle.gradients(*bases, *pair, scaling=scaling, shape=shape, upstream=upstream)

        grads = jax.grad(lambda t, n=name, u=upstream: (in_jax.with_trainable(t).delta_weight(n) * u).sum())(
            in_jax.trainable
        )[name]

        leaves = [part.requires_grad_() for part in in_torch.factors[name]]
        (in_torch.delta_weight(name) * torch.from_numpy(upstream)).sum().backward()

        layer.zero_grad()
        by_peft = layer.get_delta_weight("default")
        by_peft = by_peft.T if layer.fan_in_fan_out else by_peft
        (by_peft * torch.from_numpy(upstream)).sum().backward()
        peft_pair = layer.randlora_lambda["default"].grad, layer.randlora_gamma["default"].grad

        for index, expected in enumerate(want):
            assert relative_error(grads[index], expected) < 2e-6, name
            assert relative_error(leaves[index].grad, expected) < 2e-6, name
            assert relative_error(peft_pair[index], expected) < 2e-6, name


def test_logits_with_the_loaded_adapter_are_pefts(folder, case, peft_model):
    model = randlora_torch.load_adapter(models.CASES[case][0](), folder)
    ids = models.tokens()
    with torch.no_grad():
        want = models.logits(peft_model.eval(), ids)
        base = models.logits(models.CASES[case][0](), ids)
        got = models.logits(model, ids)
    assert (want - base).abs().max() > 0.05
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


@functools.cache
def losses_of_peft(name):
    make, fields = models.CASES[name]
    return torch_losses(peft.get_peft_model(make(), models.peft_config(fields)))


@cross(name=list(models.CASES), plan=["factored", "folded", "auto", "once"])
def test_twenty_adam_steps_give_pefts_losses_by_every_plan_and_once_per_step(name, plan):
    want = losses_of_peft(name)
    assert want[0] - want[-1] > 0.1
    make, fields = models.CASES[name]
    ours = randlora_torch.get_peft_model(make(), models.our_config(fields))
    randlora_torch.set_plan(ours, "auto" if plan == "once" else plan)
    fold = randlora_torch.fold_once if plan == "once" else contextlib.nullcontext
    np.testing.assert_allclose(torch_losses(ours, fold), want, rtol=0, atol=1e-5)


def torch_losses(model, fold=contextlib.nullcontext):
    model.eval()  # no dropout; gradients flow all the same
    ids = models.tokens()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(20):
        optimizer.zero_grad()
        with fold(model):
            out = models.logits(model, ids)
            loss = torch.nn.functional.cross_entropy(out[:, :-1].flatten(0, 1), ids[:, 1:].flatten() % out.shape[-1])
            loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_twenty_adam_steps_in_jax_give_pefts_losses():
    """The MLP as a plain JAX function over torch's own weights."""
    import optax

    make, fields = models.CASES["mlp"]
    want = losses_of_peft("mlp")
    state = {name: jnp.asarray(value.numpy()) for name, value in make().state_dict().items()}
    layers = ("wide", "square", "tall")
    params = {name: {"kernel": state[f"{name}.weight"].T, "bias": state[f"{name}.bias"]} for name in layers}
    ids = jnp.asarray(models.tokens().numpy())

    def loss(trainable, adapter, params):
        effective = randlora_jax.effective_params(params, adapter.with_trainable(trainable))
        x = jnp.sin(ids[..., None] * jnp.arange(1.0, 24.0))
        for name in layers:
            x = (jax.nn.relu(x) if name != "wide" else x) @ effective[name]["kernel"] + effective[name]["bias"]
        labels = ids[:, 1:] % x.shape[-1]
        return optax.softmax_cross_entropy_with_integer_labels(x[:, :-1], labels).mean()

    adapter = randlora_jax.init(models.our_config(fields), params)
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(trainable, state, adapter, params):
        value, grads = jax.value_and_grad(loss)(trainable, adapter, params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(trainable, updates), state, value

    trainable, got = adapter.trainable, []
    opt_state = optimizer.init(trainable)
    for _ in range(20):
        trainable, opt_state, value = step(trainable, opt_state, adapter, params)
        got.append(float(value))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)
