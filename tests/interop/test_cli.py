"""The `randlora` command on real folders: output, JSON, exit codes."""

import json

import pytest
from strategies import LAYERS, draw_adapter

import interop
from interop.cli import main


@pytest.fixture
def folder(tmp_path):
    interop.save(draw_adapter(), tmp_path / "adapter")
    return tmp_path / "adapter"


def test_inspect_prints_every_module_with_its_shape_and_count(folder, capsys):
    assert main(["inspect", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "recipe                torch>=2.12\n" in out
    assert "trainable_parameters  " in out
    for name, (rows, columns) in LAYERS.items():
        (line,) = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
        assert f"{rows}x{columns}" in line
        assert f"{interop.count_trainable((rows, columns), 4)} float32" in line


def test_inspect_as_json_holds_the_digest_of_the_bases_and_all_counts(folder, capsys):
    assert main(["inspect", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    adapter = interop.load(folder)
    assert facts["bases_sha256"] == interop.bases_digest(adapter.bases)
    assert facts["trainable_parameters"] == sum(module["parameters"] for module in facts["modules"].values())
    assert facts["trainable_parameters"] == adapter.num_trainable
    assert facts["modules"]["block.0.up"]["shape"] == [12, 6]


def test_convert_rewrites_a_folder_to_the_same_bytes(folder, tmp_path, capsys):
    assert main(["convert", str(folder), str(tmp_path / "again")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'again'}\n"
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_an_unreadable_folder_gives_one_line_and_exit_code_1(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("randlora inspect: ")
    assert "is not a folder" in captured.err


def test_a_wrong_command_shows_the_usage(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train"])
    assert stopped.value.code == 2
    assert "invalid choice: 'train'" in capsys.readouterr().err
