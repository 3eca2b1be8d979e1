"""`RandLoraConfig`: PEFT's fields, PEFT's defaults, PEFT's JSON; checked once, at construction."""

import dataclasses
from typing import Any, ClassVar

from interop.fields import AdapterConfig, is_number

SEED_MIN, SEED_MAX = -(2**63), 2**64 - 1  # what torch's CPU generator accepts


@dataclasses.dataclass(frozen=True, kw_only=True)
class RandLoraConfig(AdapterConfig):
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

    PEFT_TYPE: ClassVar[str] = "RANDLORA"
    METHOD: ClassVar[str] = "RandLoRA"
    BIAS_CHOICES: ClassVar[tuple[str, ...]] = ("none", "all", "randlora_only")
    INTS: ClassVar[tuple[str, ...]] = ("r", "projection_prng_key")
    NUMBERS: ClassVar[tuple[str, ...]] = ("randlora_alpha", "randlora_dropout")
    BOOLS: ClassVar[tuple[str, ...]] = (
        *("save_projection", "sparse", "very_sparse", "init_weights"),
        *AdapterConfig.BOOLS,
    )

    r: int = 32
    randlora_alpha: float = 640
    projection_prng_key: int = 0
    save_projection: bool = True
    sparse: bool = False
    very_sparse: bool = False
    randlora_dropout: float = 0.0
    init_weights: bool = True

    def __hash__(self) -> int:
        """A config is a static argument of jitted functions; fields that hold dicts take no part in its hash."""
        return hash((self.r, self.randlora_alpha, self.projection_prng_key, self.target_modules))

    @property
    def scaling(self) -> float:
        """`randlora_alpha / r`, the factor s of the update."""
        return self.randlora_alpha / self.r

    @property
    def dropout(self) -> float:
        """`randlora_dropout`."""
        return self.randlora_dropout

    @property
    def ternary(self) -> bool:
        """Whether the bases are ternary (`sparse` or `very_sparse`); then every recipe gives the same ones."""
        return self.sparse or self.very_sparse

    def to_dict(self) -> dict[str, Any]:
        """The fields as `adapter_config.json` holds them: lists for tuples, unknown fields merged back."""
        fields = super().to_dict()
        if self.exclude_modules is None:  # PEFT's RandLoraConfig has no such field and warns about it
            del fields["exclude_modules"]
        return fields

    def _check_values(self) -> None:
        super()._check_values()
        self._require("r", self.r >= 1, "must be at least 1. A smaller r trains more parameters; try 32.")
        rule = f"must lie in {SEED_MIN}..{SEED_MAX} (int64 or uint64), as torch's generator demands."
        self._require("projection_prng_key", SEED_MIN <= self.projection_prng_key <= SEED_MAX, rule)
        rule = "must be a finite number; the update is scaled by randlora_alpha / r (PEFT's default is 640)."
        self._require("randlora_alpha", is_number(self.randlora_alpha), rule)
        self._check_dropout("randlora_dropout")
