"""An adapter merged into the folder of its base model, without a framework, one weight after the other.

All headers are known before the first number is, so that each weight is read, changed and put in its place, and gone.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from interop.adapter import Adapter
from interop.blockwise import Rounding
from interop.files import load
from interop.mergeplan import Plan, Step, make_plan
from interop.mergestep import take
from interop.modelfolder import CONFIG_NAME, FLOATS, INDEX_NAME, WEIGHTS_NAME, CheckpointFormatError, ModelFolder
from interop.outfolder import TensorWriter, copy_others, new_folder
from interop.progress import Progress, no_progress
from interop.strictjson import parse_object

QUANTIZED = ("dequantize", "requantize")


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeReport:
    """What `merge` did.

    Attributes:
        modules: The layers that an update was added to.
        rounding: What rounding or quantizing W + dW changed in each of them.
        replaced: Weights of the base that trained ones took the place of.
        added: Trained weights that the base has not, such as those of a classifier's head.
        files: The files of weights that were written.
        left_out: What the base's folder holds and the new one does not: adapters, pickles, other weights, sub-folders.
        bytes_written: Size of the files of weights.
    """

    modules: tuple[str, ...]
    rounding: Mapping[str, Rounding]
    replaced: tuple[str, ...]
    added: tuple[str, ...]
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    bytes_written: int

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-compatible values."""
        rounding = {module: found._asdict() for module, found in self.rounding.items()}
        return {**dataclasses.asdict(self), "rounding": rounding}

    def __str__(self) -> str:
        """How much was merged, what else changed, and what rounding cost at most."""
        lines = [f"{len(self.modules)} layers merged, {self.bytes_written:,d} bytes of weights written"]
        for what, names in (("replaced", self.replaced), ("added", self.added), ("left out", self.left_out)):
            lines += [f"{what:<9} {', '.join(names)}"] * bool(names)
        module, worst = max(self.rounding.items(), key=lambda item: item[1].of_update)
        lines.append(f"rounding  at most {worst.of_weight:.1e} of W + dW and {worst.of_update:.1e} of dW ({module})")
        return "\n".join(lines)


def merge(
    adapter: Adapter | str | os.PathLike[str],
    base: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    quantized: str = "dequantize",
    progress: Progress = no_progress,
) -> MergeReport:
    """Write the folder of a model without adapters whose weights are W + dW, for transformers to load.

    The sum is taken in float64 and rounded once. Weights are read, merged and written one by one: in memory are the
    adapter's bases and one layer. The new folder has the base's files of weights under the same names, its config, and
    its other files (tokenizer, ...); it appears under its name when it is whole. Trained biases, `modules_to_save` and
    embeddings take the place of the base's, in its dtype.

    Args:
        adapter: An adapter, or its folder.
        base: The folder of its base model, in safetensors, plain or quantized by bitsandbytes.
        target: The folder to write; it must not exist, or be empty.
        dtype: "float32", "bfloat16" or "float16": what to store all floating-point weights in. By default each keeps
            its own; of a quantized weight, that is the dtype it was quantized from.
        quantized: What becomes of a quantized base: "dequantize", into a plain model; or "requantize", in the base's
            own format. Then weights without an adapter keep their very bytes, and merged ones lose of their update what
            `MergeReport.rounding` says.
        progress: See `verify`.

    Raises:
        ValueError: an argument is not allowed, adapter and base do not fit together, or a merged weight is not finite.
        CheckpointFormatError: the base is incomplete or malformed, or quantized by another method.
        AdapterFormatError: so is the adapter, or it was made for another base model.
        FileNotFoundError: a folder does not exist, or lacks its files.
        FileExistsError: the target holds something.

    Example:
        >>> merge("adapter", "base", "merged", dtype="bfloat16")  # doctest: +SKIP
    """
    base, target = Path(base), Path(target)
    _check_arguments(dtype, quantized, base, target)
    if not isinstance(adapter, Adapter):
        adapter = load(adapter, lazy=True)
    with ModelFolder(base) as model:
        plan = make_plan(adapter, model, None if dtype is None else FLOATS[dtype], quantized == "requantize")
        with new_folder(target) as work:
            rounding, written = _write_weights(plan, model, work, progress)
            names = _write_config_and_index(plan, model, work)
            left_out = copy_others(base, work, {*names, *written, *model.files})
    return MergeReport(
        modules=plan.adapter.modules,
        rounding=rounding,
        replaced=tuple(step.name for step in plan.steps if step.saved and not step.new),
        added=tuple(step.name for step in plan.steps if step.new),
        files=tuple(written),
        left_out=tuple(left_out),
        bytes_written=sum(written.values()),
    )


def _check_arguments(dtype: str | None, quantized: str, base: Path, target: Path) -> None:
    if dtype not in (None, *FLOATS):
        raise ValueError(f"dtype={dtype!r} is not known: choose one of {list(FLOATS)}, or None to keep the base's own.")
    if quantized not in QUANTIZED:
        raise ValueError(f"quantized={quantized!r} is not known: choose one of {list(QUANTIZED)}.")
    if dtype is not None and quantized == "requantize":
        raise ValueError(f"dtype={dtype!r} with quantized='requantize': quantized weights have their own. Drop one.")
    if target.exists() and base.exists() and target.samefile(base):
        raise ValueError(f"the target {target} is the base itself, which is not changed. Name another folder.")


def _write_weights(
    plan: Plan, model: ModelFolder, work: Path, progress: Progress
) -> tuple[dict[str, Rounding], dict[str, int]]:
    """Take all steps; returns the rounding by module, and the sizes of the new files by name."""
    writers: dict[str, TensorWriter] = {}
    rounding = {}
    try:
        for name, specs in sorted(plan.specs_by_file().items()):
            writers[name] = TensorWriter(work / name, specs, model.files[name].metadata)
        for step in progress(plan.steps, "merging"):
            found = _take(step, plan, model, writers)
            if found is not None:
                rounding[step.module] = found
        for writer in writers.values():
            writer.close()
    finally:
        for writer in writers.values():
            writer.abandon()
    return rounding, {name: writer.nbytes for name, writer in writers.items()}


def _take(step: Step, plan: Plan, model: ModelFolder, writers: Mapping[str, TensorWriter]) -> Rounding | None:
    try:
        return take(step, plan, model, lambda key, pieces: writers[step.file[key]].put(key, pieces))
    except ValueError as error:
        whose = f"{step.module}, {step.name}" if step.module else step.name
        kind = CheckpointFormatError if isinstance(error, CheckpointFormatError) else ValueError
        raise kind(f"{whose}: {error}") from error


def _write_config_and_index(plan: Plan, model: ModelFolder, work: Path) -> list[str]:
    """Write what describes the weights, and return the names of both files; a config that stays is copied."""
    if plan.config == model.config:
        config = [] if not (model.path / CONFIG_NAME).is_file() else [(model.path / CONFIG_NAME).read_bytes()]
    else:
        config = [(json.dumps(plan.config, indent=2) + "\n").encode()]
    for content in config:
        (work / CONFIG_NAME).write_bytes(content)
    if WEIGHTS_NAME not in model.files:
        index = parse_object((model.path / INDEX_NAME).read_bytes())
        outputs = {key: (step, spec) for step in plan.steps for key, spec in step.outputs.items()}
        metadata = {**index.get("metadata", {}), "total_size": sum(spec.nbytes for _, spec in outputs.values())}
        if "total_parameters" in metadata:
            new = (math.prod(spec.shape) for step, spec in outputs.values() if step.new)
            metadata["total_parameters"] += sum(new)
        weight_map = {key: step.file[key] for key, (step, _) in sorted(outputs.items())}
        merged = json.dumps({**index, "metadata": metadata, "weight_map": weight_map}, indent=2)
        (work / INDEX_NAME).write_text(merged + "\n", encoding="utf-8")
    return [CONFIG_NAME, INDEX_NAME]
