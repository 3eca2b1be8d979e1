"""`AdapterConfig`: what the configs of all methods have in common. Fields are checked once, at construction."""

import abc
import dataclasses
import json
import numbers
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from interop.regularfile import read_at_most
from interop.strictjson import MAX_BYTES, parse_object

# The heads that PEFT trains in full for a task type, whatever `modules_to_save` says.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}
MAX_MODULES_TO_SAVE = 1000  # each is compared with every tensor of a file


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterConfig(abc.ABC):
    """The fields that every method has, under PEFT's names; the content of `adapter_config.json`.

    Attributes:
        target_modules: Names or name suffixes of the layers to adapt, a regular expression matched against the whole
            name, or "all-linear" (every linear layer but the output head).
        exclude_modules: Names, suffixes or a regular expression of layers to leave out.
        fan_in_fan_out: The base layer stores its weight as (in, out), as GPT-2's Conv1D does.
        bias: "none", "all", or the method's own "..._only": which bias vectors train.
        modules_to_save: Further modules that train in full and are saved with the adapter.
        layers_to_transform, layers_pattern: Restrict `target_modules` to these layer indices of that module list.
        unknown_fields: Keys of a newer PEFT that this version does not know; kept and written back.

    The remaining fields are PEFT's bookkeeping and carried along unchanged.
    """

    PEFT_TYPE: ClassVar[str]  # how adapter_config.json calls the method
    METHOD: ClassVar[str]  # how we do
    BIAS_CHOICES: ClassVar[tuple[str, ...]]
    INTS: ClassVar[tuple[str, ...]]
    NUMBERS: ClassVar[tuple[str, ...]]  # of any kind, besides INTS
    BOOLS: ClassVar[tuple[str, ...]] = ("fan_in_fan_out", "inference_mode")

    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    revision: str | None = None
    inference_mode: bool = False
    auto_mapping: dict[str, Any] | None = None
    peft_version: str | None = None
    unknown_fields: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        """Normalize name lists to tuples, then check every field."""
        for name in _NAME_LISTS:
            object.__setattr__(self, name, _as_tuple(getattr(self, name)))
        for name in (*self.INTS, *self.NUMBERS):
            object.__setattr__(self, name, _as_python_number(getattr(self, name)))
        self._check_types()
        self._check_values()

    @property
    @abc.abstractmethod
    def scaling(self) -> float:
        """The number that the update is multiplied by."""

    @property
    @abc.abstractmethod
    def dropout(self) -> float:
        """Probability of zeroing an input of the adapter branch while training, under one name for all methods."""

    def with_targets(self, target_modules: str | tuple[str, ...]) -> Self:
        """This config with other target_modules, and without the fields that select among them."""
        selecting: dict[str, Any] = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
        return dataclasses.replace(self, target_modules=target_modules, **selecting)

    def require_no_head(self) -> None:
        """Refuse the task types for which PEFT trains the head, whatever `modules_to_save` says.

        Raises:
            ValueError: `task_type` is one of them.
        """
        if self.task_type in HEADS:
            raise ValueError(
                f"task_type={self.task_type!r}: for it PEFT trains the head {' or '.join(HEADS[self.task_type])} along"
                " and expects it in the file, which is not done here. Leave task_type=None."
            )

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them: lists for tuples, unknown fields merged back."""
        fields = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "unknown_fields"}
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {**self.unknown_fields, **listed, "peft_type": self.PEFT_TYPE}

    def to_json(self) -> str:
        """The text of `adapter_config.json`, formatted as PEFT writes it (sorted keys, two spaces)."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> Self:
        """Read the `adapter_config.json` of a folder, whether the folder holds weights or not.

        Raises:
            FileNotFoundError: the folder has no such file.
            TypeError, ValueError: see `from_dict`; or the file is no JSON.
        """
        return cls.from_dict(parse_object(read_at_most(Path(directory) / "adapter_config.json", MAX_BYTES)))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into a folder; an adapter is saved whole by `interop.save`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "adapter_config.json").write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Read the content of an `adapter_config.json`, the inverse of `to_dict`; `AdapterConfig` reads any method's.

        Raises:
            TypeError, ValueError: `peft_type` is another, or a field has a wrong type or value.
        """
        fields = dict(fields)
        kinds = {kind.PEFT_TYPE: kind for kind in (cls.__subclasses__() if cls is AdapterConfig else [cls])}
        peft_type = fields.pop("peft_type", "RANDLORA" if cls is AdapterConfig else cls.PEFT_TYPE)
        if not isinstance(peft_type, str) or peft_type not in kinds:
            methods = " or ".join(sorted((kind.METHOD for kind in kinds.values()), reverse=True))
            methods = f"an {methods}" if methods.startswith("A") else f"a {methods}"
            allowed = " and ".join(sorted(map(repr, kinds), reverse=True))
            raise ValueError(f"peft_type={peft_type!r} is not {methods} adapter: only {allowed} can be read here.")
        kind = kinds[peft_type]
        known = {f.name for f in dataclasses.fields(kind)} - {"unknown_fields"}
        unknown = {name: value for name, value in fields.items() if name not in known}
        return kind(**{name: fields[name] for name in known & fields.keys()}, unknown_fields=unknown)

    def _require(self, name: str, ok: bool, rule: str, *, error: type[Exception] = ValueError) -> None:
        if not ok:
            raise error(f"{name}={getattr(self, name)!r}: {rule}")

    def _check_types(self) -> None:
        for name in self.INTS:
            self._require(name, is_int(getattr(self, name)), "must be an int.", error=TypeError)
        for name in self.BOOLS:
            self._require(name, isinstance(getattr(self, name), bool), "must be True or False.", error=TypeError)
        for name in ("target_modules", "exclude_modules", "layers_pattern"):
            value = getattr(self, name)
            ok = value is None or isinstance(value, str) or _is_names(value)
            self._require(name, ok, "must be None, a string or a list of non-empty strings.", error=TypeError)
        ok = self.modules_to_save is None or _is_names(self.modules_to_save)
        self._require("modules_to_save", ok, "must be None or a list of module names.", error=TypeError)
        ok = self.modules_to_save is None or len(self.modules_to_save) <= MAX_MODULES_TO_SAVE
        self._require("modules_to_save", ok, f"must name at most {MAX_MODULES_TO_SAVE} modules.")
        for name in ("task_type", "base_model_name_or_path", "revision", "peft_version"):
            ok = getattr(self, name) is None or isinstance(getattr(self, name), str)
            self._require(name, ok, "must be None or a string.", error=TypeError)
        ok = self.auto_mapping is None or isinstance(self.auto_mapping, Mapping)
        self._require("auto_mapping", ok, "must be None or a dict.", error=TypeError)
        layers = self.layers_to_transform
        ok = layers is None or is_int(layers) or (isinstance(layers, tuple) and all(map(is_int, layers)))
        self._require("layers_to_transform", ok, "must be None, an int or a list of ints.", error=TypeError)

    def _check_values(self) -> None:
        self._require("bias", self.bias in self.BIAS_CHOICES, f"must be one of {self.BIAS_CHOICES}.")
        rule = "is empty, so nothing would be adapted. Name layers, or use 'all-linear'."
        self._require("target_modules", self.target_modules not in ((), ""), rule)

    def _check_dropout(self, name: str) -> None:
        ok = is_number(getattr(self, name)) and 0 <= getattr(self, name) < 1
        self._require(name, ok, "must be a probability in [0, 1); 0 switches dropout off.")


_NAME_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")


def is_int(value: Any) -> bool:
    """Whether a value is an int; True and False are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Whether a value is a finite number that a float can hold."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _as_tuple(value: Any) -> Any:
    """Lists and sets become tuples (sets sorted, so that the same set always gives the same file)."""
    if isinstance(value, set | frozenset):
        return tuple(sorted(value))
    return tuple(value) if isinstance(value, list) else value


def _as_python_number(value: Any) -> Any:
    """Numbers of numpy and the like become Python's, which JSON can hold."""
    if isinstance(value, bool | int | float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)
