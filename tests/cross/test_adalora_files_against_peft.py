"""AdaLoRA: PEFT's own folders through `interop`, ours through PEFT, and the schedule step by step."""

import dataclasses
import json
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import models
import numpy as np
import optax
import oracle
import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft.tuners.adalora import RankAllocator
from peft.tuners.adalora.layer import AdaLoraLayer
from safetensors.numpy import load_file
from strategies import draw_adalora, schedules
from tolerances import TOLERANCE
from torch import nn
from transformers.pytorch_utils import Conv1D

import randlora_jax
import randlora_torch
from interop import AdaLoraConfig, load, save
from interop.schedule import budgets, is_allocated, is_measured
from randlora_jax import Layout, adalora

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
SCHEDULE = {"init_r": 4, "target_r": 1, "tinit": 2, "tfinal": 2, "total_step": 8, "lora_alpha": 3}


class Convolutions(nn.Module):
    """Two convolutions with kernels that are not square, and a linear layer."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 6, (3, 2)), nn.Conv2d(6, 5, (2, 3), stride=2)
        self.out = nn.Linear(5, 7)

    def forward(self, input_ids):
        x = torch.sin(input_ids[:, None, :, None] * torch.arange(1.0, 7.0))  # (B, T) -> (B, 1, T, 6)
        return self.out(self.second(torch.relu(self.first(x))).mean((2, 3)))


def convolutions():
    torch.manual_seed(0)
    return Convolutions().eval()


class Case(NamedTuple):
    """A base model, and the fields of an AdaLoRA config for it."""

    make: Any
    fields: dict[str, Any]


GPT2_TARGETS = ["c_attn", "c_fc", "c_proj"]
CASES = {
    "llama": Case(models.llama, {"target_modules": models.LLAMA_TARGETS, "task_type": "CAUSAL_LM"}),
    "gpt2": Case(models.gpt2, {"target_modules": GPT2_TARGETS, "fan_in_fan_out": True}),
    "mlp": Case(models.mlp, {"target_modules": ["wide", "square", "tall"]}),
    "conv": Case(convolutions, {"target_modules": ["first", "second", "out"]}),
}
STEPS = {"unpruned": SCHEDULE["tinit"], "pruned": SCHEDULE["total_step"]}


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT takes a layer of rank 0 for one that DeepSpeed did not gather
        yield


class Trained(NamedTuple):
    """A PEFT model after some steps, and the folder that PEFT wrote of it."""

    case: Case
    model: Any
    folder: Any
    pruned: bool


@pytest.fixture(scope="module", params=[(name, stage) for name in CASES for stage in STEPS], ids="-".join)
def trained(request, tmp_path_factory):
    name, stage = request.param
    case, folder = CASES[name], tmp_path_factory.mktemp(name)
    torch.manual_seed(0)
    config = peft.AdaLoraConfig(**SCHEDULE, **case.fields, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(case.make(), config)
        train(model, STEPS[stage])
        model.save_pretrained(folder)
    return Trained(case, model.eval(), folder, pruned=stage == "pruned")


def train(model, steps):
    """PEFT's loop; the layer that the model asks first hardly matters, so that it loses all its triplets."""
    ids = models.tokens()
    with torch.no_grad():
        next(iter(peft_layers(model).values())).lora_A["default"] *= 1e-3
    wanted = torch.randn(models.logits(model, ids).shape)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for step in range(1, steps + 1):
        (models.logits(model, ids) - wanted).square().mean().backward()
        optimizer.step()
        model.base_model.update_and_allocate(step)
        optimizer.zero_grad()


def reloaded(case, folder):
    return peft.PeftModel.from_pretrained(case.make(), folder).eval()


def peft_layers(model):
    prefix = "base_model.model."
    return {name.removeprefix(prefix): m for name, m in model.named_modules() if isinstance(m, AdaLoraLayer)}


def peft_delta(layer):
    """In (out, in) orientation, a convolution's kernel flattened."""
    delta = layer.get_delta_weight("default").detach().numpy()
    return delta.T if getattr(layer, "fan_in_fan_out", False) else delta.reshape(len(delta), -1)


def assert_same_deltas(adapter, model):
    layers = peft_layers(model)
    assert set(adapter.modules) == set(layers)
    for name, layer in layers.items():
        want = peft_delta(layer)
        assert adapter.delta_weight(name).shape == want.shape == adapter.shapes[name]
        np.testing.assert_allclose(adapter.delta_weight(name), want, rtol=1e-6, atol=1e-6 * abs(want).max(initial=0))


def assert_same_tensors(folder, other):
    one, two = load_file(folder / WEIGHTS), load_file(other / WEIGHTS)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert (value.dtype, value.shape, value.tobytes()) == (two[key].dtype, two[key].shape, two[key].tobytes()), key


def with_adapter_and_without(model):
    """Logits (with, without)."""
    with torch.no_grad():
        both = models.logits(model, models.tokens()).numpy()
        with model.disable_adapter():
            return both, models.logits(model, models.tokens()).numpy()


def test_training_took_triplets_away_and_left_some_layer_none(trained):
    adapter = load(trained.folder)
    ranks = [adapter.config.rank(name) for name in adapter.modules]
    if trained.pruned:
        assert sum(ranks) == SCHEDULE["target_r"] * len(ranks)
        assert min(ranks) == 0
    else:
        assert adapter.config.rank_pattern is None
        assert set(ranks) == {SCHEDULE["init_r"]}


def test_an_adapter_by_peft_has_the_update_that_peft_computes(trained):
    adapter = load(trained.folder)
    assert_same_deltas(adapter, trained.model)
    assert_same_deltas(adapter, reloaded(trained.case, trained.folder))
    for name, factors in adapter.factors.items():
        naive = oracle.svd_delta_weight(*factors, scaling=adapter.config.scaling)
        np.testing.assert_allclose(adapter.delta_weight(name), naive, **TOLERANCE["float64"])


def test_a_folder_by_peft_keeps_its_values_through_load_and_save_and_then_its_bytes(trained, tmp_path):
    save(load(trained.folder), tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    assert_same_tensors(trained.folder, tmp_path / "one")
    assert (tmp_path / "one" / CONFIG).read_text() == (trained.folder / CONFIG).read_text()
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_peft_reads_our_folder_and_computes_the_same_outputs(trained, tmp_path):
    save(load(trained.folder), tmp_path / "ours")
    want, base = with_adapter_and_without(reloaded(trained.case, trained.folder))
    got, _ = with_adapter_and_without(reloaded(trained.case, tmp_path / "ours"))
    assert abs(want - base).max() > 0.05
    np.testing.assert_array_equal(got, want)


def test_peft_writes_our_folder_again_as_it_was(trained, tmp_path):
    save(load(trained.folder), tmp_path / "ours")
    reloaded(trained.case, tmp_path / "ours").save_pretrained(tmp_path / "theirs")
    assert_same_tensors(tmp_path / "ours", tmp_path / "theirs")
    ours, theirs = (load(tmp_path / name).config for name in ("ours", "theirs"))
    assert dataclasses.replace(theirs, target_modules=None) == dataclasses.replace(ours, target_modules=None)
    assert set(theirs.target_modules) == set(ours.target_modules)


def kernels(model):
    """A torch model's layers as a pytree of flax's kernels, and the layouts of the convolutions among them."""
    params, layouts = {}, {}
    for name, layer in model.named_modules():
        weight = getattr(layer, "weight", None)
        if isinstance(layer, nn.Conv2d):
            params[name] = {"kernel": jnp.asarray(weight.detach().numpy().transpose(2, 3, 1, 0))}  # (h, w, in, out)
            layouts[name] = Layout((2, 0, 1), (3,))
        elif isinstance(layer, nn.Linear | Conv1D):
            matrix = weight.detach().numpy()
            params[name] = {"kernel": jnp.asarray(matrix if isinstance(layer, Conv1D) else matrix.T)}
    return params, layouts


def test_both_stacks_compute_what_peft_does_from_its_folder_and_save_it_as_it_was(trained, tmp_path):
    model = randlora_torch.load_adapter(trained.case.make(), trained.folder).eval()
    want, base = with_adapter_and_without(reloaded(trained.case, trained.folder))
    got, without = with_adapter_and_without(model)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=2e-6)
    np.testing.assert_array_equal(without, base)
    model.save_pretrained(tmp_path / "torch")
    params, layouts = kernels(trained.case.make())
    adapter = randlora_jax.load_adapter(trained.folder, params, layouts=layouts)
    effective = randlora_jax.merge(params, adapter)
    model.merge_adapter()
    merged, _ = kernels(model.merge_and_unload())
    for name in adapter.modules:
        np.testing.assert_allclose(effective[name]["kernel"], merged[name]["kernel"], rtol=1e-5, atol=1e-6)
    adapter.save_pretrained(tmp_path / "jax")
    for stack in ("torch", "jax"):
        assert_same_tensors(trained.folder, tmp_path / stack)
        assert (tmp_path / stack / CONFIG).read_text() == (trained.folder / CONFIG).read_text()
    assert (tmp_path / "jax" / WEIGHTS).read_bytes() == (tmp_path / "torch" / WEIGHTS).read_bytes()


@pytest.mark.parametrize("case", ["mlp", "conv"])
def test_an_adapter_trained_in_jax_is_read_by_peft_and_torch_to_the_same_update(case, tmp_path):
    base = CASES[case].make()
    params, layouts = kernels(base)
    config = AdaLoraConfig(**SCHEDULE, target_modules=tuple(params))
    adapter = adalora.init(config, params, layouts=layouts, key=jax.random.key(0))
    optimizer = adalora.rank_allocator(optax.adam(1e-1), adapter)
    trainable, state = adapter.trainable, optimizer.init(adapter.trainable)

    @jax.jit
    def step(trainable, state):
        def loss(trainable):
            now = randlora_jax.effective_params(params, adapter.with_trainable(trainable))
            return sum((kernel["kernel"] ** 2).sum() for kernel in now.values())

        updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
        return optax.apply_updates(trainable, updates), state

    for _ in range(config.total_step):
        trainable, state = step(trainable, state)
    pruned = adalora.prune(adapter.with_trainable(trainable), state)
    pruned.save_pretrained(tmp_path / "jax")
    theirs = reloaded(CASES[case], tmp_path / "jax")
    assert_same_deltas(load(tmp_path / "jax"), theirs)
    ours = randlora_torch.load_adapter(CASES[case].make(), tmp_path / "jax").eval()
    assert 0 < sum(ours.ranks().values()) <= SCHEDULE["target_r"] * len(params)
    got, without = with_adapter_and_without(ours)
    np.testing.assert_allclose(got, with_adapter_and_without(theirs)[0], rtol=1e-5, atol=2e-6)
    assert abs(got - without).max() > 1e-3
    ours.save_pretrained(tmp_path / "torch")
    for name in (CONFIG, WEIGHTS):
        assert (tmp_path / "jax" / name).read_bytes() == (tmp_path / "torch" / name).read_bytes()


def shapes_of(case):
    """(out, in) of the layers that a case adapts."""
    layers = peft_layers(peft.get_peft_model(case.make(), peft.AdaLoraConfig(total_step=9, **case.fields)))
    return {name: peft_delta(layer).shape for name, layer in layers.items()}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pruned", [True, False])
def test_an_adapter_born_here_is_read_by_peft_to_the_same_update(tmp_path, name, pruned):
    case = CASES[name]
    shapes = shapes_of(case)
    masks = np.random.default_rng(1).random((len(shapes), 5)) < 0.5
    masks[0], masks[1] = False, True
    kept = dict(zip(shapes, masks, strict=True)) if pruned else None
    adapter = draw_adalora(3, shapes=shapes, kept=kept, **case.fields, init_r=5, lora_alpha=7)
    save(adapter, tmp_path)
    model = reloaded(case, tmp_path)
    assert_same_deltas(adapter, model)
    ranks = [len(layer.lora_E["default"]) for layer in peft_layers(model).values()]
    assert ranks == ([int(mask.sum()) for mask in masks] if pruned else [5] * len(shapes))
    again, base = with_adapter_and_without(model)
    assert abs(again - base).max() > 0.05


def test_where_ours_says_all_linear_peft_adapts_the_layers_of_the_adapter(tmp_path):
    case, shapes = CASES["mlp"], {"wide": (10, 23), "tall": (37, 10)}
    adapter = draw_adalora(3, shapes=shapes, target_modules="all-linear", exclude_modules=["square"])
    save(adapter, tmp_path)
    assert_same_deltas(adapter, reloaded(case, tmp_path))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_file_by_peft_is_read_in_its_dtype(tmp_path, dtype):
    case = CASES["mlp"]
    config = peft.AdaLoraConfig(**SCHEDULE, **case.fields, init_lora_weights=False)
    model = peft.get_peft_model(case.make().to(dtype), config, autocast_adapter_dtype=False)
    kept = {"wide": [True, False, False, True], "square": [False] * 4, "tall": [True] * 4}
    model.peft_config["default"].rank_pattern = {f"{name}.lora_E.default": mask for name, mask in kept.items()}
    model.save_pretrained(tmp_path / "peft")
    adapter = load(tmp_path / "peft")
    assert {name: len(factors.E) for name, factors in adapter.factors.items()} == {"wide": 2, "square": 0, "tall": 4}
    arrays = [part for factors in adapter.factors.values() for part in factors]
    assert {array.dtype.name for array in arrays} == {str(dtype).removeprefix("torch.")}
    save(adapter, tmp_path / "ours")
    assert_same_tensors(tmp_path / "peft", tmp_path / "ours")
    for folder in ("peft", "ours"):
        assert_same_deltas(adapter, reloaded(case, tmp_path / folder))  # in float32, to which PEFT widens


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_half_precision_file_of_ours_is_read_by_peft(tmp_path, dtype):
    case = CASES["conv"]
    adapter = draw_adalora(2, shapes=shapes_of(case), dtype=dtype, **case.fields)
    save(adapter, tmp_path)
    assert_same_deltas(adapter, reloaded(case, tmp_path))


class Net(nn.Module):
    """Two layers to adapt, a normalization with a bias and a head."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 12)
        self.norm, self.head = nn.LayerNorm(12), nn.Linear(12, 3)

    def forward(self, input_ids):
        x = torch.sin(input_ids[..., None] * torch.arange(1.0, 13.0))
        return self.head(self.norm(self.down(torch.tanh(self.up(x)))))


def net():
    torch.manual_seed(0)
    return Net().eval()


BESIDES = [
    {"bias": "all"},
    {"bias": "lora_only"},
    {"modules_to_save": ["head"]},
    {"bias": "lora_only", "modules_to_save": ["head", "norm"]},
]


@pytest.mark.parametrize("fields", BESIDES, ids=str)
def test_what_peft_trains_besides_is_kept(tmp_path, fields):
    case = Case(net, {"target_modules": ["up", "down"], **fields})
    config = peft.AdaLoraConfig(**SCHEDULE, **case.fields)
    model = peft.get_peft_model(net(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    model.peft_config["default"].rank_pattern = {"up.lora_E.default": [True, False, True, False]}
    model.save_pretrained(tmp_path / "peft")
    adapter = load(tmp_path / "peft")
    assert len(adapter.saved_weights) > 0
    save(adapter, tmp_path / "ours")
    assert_same_tensors(tmp_path / "peft", tmp_path / "ours")
    want, _ = with_adapter_and_without(reloaded(case, tmp_path / "peft"))
    got, _ = with_adapter_and_without(reloaded(case, tmp_path / "ours"))
    np.testing.assert_array_equal(got, want)


def test_the_base_weight_that_peft_saves_with_an_adapted_head_is_kept(tmp_path):
    case = Case(models.llama, {"target_modules": ["lm_head", "q_proj"]})
    model = peft.get_peft_model(case.make(), peft.AdaLoraConfig(**SCHEDULE, **case.fields, init_lora_weights=False))
    model.save_pretrained(tmp_path / "peft")
    adapter = load(tmp_path / "peft")
    assert [*adapter.saved_weights] == ["base_model.model.lm_head.base_layer.weight"]
    save(adapter, tmp_path / "ours")
    assert_same_tensors(tmp_path / "peft", tmp_path / "ours")
    assert_same_deltas(adapter, reloaded(case, tmp_path / "ours"))


def test_our_defaults_are_pefts_defaults():
    theirs = {**peft.AdaLoraConfig(total_step=10).to_dict(), "peft_version": None}
    ours = AdaLoraConfig(total_step=10).to_dict()
    assert ours == {name: theirs[name] for name in ours}
    assert AdaLoraConfig.from_dict(json.loads(json.dumps(theirs))).to_dict() == theirs


CONFIGS = [
    {},
    {"target_modules": ["up"], "exclude_modules": ["head"]},
    {"target_modules": ["up"], "layers_to_transform": [0, 1], "layers_pattern": "layers"},
    {"target_modules": r".*\.up", "bias": "lora_only", "modules_to_save": ["head"], "task_type": "SEQ_CLS"},
    {"beta1": 0.5, "beta2": 0.9, "deltaT": 3, "orth_reg_weight": 0.1, "lora_dropout": 0.2, "lora_alpha": 0.5},
    {"init_lora_weights": "gaussian", "use_rslora": True, "alpha_pattern": {"up": 3}},
    {"rank_pattern": {"up.lora_E": [True, False, True, False]}, "fan_in_fan_out": True},
]


@pytest.mark.parametrize("fields", CONFIGS, ids=str)
def test_the_json_of_a_config_is_what_peft_writes(tmp_path, fields):
    peft.AdaLoraConfig(**SCHEDULE | fields).save_pretrained(str(tmp_path))
    text = (tmp_path / CONFIG).read_text()
    config = AdaLoraConfig.from_pretrained(tmp_path)
    assert config.to_json() == text
    for name, value in (SCHEDULE | fields).items():
        if name in ("alpha_pattern", "use_rslora"):
            assert config.unknown_fields[name] == value
        elif name != "rank_pattern":
            assert getattr(config, name) == (tuple(value) if isinstance(value, list) else value)


def test_peft_knows_every_field_that_we_write():
    ours = AdaLoraConfig(total_step=10, target_modules=["up"]).to_dict()
    theirs = peft.AdaLoraConfig(total_step=10).to_dict()
    assert ours.keys() <= theirs.keys()


def test_another_adapter_s_name_does_not_reach_the_file(tmp_path):
    model = peft.get_peft_model(net(), peft.AdaLoraConfig(**SCHEDULE, target_modules=["up", "down"]), "größe")
    model.peft_config["größe"].rank_pattern = {"up.lora_E.größe": [True, False, False, True]}
    model.save_pretrained(tmp_path)
    adapter = load(tmp_path / "größe")
    assert adapter.config.rank_pattern == {"up.lora_E": (True, False, False, True)}
    assert [adapter.config.rank(name) for name in ("up", "down")] == [2, 4]


class Names(nn.Module):
    """What PEFT's allocator looks at: parameters with the names and sizes of AdaLoRA layers."""

    def __init__(self, num_weights, init_r):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"lora_A": nn.ParameterDict({"default": nn.Parameter(torch.zeros(init_r, 1))})})
            for _ in range(num_weights)
        )


@given(schedule=schedules(), num_weights=st.sampled_from([1, 3, 14, 50]))
def test_budgets_and_steps_are_those_of_pefts_allocator(schedule, num_weights):
    ours, theirs = AdaLoraConfig(**schedule), peft.AdaLoraConfig(**schedule)
    assert_same_schedule(ours, RankAllocator(Names(num_weights, ours.init_r), theirs, "default"), num_weights)


@pytest.mark.slow
def test_budgets_are_pefts_over_long_trainings_of_many_layers():
    for init_r, target_r in ((12, 8), (8, 1), (64, 16)):
        for total_step in (100, 1000, 9999):
            for num_weights in (7, 96, 224):
                fields = {"init_r": init_r, "target_r": target_r, "total_step": total_step, "tinit": total_step // 10}
                allocator = RankAllocator(Names(num_weights, init_r), peft.AdaLoraConfig(**fields), "default")
                assert_same_schedule(AdaLoraConfig(**fields), allocator, num_weights)


def assert_same_schedule(config, allocator, num_weights):
    found = budgets(config, num_weights).tolist()
    for step in range(config.total_step + 2):
        budget, masks = allocator.budget_schedule(step)
        assert budget == found[min(step, config.last_allocation)]
        if step <= config.last_allocation:  # later, PEFT applies the masks that it has
            assert is_allocated(config, step) == (masks or step == config.last_allocation)
        assert is_measured(config, step) == (step < config.total_step - config.tfinal)
