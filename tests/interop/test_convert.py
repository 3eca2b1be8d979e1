import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
from strategies import draw_adapter

import interop
from interop import AdapterFormatError, convert, save

ROOT = Path(__file__).parents[2]
BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
import interop
try:
    interop.convert(interop.load({folder!r}), to={to!r})
except ImportError as error:
    print(type(error).__name__, error)
"""


class Holder:
    """What both stacks' RandLoraAdapter and any third party may offer."""

    def __init__(self, adapter):
        self.adapter = adapter

    def to_interop(self):
        return self.adapter


def test_an_adapter_converts_to_peft_as_itself():
    adapter = draw_adapter()
    assert convert(adapter, to="peft") is adapter


@pytest.mark.parametrize("as_path", [str, Path])
def test_a_folder_is_loaded(tmp_path, as_path):
    save(draw_adapter(), tmp_path)
    assert convert(as_path(tmp_path), to="peft").modules == draw_adapter().modules
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        convert(as_path(tmp_path / "nowhere"), to="peft")


def test_a_folder_with_half_an_adapter_is_refused(tmp_path):
    save(draw_adapter(), tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(AdapterFormatError, match="do not fit r=32"):
        convert(tmp_path, to="peft")


def test_anything_with_to_interop_is_a_source():
    adapter = draw_adapter()
    assert convert(Holder(adapter), to="peft") is adapter


@pytest.mark.parametrize("to", ["flax", "", None, "PEFT"])
def test_an_unknown_stack_is_refused_with_the_list_of_stacks(to):
    with pytest.raises(ValueError, match=rf"to={to!r} is not a stack: choose one of \('jax', 'torch', 'peft'\)\."):
        convert(draw_adapter(), to=to)


@pytest.mark.parametrize("source", [None, 3, [1], {"a": 1}, object()], ids=lambda source: type(source).__name__)
def test_what_holds_no_adapter_is_refused_by_type(source):
    name = type(source).__name__
    message = (
        rf"^source is a {name}, which holds no adapter: pass a folder, an Adapter of any kind, a torch or Flax NNX"
        r" model with an adapter attached, by this package or by PEFT, or the linen variables of"
        r" randlora_jax\.lazy_params\.$"
    )
    with pytest.raises(TypeError, match=message):
        convert(source, to="peft")


def test_a_sub_folder_is_asked_for_by_name(tmp_path):
    save(draw_adapter(1), tmp_path)
    save(draw_adapter(2, r=3), tmp_path / "second")
    assert convert(tmp_path, to="peft").config.r == convert(tmp_path, to="peft", adapter_name="default").config.r == 4
    assert convert(tmp_path, to="peft", adapter_name="second").config.r == 3
    with pytest.raises(FileNotFoundError, match="third"):
        convert(tmp_path, to="peft", adapter_name="third")


def test_a_recipe_is_for_a_folder(tmp_path):
    save(draw_adapter(recipe="torch<=2.11", save_projection=False), tmp_path)
    assert convert(tmp_path, to="peft", recipe="torch<=2.11").recipe == "torch<=2.11"
    with pytest.raises(AdapterFormatError, match=r"names the recipe 'torch<=2\.11', but recipe='torch>=2\.12' was"):
        convert(tmp_path, to="peft", recipe="torch>=2.12")
    with pytest.raises(ValueError, match=r"recipe='torch<=2\.11' is for a folder .*, not for a source of type Adapter"):
        convert(draw_adapter(), to="peft", recipe="torch<=2.11")


@pytest.mark.parametrize("source", [draw_adapter(), Holder(draw_adapter())], ids=lambda source: type(source).__name__)
def test_what_has_one_adapter_only_has_none_by_name(source):
    kind = type(source).__name__
    with pytest.raises(
        ValueError, match=rf"name='second' is for a folder or a model, not for a source of type {kind}\."
    ):
        convert(source, to="peft", adapter_name="second")


@pytest.mark.parametrize("to", ["jax", "torch"])
def test_a_stack_that_is_not_installed_is_named_with_the_extra_to_install(tmp_path, to):
    if not (ROOT / f"randlora_{to}" / "__init__.py").exists():
        pytest.skip(f"randlora_{to} is not written yet")
    save(draw_adapter(), tmp_path)
    code = BLOCK.format(blocked={to}, folder=str(tmp_path), to=to)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"ImportError {to} is not installed. Run: pip install 'randlora[{to}]'"


@pytest.mark.parametrize("to", ["jax", "torch"])
def test_there_and_back_gives_the_same_bytes(tmp_path, to):
    if importlib.util.find_spec(to) is None or not (ROOT / f"randlora_{to}" / "__init__.py").exists():
        pytest.skip(f"{to} is not installed or randlora_{to} is not written yet")
    save(draw_adapter(), tmp_path / "before")
    moved = convert(tmp_path / "before", to=to)
    interop.save(convert(moved, to="peft"), tmp_path / "after")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "after" / name).read_bytes() == (tmp_path / "before" / name).read_bytes()
