"""What the explicit layers of NNX and linen share: their config and bases, starting values, the branch with dropout."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from interop.adapter import gamma_start
from interop.bases import Bases, make_bases
from interop.config import RandLoraConfig
from interop.delta import Factors
from interop.shapes import factor_shapes, shared_dims
from interop.storage import used_bases
from randlora_jax.bases import hold_bases, layer_bases
from randlora_jax.contraction import adapted_linear, apply_delta
from randlora_jax.kernels import on_explicit_mesh
from randlora_jax.selection import refuse_unsupported, require_randlora

_STATIC = {"static": True}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class SharedBases:
    """What all explicit layers of a model share: the bases, and the config they were made by.

    Attributes:
        bases: A (r, 1, min_dim) and B (max_dim, n, r), frozen; the part that the layers use.
        config: The config, as `explicit_config` gives it (static).
        limits: The largest out and the largest in of the layers that the bases are for (static).
    """

    bases: Any
    config: RandLoraConfig = dataclasses.field(metadata=_STATIC)
    limits: tuple[int, int] = dataclasses.field(metadata=_STATIC)


def make_shared_bases(config: RandLoraConfig, shapes: Iterable[tuple[int, int]], *, recipe: str) -> SharedBases:
    """The bases of a model whose explicit layers have these (out, in) shapes, as PEFT sizes and draws them.

    Raises:
        ValueError: `shapes` is empty, the bases cannot be made, or the config asks for what only torch can train.
    """
    config, shapes = explicit_config(config), list(shapes)
    bases = make_bases(config, **shared_dims(shapes)._asdict(), recipe=recipe)
    held = hold_bases(used_bases(bases, shapes, config, drawn_by=recipe))
    return SharedBases(held, config, largest_sides(shapes))


def explicit_config(config: RandLoraConfig) -> RandLoraConfig:
    """The config without the fields that select layers: the model's code does, and a file names those it has.

    Raises:
        ValueError: the config asks for trained biases, modules_to_save, or a task type with a trained head.
        TypeError: it is one of AdaLoRA.
    """
    require_randlora(config, "randlora_jax.adalora adapts the layers of a model as they are.")
    refuse_unsupported(config)
    return config.with_targets("all-linear")


def largest_sides(shapes: Iterable[tuple[int, int]]) -> tuple[int, int]:
    """The largest out and the largest in of (out, in) shapes."""
    rows, columns = zip(*shapes, strict=True)
    return max(rows), max(columns)


def check_fits(shape: tuple[int, int], limits: tuple[int, int]) -> None:
    """Raise a ValueError if a layer (out, in) is none that the bases were made for.

    Bases that happen to be large enough would do for us, but PEFT sizes them by the layers and could not load the file.
    """
    if shape[0] > limits[0] or shape[1] > limits[1]:
        raise ValueError(
            f"a layer with out_features={shape[0]} and in_features={shape[1]} does not fit bases made for at most"
            f" out={limits[0]} and in={limits[1]}: add {shape} to the shapes, (out, in), given to RandLoraBases."
        )


def start_factors(config: RandLoraConfig, shape: tuple[int, int], key: Callable[[], jax.Array]) -> Factors:
    """PEFT's starting values in float32, as `interop.adapter.init_adapter`, for code that may be traced.

    Args:
        config: Its r and init_weights are read.
        shape: (out, in) of the layer.
        key: Called for the random key of lambda if `init_weights=False`.
    """
    shape_lam, shape_gamma = factor_shapes(shape, config.r)
    lam = jnp.zeros(shape_lam) if config.init_weights else jax.random.normal(key(), shape_lam)
    return Factors(lam, jnp.full(shape_gamma, gamma_start(config, shape)))


def add_update(
    y: Float[Array, "*batch outputs"],
    inputs: Float[Array, "*batch inputs"],
    bases: Bases,
    factors: Factors,
    *,
    scaling: float,
    plan: str = "auto",
) -> Float[Array, "*batch outputs"]:
    """`y + inputs @ dW.T`, in y's dtype and sharding."""
    shape = (y.shape[-1], inputs.shape[-1])

    def update(inputs: Array, bases: Bases, factors: Factors) -> Array:
        parts = layer_bases(bases, shape)
        delta = apply_delta(inputs, *parts, *factors, out_features=shape[0], scaling=scaling, plan=plan)
        return delta.astype(y.dtype)

    if on_explicit_mesh(y):  # slices and reshapes of sharded axes are XLA's to place
        return y + jax.sharding.auto_axes(update, out_sharding=jax.typeof(y).sharding)(inputs, bases, factors)
    return y + update(inputs, bases, factors)


def multiply(
    inputs: Float[Array, "*batch inputs"],
    weight: Float[Array, "inputs outputs"],
    bases: Bases,
    factors: Factors,
    **options: Any,
) -> Float[Array, "*batch outputs"]:
    """`inputs @ (W + dW)` by `adapted_linear`, which gets the options, from the shared bases."""
    return adapted_linear(
        inputs, weight, *layer_bases(bases, cast(tuple[int, int], weight.shape[::-1])), *factors, **options
    )
