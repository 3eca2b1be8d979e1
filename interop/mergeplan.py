"""What a merge will do with each weight of a base, decided and checked before a file is written."""

import json
import math
import os
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.basenames import BaseNames, is_known_conv1d, match_names, unties
from interop.bnb import MALFORMED, QuantState, grouped, parse_state, require_bitsandbytes, state_piece
from interop.errors import bulleted
from interop.modelfolder import CheckpointFormatError, ModelFolder, model_dtype
from interop.outfolder import Spec
from interop.tensorfile import DTYPES

FLOATS = frozenset(DTYPES[code] for code in ("F64", "F32", "F16", "BF16"))
OFFSET_WIDTH = 24  # characters for a float32 in JSON, whatever it will be; spaces fill the rest
_CONVOLUTION = 4  # axes


class Step(NamedTuple):
    """What becomes of one weight.

    Attributes:
        name: In the base, or in the new folder if it is new.
        keys: Where its quantized pieces are, see `bnb.grouped`; {} for a plain weight.
        module: The adapted layer whose weight it is, None if none.
        saved: The key in `saved_weights` of what takes its place, None if nothing does.
        new: Whether the base lacks it.
        requantized: Whether it is quantized in the end as it was in the beginning.
        transposed: Whether a plain weight is stored (in, out).
        dtype: What a plain weight is stored in.
        file: Where it is written to.
        outputs: Its tensors there.
    """

    name: str
    keys: Mapping[str, str]
    module: str | None
    saved: str | None
    new: bool
    requantized: bool
    transposed: bool
    dtype: np.dtype
    file: Mapping[str, str]
    outputs: Mapping[str, Spec]

    @property
    def touched(self) -> bool:
        """Whether its numbers change."""
        return self.module is not None or self.saved is not None


class Plan(NamedTuple):
    """All steps, and what else there is to know.

    Attributes:
        adapter: Bound to the base.
        steps: In the order in which the base is read.
        config: The content of the new config.json.
    """

    adapter: Adapter
    steps: list[Step]
    config: dict[str, Any]

    def specs_by_file(self) -> dict[str, dict[str, Spec]]:
        """The tensors of each new file."""
        specs: dict[str, dict[str, Spec]] = {}
        for step in self.steps:
            for key, spec in step.outputs.items():
                specs.setdefault(step.file[key], {})[key] = spec
        return specs


class _Weight(NamedTuple):
    """A weight of the base: its pieces, and what it is when it is dequantized."""

    keys: Mapping[str, str]
    dtype: np.dtype
    shape: tuple[int, ...]
    state: dict[str, Any] | None  # the JSON of one with nested scales


def make_plan(adapter: Adapter, model: ModelFolder, dtype: np.dtype | None, requantize: bool) -> Plan:
    """Decide what to do with each weight.

    Args:
        adapter: Any.
        model: The base.
        dtype: What to convert floating-point weights to, if to anything.
        requantize: Whether quantized weights stay quantized.

    Raises:
        ValueError: adapter and base do not fit together.
        CheckpointFormatError: the base is malformed, or quantized by another method.
        AdapterFormatError: the adapter was made for another base.
    """
    weights = _weights(model)
    if requantize and not any(weight.keys for weight in weights.values()):
        raise ValueError(f"quantized='requantize', but {model.path} is not quantized. Drop the argument.")
    names = match_names(adapter, weights.keys(), model.config)
    _check_saved(adapter, names, weights, model)
    planner = _Planner(adapter, model, names, weights, dtype, requantize)
    return Plan(planner.bound(), planner.steps(), _new_config(model.config, names, weights, dtype, requantize))


def bind_to_folder(adapter: Adapter, base: str | os.PathLike[str]) -> Adapter:
    """`adapter.bind` with the shapes of the layers of a base model's folder, of which only headers are read.

    Raises:
        ValueError, CheckpointFormatError, AdapterFormatError: see `make_plan`.
    """
    with ModelFolder(base) as model:
        weights = _weights(model)
        names = match_names(adapter, weights.keys(), model.config)
        return _Planner(adapter, model, names, weights, None, requantize=True).bound()


def _weights(model: ModelFolder) -> dict[str, _Weight]:
    """All weights of the base, sorted as they are read: file by file."""
    require_bitsandbytes(model)
    problems: list[str] = []
    weights = {}
    for name, keys in grouped(model).items():
        try:
            weights[name] = _weight(model, name, keys)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    if problems:
        raise CheckpointFormatError(bulleted(MALFORMED.format(model.path), problems))
    return dict(sorted(weights.items(), key=lambda item: (model.file(item[0]).path.name, item[0])))


def _weight(model: ModelFolder, name: str, keys: Mapping[str, str]) -> _Weight:
    if name not in model:
        raise ValueError(f"the weight itself is missing, while {sorted(keys)} are there")
    if not keys:
        return _Weight(keys, model.dtype(name), model.shape(name), None)
    if "SCB" in keys or "weight_format" in keys:
        return _Weight(keys, model_dtype(model.config), model.shape(name), None)
    state, nested = read_state(model, keys)
    fields = json.loads(model.tensor(state_key(keys)[1]).tobytes())
    return _Weight(keys, state.dtype, state.shape, fields if nested else None)


def state_key(keys: Mapping[str, str]) -> tuple[str, str]:
    """The piece of a 4-bit weight that is JSON, and its key."""
    piece = state_piece(keys)
    return piece, keys[piece]


def read_state(model: ModelFolder, keys: Mapping[str, str]) -> tuple[QuantState, bool]:
    """How a 4-bit weight is quantized, and whether its scales are, too."""
    piece, key = state_key(keys)
    state = parse_state(piece, model.tensor(key))
    return state, state.nested_blocksize is not None


def _check_saved(adapter: Adapter, names: BaseNames, weights: Mapping[str, _Weight], model: ModelFolder) -> None:
    problems = []
    for key, name in names.saved.items():
        saved, old = adapter.saved_weights[key], weights.get(name)
        if old is None and name in model:
            problems.append(f"{name}: the base has it quantized, as a part of another weight")
        elif old is not None and tuple(saved.shape) != old.shape:
            hint = " (model.resize_token_embeddings in transformers, if the vocabulary grew)" if saved.ndim > 1 else ""
            problems.append(f"{name}: the base has {old.shape}, the adapter {tuple(saved.shape)}{hint}")
        elif old is not None and (saved.dtype in FLOATS) != (old.dtype in FLOATS):
            problems.append(f"{name}: the base has {old.dtype}, the adapter {saved.dtype}")
    if problems:
        raise ValueError(bulleted("the adapter's own weights do not fit this base", problems))


class _Planner(NamedTuple):
    adapter: Adapter
    model: ModelFolder
    names: BaseNames
    weights: Mapping[str, _Weight]
    dtype: np.dtype | None
    requantize: bool

    def bound(self) -> Adapter:
        """The adapter on this base."""
        return self.adapter.bind({module: self.shape(module, name) for module, name in self.names.weights.items()})

    def shape(self, module: str, name: str) -> tuple[int, int]:
        """(out, in) of an adapted layer."""
        shape = self._stored_shape(name)
        if len(shape) == _CONVOLUTION and isinstance(self.adapter.config, AdaLoraConfig):
            return shape[0], math.prod(shape[1:])
        if len(shape) != 2:
            raise ValueError(
                f"{name} has the shape {shape}: {self.adapter.config.METHOD} adapts matrices"
                f"{' and convolutions of images' * isinstance(self.adapter.config, AdaLoraConfig)}."
                " Is this the base it was made for?"
            )
        quantized = name in self.weights and self.weights[name].keys
        return shape[::-1] if self._transposed(name, module) and not quantized else shape

    def _stored_shape(self, name: str) -> tuple[int, ...]:
        if name in self.weights:
            return self.weights[name].shape
        (key,) = (key for key, own in self.names.saved.items() if own == name)
        return tuple(self.adapter.saved_weights[key].shape)

    def _transposed(self, name: str, module: str | None) -> bool:
        """Whether a plain weight of that name is (in, out): by the kind of model, else by what the adapter says."""
        known = is_known_conv1d(name, self.model.config)
        if known is not None:
            return known
        if module is None or not self.adapter.config.fan_in_fan_out:
            return False
        recorded, stored = (self.adapter.shapes or {}).get(module), self._stored_shape(name)
        square = len(set(stored)) == 1
        if name in self.weights and self.weights[name].keys and not self.requantize:
            raise ValueError(
                f"{name} is quantized, and whether this model stores it (in, out) when it is not cannot be told from"
                f" model_type={self.model.config.get('model_type')!r}. Use quantized='requantize'."
            )
        return len(stored) == 2 and (square or recorded != stored)

    def steps(self) -> list[Step]:
        """All of them, those of new weights last."""
        modules = {name: module for module, name in self.names.weights.items()}
        saved = {name: key for key, name in self.names.saved.items()}
        steps = [self._step(name, weight, modules.get(name), saved.get(name)) for name, weight in self.weights.items()]
        last = max(self.model.files)
        for name, key in sorted(saved.items()):
            if name not in self.weights:
                tensor = self.adapter.saved_weights[key]
                dtype = self._final(tensor.dtype)
                outputs = {name: Spec(dtype, tuple(tensor.shape))}
                steps.append(Step(name, {}, modules.get(name), key, True, False, False, dtype, {name: last}, outputs))
        return steps

    def _final(self, dtype: np.dtype) -> np.dtype:
        return self.dtype if self.dtype is not None and dtype in FLOATS else dtype

    def _step(self, name: str, weight: _Weight, module: str | None, saved: str | None) -> Step:
        requantized = bool(weight.keys) and self.requantize
        transposed = self._transposed(name, module) and not requantized
        dtype = self._final(weight.dtype)
        if module is not None and dtype not in FLOATS:
            raise ValueError(f"{name} is {dtype}: an update can only be added to floating-point weights.")
        if requantized:
            keys = [name, *weight.keys.values()]
            outputs = {key: Spec(self.model.dtype(key), self.model.shape(key)) for key in keys}
            if weight.state is not None and (module is not None or saved is not None):
                outputs[state_key(weight.keys)[1]] = Spec(np.dtype(np.uint8), (state_size(weight.state),))
        else:
            shape = weight.shape[::-1] if transposed and weight.keys else weight.shape
            outputs = {name: Spec(dtype, shape)}
        file = {key: self.model.file(key).path.name for key in outputs}
        return Step(name, weight.keys, module, saved, False, requantized, transposed, dtype, file, outputs)


def state_size(fields: Mapping[str, Any]) -> int:
    """Bytes of the JSON of a weight with nested scales, with room for any offset."""
    return len(json.dumps({**fields, "nested_offset": 0})) - 1 + OFFSET_WIDTH


def _new_config(
    config: Mapping[str, Any],
    names: BaseNames,
    weights: Mapping[str, _Weight],
    dtype: np.dtype | None,
    requantize: bool,
) -> dict[str, Any]:
    new = dict(config)
    if not requantize:
        new.pop("quantization_config", None)
    if dtype is not None and new:
        new = _with_dtype({"dtype": str(dtype), **new} if "torch_dtype" not in new else new, str(dtype))
    if unties(names, weights.keys()):
        new["tie_word_embeddings"] = False
    return new


def _with_dtype(config: Mapping[str, Any], dtype: str) -> dict[str, Any]:
    """The config with another dtype, also of the parts of a model of several."""
    values = {}
    for field, value in config.items():
        if field in ("dtype", "torch_dtype") and value is not None:
            value = dtype
        values[field] = _with_dtype(value, dtype) if isinstance(value, dict) else value
    return values
