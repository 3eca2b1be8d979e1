"""Adapter folders looked into and changed by other means than the package's own."""

import hashlib
import json

from safetensors import safe_open
from safetensors.numpy import save_file

from interop.folder import CONFIG_NAME, WEIGHTS_NAME


def weights(folder):
    """Tensors and metadata of the folder, read by the safetensors library alone."""
    with safe_open(folder / WEIGHTS_NAME, framework="numpy") as file:
        return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()


def rewrite(folder, *, drop=(), add=None, notes=None, metadata=None):
    """Write the folder's tensors again with some changed; `notes` updates our metadata, `metadata` replaces all.

    Changed tensors lose their SHA-256, and notes get a new one, so that what is wrong is found by other means.
    """
    tensors, old = weights(folder)
    tensors = {key: value for key, value in tensors.items() if key not in drop} | (add or {})
    if metadata is None:
        changed = {"tensors_sha256": None} if drop or add else {}
        metadata = {"format": "pt", "randlora": json.dumps(json.loads(old["randlora"]) | changed | (notes or {}))}
    if "randlora" in metadata:
        metadata = {"randlora_sha256": hashlib.sha256(metadata["randlora"].encode()).hexdigest(), **metadata}
    save_file(tensors, folder / WEIGHTS_NAME, metadata)


def edit_config(folder, **fields):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def both_files(folder):
    return [(folder / name).read_bytes() for name in (CONFIG_NAME, WEIGHTS_NAME)]


def same_arrays(a, b):
    assert a.keys() == b.keys()
    for name, pair in a.items():
        for x, y in zip(pair, b[name], strict=True):
            assert (x.dtype, x.shape, x.tobytes()) == (y.dtype, y.shape, y.tobytes()), name


def digest_of(tensors):
    """The `tensors_sha256` of FORMAT.md, of tensors by key."""
    digest = hashlib.sha256()
    for key, tensor in sorted(tensors.items()):
        digest.update("\0".join([key, str(tensor.dtype), str(tensor.shape), ""]).encode() + tensor.tobytes())
    return digest.hexdigest()
