"""The reader and the writer of safetensors files, beside the safetensors library."""

import gc
import json
import os
import struct
import sys
import threading

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from interop import tensorfile
from interop.tensorfile import (
    DTYPES as READ_DTYPES,
)
from interop.tensorfile import (
    LazyTensor,
    TensorFile,
    TensorFileError,
    safetensors_parts,
)

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


def tensors(rng):
    return {
        "b.half": rng.standard_normal((3, 5)).astype(np.float16),
        "a.brain": rng.standard_normal((7,)).astype(ml_dtypes.bfloat16),
        "z.single": rng.standard_normal((2, 1, 3)).astype(np.float32),
        "c.single": rng.standard_normal((1,)).astype(np.float32),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.float32(2.5).reshape(()),
        "größe": np.ones((2,), np.float16),
    }


def test_the_safetensors_library_reads_back_every_bit_and_the_metadata(tmp_path, rng):
    written = tensors(rng)
    parts = safetensors_parts(written, {"format": "pt", "note": 'ünï"code'})
    (tmp_path / "x.safetensors").write_bytes(b"".join(parts))
    read = load_file(tmp_path / "x.safetensors")
    assert read.keys() == written.keys()
    for name, array in written.items():
        assert (read[name].dtype, read[name].shape) == (array.dtype, array.shape)
        assert read[name].tobytes() == array.tobytes()
    with safe_open(tmp_path / "x.safetensors", framework="numpy") as file:
        assert file.metadata() == {"format": "pt", "note": 'ünï"code'}


def test_the_bytes_do_not_depend_on_the_order_of_tensors_or_metadata(rng):
    given, metadata = tensors(rng), {"randlora": "{}", "format": "pt", "a": "b"}
    first = b"".join(safetensors_parts(given, metadata))
    again = b"".join(safetensors_parts(dict(reversed(given.items())), dict(reversed(metadata.items()))))
    assert first == again


def test_the_header_is_padded_to_eight_bytes_and_tensors_lie_widest_first_without_gaps(rng):
    written = tensors(rng)
    length, header, *buffers = safetensors_parts(written, {"format": "pt"})
    assert struct.unpack("<Q", length) == (len(header),)
    assert len(header) % 8 == 0
    entries = json.loads(header)
    assert entries.pop("__metadata__") == {"format": "pt"}
    assert list(entries) == ["c.single", "empty", "scalar", "z.single", "a.brain", "b.half", "größe"]
    end = 0
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        assert (start, stop - start) == (end, written[name].nbytes), name
        assert stop - start == np.prod(entry["shape"]) * np.dtype(DTYPES[entry["dtype"]]).itemsize
        end = stop
    assert b"".join(buffers) == b"".join(written[name].tobytes() for name in entries)


def test_views_and_transposes_are_written_in_row_major_order(tmp_path, rng):
    whole = rng.standard_normal((6, 5, 4)).astype(np.float32)
    views = {
        "transposed": whole.T,
        "strided": whole[::2, 1::2],
        "backwards": whole[::-1],
        "fortran": np.asfortranarray(whole),
    }
    (tmp_path / "x").write_bytes(b"".join(safetensors_parts(views, {})))
    for name, array in load_file(tmp_path / "x").items():
        np.testing.assert_array_equal(array, views[name])


def test_contiguous_tensors_are_not_copied(rng):
    array = rng.standard_normal((64, 64)).astype(np.float32)
    _, _, buffer = safetensors_parts({"x": array}, {})
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), array)


def file_of(path, header, data=b"", *, length=None):
    """A safetensors file with any header, an object or bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(start, end, shape, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=5).filter(lambda x: x != "__metadata__")
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 5]), max_size=4).map(tuple)


@given(
    layout=st.dictionaries(names, st.tuples(shapes, st.sampled_from(sorted(READ_DTYPES))), max_size=5),
    metadata=st.none() | st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=5)),
    seed=st.integers(0, 2**16),
    by_library=st.booleans(),
)
def test_a_file_is_read_as_the_library_reads_it(tmp_path_factory, layout, metadata, seed, by_library):
    rng, path = np.random.default_rng(seed), tmp_path_factory.mktemp("x") / "x.safetensors"
    written = {}
    for name, (shape, code) in layout.items():
        dtype = READ_DTYPES[code]
        bits = rng.integers(0, 2 if code == "BOOL" else 256, (*shape, dtype.itemsize), np.uint8)
        written[name] = np.frombuffer(bits.tobytes(), dtype).reshape(shape)
    if by_library and layout:  # without tensors, safetensors 0.8 writes metadata that it cannot read itself
        save_file(written, path, metadata)
    else:
        path.write_bytes(b"".join(safetensors_parts(written, metadata or {})))
    with safe_open(path, framework="numpy") as theirs, TensorFile(path) as ours:
        assert ours.keys() == sorted(theirs.keys())
        assert ours.metadata == (theirs.metadata() or {})
        for key in ours.keys():
            want, got, lazy = theirs.get_tensor(key), ours.tensor(key), LazyTensor(ours, key)
            for array in (got, lazy, np.asarray(lazy), written[key]):
                assert (array.dtype, array.shape) == (want.dtype, want.shape)
                assert (array.dtype, array.shape) == (ours.dtype(key), ours.shape(key))
            assert got.tobytes() == want.tobytes() == b"".join(ours.chunks(key)) == np.asarray(lazy).tobytes()
            assert got.flags.writeable


FOUR = bytes(range(16))
CONTRADICTIONS = {
    "empty": (b"", r"it has 0 bytes, too few for a header"),
    "seven bytes": (b"1234567", r"it has 7 bytes, too few for a header"),
    "no header": (struct.pack("<Q", 0), r"its header begins with b'', not with '\{'"),
    "a header longer than the file": (struct.pack("<Q", 3) + b"{}", r"header has 3 bytes; the file has 10, and"),
    "a header of exabytes": (struct.pack("<Q", 2**64 - 1) + b"{}", r"header has 18,446,744,073,709,551,615 bytes"),
    "a negative length": (struct.pack("<q", -8) + b"{}", r"header has 18,446,744,073,709,551,608 bytes"),
    "a header of 17 MB": (struct.pack("<Q", 2**24 + 1) + b"{" + b" " * 2**24 + b"}", r"16,777,216 are allowed"),
}
HEADERS = {
    "a list": (b"[]", r"its header begins with b'\[', not with"),
    "white space before": (b" {}", r"its header begins with b' ', not with"),
    "a byte order mark": (b"\xef\xbb\xbf{}", r"its header begins with b'\\xef', not with"),
    "no JSON": (b"{]", r"the header is not valid JSON"),
    "NUL padding": (b"{}\0\0", r"the header is not valid JSON \(Extra data"),
    "not UTF-8": (b'{"\xff": 1}', r"the header is not valid JSON \('utf-8' codec"),
    "a key twice": (b'{"a": 1, "a": 1}', r"the header has the key 'a' twice"),
    "a lone surrogate": (b'{"\\ud800": {}}', r"the header holds the text '\\ud800', which is not valid Unicode"),
    "deep": (b'{"a":' * 70 + b"0" + b"}" * 70, r"the header is nested more than 64 levels deep"),
    "metadata that is a list": ({"__metadata__": []}, r"__metadata__ in the header is not an object of strings"),
    "metadata that is null": ({"__metadata__": None}, r"__metadata__ in the header is not an object of strings"),
    "metadata of numbers": ({"__metadata__": {"format": 1}}, r"__metadata__ .* is not an object of strings"),
    "an entry that is no object": ({"a": [0, 16]}, r"the header entry of 'a' does not have dtype, shape and"),
    "no dtype": ({"a": {"shape": [4], "data_offsets": [0, 16]}}, r"the header entry of 'a' does not have dtype"),
    "one field more": ({"a": {**entry(0, 16, [4]), "x": 0}}, r"the header entry of 'a' does not have dtype"),
    "unknown dtype": ({"a": entry(0, 16, [4], "F33")}, r"tensor 'a' has dtype 'F33', which is not one of \['BF16'"),
    "dtype of a wrong type": ({"a": entry(0, 16, [4], ["F32"])}, r"tensor 'a' has dtype \['F32'\], which is not"),
    "a shape that is no list": ({"a": entry(0, 16, 4)}, r"tensor 'a' has the shape 4: at most 16 sizes from 0 to"),
    "a shape that is a text": ({"a": entry(0, 16, "4")}, r"tensor 'a' has the shape 4: at most 16 sizes"),
    "negative sizes": ({"a": entry(0, 16, [-2, -2])}, r"tensor 'a' has the shape \[-2, -2\]: at most"),
    "float sizes": ({"a": entry(0, 16, [4.0])}, r"tensor 'a' has the shape \[4\.0\]: at most"),
    "True as a size": ({"a": entry(0, 4, [True])}, r"tensor 'a' has the shape \[True\]: at most"),
    "None as a size": ({"a": entry(0, 16, [None])}, r"tensor 'a' has the shape \[None\]: at most"),
    "minus zero as a size": (
        b'{"a":{"dtype":"F32","shape":[-0],"data_offsets":[0,0]}}',
        r"the header holds -0, which is no integer",
    ),
    "a size of thousands of digits": (
        b'{"a":{"dtype":"F32","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,16]}}',
        r"the header holds an integer of 5,001 digits",
    ),
    "a size of 3999 digits": (
        {"a": entry(0, 16, [10**3998])},
        r"tensor 'a' has the shape \[10{200,} \.\.\. 0+\]: at most",
    ),
    "too many axes": ({"a": entry(0, 4, [1] * 17)}, r"tensor 'a' has the shape .*: at most 16 sizes"),
    "a product of 2**64 + 4": ({"a": entry(0, 16, [2**31 - 1, 2**31 - 1, 5])}, r"tensor 'a' has the shape"),
    "a product that wraps to 4": ({"a": entry(0, 16, [2**30, 2**30, 2**4, 1])}, r"tensor 'a' has the shape"),
    "nothing of a huge size": ({"a": entry(0, 0, [0, 2**40])}, r"tensor 'a' has the shape \[0, 1099511627776\]"),
    "nothing of many huge sizes": ({"a": entry(0, 0, [0] + [2**31 - 1] * 3)}, r"tensor 'a' has the shape \[0, 21"),
    "one offset": ({"a": {**entry(0, 16, [4]), "data_offsets": [16]}}, r"data_offsets \[16\], which lie outside"),
    "three offsets": ({"a": {**entry(0, 16, [4]), "data_offsets": [0, 8, 16]}}, r"data_offsets .* lie outside"),
    "offsets backwards": ({"a": entry(16, 0, [4])}, r"tensor 'a' has the data_offsets \[16, 0\], which lie outside"),
    "a negative offset": ({"a": entry(-16, 0, [4])}, r"data_offsets \[-16, 0\], which lie outside the file"),
    "float offsets": ({"a": entry(0.0, 16.0, [4])}, r"data_offsets \[0\.0, 16\.0\], which lie outside the file"),
    "True as an offset": ({"a": entry(0, 16, [4]), "b": entry(16, True, [])}, r"data_offsets \[16, True\]"),
    "an offset behind the end": ({"a": entry(4, 20, [4])}, r"data_offsets \[4, 20\], which lie outside the file"),
    "offsets beyond 64 bits": ({"a": entry(2**64, 2**64 + 16, [4])}, r"which lie outside the file"),
    "too few bytes": ({"a": entry(0, 16, [5])}, r"tensor 'a' is given 16 bytes, but F32 \[5\] takes 20"),
    "too many bytes": ({"a": entry(0, 16, [3])}, r"tensor 'a' is given 16 bytes, but F32 \[3\] takes 12"),
    "no tensors but data": ({}, r"its tensors end after 10 bytes, the file after 26"),
    "bytes after the last tensor": ({"a": entry(0, 8, [2])}, r"its tensors end after \d+ bytes, the file after \d+"),
    "a gap at the beginning": ({"a": entry(8, 16, [2])}, r"tensor 'a' leaves a gap before it"),
    "a gap": ({"a": entry(0, 4, [1]), "b": entry(8, 16, [2])}, r"tensor 'b' leaves a gap before it"),
    "an overlap": ({"a": entry(0, 12, [3]), "b": entry(8, 16, [2])}, r"tensor 'b' overlaps another tensor"),
    "the same bytes twice": ({"a": entry(0, 16, [4]), "b": entry(0, 16, [4])}, r"tensor 'b' overlaps another"),
    "nothing inside another": ({"a": entry(0, 16, [4]), "b": entry(8, 8, [0])}, r"tensor 'b' overlaps another"),
    "a name of thousands of characters": (
        {"a" * 1025: entry(0, 16, [4])},
        r"has 1,025 characters in 1 parts; 1,024 in",
    ),
    "a name of many parts": ({"a." * 64: entry(0, 16, [4])}, r"has 128 characters in 65 parts; 1,024 in 64 are"),
}
CONTRADICTIONS |= {
    name: (struct.pack("<Q", len(text)) + text + FOUR, message)
    for name, (header, message) in HEADERS.items()
    for text in [header if isinstance(header, bytes) else json.dumps(header).encode()]
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_a_file_that_contradicts_itself_is_refused_with_the_reason(tmp_path, case):
    content, message = CONTRADICTIONS[case]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(TensorFileError, match=message) as caught:
        TensorFile(tmp_path / "x")
    assert len(str(caught.value)) < 2000
    assert str(caught.value).isprintable()


def is_refused_by_the_library(path):
    try:
        with safe_open(path, framework="numpy") as file:
            for key in file.keys():
                file.get_tensor(key)
    except (SafetensorError, ValueError, OverflowError, MemoryError, TypeError):
        return True
    return False


sizes = st.lists(st.sampled_from([0, 1, 2, 4, -1, 2**31, 2**62, 2**64, True, 1.0, None]), max_size=3)
offsets = st.lists(st.sampled_from([0, 4, 8, 12, 16, 20, -4, 2**64, 4.0, None]), min_size=1, max_size=3)
entries = st.fixed_dictionaries(
    {"dtype": st.sampled_from(["F32", "F16", "BOOL", "F4", "f32", 1]), "shape": sizes, "data_offsets": offsets},
    optional={"x": st.none()},
)


@given(
    header=st.dictionaries(st.sampled_from(["a", "b", "c", "__metadata__"]), entries, max_size=3),
    data=st.sampled_from([b"", FOUR[:4], FOUR[:8], FOUR]),
    before=st.sampled_from([b""] * 5 + [b" ", b"\n", b"\xef\xbb\xbf"]),
    after=st.sampled_from([b"", b" ", b"   ", b"\n", b"\0", b"}"]),
    longer=st.sampled_from([0] * 6 + [1, -1, 2**63]),
)
def test_what_the_library_refuses_is_refused_here(tmp_path_factory, header, data, before, after, longer):
    path = tmp_path_factory.mktemp("x") / "x"
    text = before + json.dumps(header).encode() + after
    file_of(path, text, data, length=len(text) + longer)
    if is_refused_by_the_library(path):
        with pytest.raises(TensorFileError):
            TensorFile(path)


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_the_hand_made_files_show_where_this_reader_is_the_stricter_one(tmp_path, case):
    (tmp_path / "x").write_bytes(CONTRADICTIONS[case][0])
    stricter = {"a key twice", "one field more", "metadata that is null", "nothing of a huge size", "too many axes"}
    stricter |= {"a name of thousands of characters", "a name of many parts", "a header of 17 MB", "deep"}
    stricter |= {"nothing of many huge sizes"}
    assert is_refused_by_the_library(tmp_path / "x") or case in stricter


def test_a_file_without_tensors_and_tensors_without_numbers_are_valid(tmp_path):
    assert TensorFile(file_of(tmp_path / "x", {})).keys() == []
    with TensorFile(file_of(tmp_path / "x", {"a": entry(0, 0, [0, 2**31 - 1]), "b": entry(0, 0, [3, 0])})) as file:
        assert file.tensor("a").shape == (0, 2**31 - 1)
        assert (file.tensor("b").shape, list(file.chunks("b"))) == ((3, 0), [])


@pytest.mark.parametrize("what", ["nothing", "folder", "pipe", "link to itself", "link to nothing", "device"])
def test_what_is_no_regular_file_is_not_opened(tmp_path, what):
    path = tmp_path / "x"
    if what == "folder":
        path.mkdir()
    elif what == "pipe":
        os.mkfifo(path)
    elif what != "nothing":
        path.symlink_to({"link to itself": "x", "link to nothing": "y", "device": "/dev/zero"}[what])
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    with pytest.raises(FileNotFoundError, match=r"x"):
        TensorFile(path)
    gc.collect()
    assert not before or len(os.listdir("/proc/self/fd")) == before


def test_no_descriptor_stays_open_when_a_file_is_refused(tmp_path):
    path = file_of(tmp_path / "x", b"{]")
    for _ in range(3):
        with pytest.raises(TensorFileError):
            TensorFile(path)
    if os.path.isdir("/proc/self/fd"):
        opened = [
            os.readlink(f"/proc/self/fd/{number}") for number in fds() if os.path.islink(f"/proc/self/fd/{number}")
        ]
        assert str(path) not in opened


def fds():
    return os.listdir("/proc/self/fd")


def test_a_file_that_becomes_shorter_while_it_is_read_is_noticed(tmp_path, rng):
    path = tmp_path / "x"
    path.write_bytes(b"".join(safetensors_parts(tensors(rng), {})))
    with TensorFile(path) as file:
        os.truncate(path, path.stat().st_size - 40)
        with pytest.raises(TensorFileError, match=r"it became shorter while it was read"):
            [file.tensor(key) for key in file.keys()]
        with pytest.raises(TensorFileError, match=rf"{path}, the adapter's file, cannot be read any more: it became"):
            [np.asarray(LazyTensor(file, key)) for key in file.keys()]


@pytest.mark.parametrize("positioned", [True, False])
def test_threads_and_second_openings_do_not_disturb_each_other(tmp_path, rng, monkeypatch, request, positioned):
    """Two descriptors of one open file share their position."""
    if not positioned:  # as on Windows
        monkeypatch.delattr(os, "preadv")
        before = sys.getswitchinterval()
        sys.setswitchinterval(1e-6)
        request.addfinalizer(lambda: sys.setswitchinterval(before))
    written = {str(i): rng.standard_normal(5000).astype(np.float32) for i in range(8)}
    (tmp_path / "x").write_bytes(b"".join(safetensors_parts(written, {})))
    wrong = []

    def read(file):
        for _ in range(60):
            wrong.extend(key for key in written if file.tensor(key).tobytes() != written[key].tobytes())

    with TensorFile(tmp_path / "x") as file:
        threads = [threading.Thread(target=read, args=(one,)) for one in (file, file, file.again(), file.again())]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
    assert wrong == []


def test_a_second_opening_outlives_the_first_and_the_file(tmp_path, rng):
    written = tensors(rng)
    (tmp_path / "x").write_bytes(b"".join(safetensors_parts(written, {})))
    with TensorFile(tmp_path / "x") as file:
        lazy = {key: LazyTensor(file.again(), key) for key in file.keys()}
    os.unlink(tmp_path / "x")
    for key, value in lazy.items():
        np.testing.assert_array_equal(np.asarray(value), written[key], strict=True)


def test_large_tensors_are_read_and_written_in_pieces(tmp_path, rng, monkeypatch):
    monkeypatch.setattr(tensorfile, "_CHUNK", 64)
    written = {"x": rng.standard_normal(100).astype(np.float32), "y": rng.standard_normal((7, 9)).astype(np.float16)}
    content = b"".join(safetensors_parts(written, {}))
    (tmp_path / "x").write_bytes(content)
    with TensorFile(tmp_path / "x") as file:
        lazy = {key: LazyTensor(file, key) for key in file.keys()}
        assert [len(piece) for piece in file.chunks("x")] == [64] * 6 + [16]
        assert b"".join(map(bytes, safetensors_parts(lazy, {}))) == content


def test_a_lazy_tensor_answers_what_an_array_answers(tmp_path, rng):
    array = rng.standard_normal((4, 3)).astype(np.float32)
    (tmp_path / "x").write_bytes(b"".join(safetensors_parts({"k": array}, {})))
    with TensorFile(tmp_path / "x") as file:
        lazy = LazyTensor(file, "k")
        assert (len(lazy), lazy.ndim, lazy.size, lazy.nbytes) == (4, 2, 12, 48)
        assert repr(lazy) == "LazyTensor('k', float32, (4, 3))"
        np.testing.assert_array_equal(lazy[1:, 0], array[1:, 0], strict=True)
        np.testing.assert_array_equal(lazy.astype(np.float64), array.astype(np.float64), strict=True)
        np.testing.assert_array_equal(np.asarray(lazy, np.float16), array.astype(np.float16), strict=True)
