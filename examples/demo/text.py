"""Real text without a download: the docstrings and the source code of Python's standard library, as bytes.

Every CPython carries about 1.6 MB of documentation strings and six times as much code. The demo trains a base model on
the first and fine-tunes an adapter on the second. Tokens are bytes: the vocabulary has 256 entries, no tokenizer.
"""

import ast
import os
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

VOCABULARY_SIZE = 256
LIMIT = 2_000_000  # bytes; all docstrings of CPython 3.11 come to 1.6 MB

# Tests and lib2to3 hold deliberately broken code, encodings are tables of characters, the others are programs.
_SKIPPED_FOLDERS = {"test", "tests", "idle_test", "idlelib", "lib2to3", "turtledemo", "encodings", "ensurepip"}
_SKIPPED_FOLDERS |= {"pydoc_data", "__pycache__"}  # and whatever is no package: site-packages, lib-dynload, config-...
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def docstrings(limit: int = LIMIT) -> bytes:
    """The standard library's docstrings in the order of file names, each once, at most `limit` bytes."""
    seen: set[str] = set()
    pieces, size = [], 0
    for _, tree in _standard_library():
        for node, _ in _docstring_nodes(tree):
            doc = ast.get_docstring(node) or ""  # removes the indentation
            if doc in seen or not doc:
                continue
            seen.add(doc)
            pieces.append(doc.encode() + b"\n\n")
            size += len(pieces[-1])
        if size >= limit:
            break
    return b"".join(pieces)[:limit]


def source_code(limit: int = LIMIT) -> bytes:
    """The standard library's source code without its docstrings, in the order of file names, at most `limit` bytes."""
    pieces, size = [], 0
    for source, tree in _standard_library():
        pieces.append(_without_docstrings(source, tree))
        size += len(pieces[-1])
        if size >= limit:
            break
    return b"".join(pieces)[:limit]


def read_text(path: str | os.PathLike) -> bytes:
    """A text file, or every text file of a folder and its subfolders in sorted order. Text is what decodes as UTF-8.

    Raises:
        FileNotFoundError: there is nothing at `path`.
        ValueError: what is there holds no text.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or folder. Give a text file or a folder that holds some.")
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    text = b"\n\n".join(data for data in map(_utf8_bytes, visible) if data)
    if not text:
        raise ValueError(f"{path}: none of its {len(visible)} files holds UTF-8 text. Give .txt, .md, .py or the like.")
    return text


def to_tokens(data: bytes) -> np.ndarray:
    """One token per byte: uint8 of shape (len(data),)."""
    return np.frombuffer(data, dtype=np.uint8)


def split(tokens: np.ndarray, held_out: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """`(training, held out)`: the last `held_out` share of the text is never trained on."""
    if not 0 < held_out < 1:
        raise ValueError(f"held_out={held_out}: the share of the text to hold out must be between 0 and 1, like 0.1.")
    boundary = len(tokens) - round(len(tokens) * held_out)
    return tokens[:boundary], tokens[boundary:]


def batches(tokens: np.ndarray, *, batch_size: int, length: int, seed: int) -> Iterator[np.ndarray]:
    """Endless random crops, int32 of shape (batch_size, length + 1); the same seed gives the same crops.

    The first `length` tokens of a crop are inputs, the last `length` their targets.
    """
    if len(tokens) <= length:
        raise ValueError(
            f"The text has {len(tokens)} tokens, a crop takes {length + 1}: give more text or a smaller length."
        )
    rng = np.random.default_rng(seed)
    window = np.arange(length + 1)
    while True:
        starts = rng.integers(len(tokens) - length, size=batch_size)
        yield tokens[starts[:, None] + window].astype(np.int32)  # (B, 1) + (T+1,) -> (B, T+1)


def _standard_library() -> Iterator[tuple[bytes, ast.Module]]:
    """`(source, syntax tree)` of each file, in an order that depends on the names alone."""
    root = Path(sysconfig.get_path("stdlib"))
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(name for name in subfolders if name not in _SKIPPED_FOLDERS and name.isidentifier())
        for name in sorted(names):
            # _sysconfigdata_* is written by the build and differs from machine to machine
            if not name.endswith(".py") or name.startswith("_sysconfigdata"):
                continue
            source = _utf8_bytes(Path(folder, name)).replace(b"\r\n", b"\n")
            try:
                yield source, ast.parse(source)
            except (SyntaxError, ValueError):
                continue


def _utf8_bytes(file: Path) -> bytes:
    """The content, or nothing where it is not text."""
    data = file.read_bytes()
    try:
        return b"" if b"\0" in data else data.decode("utf-8-sig").encode()
    except UnicodeDecodeError:
        return b""


def _docstring_nodes(node: ast.AST) -> Iterator[tuple[ast.AST, ast.Expr]]:
    """Each module, class and function that has a docstring, with the statement that is it, in the order of the file."""
    if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
        yield node, node.body[0]
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case):  # expressions hold no docstring
            yield from _docstring_nodes(child)


def _without_docstrings(source: bytes, tree: ast.Module) -> bytes:
    """The source with its docstrings cut out and runs of empty lines shortened to two; it still parses."""
    line_starts = np.cumsum([0] + [len(line) + 1 for line in source.split(b"\n")]).tolist()
    kept, position = [], 0
    for node, doc in _docstring_nodes(tree):
        before = source[position : line_starts[doc.lineno - 1] + doc.col_offset]
        needs_pass = len(node.body) == 1 or node.body[1].lineno == doc.end_lineno
        kept.append(before + b"pass" if needs_pass else before.rstrip())
        position = line_starts[doc.end_lineno - 1] + doc.end_col_offset
    kept.append(source[position:])
    return re.sub(rb"\n(?:[ \t\f]*\n){3,}", rb"\n\n\n", b"".join(kept).lstrip(b"\n"))
