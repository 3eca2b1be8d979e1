"""What a model holds of its bases: the block that its layers use. What leaves it has all of them, as before."""

import copy
import dataclasses
import io

import numpy as np
import pytest
import torch
from torch import nn

import interop
from interop import Bases, init_adapter
from randlora_torch import extract, get_peft_model, load_adapter
from randlora_torch.bases import to_torch
from tests.torch.conftest import assert_same, config, layers_of, randomize

UP_DOWN = {"up": (24, 9), "down": (9, 24)}  # PEFT's bases are for (24, 24), the layers use (24, 9)
MIXED = {**UP_DOWN, "mix": (12, 12)}  # of the same bases, the layers use (24, 12)
KINDS = [{}, {"sparse": True}, {"very_sparse": True}]
every_kind = pytest.mark.parametrize("fields", KINDS, ids=str)
FILE = "adapter_model.safetensors"


class Layers(nn.ModuleDict):
    """Layers side by side: the result has what each makes of ones."""

    def forward(self):
        return torch.cat([layer(torch.ones(1, layer.in_features)) for layer in self.values()], dim=1)


def plain():
    torch.manual_seed(0)
    return Layers({name: nn.Linear(inp, out) for name, (out, inp) in MIXED.items()})


def adapted(shapes=UP_DOWN, name="default", **fields):
    return randomize(get_peft_model(plain(), config(list(shapes), **fields), name), name)


def outputs(model):
    with torch.no_grad():
        return model()


def hub(shapes=UP_DOWN, **fields):
    """A new adapter that was never held by a model."""
    return init_adapter(config(list(shapes), **fields), shapes)


def foreign(shapes=UP_DOWN, **fields):
    """An adapter with bases that no recipe draws."""
    adapter = hub(shapes, **fields)
    lam, rng = {}, np.random.default_rng(0)
    for module, factors in adapter.factors.items():
        lam[module] = factors._replace(lam=rng.standard_normal(factors.lam.shape, np.float32))
    bases = Bases(*(np.ascontiguousarray(basis[::-1]) for basis in adapter.bases))
    return dataclasses.replace(adapter, bases=bases, factors=lam, recipe=None)


def same_bits(got, want):
    for one, other in zip(got, want, strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        assert one.tobytes() == other.tobytes()


@every_kind
def test_the_block_that_layers_use_is_held_and_all_bases_leave_the_model(fields, tmp_path):
    model, want = get_peft_model(plain(), config(list(UP_DOWN), **fields)), hub(**fields)
    A, B = model.randlora_A.stored("default"), model.randlora_B.stored("default")
    assert (A.dtype, A.shape) == (torch.float32, (3, 1, 9))
    assert (B.dtype, B.shape) == (torch.int8 if fields else torch.bfloat16, (24, 3, 3))
    assert model.randlora_A.nbytes + model.randlora_B.nbytes == 4 * 27 + 216 * (1 if fields else 2)
    held = (model.randlora_A["default"], model.randlora_B["default"])
    assert_same(held[0], to_torch(want.bases.A[:, :, :9]).float())
    assert_same(held[1], to_torch(want.bases.B[:, :3]))
    got = extract(model)
    same_bits(got.to_interop().bases, want.bases)
    model.save_pretrained(tmp_path / "model")
    interop.save(dataclasses.replace(want, config=got.config), tmp_path / "hub")
    assert (tmp_path / "model" / FILE).read_bytes() == (tmp_path / "hub" / FILE).read_bytes()


@every_kind
def test_a_layer_computes_with_its_part_of_the_block_as_with_all_bases(fields):
    model = adapted(MIXED, **fields)
    adapter = extract(model)
    for module, layer in layers_of(model):
        want = adapter.to_interop().delta_weight(module)
        np.testing.assert_allclose(layer.get_delta_weight("default").detach(), want, rtol=1e-5, atol=1e-6)
        scaled = layer.get_scaled_bases("default")
        product = (scaled.B @ scaled.A).detach()  # long side first
        np.testing.assert_allclose(product if layer.out_features >= layer.in_features else product.T, want, 1e-5, 1e-6)


@every_kind
@pytest.mark.parametrize("to", [np.float32, np.float16])
def test_files_keep_the_dtype_in_which_an_adapter_came(fields, to, tmp_path):
    source = hub(**fields)
    rounded = dataclasses.replace(source, bases=Bases(*(basis.astype(to) for basis in source.bases)), recipe=None)
    model = load_adapter(plain(), rounded)
    same_bits(extract(model).to_interop().bases, rounded.bases)
    model.save_pretrained(tmp_path)
    same_bits(interop.load(tmp_path).bases, rounded.bases)


def test_bases_of_other_origin_are_held_as_a_whole_and_saved(tmp_path):
    adapter = foreign()
    model = load_adapter(plain(), adapter)
    assert model.randlora_B["default"].shape == (24, 8, 3)
    assert model._randlora.adapters["default"].origin is None
    model.save_pretrained(tmp_path)
    same_bits(interop.load(tmp_path).bases, adapter.bases)
    assert_same(outputs(load_adapter(plain(), tmp_path)), outputs(model))


@pytest.mark.parametrize("save_projection", [True, False])
@every_kind
def test_an_adapter_with_a_cut_basis_is_saved_loaded_and_restored(fields, save_projection, tmp_path):
    model = adapted(save_projection=save_projection, **fields)
    model.save_pretrained(tmp_path / "first")
    again = load_adapter(plain(), tmp_path / "first")
    assert again.randlora_B.stored("default").shape == (24, 3, 3)
    assert_same(outputs(again), outputs(model))
    again.save_pretrained(tmp_path / "second")
    assert (tmp_path / "first" / FILE).read_bytes() == (tmp_path / "second" / FILE).read_bytes()
    randomize(again, seed=4)
    again.restore_adapter(tmp_path / "first")
    assert_same(outputs(again), outputs(model))
    for other in ({**fields, "projection_prng_key": 1}, {} if fields else {"sparse": True}):
        adapted(**other).save_pretrained(tmp_path / "other")
        with pytest.raises(ValueError, match=r"bases: they are not the same \(another seed, sparsity or recipe\)"):
            again.restore_adapter(tmp_path / "other")


@pytest.mark.parametrize("change", ["B in place", "A in place", "another seed", "another recipe"])
def test_bases_that_were_changed_behind_our_back_are_not_completed_by_others(change, tmp_path):
    model = adapted()
    info = model._randlora.adapters["default"]
    if "in place" in change:
        getattr(model, f"randlora_{change[0]}")["default"].mul_(2)
    else:
        drawn = dataclasses.replace(info.origin.config, projection_prng_key=1)
        origin = info.origin._replace(**({"config": drawn} if "seed" in change else {"recipe": "torch<=2.11"}))
        model._randlora.adapters["default"] = dataclasses.replace(info, origin=origin)
    before = outputs(model)
    for leave in (lambda: extract(model), lambda: model.save_pretrained(tmp_path / "folder")):
        with pytest.raises(
            ValueError, match=r"the bases in memory are not those that projection_prng_key=\d and the r"
        ):
            leave()
    assert not (tmp_path / "folder").exists()
    assert_same(outputs(model), before)


@every_kind
@pytest.mark.parametrize("order", [(UP_DOWN, MIXED), (MIXED, UP_DOWN)], ids=["smaller first", "larger first"])
def test_adapters_that_use_different_parts_of_the_same_bases_share_the_larger_one(fields, order):
    model = adapted(order[0], "a", **fields)
    want = [outputs(model)]
    randomize(get_peft_model(model, config(list(order[1]), **fields), "b"), "b", seed=3)
    want.append(outputs(model))
    for held in (model.randlora_A, model.randlora_B):
        assert held.stored("a") is held.stored("b")
    assert model.randlora_B.stored("a").shape == (24, 4, 3)
    alone = {"a": adapted(order[0], "a", **fields), "b": randomize(adapted(order[1], "b", **fields), "b", seed=3)}
    for name, other in alone.items():
        model.set_adapter(name)
        assert_same(outputs(model), want.pop(0))
        same_bits(extract(model, name).to_interop().bases, extract(other).to_interop().bases)
    model.delete_adapter("b" if order[1] is MIXED else "a")
    (left,) = model.peft_config
    model.set_adapter(left)
    assert_same(outputs(model), outputs(alone[left]))
    same_bits(extract(model).to_interop().bases, extract(alone[left]).to_interop().bases)


def test_bases_that_agree_only_where_layers_look_are_not_shared():
    model, other = adapted(), hub()
    other.bases.B[-1, -1, -1] += 1
    load_adapter(model, dataclasses.replace(other, recipe=None), "b")
    assert model.randlora_B.stored("default").shape == (24, 3, 3)
    assert model.randlora_B.stored("b").shape == (24, 8, 3)
    same_bits(extract(model, "default").to_interop().bases, hub().bases)
    same_bits(extract(model, "b").to_interop().bases, other.bases)


def through_pickle(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    return torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)


@every_kind
@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])
def test_duplicates_hold_a_block_of_their_own_and_give_all_bases(fields, duplicate):
    model = adapted(MIXED, **fields)
    twin = duplicate(model)
    assert_same(outputs(twin), outputs(model))
    assert twin.randlora_B.stored("default").shape == (24, 4, 3)
    same_bits(extract(twin).to_interop().bases, extract(model).to_interop().bases)


@pytest.mark.parametrize(
    "convert", [nn.Module.half, nn.Module.bfloat16, nn.Module.double, lambda model: model.to("meta")]
)
@every_kind
def test_no_conversion_of_a_model_touches_the_block(fields, convert):
    model = adapted(**fields)
    before = [held.stored("default") for held in (model.randlora_A, model.randlora_B)]
    convert(model)
    assert all(
        a is held.stored("default") for a, held in zip(before, (model.randlora_A, model.randlora_B), strict=True)
    )


@every_kind
def test_mixed_batches_and_merging_use_the_block(fields):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(9, 24), nn.Linear(24, 9), nn.Linear(9, 9))
    x, base = torch.ones(3, 9), copy.deepcopy(model)
    randomize(get_peft_model(model, config(["0", "1"], **fields), "a"), "a")
    randomize(get_peft_model(model, config(["0", "1", "2"], **fields), "b"), "b", seed=2)
    model.eval()
    rows = []
    for name in ("a", "b"):
        model.set_adapter(name)
        rows.append(model(x).detach()[:1])
    mixed = model(x, adapter_names=["a", "b", "__base__"]).detach()
    torch.testing.assert_close(mixed, torch.cat([*rows, base(x).detach()[:1]]), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.merge_and_unload()(x).detach()[:1], rows[1], rtol=1e-4, atol=1e-4)
