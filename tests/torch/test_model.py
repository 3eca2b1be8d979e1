"""Adapters on whole models: attached in place, several by name, saved and loaded, merged and switched off."""

import copy
import dataclasses

import numpy as np
import pytest
import torch
from stacks import without_type_checks
from tolerances import TOLERANCE
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

import interop
from interop import DEFAULT_RECIPE, Adapter, AdapterFormatError, RandLoraConfig
from interop.shapes import count_trainable
from randlora_torch import (
    Linear,
    RandLoraAdapter,
    RandLoraLayer,
    RandLoraMixin,
    extract,
    get_peft_model,
    load_adapter,
)


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6, bias=False)
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.norm(self.down(torch.relu(self.up(x)))))


def mlp(seed=0):
    torch.manual_seed(seed)
    return MLP()


def llama(seed=0, **fields):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    heads = {"num_key_value_heads": 1, "vocab_size": 40, "max_position_embeddings": 16, "initializer_range": 0.3}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **heads, **fields})).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=40, n_positions=16, initializer_range=0.3)
    ).eval()


def bert(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    return BertForSequenceClassification(
        BertConfig(vocab_size=40, max_position_embeddings=16, initializer_range=0.3, **sizes)
    ).eval()


MODELS = {  # maker, targets, how many layers they are, the kind of base layer
    "MLP": (mlp, ["up", "down"], 2, nn.Linear),
    "Llama": (llama, ["q_proj", "v_proj", "down_proj"], 6, nn.Linear),
    "GPT-2": (gpt2, ["c_attn", "c_fc"], 4, Conv1D),
    "BERT": (bert, ["query", "value", "intermediate.dense"], 6, nn.Linear),
}
every_model = pytest.mark.parametrize("kind", MODELS)
X = torch.randn(4, 6, generator=torch.Generator().manual_seed(9))
TOKENS = torch.randint(0, 40, (2, 7), generator=torch.Generator().manual_seed(9))


def config(targets, **fields):
    """A small config; alpha = r keeps updates of order 1."""
    return RandLoraConfig(**{"r": 3, "randlora_alpha": 3, "target_modules": targets, **fields})


def output(model):
    """Logits for a fixed input."""
    with torch.no_grad():
        return model(X) if isinstance(model, MLP) else model(TOKENS).logits


def loss_of(model):
    return (model(X) if isinstance(model, MLP) else model(TOKENS).logits).square().sum()


def randomize(model, name="default", seed=0):
    """Random lambda and gamma, as after training."""
    generator = torch.Generator().manual_seed(seed)
    for _, layer in layers_of(model, name):
        for parameter in layer.factors(name):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 3)
    return model


def layers_of(model, name="default"):
    return [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, RandLoraLayer) and name in module.randlora_lambda
    ]


def trained(kind="MLP", name="default", **fields):
    make, targets, _, _ = MODELS[kind]
    return randomize(get_peft_model(make(), config(targets, **fields), name), name)


def assert_same(got, want):
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def assert_close(got, want):
    torch.testing.assert_close(got, want, **TOLERANCE["float32", "forward"])


@every_model
def test_attaching_keeps_the_object_its_class_its_layers_names_and_its_output(kind):
    make, targets, count, base_kind = MODELS[kind]
    model = make()
    want, before = output(model), type(model)
    assert get_peft_model(model, config(targets)) is model
    assert isinstance(model, before)
    assert isinstance(model, RandLoraMixin)
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


@every_model
def test_save_and_load_give_bit_equal_logits(kind, tmp_path):
    model = trained(kind)
    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    again = load_adapter(MODELS[kind][0](), tmp_path)
    assert_same(output(again), output(model))
    assert extract(again).recipe == extract(model).recipe == DEFAULT_RECIPE


def test_a_named_adapter_is_saved_in_a_folder_of_its_name(tmp_path):
    model = trained()
    load_adapter(model, extract(trained(r=2, sparse=True)), "other")
    model.save_pretrained(tmp_path)
    for folder, name in ((tmp_path, "default"), (tmp_path / "other", "other")):
        alone = load_adapter(mlp(), folder, name)
        model.set_adapter(name)
        assert_same(output(alone), output(model))
    model.save_pretrained(tmp_path / "selected", selected_adapters=["other"])
    assert [path.name for path in (tmp_path / "selected").iterdir()] == ["other"]
    model.save_pretrained(tmp_path / "worker", is_main_process=False)
    assert not (tmp_path / "worker").exists()


def test_saving_changes_nothing_and_refuses_adapters_that_are_not_attached(tmp_path):
    model = trained()
    want, before = output(model), copy.deepcopy(model.state_dict())
    model.save_pretrained(tmp_path)
    assert_same(output(model), want)
    assert_same(dict(model.state_dict()), dict(before))
    with pytest.raises(ValueError, match=r"adapter 'nope' is not attached: the model has \['default'\]\."):
        model.save_pretrained(tmp_path / "none", selected_adapters=["default", "nope"])
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_factors_keep_their_dtype_through_save_and_load(dtype, tmp_path):
    model = trained().to(dtype)
    model.save_pretrained(tmp_path)
    again = load_adapter(mlp().to(dtype), tmp_path)
    assert {part.dtype for part in layers_of(again)[0][1].factors("default")} == {dtype}
    with torch.no_grad():
        assert_same(again(X.to(dtype)), model(X.to(dtype)))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_a_loaded_adapter_trains_only_if_asked_to(is_trainable):
    model = load_adapter(mlp(), extract(trained()), is_trainable=is_trainable)
    trainable = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert len(trainable) == (4 if is_trainable else 0)
    assert model.randlora_adapters["default"].recipe == DEFAULT_RECIPE


def test_an_adapter_of_any_form_loads_alike(tmp_path):
    model = trained()
    model.save_pretrained(tmp_path)
    adapter = extract(model)
    hub = adapter.to_interop()
    bare = dataclasses.replace(hub, bases=None, shapes=None)
    for source in (adapter, hub, bare, tmp_path, str(tmp_path), RandLoraAdapter.from_interop(hub)):
        assert_same(output(load_adapter(mlp(), source)), output(model))


@pytest.mark.parametrize("wrong", [None, 3, {"r": 4}])
def test_loading_something_else_is_a_type_error(wrong):
    message = r"dir_or_adapter is a (NoneType|int|dict): pass an adapter folder or an adapter\."
    with without_type_checks(), pytest.raises(TypeError, match=message):
        load_adapter(mlp(), wrong)


def test_extract_gives_the_current_factors_and_what_the_adapter_was_made_with():
    model = trained()
    adapter = extract(model)
    assert adapter.modules == ("down", "up")
    assert adapter.shapes == {"down": (6, 12), "up": (12, 6)}
    assert adapter.config.r == 3
    for name, layer in layers_of(model):
        assert_same(adapter.delta_weight(name), layer.get_delta_weight("default").detach())
        assert all(not part.requires_grad for part in adapter.factors[name])
    randomize(model, seed=5)
    assert_same(adapter.factors["up"].lam, model.up.factors("default").lam.detach())
    assert isinstance(adapter.to_interop(), Adapter)


def test_extract_needs_a_name_if_there_are_several_adapters_or_none():
    with pytest.raises(ValueError, match=r"the model has the adapters \[\]: pass adapter_name to say which one\."):
        extract(mlp())
    model = load_adapter(trained(), extract(trained()), "b")
    with pytest.raises(ValueError, match=r"the model has the adapters \['default', 'b'\]: pass adapter_name"):
        extract(model)
    with pytest.raises(ValueError, match=r"adapter 'c' is not attached: the model has \['default', 'b'\]\."):
        extract(model, "c")
    assert extract(model, "b").modules == ("down", "up")


SECOND = {  # what PEFT gets wrong for a second adapter: its bases, its rank, its size
    "sparse": {"sparse": True},
    "smaller r": {"r": 2},
    "larger r": {"r": 5},
    "another seed": {"projection_prng_key": 7},
    "fewer targets": {"targets": ["head"]},
}


@pytest.mark.parametrize("difference", SECOND)
def test_a_second_adapter_neither_disturbs_the_first_nor_differs_from_being_alone(difference, tmp_path):
    first, second = (
        trained(),
        randomize(get_peft_model(mlp(), config(**{"targets": ["up", "down"], **SECOND[difference]})), seed=1),
    )
    want_first, want_second = output(first), output(second)
    second.save_pretrained(tmp_path)
    model = load_adapter(first, tmp_path, "second")
    assert_same(output(model), want_first)
    model.set_adapter("second")
    assert_same(output(model), want_second)
    model.set_adapter("default")
    assert_same(output(model), want_first)
    model.save_pretrained(tmp_path / "both")
    assert_same(output(load_adapter(mlp(), tmp_path / "both" / "second")), want_second)
    assert_same(output(load_adapter(mlp(), tmp_path / "both")), want_first)


def test_a_second_new_adapter_becomes_the_active_one_and_starts_at_no_update():
    model = trained()
    get_peft_model(model, config(["up", "head"], r=2), "second")
    assert_same(output(model), output(mlp()))
    assert list(model.randlora_adapters) == ["default", "second"]
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {f"{layer}.randlora_{part}.second" for layer in ("up", "head") for part in ("lambda", "gamma")}


def test_active_adapters_add_up_and_set_adapter_says_which_of_them_train():
    model = load_adapter(trained(), extract(trained(r=2, sparse=True)), "b")
    assert {layer.active_adapters[0] for _, layer in layers_of(model)} == {"default"}
    model.set_adapter(["default", "b"])
    plain = mlp()
    for name, layer in layers_of(model):
        for adapter in ("default", "b"):
            plain.get_submodule(name).weight.data += layer.get_delta_weight(adapter).detach()
    assert_close(output(model), output(plain))
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"default", "b"}
    model.set_adapter("b")
    assert {name.rsplit(".", 1)[1] for name, p in model.named_parameters() if p.requires_grad} == {"b"}
    with pytest.raises(ValueError, match=r"adapter 'c' is not attached: the model has \['default', 'b'\]\."):
        model.set_adapter(["b", "c"])
    assert model.up.active_adapters == ["b"]


@every_model
def test_a_merged_model_computes_the_same_and_unmerging_restores_it(kind):
    model = trained(kind)
    want = output(model)
    weights = {name: layer.base_layer.weight.clone() for name, layer in layers_of(model)}
    model.merge_adapter()
    assert all(layer.merged for _, layer in layers_of(model))
    assert_close(output(model), want)
    model.merge_adapter()
    assert_close(output(model), want)
    model.unmerge_adapter()
    for name, layer in layers_of(model):
        torch.testing.assert_close(layer.base_layer.weight.data, weights[name], **TOLERANCE["float32", "merge"])
    assert_close(output(model), want)


def test_a_safe_merge_that_fails_in_one_layer_leaves_every_layer_as_it_was():
    model = trained()
    last = layers_of(model)[-1][0]
    model.get_submodule(last).factors("default").gamma.data[0, 0] = float("nan")
    weights = {name: layer.base_layer.weight.clone() for name, layer in layers_of(model)}
    with pytest.raises(ValueError, match=rf"merging \['default'\] would make the weight of {last} not finite"):
        model.merge_adapter(safe_merge=True)
    for name, layer in layers_of(model):
        assert not layer.merged
        assert_same(layer.base_layer.weight.data, weights[name])


def test_merging_an_adapter_that_is_not_attached_is_refused():
    model = trained()
    with pytest.raises(ValueError, match=r"adapter 'b' is not attached: the model has \['default'\]\."):
        model.merge_adapter(["default", "b"])
    assert not model.up.merged


@pytest.mark.parametrize("merged", [False, True])
def test_with_the_adapter_disabled_the_model_computes_as_the_base_model(merged):
    model = trained()
    want = output(model)
    if merged:
        model.merge_adapter()
    with model.disable_adapter():
        assert_close(output(model), output(mlp()))
    assert model.up.merged is merged
    assert_close(output(model), want)


def test_an_exception_while_disabled_still_enables_the_adapter_again():
    model = trained()
    want = output(model)
    with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
        raise RuntimeError("inside")
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


def test_the_recipe_of_the_bases_can_be_chosen_and_is_remembered(tmp_path):
    fields = {"save_projection": False}
    model = randomize(get_peft_model(mlp(), config(["up"], **fields), recipe="torch<=2.11"))
    assert extract(model).recipe == "torch<=2.11"
    model.save_pretrained(tmp_path)
    assert_same(output(load_adapter(mlp(), tmp_path)), output(model))
    assert_same(output(load_adapter(mlp(), tmp_path, recipe="torch<=2.11")), output(model))


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
    ("fields", "message"),
    [
        ({"bias": "all"}, r"bias='all', modules_to_save=None: this release trains lambda and gamma only\. Use bias"),
        ({"bias": "randlora_only"}, r"bias='randlora_only'"),
        ({"modules_to_save": ["head"]}, r"modules_to_save=\('head',\): this release trains lambda and gamma only"),
    ],
)
def test_biases_and_modules_to_save_are_refused_before_the_model_is_changed(fields, message):
    model = mlp()
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, config(["up"], **fields))
    assert type(model) is MLP
    assert type(model.up) is nn.Linear
    assert all(parameter.requires_grad for parameter in model.parameters())


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


def test_an_adapter_for_another_model_is_refused_and_the_model_stays_as_it_was():
    other = nn.ModuleDict({"up": nn.Linear(6, 13)})
    with pytest.raises(AdapterFormatError, match=r"the model lacks these adapted layers .*:\n  - down$"):
        load_adapter(other, extract(trained()))
    only_up = extract(randomize(get_peft_model(mlp(), config(["up"]))))
    with pytest.raises(AdapterFormatError, match=r"up: the model has \(13, 6\), the adapter was made for \(12, 6\)"):
        load_adapter(other, only_up)
    assert type(other) is nn.ModuleDict
    assert type(other["up"]) is nn.Linear


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_adapter(mlp(), tmp_path / "nowhere")


def test_state_dicts_of_two_models_with_equal_adapters_are_interchangeable():
    model, other = trained(), get_peft_model(mlp(1), config(["up", "down"]))
    other.load_state_dict(model.state_dict())
    assert_same(output(other), output(model))


def test_a_later_adapter_stays_inactive_also_on_layers_that_the_first_does_not_adapt():
    model, base = mlp(), mlp()
    x = torch.randn(3, model.up.in_features)
    get_peft_model(model, RandLoraConfig(r=4, target_modules=["up"]))
    other = get_peft_model(mlp(), RandLoraConfig(r=4, target_modules=["down"], init_weights=False))
    load_adapter(model, extract(other), "second")
    torch.testing.assert_close(model(x), base(x))
    model.set_adapter("second")
    torch.testing.assert_close(model(x), other(x))


def test_a_refused_layer_leaves_the_model_as_it_was():
    model = mlp()
    keys, kind = list(model.state_dict()), type(model)
    with pytest.raises(ValueError, match="bias='all'"):
        get_peft_model(model, RandLoraConfig(r=4, target_modules=["up"], bias="all"))
    assert list(model.state_dict()) == keys
    assert type(model) is kind
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_sequential_model_computes_its_own_chain_only():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    x, names = torch.randn(4, 6), [name for name, _ in base.named_children()]
    want = base(x)
    model = get_peft_model(base, RandLoraConfig(r=4, target_modules="all-linear"))
    assert [name for name, _ in model.named_children()] == names
    torch.testing.assert_close(model(x), want)
