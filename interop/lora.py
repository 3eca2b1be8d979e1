"""`export_lora`: the closest LoRA of a given rank, for servers that know only LoRA, and how close it is."""

import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from interop.adalora import SVDFactors
from interop.adapter import Adapter
from interop.card import lora_card, write_card
from interop.compare import open_adapter
from interop.delta import product_blocks
from interop.folder import CONFIG_NAME, replace_pair
from interop.progress import Progress, no_progress
from interop.regularfile import read_at_most
from interop.strictjson import MAX_BYTES, JSONError, parse_object
from interop.table import table
from interop.tensorfile import DTYPES, safetensors_parts

FLOATS = {DTYPES[code].name: DTYPES[code] for code in ("F32", "BF16", "F16")}
EXACT_UP_TO = 1024  # short side of a layer that LAPACK decomposes in about a second; beyond, by a random subspace
OVERSAMPLING, POWER_ITERATIONS = 16, 4  # Halko, Martinsson and Tropp, arXiv:0909.4061, algorithm 4.4


@dataclasses.dataclass(frozen=True)
class LoraExport:
    """What `export_lora` wrote.

    Attributes:
        rank: The rank r of every layer.
        errors: `|dW - B A| / |dW|` in Frobenius norm of each layer, of the numbers as they were written.
    """

    rank: int
    errors: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-compatible values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        """A line for each layer, and the range of errors."""
        lines = table(["module", "relative error"], [[name, f"{error:.3e}"] for name, error in self.errors.items()])
        low, high = min(self.errors.values()), max(self.errors.values())
        return "\n".join([*lines, f"rank {self.rank}: relative errors from {low:.2e} to {high:.2e}"])


def export_lora(
    source: Any,
    directory: str | os.PathLike[str],
    *,
    rank: int,
    dtype: str = "float32",
    progress: Progress = no_progress,
) -> LoraExport:
    """Write a PEFT LoRA whose update is, layer by layer, the best of its rank to an adapter's: a truncated SVD.

    RandLoRA's updates have full rank, and often no few directions that matter most, so look at the errors: it is here
    for servers that can do no better. AdaLoRA's are exact from the rank on that is left. One layer is in memory at a
    time. `lora_alpha` is the rank, so that servers scale by 1; layers whose update has a lower rank get rows of zeros.

    Args:
        source: A folder, an adapter of any kind, or a model with one attached; of linear layers.
        directory: The folder to write to. It may hold an older LoRA, which is replaced, but no other adapter.
        rank: Of the LoRA.
        dtype: What it is stored in: float32, bfloat16 or float16.
        progress: See `verify`.

    Raises:
        ValueError: `rank` or `dtype` is not possible, `directory` holds another adapter, or see `convert`.
        OSError: a file cannot be written.
    """
    adapter, directory = open_adapter(source), Path(directory)
    if rank < 1:
        raise ValueError(f"rank={rank}: must be at least 1. 64 is the most that many servers take.")
    if dtype not in FLOATS:
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {list(FLOATS)}.")
    _refuse_other_adapter(directory)
    errors: dict[str, float] = {}
    steps = iter(progress(list(adapter.factors), "decomposing"))

    @functools.lru_cache(maxsize=1)  # A and B of a layer are written one after the other
    def pair(module: str) -> tuple[np.ndarray, np.ndarray]:
        next(steps, None)
        A, B, errors[module] = _truncated(adapter, module, rank, FLOATS[dtype])
        return A, B

    def factor(module: str, i: int) -> np.ndarray:
        return pair(module)[i]

    tensors: dict[str, Any] = dict(adapter.saved_weights)
    for module in adapter.factors:
        out, inp = _shape(adapter, module)
        for i, (part, shape) in enumerate((("lora_A", (rank, inp)), ("lora_B", (out, rank)))):
            made = _Made(shape, FLOATS[dtype], functools.partial(factor, module, i))
            tensors[f"base_model.model.{module}.{part}.weight"] = made
    directory.mkdir(parents=True, exist_ok=True)
    config = json.dumps(_config(adapter, rank), indent=2, sort_keys=True).encode()
    replace_pair(directory, config, safetensors_parts(tensors, {"format": "pt"}))
    next(steps, None)
    found = LoraExport(rank, {name: errors[name] for name in adapter.factors})
    write_card(lora_card(adapter, rank, found.errors), directory)
    return found


class _Made:
    """A tensor that is computed when its turn to be written comes."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[], np.ndarray]):
        self.shape, self.dtype, self._make = shape, dtype, make
        self.nbytes = math.prod(shape) * dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self._make()


def _refuse_other_adapter(directory: Path) -> None:
    path = directory / CONFIG_NAME
    try:
        kind = parse_object(read_at_most(path, MAX_BYTES)).get("peft_type")
    except FileNotFoundError:
        return
    except JSONError:
        kind = "?"
    if kind != "LORA":
        raise ValueError(f"{directory} holds an adapter of type {kind!r}, which would be lost. Give another folder.")


def _shape(adapter: Adapter, module: str) -> tuple[int, int]:
    if adapter.shapes is None:
        raise ValueError(f"the shape of {module!r} is not recorded in this adapter: bind it to its model first.")
    return adapter.shapes[module]


def _config(adapter: Adapter, rank: int) -> dict[str, Any]:
    """PEFT's LoraConfig; what it has besides is at its defaults."""
    fields = adapter.config.to_dict()
    kept = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "fan_in_fan_out", "modules_to_save")
    return {name: fields[name] for name in kept} | {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "lora_only" if fields["bias"] == "randlora_only" else fields["bias"],
        "target_modules": list(adapter.modules),
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
    }


def _truncated(adapter: Adapter, module: str, rank: int, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray, float]:
    """A (rank, in), B (out, rank) and the relative error of B A."""
    factors = adapter.factors[module]
    if isinstance(factors, SVDFactors):
        right, weights, left = (part.astype(np.float64) for part in factors)
        U, S, V = _of_product(adapter.config.scaling * left * weights.T, right)
        blocks = adapter.delta_blocks(module)
    else:
        shape, scaling = _shape(adapter, module), adapter.config.scaling
        dense = np.empty(shape, np.float32)
        for where, block in product_blocks(factors, adapter.bases, shape, scaling=scaling, dtype=np.float32):
            dense[where] = block
        U, S, V = _of_dense(dense, rank)
        blocks = (((slice(i, i + 1024), slice(None)), dense[i : i + 1024]) for i in range(0, len(dense), 1024))
    A, B = np.zeros((rank, V.shape[1]), dtype), np.zeros((U.shape[0], rank), dtype)
    kept, root = min(rank, len(S)), np.sqrt(S[:rank])
    A[:kept], B[:, :kept] = root[:, None] * V[:kept], U[:, :kept] * root
    return A, B, _relative_error(blocks, A, B)


def _relative_error(blocks: Iterator[Any], A: np.ndarray, B: np.ndarray) -> float:
    A, B = A.astype(np.float64), B.astype(np.float64)
    apart, whole = 0.0, 0.0
    for (rows, columns), block in blocks:
        error = block - B[rows] @ A[:, columns]
        apart, whole = apart + np.vdot(error, error), whole + np.vdot(block, block)
    return math.sqrt(apart / whole) if whole else 0.0


def _of_product(left: np.ndarray, right: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The singular value decomposition U, S, V of a product of few columns and few rows, which is not formed."""
    Q, R = np.linalg.qr(left)
    P, T = np.linalg.qr(right.T)
    U, S, V = np.linalg.svd(R @ T.T, full_matrices=False)
    return Q @ U, S, V @ P.T


def _of_dense(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The largest singular values with their vectors; of a large matrix, from the subspace that a random one finds."""
    width = rank + OVERSAMPLING
    if min(matrix.shape) <= max(EXACT_UP_TO, 2 * width):
        return np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    sample = np.random.default_rng(0).standard_normal((matrix.shape[1], width), np.float32)
    Q = np.linalg.qr(matrix @ sample)[0]
    for _ in range(POWER_ITERATIONS):
        Q = np.linalg.qr(matrix @ np.linalg.qr(matrix.T @ Q)[0])[0]
    U, S, V = np.linalg.svd(Q.T @ matrix, full_matrices=False)
    return Q @ U, S, V
