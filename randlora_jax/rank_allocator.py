"""The rank allocator of AdaLoRA (arXiv:2303.10512, section 3.2) as an optax transformation around any other.

Importance is PEFT's: of a step, |p * gradient| with the values p that the step's update gives. Masking is part of the
update, so that the triplets that are taken away have E = 0 exactly once the update is applied.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.schedule import budgets, is_allocated, is_measured
from randlora_jax.adalora_adapter import AdaLoraAdapter
from randlora_jax.scaling import compute_dtype

Trainable = dict[str, SVDFactors]


class Importance(NamedTuple):
    """Moving averages, entry by entry: of importance, and of how much it varies."""

    exp_avg_ipt: Trainable
    exp_avg_unc: Trainable


class RankAllocatorState(NamedTuple):
    """State of `rank_allocator`, a pytree: a run that goes on from it is the uninterrupted one.

    Attributes:
        step: Updates made.
        exp_avg_ipt: See `Importance`; float32 or wider.
        exp_avg_unc: See `Importance`.
        mask: The triplets that the last allocation left, (r,) or (weights, r) by kernel; all, before the first.
        inner: State of the wrapped optimizer.
    """

    step: Int[Array, ""]
    exp_avg_ipt: Trainable
    exp_avg_unc: Trainable
    mask: dict[str, Bool[Array, "*weights r"]]
    inner: Any


def rank_allocator(
    inner: optax.GradientTransformation, adapter: AdaLoraAdapter
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for `adapter.trainable` that takes triplets away as `adapter.config` schedules it.

    The first update is step 1 of the schedule, the last of `total_step` updates step `total_step`. In steps in which
    some gradient is not finite, importance is not measured, as loops with loss scaling skip the optimizer's step then.

    Args:
        inner: What makes the updates: whatever changes them must be inside, since nothing may come after masking. What
            changes gradients before importance is measured, such as clipping, goes in front, by `optax.chain`.
        adapter: Only its config, names and shapes are read; make the allocator anew for another or a pruned adapter.

    Returns:
        A transformation with `RankAllocatorState`, whose update needs the parameters and passes extra arguments on.

    Raises:
        ValueError: the config has no schedule, or one that allocates before anything was measured; in init and update,
            the trainable is not this adapter's, or update is not given it.
    """
    plan = _Plan.of(adapter)
    inner = optax.with_extra_args_support(inner)

    def init(params: Trainable) -> RankAllocatorState:
        plan.check(params)
        zeros = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype=compute_dtype(leaf)), params)
        mask = {name: jnp.asarray(rows) for name, rows in plan.present.items()}
        return RankAllocatorState(
            step=jnp.zeros((), jnp.int32),
            exp_avg_ipt=zeros,
            exp_avg_unc=jax.tree.map(jnp.copy, zeros),  # buffers of their own, which a step may donate
            mask=mask,
            inner=inner.init(params),
        )

    def update(
        grads: Trainable, state: RankAllocatorState, params: Trainable | None = None, **extra: Any
    ) -> tuple[Trainable, RankAllocatorState]:
        if params is None:
            raise ValueError("rank_allocator needs the values it updates: call update(grads, state, trainable).")
        plan.check(params)
        plan.check(grads)
        updates, inner_state = inner.update(grads, state.inner, params, **extra)
        step = state.step + 1
        importance = plan.measure(state, optax.apply_updates(params, updates), grads)
        mask = plan.allocate(state, importance)
        cut = is_allocated(plan.config, step) | (step > plan.config.last_allocation)
        updates = {
            name: _masked(factors, params[name], (mask[name] | ~cut) & plan.present[name])
            for name, factors in updates.items()
        }
        finished = step == plan.config.last_allocation
        kept = jax.tree.map(lambda leaf: jnp.where(finished, jnp.zeros_like(leaf), leaf), importance)
        return updates, RankAllocatorState(step, kept.exp_avg_ipt, kept.exp_avg_unc, mask, inner_state)

    return optax.GradientTransformationExtraArgs(init, update)


def smooth(
    average: Array, uncertainty: Array, value: Array, grad: Array, *, config: AdaLoraConfig
) -> tuple[Array, Array]:
    """The moving averages of one array, as in `Importance`, after a step in which it got this value by this gradient.

    `I = |value * grad|`, `average = beta1 average + (1 - beta1) I`, and the same of `|I - average|` with beta2.
    """
    beta1, beta2 = config.beta1, config.beta2
    importance = jnp.abs(value.astype(average.dtype) * grad.astype(average.dtype))
    average = beta1 * average + (1 - beta1) * importance
    return average, beta2 * uncertainty + (1 - beta2) * jnp.abs(importance - average)


def triplet_scores(average: SVDFactors, uncertainty: SVDFactors) -> Float[Array, "*weights r"]:
    """Scores of a kernel's triplets, `s(E_i) + mean_j s(A_ij) + mean_j s(B_ji)` with `s = average * uncertainty`."""
    A, E, B = (a * u for a, u in zip(average, uncertainty, strict=True))
    return E[..., 0] + (A.mean(-1) + B.mean(-2))


def keep_mask(
    scores: Mapping[str, Float[Array, "*weights r"]], present: Mapping[str, np.ndarray], excess: Int[Array, ""] | int
) -> dict[str, Bool[Array, "*weights r"]]:
    """Which triplets are left when those of the `excess` lowest scores go, over all kernels; ties go, too, as in PEFT.

    Args:
        scores: See `triplet_scores`.
        present: Which of them count (`AdaLoraAdapter.present`).
        excess: How many triplets go, at most all; 0 or less keeps every one.
    """
    count = sum(int(rows.sum()) for rows in present.values())
    if count == 0:
        return {name: jnp.asarray(rows) for name, rows in present.items()}
    counted = [scores[name].reshape(-1)[np.flatnonzero(rows)] for name, rows in present.items()]
    threshold = jnp.sort(jnp.concatenate(counted))[jnp.clip(excess - 1, 0, count - 1)]
    return {name: ((scores[name] > threshold) | (excess <= 0)) & rows for name, rows in present.items()}


def find_state(state: Any) -> RankAllocatorState:
    """The allocator's own state in that of an optimizer which contains it, such as an `optax.chain`.

    Raises:
        ValueError: there is none, or more than one.
    """
    is_ours = lambda node: isinstance(node, RankAllocatorState)  # noqa: E731
    found = [node for node in jax.tree.leaves(state, is_leaf=is_ours) if is_ours(node)]
    if len(found) != 1:
        raise ValueError(
            f"state holds {len(found)} states of a rank_allocator: pass that of the optimizer which trained this"
            " adapter, as init or update returned it."
        )
    return found[0]


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What an allocator knows before training: the schedule, and which triplets there are."""

    config: AdaLoraConfig
    present: dict[str, np.ndarray]
    shapes: dict[str, tuple[int, ...]]
    excess: np.ndarray  # how many triplets go, by step

    @classmethod
    def of(cls, adapter: AdaLoraAdapter) -> "_Plan":
        config, present = adapter.config, adapter.present
        config.require_schedule()
        if config.last_allocation < 2:
            raise ValueError(
                f"total_step={config.total_step} and tfinal={config.tfinal} allocate at step 1, before importance was"
                " measured: total_step must be at least tfinal + 2. Raise it, or lower tfinal."
            )
        weights = sum(len(modules) for modules in adapter.weight_names.values())
        count = sum(int(rows.sum()) for rows in present.values())
        return cls(config, present, _named_shapes(adapter.trainable), count - budgets(config, weights))

    def check(self, trainable: Any) -> None:
        """Raise a ValueError if this is not the trainable of the adapter, or a tree like it."""
        found = _named_shapes(trainable)
        differing = sorted(path for path, _ in found.items() ^ self.shapes.items())
        if differing:
            path = differing[0]
            raise ValueError(
                f"{path} has shape {found.get(path, 'none')}, in the adapter of this rank_allocator"
                f" {self.shapes.get(path, 'none')}: pass adapter.trainable and its gradients, and make the allocator"
                " and its state anew for another or a pruned adapter."
            )

    def measure(self, state: RankAllocatorState, params: Trainable, grads: Trainable) -> Importance:
        """The moving averages after the next step, or as they were if nothing is measured in it."""
        before = Importance(state.exp_avg_ipt, state.exp_avg_unc)

        def measured() -> Importance:
            smoothed = functools.partial(smooth, config=self.config)
            pairs = jax.tree.map(smoothed, *before, params, grads)
            return Importance(*jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), pairs))

        finite = jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)]).all()
        # With `where`, XLA would copy the check of all gradients into the program of each array, and take minutes.
        return jax.lax.cond(is_measured(self.config, state.step + 1) & finite, measured, lambda: before)

    def allocate(self, state: RankAllocatorState, importance: Importance) -> dict[str, Array]:
        """The mask after the next step: a new one where the schedule says so."""
        step = state.step + 1

        def chosen() -> dict[str, Array]:
            excess = jnp.asarray(self.excess)[jnp.clip(step, 0, len(self.excess) - 1)]
            averages, uncertainties = importance
            scores = {name: triplet_scores(average, uncertainties[name]) for name, average in averages.items()}
            return keep_mask(scores, self.present, excess)

        return jax.lax.cond(is_allocated(self.config, step), chosen, lambda: state.mask)


def _masked(updates: SVDFactors, params: SVDFactors, kept: Bool[Array, "*weights r"]) -> SVDFactors:
    """The updates, with those of E that give exactly 0 where a triplet is not kept."""
    wide = jnp.promote_types(updates.E.dtype, params.E.dtype)  # -E must not be rounded
    E = jnp.where(kept[..., None], updates.E.astype(wide), -params.E.astype(wide))
    return updates._replace(E=E)


def _named_shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in leaves}
