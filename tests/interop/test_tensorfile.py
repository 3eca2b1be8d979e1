import json
import struct

import ml_dtypes
import numpy as np
from safetensors import safe_open
from safetensors.numpy import load_file

from interop.tensorfile import safetensors_parts

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
    first, *buffers = safetensors_parts(written, {"format": "pt"})
    length, header = first[:8], first[8:]
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
    _, buffer = safetensors_parts({"x": array}, {})
    assert np.shares_memory(np.frombuffer(buffer, np.uint8), array)
