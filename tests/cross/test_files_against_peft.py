"""PEFT's own adapter folders through `interop`, and ours through PEFT."""

import dataclasses
import json
import warnings

import numpy as np
import oracle
import pytest
from strategies import draw_adapter
from tolerances import TOLERANCE

from interop import AdapterFormatError, RandLoraConfig, init_adapter, load, save

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

FILES = ("adapter_config.json", "adapter_model.safetensors")
SHAPES = {"up": (20, 12), "down": (12, 20), "mix": (12, 12)}
KINDS = [
    {},
    {"r": 12},
    {"sparse": True},
    {"very_sparse": True},
    {"projection_prng_key": -17},
    {"save_projection": False, "projection_prng_key": 2**40 + 3},
    {"save_projection": False, "sparse": True},
    {"bias": "all"},
    {"bias": "randlora_only", "modules_to_save": ["head"]},
    {"modules_to_save": ["head"], "save_projection": False},
]


class Net(torch.nn.Module):
    """Three layers of different orientation, a normalization with a bias and a head."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.mix = torch.nn.Linear(12, 20), torch.nn.Linear(20, 12), torch.nn.Linear(12, 12)
        self.norm, self.head = torch.nn.LayerNorm(12), torch.nn.Linear(12, 3)

    def forward(self, x):
        return self.head(self.norm(self.mix(self.down(torch.tanh(self.up(x))))))


@pytest.fixture(autouse=True)
def _quiet_and_seeded():
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT warns of save_projection=False and of missing keys that it then makes
        yield


def trained(dtype=torch.float32, autocast=True, **fields):
    """A PEFT model in which every trainable number has been moved away from its start."""
    config = peft.RandLoraConfig(**{"r": 5, "randlora_alpha": 3, "target_modules": list(SHAPES), **fields})
    model = peft.get_peft_model(Net().to(dtype), config, autocast_adapter_dtype=autocast)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    return model


def layer(model, name):
    return getattr(model.base_model.model, name)


def read(folder, **arguments):
    """Our adapter of a folder, bound to the model if the folder leaves that open."""
    adapter = load(folder, **arguments)
    return adapter if adapter.bases is not None else adapter.bind(SHAPES)


def test_the_json_of_a_config_is_what_peft_writes(tmp_path):
    for number, fields in enumerate([*KINDS, {"layers_to_transform": [0, 1], "layers_pattern": "layers"}]):
        fields = {"r": 5, "target_modules": ["up"], "task_type": "CAUSAL_LM", **fields}
        peft.RandLoraConfig(**fields).save_pretrained(str(tmp_path / str(number)))
        text = (tmp_path / str(number) / FILES[0]).read_text()
        assert RandLoraConfig(peft_version=peft.__version__, **fields).to_json() == text
        assert RandLoraConfig.from_dict(json.loads(text)).to_json() == text


def test_our_defaults_are_pefts_defaults():
    theirs = {name: value for name, value in peft.RandLoraConfig().to_dict().items() if name != "peft_version"}
    ours = {name: value for name, value in RandLoraConfig().to_dict().items() if name != "peft_version"}
    assert ours == theirs


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_an_adapter_by_peft_has_the_update_that_peft_computes(tmp_path, fields):
    model = trained(**fields)
    model.save_pretrained(tmp_path)
    adapter = read(tmp_path)
    assert adapter.modules == tuple(sorted(SHAPES))
    assert (adapter.recipe or "torch>=2.12") in ("torch>=2.12", "torch<=2.11")
    for name, shape in SHAPES.items():
        lam, gamma = adapter.factors[name]
        want = layer(model, name).get_delta_weight("default").detach().numpy()
        got = adapter.delta_weight(name, shape)
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)  # PEFT sums in float32
        scaling = adapter.config.scaling
        naive = oracle.delta_weight(*adapter.bases, lam, gamma, scaling=scaling, shape=shape)
        np.testing.assert_allclose(got, naive, **TOLERANCE["float64"])


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_a_folder_by_peft_keeps_its_values_through_load_and_save_and_then_its_bytes(tmp_path, fields):
    trained(**fields).save_pretrained(tmp_path / "peft")
    first = read(tmp_path / "peft")
    save(first, tmp_path / "one")
    save(load(tmp_path / "one"), tmp_path / "two")
    for name in FILES:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    assert (tmp_path / "one" / FILES[0]).read_text() == (tmp_path / "peft" / FILES[0]).read_text()
    second = load(tmp_path / "one")
    for a, b in [*zip(first.factors.values(), second.factors.values(), strict=True), (first.bases, second.bases)]:
        for x, y in zip(a, b, strict=True):
            assert (x.dtype, x.tobytes()) == (y.dtype, y.tobytes())
    assert first.saved_weights.keys() == second.saved_weights.keys()
    for key, value in first.saved_weights.items():
        np.testing.assert_array_equal(second.saved_weights[key], value, strict=True)


@pytest.mark.parametrize("fields", KINDS, ids=str)
def test_peft_reads_our_folder_and_computes_the_same_outputs(tmp_path, fields):
    model = trained(**fields).eval()
    model.save_pretrained(tmp_path / "peft")
    save(read(tmp_path / "peft"), tmp_path / "ours")
    base = Net()
    base.load_state_dict(
        {
            name.replace(".base_layer", "").replace(".original_module", ""): value
            for name, value in model.base_model.model.state_dict().items()
            if "randlora" not in name and "modules_to_save" not in name
        }
    )
    again = peft.PeftModel.from_pretrained(base, tmp_path / "ours").eval()
    x = torch.randn(4, 12)
    assert (model(x).detach() - base_output(model, x)).abs().max() > 0.1
    np.testing.assert_array_equal(again(x).detach().numpy(), model(x).detach().numpy())


def base_output(model, x):
    with model.disable_adapter():
        return model(x).detach()


def test_a_new_adapter_of_ours_is_one_that_peft_would_make(tmp_path):
    model = peft.get_peft_model(Net(), peft.RandLoraConfig(r=5, target_modules=list(SHAPES)))
    model.save_pretrained(tmp_path / "peft")
    theirs = load(tmp_path / "peft")
    ours = init_adapter(theirs.config, SHAPES)
    for name in SHAPES:
        for mine, pefts in zip(ours.factors[name], theirs.factors[name], strict=True):
            np.testing.assert_array_equal(mine, pefts, strict=True)
    for mine, pefts in zip(ours.bases, theirs.bases, strict=True):
        np.testing.assert_array_equal(mine.astype(np.float32), pefts)


def test_a_half_precision_file_by_peft_is_read_in_its_dtype(tmp_path):
    for dtype, name in [(torch.bfloat16, "bfloat16"), (torch.float16, "float16")]:
        trained(dtype, autocast=False).save_pretrained(tmp_path / name)
        adapter = load(tmp_path / name)
        arrays = [part for pair in (*adapter.factors.values(), adapter.bases) for part in pair]
        assert {array.dtype.name for array in arrays} == {name}
        save(adapter, tmp_path / "again")
        back = load(tmp_path / "again")
        for pair, other in zip(adapter.factors.values(), back.factors.values(), strict=True):
            assert [part.tobytes() for part in pair] == [part.tobytes() for part in other]


def test_a_second_adapter_lies_in_a_sub_folder_and_is_suggested(tmp_path):
    model = trained()
    model.add_adapter("other", peft.RandLoraConfig(r=5, target_modules=list(SHAPES)))
    model.save_pretrained(tmp_path, selected_adapters=["other"])
    with pytest.raises(FileNotFoundError, match=r"Its sub-folders \['other'\] do, one per adapter name"):
        load(tmp_path)
    assert load(tmp_path / "other").modules == tuple(sorted(SHAPES))


def test_a_pickled_adapter_by_peft_is_refused(tmp_path):
    trained().save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(AdapterFormatError, match=r"holds adapter_model\.bin, a pickle"):
        load(tmp_path)


@pytest.mark.parametrize("other", ["LoraConfig", "VeraConfig", "LoHaConfig"])
def test_another_kind_of_peft_adapter_is_refused_by_name(tmp_path, other):
    peft.get_peft_model(Net(), getattr(peft, other)(target_modules=["mix"])).save_pretrained(tmp_path)
    with pytest.raises(AdapterFormatError, match=r"peft_type='(LORA|VERA|LOHA)' is not a RandLoRA or AdaLoRA adapter"):
        load(tmp_path)


def test_an_adapter_born_here_is_read_by_peft_to_the_same_update(tmp_path):
    for keep in (True, False):
        adapter = draw_adapter(3, shapes=SHAPES, r=5, randlora_alpha=3, save_projection=keep)
        save(dataclasses.replace(adapter), tmp_path / str(keep))
        model = peft.PeftModel.from_pretrained(Net(), tmp_path / str(keep))
        for name in SHAPES:
            got = layer(model, name).get_delta_weight("default").detach().numpy()
            np.testing.assert_allclose(got, adapter.delta_weight(name), rtol=1e-4, atol=1e-4)
