"""AdaLoRA (arXiv:2303.10512): its config, and what its factors are. `interop.delta` has the update they make.

Number i of E, row i of A and column i of B are a triplet, as singular values and vectors are. Training starts with
`init_r` triplets a layer and takes the least important ones away (`interop.schedule`); which ones, `rank_pattern` says.
"""

import dataclasses
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from interop.fields import AdapterConfig, is_int, is_number
from interop.shapes import MAX_SIDE

_EPSILON = 1e-5  # PEFT's, in the divisor of the scaling
# Fields of PEFT's LoraConfig with which AdaLoRA adapts another thing than its three matrices, or PEFT refuses it.
_UNSUPPORTED = ("use_dora", "loftq_config", "layer_replication", "target_parameters", "trainable_token_indices")
_PATTERN_KEY = re.compile(r"(?s)(?P<module>.+)\.lora_E(\.[^.]+)?")  # in memory, PEFT appends the adapter's name


class SVDFactors(NamedTuple):
    """The trainable part of one layer: E (r, 1) weighs the products of A's rows (r, in) and B's columns (out, r)."""

    A: Any  # arrays of numpy's here, of the framework's in the stacks
    E: Any
    B: Any


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdaLoraConfig(AdapterConfig):
    """What an AdaLoRA adapter is, apart from its weights (arXiv:2303.10512); the content of `adapter_config.json`.

    Training has `total_step` optimizer steps: `tinit` with all triplets, then a budget that falls with the third power
    of the time left, then `tfinal` with the ranks that it fell to.

    Attributes:
        init_r: Triplets that each adapted layer starts with, at least 1.
        target_r: Triplets that a layer ends with on average, from 1 to below `init_r`.
        total_step: Optimizer steps of the whole training. Needed to train.
        tinit: Steps before the first triplet is taken away.
        tfinal: Steps after the last one is.
        deltaT: Steps between two allocations; between them, a triplet that was taken away may come back.
        beta1, beta2: Decay in (0, 1) of the moving averages of importance, and of how much it varies.
        orth_reg_weight: Weight in the training loss of how far A and B are from orthogonal, at least 0.
        lora_alpha: The update is scaled by `lora_alpha / init_r`, whatever rank is left; above 0.
        lora_dropout: Probability in [0, 1) of zeroing an input of the adapter branch while training.
        init_lora_weights: True starts at dW = 0 (E = 0; A and B from N(0, 0.02)); False draws all three from N(0, 1).
        rank_pattern: By "<layer>.lora_E", which of its `init_r` triplets are left; None or no entry: all are.
        r: Has no meaning here. PEFT's field, from LoRA.
        bias: "none", "all" or "lora_only": which bias vectors train.
        unknown_fields: Keys that this version does not know, such as LoRA's others; kept and written back.

    The remaining fields are those of every config, see `RandLoraConfig`.

    Raises:
        TypeError, ValueError: a field has a wrong type or value; the message says what is allowed and what to do. The
            schedule is not checked with `inference_mode=True`, as in files, but by `require_schedule` before training.

    Example:
        >>> AdaLoraConfig(init_r=12, target_r=4, total_step=1000, target_modules=["q_proj"]).last_allocation
        1000
    """

    PEFT_TYPE: ClassVar[str] = "ADALORA"
    METHOD: ClassVar[str] = "AdaLoRA"
    BIAS_CHOICES: ClassVar[tuple[str, ...]] = ("none", "all", "lora_only")
    INTS: ClassVar[tuple[str, ...]] = ("r", "init_r", "target_r", "tinit", "tfinal", "deltaT")
    NUMBERS: ClassVar[tuple[str, ...]] = (
        *("total_step", "lora_alpha", "lora_dropout", "beta1", "beta2", "orth_reg_weight"),
    )

    target_r: int = 8
    init_r: int = 12
    tinit: int = 0
    tfinal: int = 0
    deltaT: int = 1
    beta1: float = 0.85
    beta2: float = 0.85
    orth_reg_weight: float = 0.5
    total_step: int | None = None
    rank_pattern: Mapping[str, tuple[bool, ...]] | None = None
    lora_alpha: float = 8
    lora_dropout: float = 0.0
    init_lora_weights: bool | str = True
    r: int = 8

    def __post_init__(self) -> None:
        """See `AdapterConfig`; the rank pattern is brought into one form first."""
        object.__setattr__(self, "rank_pattern", _normalized(self.rank_pattern))
        super().__post_init__()
        if self.inference_mode:
            return
        if self.r != 8:
            warnings.warn(f"r={self.r} has no meaning in AdaLoRA: set init_r. r=8 silences this.", stacklevel=3)
        self.require_schedule()

    def __hash__(self) -> int:
        """A config is a static argument of jitted functions; fields that hold dicts take no part in its hash."""
        return hash((self.init_r, self.lora_alpha, self.total_step, self.target_modules))

    @property
    def scaling(self) -> float:
        """`lora_alpha / (init_r + 1e-5)`; PEFT's divisor stays the initial rank, and so does ours."""
        return self.lora_alpha / (self.init_r + _EPSILON)

    @property
    def dropout(self) -> float:
        """`lora_dropout`."""
        return self.lora_dropout

    @property
    def last_allocation(self) -> int:
        """The step after which ranks stay what they are, `total_step - tfinal`.

        Raises:
            ValueError: `total_step` is None.
        """
        if self.total_step is None:
            raise ValueError("total_step=None: set it to the number of optimizer steps of the training.")
        return self.total_step - self.tfinal

    def require_schedule(self) -> None:
        """Check what an adapter needs to train, and one for inference does not.

        Raises:
            ValueError: the ranks cannot fall from `init_r` to `target_r` in the given steps.
        """
        steps = self.last_allocation  # refuses total_step=None
        rule = f"must be below init_r={self.init_r}: ranks only fall. Lower it, or raise init_r."
        self._require("target_r", self.target_r < self.init_r, rule)
        rule = (
            f"tinit={self.tinit} and tfinal={self.tfinal} leave no step in which ranks could fall. Raise total_step, or"
            " lower the others."
        )
        self._require("total_step", self.tinit < steps, rule)

    def kept(self, module: str) -> tuple[bool, ...]:
        """Which of the `init_r` triplets of a layer are left."""
        return (self.rank_pattern or {}).get(f"{module}.lora_E", (True,) * self.init_r)

    def rank(self, module: str) -> int:
        """How many triplets of a layer are left."""
        kept = (self.rank_pattern or {}).get(f"{module}.lora_E")
        return self.init_r if kept is None else sum(kept)

    def with_kept(self, kept: Mapping[str, Sequence[bool]]) -> "AdaLoraConfig":
        """This config with the triplets that are left in each layer; no pattern if all are."""
        pattern = {f"{module}.lora_E": tuple(map(bool, mask)) for module, mask in kept.items()}
        whole = all(all(mask) for mask in pattern.values())
        return dataclasses.replace(self, rank_pattern=None if whole else pattern)

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them: lists for tuples, unknown fields merged back."""
        pattern = None if self.rank_pattern is None else {key: list(mask) for key, mask in self.rank_pattern.items()}
        return {**super().to_dict(), "rank_pattern": pattern}

    def _check_types(self) -> None:
        super()._check_types()
        ok = self.total_step is None or is_int(self.total_step)
        self._require("total_step", ok, "must be an int.", error=TypeError)
        ok = isinstance(self.init_lora_weights, bool | str)
        self._require("init_lora_weights", ok, "must be True or False.", error=TypeError)

    def _check_values(self) -> None:
        super()._check_values()
        for name, least in (("init_r", 1), ("target_r", 1), ("tinit", 0), ("tfinal", 0), ("deltaT", 1)):
            self._require(name, getattr(self, name) >= least, f"must be at least {least}.")
        self._require("total_step", self.total_step is None or self.total_step >= 1, "must be at least 1.")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            self._require(name, is_number(value) and 0 < value < 1, "must lie between 0 and 1.")
        ok = is_number(self.orth_reg_weight) and self.orth_reg_weight >= 0
        self._require("orth_reg_weight", ok, "must be at least 0; 0 switches the regularization off.")
        rule = "must be above 0; the update is scaled by lora_alpha / init_r."
        self._require("lora_alpha", is_number(self.lora_alpha) and self.lora_alpha > 0, rule)
        self._check_dropout("lora_dropout")
        for key, mask in (self.rank_pattern or {}).items():
            rule = f"the entry for {key!r} has {len(mask)} triplets, not init_r={self.init_r}."
            self._require("rank_pattern", len(mask) == self.init_r, rule)
        for name in _UNSUPPORTED:
            value = self.unknown_fields.get(name)
            if value:
                raise ValueError(f"{name}={value!r} is not supported with AdaLoRA. Leave it out.")


def _normalized(pattern: Any) -> dict[str, tuple[bool, ...]] | None:
    """A rank pattern with keys without adapter names, and tuples for lists."""
    if pattern is None:
        return None
    if not isinstance(pattern, Mapping):
        raise TypeError(f"rank_pattern={pattern!r}: must be None or a dict of lists of True and False.")
    found = {}
    for key, mask in pattern.items():
        match = _PATTERN_KEY.fullmatch(key) if isinstance(key, str) else None
        values = tuple(getattr(mask, "tolist", lambda mask=mask: mask)()) if isinstance(mask, Iterable) else (None,)
        if match is None or not all(isinstance(value, bool | np.bool_) for value in values):
            raise TypeError(
                f"rank_pattern: {key!r}: {mask!r} is not the name of a lora_E with a list of True or False."
            )
        name = f"{match['module']}.lora_E"
        if name in found:
            raise ValueError(f"rank_pattern: {key!r} is one of two entries for {name!r}. Keep one of them.")
        found[name] = tuple(map(bool, values))
    return found or None


def init_factors(config: AdaLoraConfig, shape: tuple[int, int], rng: np.random.Generator) -> SVDFactors:
    """New float32 factors of a layer of shape (out, in), as `init_lora_weights` says."""
    A, E, B = (rng.standard_normal(part, np.float32) for part in factor_shapes(config.init_r, shape))
    if config.init_lora_weights:
        return SVDFactors(np.float32(0.02) * A, np.zeros_like(E), np.float32(0.02) * B)
    return SVDFactors(A, E, B)


def factor_shapes(rank: int, shape: tuple[int, int]) -> SVDFactors:
    """Shapes of A (r, in), E (r, 1) and B (out, r) for a layer of shape (out, in)."""
    return SVDFactors((rank, shape[1]), (rank, 1), (shape[0], rank))


def keep_triplets(factors: SVDFactors, mask: Sequence[bool]) -> SVDFactors:
    """Those triplets for which the mask is True; works on arrays of any framework."""
    index = np.flatnonzero(mask)  # jax takes no lists
    return SVDFactors(factors.A[index], factors.E[index], factors.B[:, index])


def misfits(adapter: Any) -> Iterable[str]:
    """Every way in which the parts of an AdaLoRA adapter contradict each other."""
    config = adapter.config
    for name, factors in adapter.factors.items():
        shapes = SVDFactors(*(tuple(part.shape) for part in factors))
        wide = shapes.A[1:] + shapes.B[:1]
        if (
            len(wide) != 2
            or not 0 < min(wide) <= max(wide) <= MAX_SIDE
            or shapes != factor_shapes(config.rank(name), (wide[1], wide[0]))
        ):
            yield (
                f"{name}: lora_A {shapes.A}, lora_E {shapes.E} and lora_B {shapes.B} do not fit"
                f" {config.rank(name)} triplets (init_r, rank_pattern): they are (r, in), (r, 1), (out, r)"
            )
        elif adapter.shapes and adapter.shapes.get(name, wide[::-1]) != wide[::-1]:
            yield f"{name}: lora_A {shapes.A} and lora_B {shapes.B} do not fit a layer of shape {adapter.shapes[name]}"
    unknown = [key for key in config.rank_pattern or () if key.removesuffix(".lora_E") not in adapter.factors]
    if unknown:
        yield f"rank_pattern names {unknown[:4]}, which are not adapted"
    if adapter.bases is not None or adapter.recipe is not None:
        yield "an AdaLoRA adapter has no bases and no recipe"
