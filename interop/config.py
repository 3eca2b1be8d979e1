"""`RandLoraConfig`: PEFT's fields, PEFT's defaults, PEFT's JSON; checked once, at construction."""

import dataclasses
import json
import numbers
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1  # what torch's CPU generator accepts
BIAS_CHOICES = ("none", "all", "randlora_only")
# The heads that PEFT trains in full for a task type, whatever `modules_to_save` says.
HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoraConfig:
    """What a RandLoRA adapter is, apart from its weights (arXiv:2502.00987); the content of `adapter_config.json`.

    Attributes:
        r: Rank of one basis, at least 1. **A smaller r trains more parameters**: n = ceil(min(out, in) / r) bases.
        randlora_alpha: The update is scaled by `randlora_alpha / r`.
        target_modules: Names or name suffixes of the layers to adapt, a regular expression matched against the whole
            name, or "all-linear" (every linear layer but the output head).
        exclude_modules: Names, suffixes or a regular expression of layers to leave out. PEFT ignores it for RandLoRA.
        projection_prng_key: Seed of the random bases, any int64 or uint64 (torch uses its low 32 bits).
        save_projection: Whether the bases are written to the file; if not, they are rebuilt from the seed and checked.
        sparse, very_sparse: Ternary bases with density 1/3, or 1/sqrt(min_dim); `very_sparse` wins if both are set.
        randlora_dropout: Probability in [0, 1) of zeroing an input of the adapter branch while training.
        fan_in_fan_out: The base layer stores its weight as (in, out), as GPT-2's Conv1D does.
        bias: "none", "all" or "randlora_only": which bias vectors train.
        modules_to_save: Further modules that train in full and are saved with the adapter.
        init_weights: True starts at dW = 0 (lambda = 0, gamma = 1/max(n, min_dim)); False at a random dW.
        layers_to_transform, layers_pattern: Restrict `target_modules` to these layer indices of that module list.
        unknown_fields: Keys of a newer PEFT that this version does not know; kept and written back.

    The remaining fields are PEFT's bookkeeping and carried along unchanged.

    Raises:
        TypeError, ValueError: a field has a wrong type or value; the message says what is allowed and what to do.

    Example:
        >>> RandLoraConfig(r=4, target_modules=["q_proj"]).scaling
        160.0
    """

    r: int = 32
    randlora_alpha: float = 640
    target_modules: str | tuple[str, ...] | None = None
    exclude_modules: str | tuple[str, ...] | None = None
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    fan_in_fan_out: bool = False
    bias: str = "none"
    modules_to_save: tuple[str, ...] | None = None
    init_weights: bool = True
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
        for name in ("r", "projection_prng_key", "randlora_alpha", "randlora_dropout"):
            object.__setattr__(self, name, _as_python_number(getattr(self, name)))
        _check_types(self)
        _check_values(self)

    def __hash__(self) -> int:
        """A config is a static argument of jitted functions; fields that hold dicts take no part in its hash."""
        return hash((self.r, self.randlora_alpha, self.projection_prng_key, self.target_modules))

    @property
    def scaling(self) -> float:
        """`randlora_alpha / r`, the factor s of the update."""
        return self.randlora_alpha / self.r

    @property
    def ternary(self) -> bool:
        """Whether the bases are ternary (`sparse` or `very_sparse`): then every recipe gives the same ones."""
        return self.sparse or self.very_sparse

    def with_targets(self, target_modules: str | tuple[str, ...]) -> "RandLoraConfig":
        """This config with other target_modules, and without the fields that select among them."""
        selecting = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
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
        if self.exclude_modules is None:  # PEFT's RandLoraConfig has no such field and warns about it
            del fields["exclude_modules"]
        listed = {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}
        return {**self.unknown_fields, **listed, "peft_type": "RANDLORA"}

    def to_json(self) -> str:
        """The text of `adapter_config.json`, formatted as PEFT writes it (sorted keys, two spaces)."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> "RandLoraConfig":
        """Read the `adapter_config.json` of a folder, whether the folder holds weights or not.

        Raises:
            FileNotFoundError: the folder has no such file.
            TypeError, ValueError: see `from_dict`; or the file is no JSON.
        """
        return cls.from_dict(json.loads((Path(directory) / "adapter_config.json").read_text(encoding="utf-8-sig")))

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write `adapter_config.json` into a folder; an adapter is saved whole by `interop.save`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        (Path(directory) / "adapter_config.json").write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> "RandLoraConfig":
        """Read the content of an `adapter_config.json`; the inverse of `to_dict`.

        Raises:
            TypeError, ValueError: `peft_type` is not RANDLORA, or a field has a wrong type or value.
        """
        fields = dict(fields)
        peft_type = fields.pop("peft_type", "RANDLORA")
        if peft_type != "RANDLORA":
            raise ValueError(f"peft_type={peft_type!r} is not a RandLoRA adapter: only 'RANDLORA' can be read here.")
        known = {f.name for f in dataclasses.fields(cls)} - {"unknown_fields"}
        unknown = {name: value for name, value in fields.items() if name not in known}
        return cls(**{name: fields[name] for name in known & fields.keys()}, unknown_fields=unknown)


_NAME_LISTS = ("target_modules", "exclude_modules", "modules_to_save", "layers_to_transform", "layers_pattern")
_BOOLS = ("save_projection", "sparse", "very_sparse", "fan_in_fan_out", "init_weights", "inference_mode")
_OPTIONAL_NAMES = ("target_modules", "exclude_modules", "layers_pattern")


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


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_names(value: Any) -> bool:
    return isinstance(value, tuple) and all(isinstance(item, str) and item for item in value)


def _require(config: RandLoraConfig, name: str, ok: bool, rule: str, *, error: type[Exception] = ValueError) -> None:
    if not ok:
        raise error(f"{name}={getattr(config, name)!r}: {rule}")


def _check_types(config: RandLoraConfig) -> None:
    for name in ("r", "projection_prng_key"):
        _require(config, name, _is_int(getattr(config, name)), "must be an int.", error=TypeError)
    for name in _BOOLS:
        _require(config, name, isinstance(getattr(config, name), bool), "must be True or False.", error=TypeError)
    for name in _OPTIONAL_NAMES:
        value = getattr(config, name)
        ok = value is None or isinstance(value, str) or _is_names(value)
        _require(config, name, ok, "must be None, a string or a list of non-empty strings.", error=TypeError)
    ok = config.modules_to_save is None or _is_names(config.modules_to_save)
    _require(config, "modules_to_save", ok, "must be None or a list of module names.", error=TypeError)
    layers = config.layers_to_transform
    ok = layers is None or _is_int(layers) or (isinstance(layers, tuple) and all(map(_is_int, layers)))
    _require(config, "layers_to_transform", ok, "must be None, an int or a list of ints.", error=TypeError)


def _check_values(config: RandLoraConfig) -> None:
    _require(config, "r", config.r >= 1, "must be at least 1. A smaller r trains more parameters; try 32.")
    rule = f"must lie in {SEED_MIN}..{SEED_MAX} (int64 or uint64), as torch's generator demands."
    _require(config, "projection_prng_key", SEED_MIN <= config.projection_prng_key <= SEED_MAX, rule)
    rule = "must be a finite number; the update is scaled by randlora_alpha / r (PEFT's default is 640)."
    _require(config, "randlora_alpha", _is_number(config.randlora_alpha), rule)
    ok = _is_number(config.randlora_dropout) and 0 <= config.randlora_dropout < 1
    _require(config, "randlora_dropout", ok, "must be a probability in [0, 1); 0 switches dropout off.")
    _require(config, "bias", config.bias in BIAS_CHOICES, f"must be one of {BIAS_CHOICES}.")
    rule = "is empty, so nothing would be adapted. Name layers, or use 'all-linear'."
    _require(config, "target_modules", config.target_modules not in ((), ""), rule)
