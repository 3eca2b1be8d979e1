"""What files and values at the edge of the format do: they are refused, or survive."""

import dataclasses
import json

import numpy as np
import pytest
from strategies import draw_adapter

from interop import (
    Adapter,
    AdapterFormatError,
    Bases,
    Factors,
    RandLoraConfig,
    bases_digest,
    init_adapter,
    load,
    save,
)
from tests.interop.folders import rewrite


def test_numbers_of_numpy_become_pythons():
    config = RandLoraConfig(r=np.int64(4), randlora_alpha=np.float32(16), projection_prng_key=np.uint64(2**63))
    assert (type(config.r), type(config.randlora_alpha)) == (int, float)
    assert json.loads(config.to_json())["projection_prng_key"] == 2**63


def test_bases_that_were_changed_are_saved_without_a_recipe(tmp_path):
    adapter = draw_adapter()
    changed = Bases(adapter.bases.A * adapter.bases.A.dtype.type(0.5), adapter.bases.B)
    save(dataclasses.replace(adapter, bases=changed), tmp_path)
    back = load(tmp_path)
    assert back.recipe is None
    assert bases_digest(back.bases) == bases_digest(changed)


@pytest.mark.parametrize("name", ["with\nline break", "größe.q", "a b", "x/y"])
def test_module_names_of_any_kind_survive(tmp_path, name):
    adapter = init_adapter(RandLoraConfig(r=2, target_modules=["q"]), {name: (6, 4)})
    save(adapter, tmp_path)
    assert load(tmp_path).modules == (name,)


def test_an_empty_module_name_is_refused_before_it_is_written():
    factors = {"": Factors(np.zeros((2, 2), np.float32), np.zeros((2, 4), np.float32))}
    with pytest.raises(AdapterFormatError, match=r"a layer has an empty name; .* wrap it\)"):
        Adapter(config=RandLoraConfig(r=2), factors=factors)


def test_a_file_in_the_place_of_the_folder_is_left_alone(tmp_path):
    (tmp_path / "x").write_text("precious")
    with pytest.raises(NotADirectoryError, match=r"x is a file: pass the folder to write adapter_config\.json"):
        save(draw_adapter(), tmp_path / "x")
    assert (tmp_path / "x").read_text() == "precious"


def test_a_config_with_a_byte_order_mark_is_read(tmp_path):
    save(draw_adapter(), tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert load(tmp_path).modules == draw_adapter().modules


def test_dims_that_do_not_follow_from_the_shapes_are_refused_before_any_memory_is_asked_for(tmp_path):
    save(draw_adapter(save_projection=False), tmp_path)
    rewrite(tmp_path, notes={"max_dim": 99})
    with pytest.raises(AdapterFormatError, match=r"its notes contradict each other: \{'max_dim': 99, 'min_dim': 12\}"):
        load(tmp_path)
