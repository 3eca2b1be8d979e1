import ast
import importlib.util
import itertools
import re
import sys

import numpy as np
import pytest
import text
from progress import progress


def tokens_of_a_counter(count=1000):
    return np.arange(count) % 256


@pytest.mark.parametrize("corpus", [text.docstrings, text.source_code])
def test_a_corpus_is_the_same_text_each_time_and_a_limit_only_cuts_it(corpus):
    longer = corpus(60_000)
    assert len(longer) == 60_000
    assert corpus(60_000) == longer
    assert corpus(7_000) == longer[:7_000]


@pytest.mark.slow
def test_every_python_has_more_than_a_megabyte_of_docstrings_each_once_and_in_utf8():
    docs = text.docstrings()
    assert 1_000_000 < len(docs) <= text.LIMIT
    docs.decode()
    assert docs.count(b"Add message and return assigned key.") == 1  # mailbox has it 5 times


def test_docstrings_are_prose_and_source_code_is_code():
    statement = re.compile(rb"^\s*(?:def |class |return\b|import |from \w+ import |if .*:$|self\.)", re.MULTILINE)
    docs, code = text.docstrings(400_000), text.source_code(400_000)
    assert len(statement.findall(code)) > 20 * len(statement.findall(docs))


def test_no_docstring_is_left_in_the_source_code():
    for source, tree in itertools.islice(text._standard_library(), 60):
        assert list(text._docstring_nodes(ast.parse(text._without_docstrings(source, tree)))) == []


def test_cutting_docstrings_leaves_the_code_unchanged():
    import json.decoder as module

    source = open(module.__file__, "rb").read()
    tree = ast.parse(source)
    bare = ast.parse(text._without_docstrings(source, tree))
    for node, _ in list(text._docstring_nodes(tree)):
        node.body[:1] = [] if len(node.body) > 1 else [ast.Pass()]
    assert ast.dump(bare) == ast.dump(tree)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ('"""Module."""\nx = 1\n', "\nx = 1\n".lstrip("\n")),
        ('class A:\n    """Only a docstring."""\n', "class A:\n    pass\n"),
        ('def f(): "inline"\n', "def f(): pass\n"),
        ('def f():\n    "first"; return 1\n', "def f():\n    pass; return 1\n"),
        ('def f():\n    """Ünïcödé."""\n    return "é"\n', 'def f():\n    return "é"\n'),
        ('def f():\n    x = """no docstring"""\n', 'def f():\n    x = """no docstring"""\n'),
    ],
)
def test_each_form_of_docstring_is_cut_out(source, expected):
    encoded = source.encode()
    assert text._without_docstrings(encoded, ast.parse(encoded)).decode() == expected


def test_a_folder_is_read_in_sorted_order_without_hidden_or_binary_files(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / ".git").mkdir()
    for name, data in {
        "b.txt": b"second",
        "a.md": "first é".encode(),
        "sub/c.py": b"third",
        "image.png": b"\x89PNG\xff",
        "zeros.bin": b"a\0b",
        ".hidden": b"no",
        ".git/config": b"no",
    }.items():
        (tmp_path / name).write_bytes(data)
    assert text.read_text(tmp_path) == "first é\n\nsecond\n\nthird".encode()
    assert text.read_text(tmp_path / "b.txt") == b"second"
    assert text.read_text(tmp_path / ".hidden") == b"no"  # asked for by name


def test_a_missing_path_and_a_folder_without_text_are_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing: no such file or folder\. Give a text file or a folder"):
        text.read_text(tmp_path / "nothing")
    with pytest.raises(ValueError, match=r"none of its 0 files holds UTF-8 text\. Give \.txt"):
        text.read_text(tmp_path)
    (tmp_path / "image.png").write_bytes(b"\x89PNG\xff")
    with pytest.raises(ValueError, match=r"none of its 1 files holds UTF-8 text"):
        text.read_text(tmp_path)


def test_tokens_are_the_bytes():
    assert text.to_tokens("aé".encode()).tolist() == [97, 195, 169]
    assert text.VOCABULARY_SIZE == 256


def test_split_parts_the_text_at_its_end():
    tokens = tokens_of_a_counter(105)
    training, held_out = text.split(tokens, held_out=0.2)
    assert len(held_out) == 21
    np.testing.assert_array_equal(np.concatenate([training, held_out]), tokens)
    with pytest.raises(ValueError, match=r"held_out=1\.0: the share of the text to hold out must be between 0 and 1"):
        text.split(tokens, held_out=1.0)


def test_batches_are_crops_of_the_text_and_depend_on_the_seed_alone():
    tokens = np.random.default_rng(0).integers(256, size=500)
    first, again, other = (
        list(itertools.islice(text.batches(tokens, batch_size=3, length=8, seed=seed), 4)) for seed in (1, 1, 2)
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    windows = {tuple(window) for window in np.lib.stride_tricks.sliding_window_view(tokens, 9)}
    assert all(tuple(row) in windows for batch in first for row in batch)
    assert first[0].shape == (3, 9)
    assert first[0].dtype == np.int32


def test_batches_reach_both_ends_of_the_text_and_refuse_a_text_shorter_than_a_crop():
    tokens = tokens_of_a_counter(10)
    rows = np.concatenate(list(itertools.islice(text.batches(tokens, batch_size=8, length=8, seed=0), 8)))
    assert {tuple(row) for row in rows} == {tuple(range(9)), tuple(range(1, 10))}
    with pytest.raises(ValueError, match=r"The text has 10 tokens, a crop takes 11: give more text"):
        next(text.batches(tokens, batch_size=1, length=10, seed=0))


def test_progress_yields_the_first_items_and_logs_every_n_steps_and_the_last(capsys):
    seen = []
    for item in progress(itertools.count(10), total=5, describe=lambda: f"at {seen[-1]}", every=2):
        seen.append(item)
    assert seen == [10, 11, 12, 13, 14]
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["step     2/5  at 11", "step     4/5  at 13", "step     5/5  at 14"]


def test_progress_is_an_ascii_bar_on_a_terminal(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    list(progress(range(3), total=3, describe=lambda: "loss 1.5", every=3))
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert "loss 1.5" in shown
    assert shown.isascii()


def test_text_needs_no_package_but_numpy():
    source = ast.parse(open(importlib.util.find_spec("text").origin).read())
    imported = {alias.name for node in ast.walk(source) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in ast.walk(source) if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == {"numpy"}
