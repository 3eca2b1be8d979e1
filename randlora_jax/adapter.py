"""`RandLoraAdapter`: an adapter as a pytree. Pass it to jitted functions whole; give optax its `trainable` part.

What it shares with `AdaLoraAdapter`, which is in a module of its own, is in `KernelAdapter`.
"""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter, resolve_shape
from interop.bases import Bases
from interop.config import RandLoraConfig
from interop.delta import Factors
from interop.fields import AdapterConfig
from interop.files import save
from interop.storage import Origin, Used
from randlora_jax.bases import hold_bases, to_host, whole_bases
from randlora_jax.kernels import AnyFactors, is_stacked, weight_deltas
from randlora_jax.layouts import Layout, weight_names

This = TypeVar("This", bound="KernelAdapter")
Parts = TypeVar("Parts", bound=AnyFactors)


class KernelAdapter:
    """What the adapters of both methods have in common: a pytree of factors by kernel, and static knowledge of them.

    A kernel that holds several weights (`Layout.stack_axes`) has its factors in arrays with an axis over the weights in
    front. In adapter files each of them has a name of its own.
    """

    factors: dict[str, Any]
    bases: Bases | None
    config: AdapterConfig
    shapes: tuple[tuple[str, tuple[int, int]], ...] | None
    layouts: tuple[tuple[str, Layout], ...]
    recipe: str | None
    dtype: np.dtype | None

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the adapted layers."""
        return tuple(self.factors)

    @property
    def trainable(self) -> dict[str, Any]:
        """The pytree that gradients and optimizer states are made for, the factors without any bases."""
        return self.factors

    @property
    def weight_names(self) -> dict[str, list[str]]:
        """Names in adapter files of the weights that each kernel's factors are for, in their order."""
        layouts = dict(self.layouts)
        return {name: _weight_names(name, layouts.get(name), factors) for name, factors in self.factors.items()}

    def with_trainable(self: This, trainable: dict[str, Any]) -> This:
        """This adapter with other factors, as they come out of an optax update or into a loss function.

        Raises:
            ValueError: the layers are not those of this adapter.
        """
        if set(trainable) != set(self.factors):
            differing = sorted(set(trainable) ^ set(self.factors))
            raise ValueError(f"trainable must hold the {len(self.factors)} adapted layers; these differ: {differing}.")
        return self._with(factors=trainable)

    def with_layouts(self: This, layouts: Mapping[str, Layout]) -> This:
        """This adapter, knowing the layouts of kernels that are no plain 2-D matrices, by module name.

        Raises:
            ValueError: a name is not adapted.
        """
        unknown = sorted(set(layouts) - set(self.factors))
        if unknown:
            raise ValueError(f"layouts are given for {unknown}, which are not adapted. The adapter has {self.modules}.")
        return self._with(layouts=tuple({**dict(self.layouts), **layouts}.items()))

    def _with(self: This, **changes: Any) -> This:
        own: Any = self  # a dataclass, which this class itself is not
        return dataclasses.replace(own, **changes)

    def delta_weight(
        self, module: str, shape: tuple[int, int] | None = None
    ) -> Float[Array, "*weights outputs inputs"]:
        """The update of one layer in torch's (out, in) orientation, float32 or wider; of each weight stacked in it.

        Args:
            module: One of `adapter.modules`.
            shape: (out, in) of the layer; may be left out if `adapter.shapes` is known.

        Raises:
            KeyError: `module` is not adapted.
            ValueError: the shape is unknown or does not fit.
        """
        shape = resolve_shape(self, module, shape)
        factors, scaling = self.factors[module], self.config.scaling
        with jax.default_matmul_precision("highest"):
            return weight_deltas(self.bases, factors, shape, scaling=scaling, dtype=self.dtype)

    def save_pretrained(self, directory: str | os.PathLike[str]) -> None:
        """Write the adapter in PEFT's format; see `interop.save`. With several processes, call it in all of them.

        The first process writes; the others return when it has.
        """
        adapter = self.to_interop()
        if jax.process_index() == 0:
            save(adapter, directory)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("randlora: adapter saved")

    def to_interop(self) -> Adapter:
        """The same arrays in numpy, each weight of a stacked kernel under its own name (`Layout.modules`).

        Arrays that are spread over several processes are gathered: call it in all of them.
        """
        factors = jax.tree.map(to_host, self.factors)
        names, shapes = self.weight_names, None if self.shapes is None else dict(self.shapes)
        return Adapter(
            config=self.config,
            factors={
                module: self._as_stored(module, weight)
                for name, stacked in factors.items()
                for module, weight in zip(names[name], weights_of(stacked), strict=True)
            },
            bases=None if self.bases is None else whole_bases(self.bases),
            recipe=self.recipe,
            shapes=None if shapes is None else {module: shapes[name] for name in names for module in names[name]},
        )

    def _as_stored(self, module: str, factors: AnyFactors) -> AnyFactors:
        """The factors of one weight as files hold them, from how they lie in an array of several."""
        return factors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class RandLoraAdapter(KernelAdapter):
    """A RandLoRA adapter (arXiv:2502.00987) on JAX arrays, keyed by module name, in torch's (out, in) coordinates.

    Attributes:
        factors: lambda (r, n) and gamma (n, min(out, in)) of each adapted layer: the trainable leaves. A kernel that
            holds several weights (`Layout.stack_axes`) has (weights, r, n) and (weights, n, min(out, in)).
        bases: A (r, 1, min_dim) and B (max_dim, n, r), frozen, shared by all layers. On a model, only the part is held
            that its layers use, and a ternary B as int8 codes: B is a `HeldBasis` then. `to_interop` gives all of them.
        config: The adapter's `RandLoraConfig` (static).
        shapes: (name, (out, in)) of each adapted layer, or None if its file did not say (static).
        layouts: (name, Layout) of the kernels that are no plain 2-D matrices (static).
        recipe: Name of the recipe that made the bases, or None (static).
        dtype: What the operands of the large products are rounded to, e.g. bfloat16; None: see `init` (static).
    """

    factors: dict[str, Factors]
    bases: Bases
    config: RandLoraConfig = dataclasses.field(metadata={"static": True})
    shapes: tuple[tuple[str, tuple[int, int]], ...] | None = dataclasses.field(default=None, metadata={"static": True})
    layouts: tuple[tuple[str, Layout], ...] = dataclasses.field(default=(), metadata={"static": True})
    recipe: str | None = dataclasses.field(default=None, metadata={"static": True})
    dtype: np.dtype | None = dataclasses.field(default=None, metadata={"static": True})

    def with_bases_dtype(self, dtype: Any) -> "RandLoraAdapter":
        """This adapter with its bases stored in another dtype, e.g. bfloat16, which halves their memory.

        Rounded bases are other bases: files then hold them as they are, and `save_projection=False` is refused. So all
        of them are held.
        """
        if all(basis.dtype == dtype for basis in self.bases):
            return self
        held = getattr(self.bases.B, "values", self.bases.B)
        A, B = (basis.astype(dtype) for basis in whole_bases(self.bases))
        return dataclasses.replace(self, bases=Bases(jnp.asarray(A), jax.device_put(B, held.sharding)))

    @classmethod
    def from_interop(cls, adapter: Adapter, *, origin: Origin | None = None) -> "RandLoraAdapter":
        """The same numbers on the default device; a ternary B as codes.

        Args:
            adapter: Any of RandLoRA.
            origin: What all of its bases are drawn from, if it holds only those that its layers use.

        Raises:
            ValueError: the bases are not known yet, or the adapter also trains biases or whole modules, which this
                stack cannot hold.
            TypeError: it is an adapter of AdaLoRA.
        """
        if isinstance(adapter.config, AdaLoraConfig):
            raise TypeError("the adapter is one of AdaLoRA: use AdaLoraAdapter.from_interop, or interop.convert.")
        if adapter.bases is None:
            raise ValueError(
                "this adapter's file holds no bases and does not say how large they are: attach it to its model"
                " (randlora_jax.attach), or give the (out, in) shapes of its layers first: adapter.bind(shapes)."
            )
        refuse_saved_weights(adapter, "lambda and gamma")
        factors, bases = jax.tree.map(jnp.asarray, dict(adapter.factors)), hold_bases(Used(adapter.bases, origin))
        shapes = None if adapter.shapes is None else tuple(adapter.shapes.items())
        return cls(factors=factors, bases=bases, config=adapter.config, shapes=shapes, recipe=adapter.recipe)


def refuse_saved_weights(adapter: Adapter, factors: str) -> None:
    """Raise a ValueError if an adapter of the hub holds other weights than its factors."""
    if adapter.saved_weights:
        raise ValueError(
            f"the adapter holds {sorted(adapter.saved_weights)} besides {factors}"
            f" (bias={adapter.config.bias!r}, modules_to_save={adapter.config.modules_to_save}). The JAX stack"
            f" holds {factors} only: merge those weights into the base model in torch first."
        )


def weights_of(factors: Parts) -> list[Parts]:
    """The factors of each weight of a kernel."""
    if not is_stacked(factors):
        return [factors]
    return [type(factors)(*(part[i] for part in factors)) for i in range(len(factors[0]))]


def _weight_names(name: str, layout: Layout | None, factors: AnyFactors) -> list[str]:
    """Names in adapter files of the weights whose factors stand in the arrays of one kernel."""
    if layout is not None and layout.modules is not None:
        return [module for module in layout.modules if module is not None]
    return list(weight_names(name, len(factors[0]) if is_stacked(factors) else None))
