"""`AdaLoraAdapter`: an adapter of AdaLoRA as a pytree, the twin of `RandLoraAdapter`.

Its arrays hold the triplets that `config.rank_pattern` leaves, and no others. Where one array holds several weights,
of which some have fewer triplets left, rows of zeros follow theirs.
"""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.adapter import Adapter
from randlora_jax.adapter import KernelAdapter, refuse_saved_weights
from randlora_jax.kernels import AnyFactors, is_stacked
from randlora_jax.layouts import Layout


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class AdaLoraAdapter(KernelAdapter):
    """An AdaLoRA adapter (arXiv:2303.10512) on JAX arrays, keyed by module name, in torch's (out, in) coordinates.

    Attributes:
        factors: A (r, in), E (r, 1) and B (out, r) of each adapted layer: the trainable leaves. A kernel that holds
            several weights (`Layout.stack_axes`) has them with an axis over the weights in front.
        config: The adapter's `AdaLoraConfig` (static).
        shapes: (name, (out, in)) of each adapted layer (static).
        layouts: (name, Layout) of the kernels that are no plain 2-D matrices (static).
        dtype: What the operands of the large products are rounded to, e.g. bfloat16; None: see `init` (static).
    """

    factors: dict[str, SVDFactors]
    config: AdaLoraConfig = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[str, tuple[int, int]], ...] = dataclasses.field(metadata={"static": True})
    layouts: tuple[tuple[str, Layout], ...] = dataclasses.field(default=(), metadata={"static": True})
    dtype: np.dtype | None = dataclasses.field(default=None, metadata={"static": True})

    bases: ClassVar[None] = None  # type: ignore[misc] # no fields: there are none
    recipe: ClassVar[None] = None  # type: ignore[misc]

    @property
    def present(self) -> dict[str, np.ndarray]:
        """Which rows of A are triplets and no padding, (r,) or (weights, r), by kernel; known while tracing."""
        found = {}
        for name, modules in self.weight_names.items():
            factors = self.factors[name]
            rows = np.arange(factors.E.shape[-2]) < [[self.config.rank(module)] for module in modules]
            found[name] = rows if is_stacked(factors) else rows[0]
        return found

    @classmethod
    def from_interop(cls, adapter: Adapter) -> "AdaLoraAdapter":
        """The same arrays on the default device; dtypes are kept.

        Raises:
            ValueError: the adapter also trains biases or whole modules, which this stack cannot hold.
            TypeError: it is an adapter of RandLoRA.
        """
        if not isinstance(adapter.config, AdaLoraConfig):
            raise TypeError("the adapter is one of RandLoRA: use RandLoraAdapter.from_interop, or interop.convert.")
        refuse_saved_weights(adapter, "A, E and B")
        assert adapter.shapes is not None  # the factors of AdaLoRA tell them
        factors = jax.tree.map(jnp.asarray, dict(adapter.factors))
        return cls(factors=factors, config=adapter.config, shapes=tuple(adapter.shapes.items()))

    def _as_stored(self, module: str, factors: AnyFactors) -> SVDFactors:
        """The factors of one weight without padding."""
        assert isinstance(factors, SVDFactors)
        rank = self.config.rank(module)
        A, E, B = factors
        return SVDFactors(A[:rank], E[:rank], np.ascontiguousarray(B[:, :rank]))


def stack_triplets(weights: Sequence[SVDFactors]) -> SVDFactors:
    """The factors of several weights in arrays with an axis over the weights, padded with zeros to the largest rank."""
    rank = max(factors.E.shape[0] for factors in weights)

    def stacked(parts: Sequence[jax.Array], axis: int) -> jax.Array:
        widths = [[(0, (rank - part.shape[axis]) * (i == axis)) for i in (0, 1)] for part in parts]
        return jnp.stack([jnp.pad(part, width) for part, width in zip(parts, widths, strict=True)])

    A, E, B = zip(*weights, strict=True)
    return SVDFactors(stacked(A, 0), stacked(E, 0), stacked(B, 1))
