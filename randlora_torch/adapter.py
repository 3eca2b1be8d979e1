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
    """

    factors: dict[str, Factors]
    bases: Bases
    config: RandLoraConfig
    shapes: dict[str, tuple[int, int]] | None = None
    recipe: str | None = None

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
            ValueError: the bases are not known yet, or the adapter also trains biases or whole modules, which this
                object cannot hold.
        """
        if adapter.bases is None:
            raise ValueError(
                "this adapter's file holds no bases and does not say how large they are: attach it to its model"
                " (randlora_torch.load_adapter), or give the (out, in) shapes of its layers: adapter.bind(shapes)."
            )
        if adapter.saved_weights:
            raise ValueError(
                f"the adapter holds {sorted(adapter.saved_weights)} besides lambda and gamma"
                f" (bias={adapter.config.bias!r}, modules_to_save={adapter.config.modules_to_save}). Only adapters made"
                " of lambda and gamma are supported: merge those weights into the base model with PEFT first."
            )
        factors = {name: Factors(*map(to_torch, pair)) for name, pair in adapter.factors.items()}
        bases = Bases(*map(to_torch, adapter.bases))
        shapes = adapter.shapes and dict(adapter.shapes)
        return cls(factors=factors, bases=bases, config=adapter.config, shapes=shapes, recipe=adapter.recipe)

    def to_interop(self) -> Adapter:
        """The same numbers in numpy; the factors are copies, which further training does not change."""
        factors = {name: Factors(*(to_numpy(part).copy() for part in pair)) for name, pair in self.factors.items()}
        bases = Bases(*map(to_numpy, self.bases))
        return Adapter(config=self.config, factors=factors, bases=bases, recipe=self.recipe, shapes=self.shapes)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter in PEFT's format; see `interop.save`."""
        save(self.to_interop(), directory)
