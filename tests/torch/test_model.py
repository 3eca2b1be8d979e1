"""Adapters on whole models: attached in place, with PEFT's names and counts, on the layers that were meant."""

import copy

import numpy as np
import pytest
import torch
from tolerances import TOLERANCE
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

import interop
from interop import RandLoraConfig
from interop.shapes import count_trainable
from randlora_torch import Linear, RandLoraModel, extract, get_peft_model, load_adapter
from tests.torch.conftest import (
    MLP,
    MODELS,
    TOKENS,
    X,
    assert_close,
    assert_same,
    config,
    every_model,
    layers_of,
    llama,
    loss_of,
    mlp,
    output,
    randomize,
    trained,
)


@every_model
def test_attaching_keeps_the_object_its_class_its_layers_names_and_its_output(kind):
    make, targets, count, base_kind = MODELS[kind]
    model = make()
    want, before = output(model), type(model)
    assert get_peft_model(model, config(targets)) is model
    assert isinstance(model, before)
    assert isinstance(model, RandLoraModel)
    assert isinstance(model, PreTrainedModel) == (kind != "MLP")
    assert type(model).__name__ == f"{before.__name__}"
    layers = layers_of(model)
    assert len(layers) == count
    assert all(type(layer) is Linear and type(layer.base_layer) is base_kind for _, layer in layers)
    assert all(name.endswith(tuple(targets)) for name, _ in layers)
    assert_same(output(model), want)


@every_model
def test_an_adapted_model_is_the_base_model_with_w_plus_dw(kind):
    model = trained(kind)
    plain = MODELS[kind][0]()
    for name, layer in layers_of(model):
        delta = layer.get_delta_weight("default").detach()
        weight = plain.get_submodule(name).weight
        weight.data += delta.T if isinstance(layer.base_layer, Conv1D) else delta
    assert (output(model) - output(MODELS[kind][0]())).abs().max() > 0.05
    assert_close(output(model), output(plain))


@every_model
def test_training_moves_lambda_and_gamma_and_nothing_else(kind):
    model = trained(kind).train()
    before = {name: tensor.clone() for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    wanted = {f"{path}.randlora_{part}.default" for path, _ in layers_of(model) for part in ("lambda", "gamma")}
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == wanted
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        loss_of(model).backward()
        optimizer.step()
    after = {name: tensor for name, tensor in (*model.named_parameters(), *model.named_buffers())}
    assert {name for name in before if not torch.equal(before[name], after[name])} == wanted
    assert all(tensor.isfinite().all() for tensor in after.values())


def test_training_recovers_the_outputs_of_another_adapter():
    model, target = get_peft_model(mlp(), config(["up", "down"])), output(trained())
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(100):
        optimizer.zero_grad()
        loss = (model(X) - target).square().mean()
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
    assert losses[-1] < 0.05 * losses[0]


@pytest.mark.parametrize("kind", ["Llama", "GPT-2", "BERT"])
def test_parameter_names_and_counts_are_those_of_peft(kind, capsys):
    peft = pytest.importorskip("peft")
    make, targets, _, _ = MODELS[kind]
    model = get_peft_model(make(), config(targets))
    theirs = peft.get_peft_model(
        make(), peft.RandLoraConfig(r=3, randlora_alpha=3, target_modules=targets, fan_in_fan_out=kind == "GPT-2")
    )
    ours = {name: (p.shape, p.requires_grad) for name, p in model.named_parameters()}
    wanted = {
        name.removeprefix("base_model.model."): (p.shape, p.requires_grad) for name, p in theirs.named_parameters()
    }
    assert ours == wanted
    model.print_trainable_parameters()
    line, rest = capsys.readouterr().out.split("\n", 1)
    theirs.print_trainable_parameters()
    assert line == capsys.readouterr().out.rstrip("\n")
    count = len(layers_of(model))
    frozen = model.randlora_A["default"].nbytes + model.randlora_B["default"].nbytes
    assert rest == f"frozen bases: {frozen:,d} bytes, shared by {count} layers\n"


def test_the_trainable_count_is_the_closed_form():
    model = get_peft_model(mlp(), config(["up", "down"], r=4))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == count_trainable((12, 6), 4) + count_trainable((6, 12), 4)


def test_all_layers_share_one_pair_of_bases_that_no_state_dict_holds():
    model = trained("Llama")
    layers = [layer for _, layer in layers_of(model)]
    assert {id(layer.randlora_A) for layer in layers} == {id(model.randlora_A)}
    assert {layer.randlora_B["default"].data_ptr() for layer in layers} == {model.randlora_B["default"].data_ptr()}
    assert [name for name in model.state_dict() if "randlora_A" in name or "randlora_B" in name] == []
    # q (16, 16), v (8, 16), down (16, 24)
    want = interop.make_bases(config(["x"]), max_dim=24, min_dim=16)
    assert interop.bases_digest(extract(model).to_interop().bases) == interop.bases_digest(want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_converting_the_model_converts_its_factors_but_not_its_bases(dtype):
    model = trained("MLP")
    bases = model.randlora_B["default"].clone()
    model.to(dtype)
    assert_same(model.randlora_B["default"], bases)
    factors = layers_of(model)[0][1].factors("default")
    assert {part.dtype for part in factors} == {dtype}
    with torch.no_grad():
        assert model(X.to(dtype)).dtype == dtype


def test_a_half_precision_model_gets_float32_factors():
    model = get_peft_model(llama().bfloat16(), config(["q_proj"]))
    assert {part.dtype for _, layer in layers_of(model) for part in layer.factors("default")} == {torch.float32}
    assert output(model).dtype == torch.bfloat16
    loss_of(randomize(model)).backward()
    assert all(layer.factors("default").lam.grad.dtype == torch.float32 for _, layer in layers_of(model))


def test_a_deep_copy_computes_the_same_shares_its_own_bases_and_trains_apart():
    model = trained()
    want = output(model)
    twin = copy.deepcopy(model)
    assert_same(output(twin), want)
    assert type(twin) is type(model)
    layers = [layer for _, layer in layers_of(twin)]
    assert all(layer.randlora_A is twin.randlora_A for layer in layers)
    assert twin.randlora_A is not model.randlora_A
    randomize(twin, seed=3)
    assert not torch.equal(output(twin), want)
    assert_same(output(model), want)


def test_a_model_in_training_mode_keeps_its_mode_and_drops_inputs():
    model = get_peft_model(mlp().train(), config(["up"], randlora_dropout=0.5))
    randomize(model)
    assert model.up.training
    assert model.up.randlora_dropout["default"].p == 0.5
    torch.manual_seed(0)
    first = output(model)
    assert not torch.equal(output(model), first)
    model.eval()
    assert_same(output(model), output(model))


def test_a_model_as_a_whole_follows_autocast_and_gradient_checkpointing():
    model, twin = trained("Llama").train(), trained("Llama").train()
    twin.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    loss_of(model).backward()
    loss_of(twin).backward()
    for (_, ours), (_, theirs) in zip(layers_of(twin), layers_of(model), strict=True):
        for got, want in zip(ours.factors("default"), theirs.factors("default"), strict=True):
            torch.testing.assert_close(got.grad, want.grad, **TOLERANCE["float32", "gradient"])
    with torch.autocast("cpu", torch.bfloat16):
        assert output(model).dtype == torch.bfloat16


def test_a_generating_model_still_generates_with_its_adapter():
    model = trained("Llama")
    tokens = model.generate(TOKENS, max_new_tokens=3, do_sample=False, pad_token_id=0)
    logits = model(tokens[:, :-1]).logits[:, -3:]
    assert_same(tokens[:, -3:], logits.argmax(-1))


@pytest.mark.parametrize(
    ("fields", "chosen"),
    [
        ({"target_modules": "all-linear"}, 14),
        ({"target_modules": r".*layers\.1\..*proj"}, 7),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1]}, 1),
        ({"target_modules": ["lm_head"]}, 1),
        ({"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj"]}, 12),
    ],
    ids=str,
)
def test_targets_are_found_as_in_peft(fields, chosen):
    model = get_peft_model(llama(), RandLoraConfig(r=3, **fields))
    assert len(layers_of(model)) == chosen


def test_linear_layers_that_are_read_without_being_called_are_left_alone():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attn, self.out = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    model = get_peft_model(Attends(), config("all-linear"))
    assert [name for name, _ in layers_of(model)] == ["out"]


def test_init_weights_false_follows_torchs_seed():
    made = []
    for seed in (0, 0, 1):
        model = mlp()
        torch.manual_seed(seed)
        get_peft_model(model, config(["up"], init_weights=False))
        made.append(model.up.factors("default"))
    assert_same(made[0].lam, made[1].lam)
    assert not torch.equal(made[0].lam, made[2].lam)
    np.testing.assert_array_equal(made[0].gamma.detach(), np.float32(1 / 12))


def test_the_name_of_the_base_model_is_recorded():
    model = llama()
    model.config._name_or_path = model.name_or_path = "some/base"
    assert extract(get_peft_model(model, config(["q_proj"]))).config.base_model_name_or_path == "some/base"
    assert extract(get_peft_model(mlp(), config(["up"]))).config.base_model_name_or_path is None


@pytest.mark.parametrize("name", ["", "a.b"])
def test_names_that_cannot_be_those_of_parameters_are_refused(name):
    message = rf"adapter_name='{name}': must be a non-empty name without dots"
    with pytest.raises(ValueError, match=message):
        get_peft_model(mlp(), config(["up"]), name)
    with pytest.raises(ValueError, match=message):
        load_adapter(mlp(), extract(trained()), name)


def test_a_name_that_is_taken_is_refused_and_the_model_stays_as_it_was():
    model = trained()
    want = output(model)
    with pytest.raises(ValueError, match=r"adapter_name='default' is taken: the model has \['default'\]\."):
        get_peft_model(model, config(["up"]))
    with pytest.raises(ValueError, match=r"adapter_name='default' is taken"):
        load_adapter(model, extract(trained(r=2)))
    assert_same(output(model), want)


@pytest.mark.parametrize("name", ["up", "keys", "training", "weight"])
def test_names_that_torch_uses_itself_work_or_are_refused(name):
    # An adapter's name becomes a key of ParameterDict and ModuleDict and the name of a buffer.
    want = output(trained())
    try:
        model = trained(name=name)
    except ValueError as error:
        assert "adapter_name" in str(error)  # noqa: PT017
    else:
        assert_same(output(model), want)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["norm"], r"entry 'norm' matches none of the 3 adaptable layers\. It matches 'norm', which is not a linear"),
        (["upp"], r"Did you mean 'up'\?"),
        (None, r"target_modules=None: name the layers to adapt"),
    ],
)
def test_a_target_that_adapts_nothing_is_refused(targets, message):
    with pytest.raises(ValueError, match=message):
        get_peft_model(mlp(), config(targets))


REFUSED = [
    ({"modules_to_save": ["nope"]}, r"modules_to_save entry 'nope' matches no module of the model\. Name it in full\."),
    ({"modules_to_save": ["up"]}, r"modules_to_save=\('up',\) and layers_to_transform=None leaves no layer to adapt"),
    ({"task_type": "SEQ_CLS"}, r"task_type='SEQ_CLS': the model has no head named classifier or score\."),
    ({"task_type": "TOKEN_CLS"}, r"task_type='TOKEN_CLS': the model has no head named classifier or score\."),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=str)
def test_a_refused_config_leaves_the_model_as_it_was(fields, message):
    model = mlp()
    keys = list(model.state_dict())
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(["up"], **fields))
    assert list(model.state_dict()) == keys
    assert type(model) is MLP
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_sequential_model_computes_its_own_chain_only():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x, names = torch.randn(4, 6), [name for name, _ in base.named_children()]
    want = base(x)
    model = get_peft_model(base, RandLoraConfig(r=4, target_modules="all-linear"))
    assert [name for name, _ in model.named_children()] == names
    torch.testing.assert_close(model(x), want)
