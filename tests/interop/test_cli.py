"""What `randlora inspect` says of an adapter, and the bar; all commands as processes: tests/cross/test_cli.py."""

import importlib.metadata
import io
import json
import re
import sys

import pytest
from strategies import KEPT, LAYERS, draw_adalora, draw_adapter

import interop
from interop import progress as module
from interop.cli import main
from interop.progress import progress


@pytest.fixture
def folder(tmp_path):
    interop.save(draw_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


def inspected(folder, capsys, *options):
    assert main(["inspect", str(folder), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def test_inspect_prints_every_module_with_its_shape_and_count(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "recipe                torch>=2.12\n" in out
    assert "trainable_parameters  " in out
    for name, (rows, columns) in LAYERS.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
        assert f"{rows}x{columns}" in line
        assert f"{interop.count_trainable((rows, columns), 4)} float32" in line


def test_inspect_as_json_holds_digests_and_counts(folder, capsys):
    facts = inspected(folder, capsys)
    adapter = interop.load(folder)
    assert facts["bases_sha256"] == interop.bases_digest(adapter.bases)
    assert facts["trainable_parameters"] == sum(module["parameters"] for module in facts["modules"].values())
    assert facts["trainable_parameters"] == adapter.num_trainable
    assert facts["modules"]["block.0.up"]["shape"] == [12, 6]


@pytest.mark.parametrize("fields", [{}, {"sparse": True}])
def test_inspect_lists_the_recipes_with_the_bases_that_each_would_give(tmp_path, capsys, fields):
    interop.save(draw_adapter(save_projection=False, **fields), tmp_path)
    dims = {"max_dim": 12, "min_dim": 12}
    config = interop.load(tmp_path).config
    want = {r: interop.bases_digest(interop.make_bases(config, **dims, recipe=r)) for r in interop.RECIPES}
    assert inspected(tmp_path, capsys)["recipes"] == want
    assert len(set(want.values())) == (1 if fields else 4)
    assert inspected(tmp_path, capsys, "--no-recipes")["recipes"] is None


def test_inspect_tells_of_the_adapters_in_sub_folders(folder, capsys):
    interop.save(draw_adalora(kept=KEPT), folder, adapter_name="second")
    assert inspected(folder, capsys)["adapters"] == ["default", "second"]
    facts = inspected(folder, capsys, "--adapter-name", "second")
    assert facts["method"] == "AdaLoRA"
    assert {name: module["rank"] for name, module in facts["modules"].items()} == {n: sum(k) for n, k in KEPT.items()}


def test_the_version_is_that_of_the_installed_package_and_needs_no_command(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"randlora {importlib.metadata.version('randlora')}\n"


def test_commands_run_from_sources_that_are_not_installed(folder, capsys, monkeypatch):
    def nothing_installed(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", nothing_installed)
    assert inspected(folder, capsys)["modules"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_bar_shows_on_a_terminal_only_and_is_gone_in_the_end(monkeypatch):
    monkeypatch.setattr(module, "INTERVAL", 0)
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", stream)
        assert list(progress(range(5), "counting")) == list(range(5))
        shown = stream.getvalue()
        assert bool(shown) == stream.isatty()
        if shown:
            assert re.findall(r"counting \[(#*) *\] (\d)/5", shown) == [("#" * (6 * i), str(i)) for i in range(5)]
            assert shown.endswith("\r\x1b[K")
            assert shown.isascii()
