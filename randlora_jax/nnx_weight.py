"""What stands for an adapted `nnx.Param`: it reads as W + dW, computed at each access."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from interop.adapter import factors_kind
from interop.bases import Bases
from interop.config import RandLoraConfig
from interop.contents import PARTS
from interop.fields import AdapterConfig
from interop.shapes import factor_shapes
from randlora_jax.bases import Captured
from randlora_jax.kernels import AnyFactors, Kernel, align_factors, fits_weight, unalign_factors
from randlora_jax.quantized import dequantize
from randlora_jax.rebuilding import adapted_kernel


class RandLoraParam(nnx.LoRAParam[Any]):
    """A factor of the active adapter: what `nnx.Optimizer(model, tx, wrt=RandLoraParam)` trains, nothing else.

    A subclass of `nnx.LoRAParam`, by which Tunix and MaxText recognize adapters.
    """


class RandLoraInactive(nnx.Variable[Any]):
    """A factor of an adapter that is attached but not active: no optimizer for `RandLoraParam` sees it."""


class RandLoraBasis(nnx.Variable[Any]):
    """One of the two frozen bases of RandLoRA. All layers share one pair: it appears once in the model's state."""


@dataclasses.dataclass(frozen=True)
class Static:
    """What a layer knows of an adapter besides arrays; hashable, part of the graph definition."""

    config: AdapterConfig
    kernel: Kernel
    recipe: str | None
    dtype: np.dtype | None


class LayerAdapter(nnx.Module):
    """One adapter's part in one kernel: its factors, called as in files, and what it shares with the other kernels.

    RandLoRA's shares the bases, `randlora_A` and `randlora_B`; AdaLoRA's has none.
    """

    def __init__(self, factors: AnyFactors, static: Static, shared: Bases | None = None):
        aligned = align_factors(factors, static.kernel)
        for name, part in zip(PARTS[type(factors)], aligned, strict=True):
            setattr(self, name, RandLoraInactive(part))
        if shared is not None:
            self.randlora_A, self.randlora_B = shared
        self.static = static

    @property
    def has_bases(self) -> bool:
        """Whether the adapter is one of RandLoRA."""
        return hasattr(self, "randlora_A")

    @property
    def bases(self) -> Bases | None:
        """The arrays of the shared bases."""
        if not self.has_bases:
            return None
        held = (self.randlora_A, self.randlora_B)
        return Bases(*(basis.array if isinstance(basis, Captured) else basis.get_value() for basis in held))

    @property
    def kernel(self) -> Kernel:
        """The whole kernel, with stack_axes in front if `nnx.vmap` made many layers of the one that was written.

        Raises:
            ValueError: it stacked them on another axis than the first.
        """
        layout, shape = self.static.kernel
        factors = _stored(self)
        if layout.stack_axes or factors[0].ndim == 2:
            return self.static.kernel
        stacked = factors[0].shape[:-2]
        if not self._stacked_first(factors):
            names = " and ".join(f"{name} {part.shape}" for name, part in factors._asdict().items())
            raise ValueError(
                f"{names} are stacked on another axis than the first, for a kernel that stands for a weight of shape"
                f" {self.static.kernel.shape}: make the layers with nnx.vmap(..., out_axes=0)."
            )
        return Kernel(layout.within(len(stacked)), (*stacked, *shape))

    def _stacked_first(self, factors: AnyFactors) -> bool:
        shape, config = self.static.kernel.shape, self.static.config
        if isinstance(config, RandLoraConfig) and factors[0].shape[-2:] != factor_shapes(shape, config.r)[0]:
            return False
        return fits_weight(factors, shape)

    def factors(self) -> AnyFactors:
        """The factors of the whole kernel, stacked as in `KernelAdapter.factors`."""
        kernel = self.kernel
        return unalign_factors(_stored(self), kernel, kernel.kernel_shape)[0]

    def hold(self, basis_A: RandLoraBasis | Captured, basis_B: RandLoraBasis | Captured) -> None:
        """Hold the bases as Variables, or as constants that no transformation slices."""
        mark = nnx.data if isinstance(basis_A, RandLoraBasis) else nnx.static
        self.randlora_A, self.randlora_B = mark(basis_A), mark(basis_B)

    def set_active(self, active: bool) -> None:
        """Let optimizers for `RandLoraParam` see the factors, or not."""
        kind = RandLoraParam if active else RandLoraInactive
        for name in PARTS[factors_kind(self.static.config)]:
            variable = getattr(self, name)
            if type(variable) is not kind:
                setattr(self, name, kind.from_metadata(variable.get_value(), variable.get_metadata()))


# No methods, as `nnx.tabulate` compiles every method that a forward pass calls, and these are not given arrays only.
def _stored(part: LayerAdapter) -> AnyFactors:
    """The factors on the kernel's own axes."""
    kind = factors_kind(part.static.config)
    return kind(*(getattr(part, name)[...] for name in PARTS[kind]))


def factors_at(part: LayerAdapter, shape: tuple[int, ...]) -> tuple[AnyFactors, Kernel]:
    """Factors and kernel as they are where a kernel of this shape is read: a scan or vmap may have sliced them."""
    return unalign_factors(_stored(part), part.static.kernel, shape)


def _combined(weight: jax.Array, part: LayerAdapter) -> jax.Array:
    """W + dW, for the kernel or the slice of it that a scan or vmap is working on."""
    factors, kernel = factors_at(part, weight.shape)
    static = part.static
    return adapted_kernel(weight, part.bases, factors, kernel, scaling=static.config.scaling, dtype=static.dtype)


class RandLoraWeight(nnx.Module):
    """Stands for the `nnx.Param` of a kernel and reads as W + dW of the active adapter, or as W.

    Also stands for a quantized kernel, adapted or not, which it dequantizes at each access.
    """

    def __init__(self, base: nnx.Variable[Any]):
        self.base = base
        self.adapters: nnx.Dict[LayerAdapter] = nnx.Dict({})
        self.active: str | None = None
        self.enabled = True

    def activate(self, adapter_name: str) -> None:
        """Compute with the adapter of that name, if it has a part in this kernel, and let only it be trained."""
        self.active = adapter_name
        for name, part in self.adapters.items():
            part.set_active(name == adapter_name)

    @property
    def active_adapter(self) -> LayerAdapter | None:
        """The active adapter's part, None if there is none or it does not adapt this kernel."""
        return None if self.active is None else self.adapters.get(self.active)

    def get_value(self, *, index: Any = ...) -> jax.Array:
        """The effective kernel W + dW, in W's dtype."""
        weight = dequantize(self.base.get_value())
        adapter = self.active_adapter
        return (weight if adapter is None or not self.enabled else _combined(weight, adapter))[index]

    def set_value(self, value: Any, **_: Any) -> None:
        """Refused: W + dW is computed, not stored."""
        raise ValueError("this kernel is adapted: detach(model) before writing to it, or write to its `.base`.")

    value = property(get_value, set_value)
    shape = property(lambda self: self.base.shape)
    dtype = property(lambda self: self.base.dtype)
    ndim = property(lambda self: self.base.ndim)

    def __getitem__(self, index: Any) -> jax.Array:
        return self.get_value(index=index)

    def __setitem__(self, index: Any, value: Any) -> None:
        self.set_value(value)

    def __len__(self) -> int:
        return self.shape[0]

    def __iter__(self) -> Iterator[jax.Array]:
        return iter(self.get_value())

    def __getattr__(self, name: str) -> Any:
        """Whatever else an array has (`T`, `reshape`, `at`, ...), as nnx.Variable answers for its value."""
        if name.startswith("_") or not hasattr(jax.Array, name):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.get_value(), name)

    def __jax_array__(self) -> jax.Array:
        return self.get_value()

    def astype(self, dtype: Any) -> jax.Array:
        """The effective kernel in another dtype."""
        return self.get_value().astype(dtype)


def _on_value(operator: str) -> Callable[..., jax.Array]:
    return lambda self, *operands: getattr(self.get_value(), operator)(*operands)


for _name in ("add", "sub", "mul", "truediv", "matmul", "pow"):
    for _operator in (f"__{_name}__", f"__r{_name}__"):
        setattr(RandLoraWeight, _operator, _on_value(_operator))
for _operator in ("__neg__", "__abs__"):
    setattr(RandLoraWeight, _operator, _on_value(_operator))
