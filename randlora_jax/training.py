"""Gradient accumulation that builds the update once per optimizer step, not once per micro-batch.

Forward and backward of a micro-batch see W + dW as a plain kernel. Its gradient is summed over the micro-batches and
goes through the formula of dW, by the chain rule, once: dL/dlambda depends on the batch only through dL/dW.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from randlora_jax.kernels import AnyFactors, named_leaves
from randlora_jax.layouts import module_name, path_parts
from randlora_jax.params import effective_params
from randlora_jax.quantized import dequantize, is_quantized
from randlora_jax.selection import AnyAdapter

Loss = Callable[[Any, Any], Any]


def accumulate_gradients(
    loss: Loss,
    adapter: AnyAdapter,
    params: Any,
    batches: Any,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    has_aux: bool = False,
) -> tuple[Any, dict[str, AnyFactors]]:
    """Loss and gradient of `adapter.trainable` over micro-batches, equal to those over the large batch.

    Call it inside jit, and give the gradients to optax. Beyond the model's own memory it takes one float32 copy of the
    adapted kernels, W + dW, and one of their gradients. The loss does not see the factors: to those of AdaLoRA,
    add the gradient of `adalora.orthogonal_loss`, which needs no batch.

    Args:
        loss: `loss(effective_params, batch)`, a scalar, or (scalar, auxiliary) with `has_aux`.
        adapter: The adapter to differentiate.
        params: The frozen parameters, as for `effective_params`.
        batches: A pytree of arrays (micro-batches, ...): `x.reshape(count, -1, *x.shape[1:])` of the large batch.
        reduction: "mean" for a loss that averages over the examples of a batch, in batches of equal weight; "sum" for
            one that sums, or divides by a number that counts the whole large batch, such as its tokens.
        has_aux: As in `jax.value_and_grad`.

    Returns:
        (loss, gradients), or ((loss, auxiliary), gradients) with auxiliary stacked over the micro-batches.

    Raises:
        ValueError: `batches` have no common leading axis, or `reduction` is neither.
    """
    count = _count(batches)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: choose 'mean' or 'sum'.")

    adapted = {name: leaf for name, leaf in _named(params) if name in adapter.factors}
    wide = _replace(params, {name: _widened(leaf) for name, leaf in adapted.items()})

    def kernels_of(trainable: dict[str, AnyFactors]) -> dict[str, jax.Array]:
        effective = dict(_named(effective_params(wide, adapter.with_trainable(trainable))))
        return {name: effective[name] for name in adapted}

    wide_kernels, pull_back = jax.vjp(kernels_of, adapter.trainable)
    kernels = {name: kernel.astype(adapted[name].dtype) for name, kernel in wide_kernels.items()}

    def loss_of(kernels: dict[str, jax.Array], batch: Any) -> Any:
        return loss(_replace(params, kernels), batch)

    def step(carry: tuple[Any, Any], batch: Any) -> tuple[tuple[Any, Any], Any]:
        total, sums = carry
        result, grads = jax.value_and_grad(loss_of, has_aux=has_aux)(kernels, batch)
        value, auxiliary = result if has_aux else (result, None)
        return (total + value, jax.tree.map(jnp.add, sums, grads)), auxiliary

    shape = jax.eval_shape(loss_of, kernels, jax.tree.map(lambda leaf: leaf[0], batches))
    zero = jnp.zeros((), (shape[0] if has_aux else shape).dtype)
    (total, sums), auxiliary = jax.lax.scan(step, (zero, jax.tree.map(jnp.zeros_like, wide_kernels)), batches)
    scale = 1 / count if reduction == "mean" else 1
    (grads,) = pull_back(jax.tree.map(lambda part: part * scale, sums))
    return ((total * scale, auxiliary) if has_aux else total * scale), grads


def _count(batches: Any) -> int:
    """Number of micro-batches."""
    counts = {leaf.shape[:1] for leaf in jax.tree.leaves(batches)}
    if len(counts) != 1 or () in counts or (0,) in counts:
        raise ValueError(
            f"batches have leading axes {sorted(counts)}: every array must have the same first axis, over the"
            " micro-batches. Make it with x.reshape(count, -1, *x.shape[1:])."
        )
    return counts.pop()[0]


def _widened(leaf: Any) -> jax.Array:
    """A kernel in float32 or wider, so that the sum of its gradients is not rounded on the way to dW."""
    weight = dequantize(leaf)
    return weight.astype(jnp.promote_types(weight.dtype, jnp.float32))


def _named(params: Any) -> list[tuple[str, Any]]:
    return [(module_name(parts), leaf) for parts, leaf in named_leaves(params)]


def _replace(params: Any, kernels: Mapping[str, jax.Array]) -> Any:
    """`params` with these kernels; other quantized leaves become arrays, as in `effective_params`."""

    def visit(path: tuple[Any, ...], leaf: Any) -> Any:
        name = module_name(path_parts(path))
        return kernels[name] if name in kernels else dequantize(leaf)

    return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_quantized)
