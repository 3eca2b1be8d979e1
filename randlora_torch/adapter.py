"""`RandLoraAdapter`: an adapter as torch tensors, apart from any model."""

import dataclasses
import os

from jaxtyping import Float
from torch import Tensor

from interop.adapter import Adapter, Factors, resolve_shape
from interop.bases import Bases
from interop.config import RandLoraConfig
from interop.files import save
from randlora_torch.bases import layer_bases, to_numpy, to_torch
from randlora_torch.gradients import delta_weight


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RandLoraAdapter:
    """A RandLoRA adapter (arXiv:2502.00987) on torch tensors, keyed by module name, in torch's (out, in) coordinates.

    Attributes:
        factors: lambda (r, n) and gamma (n, min(out, in)) of each adapted layer.
        bases: A (r, 1, min_dim) and B (max_dim, n, r), frozen, shared by all layers.
        config: The adapter's `RandLoraConfig`.
        shapes: (out, in) of each adapted layer, or None if its file did not say.
        recipe: Name of the recipe that made the bases, or None.
        saved_weights: What is trained besides lambda and gamma (biases, modules_to_save), under the keys of the file.
    """

    factors: dict[str, Factors]
    bases: Bases
    config: RandLoraConfig
    shapes: dict[str, tuple[int, int]] | None = None
    recipe: str | None = None
    saved_weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.factors)

    def delta_weight(self, module: str, shape: tuple[int, int] | None = None) -> Float[Tensor, "outputs inputs"]:
        """The update of one layer in torch's (out, in) orientation, float32 or wider.

        Args:
            module: One of `adapter.modules`.
            shape: (out, in) of the layer; may be left out if `adapter.shapes` is known.

        Raises:
            KeyError: `module` is not adapted.
            ValueError: the shape is unknown or does not fit.
        """
        shape = resolve_shape(self, module, shape)
        bases = layer_bases(self.bases, shape)
        delta = delta_weight(*bases, *self.factors[module], scaling=self.config.scaling)  # (long, short)
        return delta if shape[0] >= shape[1] else delta.T

    @classmethod
    def from_interop(cls, adapter: Adapter) -> "RandLoraAdapter":
        """The same numbers as CPU tensors; dtypes are kept.

        Raises:
            ValueError: the bases are not known yet.
        """
        if adapter.bases is None:
            raise ValueError(
                "this adapter's file holds no bases and does not say how large they are: attach it to its model"
                " (randlora_torch.load_adapter), or give the (out, in) shapes of its layers: adapter.bind(shapes)."
            )
        factors = {name: Factors(*map(to_torch, pair)) for name, pair in adapter.factors.items()}
        bases = Bases(*map(to_torch, adapter.bases))
        shapes = adapter.shapes and dict(adapter.shapes)
        saved = {key: to_torch(value) for key, value in adapter.saved_weights.items()}
        return cls(
            factors=factors,
            bases=bases,
            config=adapter.config,
            shapes=shapes,
            recipe=adapter.recipe,
            saved_weights=saved,
        )

    def to_interop(self) -> Adapter:
        """The same numbers in numpy; what is trained is copied, so further training does not change it."""
        factors = {name: Factors(*(to_numpy(part).copy() for part in pair)) for name, pair in self.factors.items()}
        bases = Bases(*map(to_numpy, self.bases))
        saved = {key: to_numpy(value).copy() for key, value in self.saved_weights.items()}
        return Adapter(
            config=self.config,
            factors=factors,
            bases=bases,
            recipe=self.recipe,
            shapes=self.shapes,
            saved_weights=saved,
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter in PEFT's format; see `interop.save`."""
        save(self.to_interop(), directory)
