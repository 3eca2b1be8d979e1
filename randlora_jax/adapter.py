"""`RandLoraAdapter`: an adapter as a pytree. Pass it to jitted functions whole; give optax its `trainable` part."""

import dataclasses
import os
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from interop.adapter import Adapter, Factors, resolve_shape
from interop.bases import Bases
from interop.config import RandLoraConfig
from interop.files import save
from randlora_jax.bases import layer_bases
from randlora_jax.gradients import delta_weight
from randlora_jax.layouts import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RandLoraAdapter:
    """A RandLoRA adapter (arXiv:2502.00987) on JAX arrays, keyed by module name, in torch's (out, in) coordinates.

    Attributes:
        factors: lambda (r, n) and gamma (n, min(out, in)) of each adapted layer: the trainable leaves.
        bases: A (r, 1, min_dim) and B (max_dim, n, r), frozen, shared by all layers.
        config: The adapter's `RandLoraConfig` (static).
        shapes: (name, (out, in)) of each adapted layer, or None if its file did not say (static).
        layouts: (name, Layout) of the kernels that are no plain 2-D matrices (static).
        recipe: Name of the recipe that made the bases, or None (static).
    """

    factors: dict[str, Factors]
    bases: Bases
    config: RandLoraConfig = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[str, tuple[int, int]], ...] | None = dataclasses.field(default=None, metadata={"static": True})
    layouts: tuple[tuple[str, Layout], ...] = dataclasses.field(default=(), metadata={"static": True})
    recipe: str | None = dataclasses.field(default=None, metadata={"static": True})

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.factors)

    @property
    def trainable(self) -> dict[str, Factors]:
        """The pytree that gradients and optimizer states are made for: lambda and gamma, without the bases."""
        return self.factors

    def with_trainable(self, trainable: dict[str, Factors]) -> "RandLoraAdapter":
        """This adapter with other factors, as they come out of an optax update or into a loss function.

        Raises:
            ValueError: the layers are not those of this adapter.
        """
        if set(trainable) != set(self.factors):
            differing = sorted(set(trainable) ^ set(self.factors))
            raise ValueError(f"trainable must hold the {len(self.factors)} adapted layers; these differ: {differing}.")
        return dataclasses.replace(self, factors=trainable)

    def with_layouts(self, layouts: Mapping[str, Layout]) -> "RandLoraAdapter":
        """This adapter, knowing the layouts of kernels that are no plain 2-D matrices, by module name.

        Raises:
            ValueError: a name is not adapted.
        """
        unknown = sorted(set(layouts) - set(self.factors))
        if unknown:
            raise ValueError(f"layouts are given for {unknown}, which are not adapted. The adapter has {self.modules}.")
        return dataclasses.replace(self, layouts=tuple({**dict(self.layouts), **layouts}.items()))

    def delta_weight(self, module: str, shape: tuple[int, int] | None = None) -> Float[Array, "outputs inputs"]:
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
        """The same arrays on the default device; dtypes are kept.

        Raises:
            ValueError: the bases are not known yet, or the adapter also trains biases or whole modules, which this
                stack cannot hold.
        """
        if adapter.bases is None:
            raise ValueError(
                "this adapter's file holds no bases and does not say how large they are: attach it to its model"
                " (randlora_jax.attach), or give the (out, in) shapes of its layers first: adapter.bind(shapes)."
            )
        if adapter.saved_weights:
            raise ValueError(
                f"the adapter holds {sorted(adapter.saved_weights)} besides lambda and gamma"
                f" (bias={adapter.config.bias!r}, modules_to_save={adapter.config.modules_to_save}). The JAX stack"
                " holds lambda and gamma only: merge those weights into the base model in torch first."
            )
        factors, bases = jax.tree.map(jnp.asarray, (dict(adapter.factors), adapter.bases))
        shapes = adapter.shapes and tuple(adapter.shapes.items())
        return cls(factors=factors, bases=bases, config=adapter.config, shapes=shapes, recipe=adapter.recipe)

    def to_interop(self) -> Adapter:
        """The same arrays in numpy."""
        factors, bases = jax.tree.map(np.asarray, (self.factors, self.bases))
        return Adapter(
            config=self.config,
            factors=factors,
            bases=bases,
            recipe=self.recipe,
            shapes=self.shapes and dict(self.shapes),
        )

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter in PEFT's format; see `interop.save`."""
        save(self.to_interop(), directory)
