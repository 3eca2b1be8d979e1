"""AdaLoRA (arXiv:2303.10512) for any pytree of parameters: new adapters, the regularization, ranks, pruning.

Everything that takes an adapter takes one of these: `attach`, `effective_params`, `merge`, `lazy_params`,
`load_adapter`, `accumulate_gradients`, `AdapterCheckpoints`, ...

    config = adalora.AdaLoraConfig(init_r=12, target_r=4, tinit=50, tfinal=100, total_step=1000, target_modules=[...])
    adapter = adalora.init(config, params, key=jax.random.key(0))
    optimizer = adalora.rank_allocator(optax.adam(1e-3), adapter)
    ...  # the loss: task + adalora.orthogonal_loss(adapter.with_trainable(trainable))
    adalora.prune(adapter.with_trainable(trainable), state).save_pretrained("folder")

On an NNX model, `on_model` makes an optimizer for `nnx.Optimizer` of the allocator.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from interop.adalora import AdaLoraConfig, SVDFactors, keep_triplets
from interop.fields import AdapterConfig
from randlora_jax.adalora_adapter import AdaLoraAdapter, stack_triplets
from randlora_jax.adapter import weights_of
from randlora_jax.bases import to_host
from randlora_jax.kernels import find_kernels, is_stacked, named_leaves
from randlora_jax.naming import Layouts
from randlora_jax.nnx_optimizer import on_model
from randlora_jax.rank_allocator import RankAllocatorState, find_state, rank_allocator
from randlora_jax.selection import new_adapter
from randlora_jax.sharding import like_kernels
from randlora_jax.svd import distance_from_orthogonal

__all__ = [
    "AdaLoraAdapter",
    "AdaLoraConfig",
    "RankAllocatorState",
    "init",
    "on_model",
    "orthogonal_loss",
    "prune",
    "rank_allocator",
]


def init(
    config: AdapterConfig,
    params: Any,
    *,
    layouts: Layouts | None = None,
    key: jax.Array | None = None,
    dtype: DTypeLike | None = None,
) -> AdaLoraAdapter:
    """A new adapter for the kernels of `params` that `config.target_modules` selects, at PEFT's starting values.

    See `randlora_jax.init` for what is selected and where the adapter is placed.

    Args:
        config: What to adapt, and the schedule.
        params: See `randlora_jax.init`.
        layouts: See `randlora_jax.init`. That of a convolution that flax keeps as (height, width, in, out) is
            `Layout((2, 0, 1), (3,))`, torch's (out, in * height * width).
        key: A `jax.random.key`; A and B are drawn from it.
        dtype: What the operands of the large products are rounded to, see `randlora_jax.init`.

    Raises:
        ValueError: a target matches nothing or no adaptable kernel, the config has no schedule or a rank pattern, or
            asks for trained biases, modules_to_save or dropout, or there is no key.
        TypeError: it is no `AdaLoraConfig`.
    """
    if not isinstance(config, AdaLoraConfig):
        raise TypeError(f"config is a {type(config).__name__}: pass an AdaLoraConfig, or use randlora_jax.init.")
    leaves = named_leaves(params)
    adapter = new_adapter(config, find_kernels(leaves, layouts), key=key, dtype=dtype)
    assert isinstance(adapter, AdaLoraAdapter)
    return like_kernels(adapter, leaves)


def orthogonal_loss(adapter: AdaLoraAdapter) -> Float[Array, ""]:
    """What is added to the loss to keep A and B orthogonal (arXiv:2303.10512, section 3.1), as PEFT averages it.

    `orth_reg_weight` times the mean Frobenius norm of `A A^T - I` and `B^T B - I` over all adapted weights. Where a
    norm is zero, so is its gradient.
    """
    present = adapter.present
    distances = [
        distance.sum()
        for name, factors in adapter.factors.items()
        for distance in distance_from_orthogonal(factors, present[name])
    ]
    weights = sum(len(modules) for modules in adapter.weight_names.values())
    return adapter.config.orth_reg_weight * jnp.stack(distances).sum() / (2 * weights)


def prune(adapter: AdaLoraAdapter, state: Any) -> AdaLoraAdapter:
    """The adapter without the triplets that the allocator took away: the same update from smaller arrays.

    A triplet that the last allocation left stays, and so does one whose E is not 0 because it came back between two
    allocations; nothing is lost. Call it outside of jit, since shapes change; where arrays are spread over several
    processes, in all of them.

    Args:
        adapter: With its trained factors, `adapter.with_trainable(trainable)`.
        state: That of `rank_allocator`, or of an optimizer that contains it.

    Returns:
        The adapter as it is saved, with `config.rank_pattern`. To train it further, make a new allocator.

    Raises:
        ValueError: `state` holds no state of an allocator or several, or the allocator is that of another adapter.
        TypeError: a transformation such as jit traces the arguments.
    """
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((adapter, state))):
        raise TypeError("prune makes arrays of other shapes: call it on the results of a jitted function, not in it.")
    masks, present = {name: mask[...] for name, mask in find_state(state).mask.items()}, adapter.present
    if {name: mask.shape for name, mask in masks.items()} != {name: rows.shape for name, rows in present.items()}:
        raise ValueError(
            "state is that of a rank_allocator for another adapter, or for this one before it was pruned: pass the"
            " adapter that was trained with it."
        )
    factors: dict[str, SVDFactors] = {}
    kept: dict[str, tuple[bool, ...]] = {}
    for name, modules in adapter.weight_names.items():
        stacked = adapter.factors[name]
        left = (to_host(masks[name]) | (to_host(stacked.E)[..., 0] != 0)) & present[name]
        left = left if is_stacked(stacked) else left[None]
        weights = [keep_triplets(weight, rows) for weight, rows in zip(weights_of(stacked), left, strict=True)]
        factors[name] = stack_triplets(weights) if is_stacked(stacked) else weights[0]
        kept |= {module: _within(adapter.config.kept(module), rows) for module, rows in zip(modules, left, strict=True)}
    placed = jax.tree.map(_placed_like, factors, adapter.factors)
    return dataclasses.replace(adapter, factors=placed, config=adapter.config.with_kept(kept))


def _within(pattern: tuple[bool, ...], rows: Iterable[np.bool_]) -> tuple[bool, ...]:
    """The pattern with those of its triplets left for which `rows` is true; `rows` may go on with padding."""
    left = iter(rows)
    return tuple(kept and bool(next(left)) for kept in pattern)


def _placed_like(array: jax.Array, other: jax.Array) -> jax.Array:
    """The array where the other lies, if that is on a mesh: XLA may have put it elsewhere."""
    return jax.device_put(array, other.sharding) if isinstance(other.sharding, NamedSharding) else array
