"""`RandLoraAdapter` and `AdaLoraAdapter`: adapters as torch tensors, apart from any model."""

import abc
import dataclasses
import os
from typing import Any

from jaxtyping import Float
from torch import Tensor

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.adapter import Adapter, resolve_shape
from interop.bases import Bases
from interop.config import RandLoraConfig
from interop.delta import Factors
from interop.files import save
from randlora_torch import svd
from randlora_torch.bases import layer_bases, to_numpy, to_torch
from randlora_torch.gradients import delta_weight


class _TorchAdapter(abc.ABC):
    """What adapters of all methods can do."""

    factors: dict[str, Any]

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.factors)

    @abc.abstractmethod
    def to_interop(self) -> Adapter:
        """The same numbers in numpy; what is trained is copied, so further training does not change it."""

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter in PEFT's format; see `interop.save`."""
        save(self.to_interop(), directory)


def _copied(tensors: Any) -> Any:
    """A dict or NamedTuple of tensors as numpy arrays with their own memory."""
    if isinstance(tensors, dict):
        return {key: _copied(value) for key, value in tensors.items()}
    if isinstance(tensors, tuple):
        return type(tensors)(*map(_copied, tensors))
    return to_numpy(tensors).copy()


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RandLoraAdapter(_TorchAdapter):
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
        shapes = None if adapter.shapes is None else dict(adapter.shapes)
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
        return Adapter(
            config=self.config,
            factors=_copied(self.factors),
            bases=Bases(*map(to_numpy, self.bases)),
            recipe=self.recipe,
            shapes=self.shapes,
            saved_weights=_copied(self.saved_weights),
        )


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdaLoraAdapter(_TorchAdapter):
    """An AdaLoRA adapter (arXiv:2303.10512) on torch tensors, keyed by module name, in torch's (out, in) coordinates.

    Attributes:
        factors: A (r, in), E (r, 1) and B (out, r) of each adapted layer, with the ranks that are left.
        config: The adapter's `AdaLoraConfig`.
        shapes: (out, in) of each adapted layer.
        saved_weights: What is trained besides them (biases, modules_to_save), under the keys of the file.
    """

    factors: dict[str, SVDFactors]
    config: AdaLoraConfig
    shapes: dict[str, tuple[int, int]]
    saved_weights: dict[str, Tensor] = dataclasses.field(default_factory=dict)

    def delta_weight(self, module: str, shape: tuple[int, int] | None = None) -> Float[Tensor, "outputs inputs"]:
        """The update of one layer in torch's (out, in) orientation, float32 or wider; `shape` is checked if given.

        Raises:
            KeyError: `module` is not adapted.
            ValueError: the shape does not fit.
        """
        resolve_shape(self, module, shape)
        return svd.delta_weight(*self.factors[module], scaling=self.config.scaling)

    @classmethod
    def from_interop(cls, adapter: Adapter) -> "AdaLoraAdapter":
        """The same numbers as CPU tensors; dtypes are kept."""
        assert adapter.shapes is not None  # the factors of AdaLoRA tell them
        return cls(
            factors={name: SVDFactors(*map(to_torch, parts)) for name, parts in adapter.factors.items()},
            config=adapter.config,
            shapes=dict(adapter.shapes),
            saved_weights={key: to_torch(value) for key, value in adapter.saved_weights.items()},
        )

    def to_interop(self) -> Adapter:
        """The same numbers in numpy, copied, so further training does not change it."""
        return Adapter(
            config=self.config,
            factors=_copied(self.factors),
            shapes=self.shapes,
            saved_weights=_copied(self.saved_weights),
        )
