"""The rank allocator: every step of the schedule against the oracle, pruning, resuming, one compilation."""

import dataclasses
import functools

import adalora_oracle
import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import oracle
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from stacks import without_type_checks
from strategies import draw_adalora

from interop import AdapterFormatError, RandLoraConfig, SVDFactors
from interop import adalora as hub_adalora
from randlora_jax import Layout, adalora, effective_params, init, load_adapter, merge
from randlora_jax.checkpoint import AdapterCheckpoints
from randlora_jax.rank_allocator import RankAllocatorState, find_state, keep_mask, smooth, triplet_scores
from randlora_jax.sharding import adapter_shardings, adapter_specs
from tests.jax.adalora_models import (
    LAYOUTS,
    MIXES,
    WEIGHTS,
    array,
    by_weight,
    config,
    masks_by_weight,
    new_adapter,
    params,
    trained,
)

RATE = 0.05  # of plain gradient descent, which the oracle's loop does, too
STEPS = 12


def random_grads(adapter, steps=STEPS, seed=0):
    """Gradients of every step, stacked; those of padding are not zero, to see that they are ignored."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.standard_normal((steps, *leaf.shape)), leaf.dtype)  # noqa: E731
    return jax.tree.map(draw, adapter.trainable)


def run(adapter, grads, inner=None, *, jit=True):
    """Trainable and state after each step, stacked, by `lax.scan`; or lists of them, step by step."""
    optimizer = adalora.rank_allocator(inner or optax.sgd(RATE), adapter)

    def step(carry, grads):
        trainable, state = carry
        updates, state = optimizer.update(grads, state, trainable)
        carry = optax.apply_updates(trainable, updates), state
        return carry, carry

    carry = adapter.trainable, optimizer.init(adapter.trainable)
    if jit:
        _, history = jax.jit(lambda carry, grads: jax.lax.scan(step, carry, grads))(carry, grads)
        history = jax.tree.map(np.asarray, history)
        return [jax.tree.map(lambda leaf, i=i: leaf[i], history) for i in range(len(history[1].step))]
    history = []
    for i in range(len(jax.tree.leaves(grads)[0])):
        carry, _ = step(carry, jax.tree.map(lambda leaf, i=i: leaf[i], grads))
        history.append(carry)
    return history


def on_device(tree):
    return jax.tree.map(jnp.asarray, tree)


@functools.cache
def whole_run(**fields):
    """An adapter and its run by random gradients."""
    adapter = trained(new_adapter(**fields))
    return adapter, run(adapter, random_grads(adapter))


def oracle_run(adapter, grads):
    """The same by the oracle, in float64."""
    wide = lambda tree: {n: SVDFactors(*(p.astype(np.float64) for p in f)) for n, f in tree.items()}  # noqa: E731
    trainable = wide(by_weight(adapter, adapter.trainable))
    state, history = adalora_oracle.start(trainable), []
    for i in range(len(jax.tree.leaves(grads)[0])):
        grad = wide(by_weight(adapter, jax.tree.map(lambda leaf, i=i: leaf[i], grads)))
        trainable = {
            name: SVDFactors(*(p - np.float64(RATE) * g for p, g in zip(factors, grad[name], strict=True)))
            for name, factors in trainable.items()
        }
        state, trainable = adalora_oracle.step(state, adapter.config, trainable, grad)
        history.append((trainable, state))
    return history


def assert_same_run(adapter, got, want):
    for (trainable, state), (wanted, wanted_state) in zip(got, want, strict=True):
        assert state.step == wanted_state.step
        assert masks_by_weight(adapter, state.mask) == wanted_state.mask
        for tree, other in (
            (by_weight(adapter, trainable), wanted),
            (by_weight(adapter, state.exp_avg_ipt), wanted_state.ipt),
            (by_weight(adapter, state.exp_avg_unc), wanted_state.unc),
        ):
            for name in other:
                for mine, theirs in zip(tree[name], other[name], strict=True):
                    np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
                zero = other[name].E == 0
                np.testing.assert_array_equal(tree[name].E[zero], 0)


RETURNING = {"deltaT": 3, "tinit": 2, "tfinal": 4}  # allocations at steps 3, 6 and 8
SCHEDULES = {
    "every step": {},
    "every third step": RETURNING,
    "from the first step to the last": {"tinit": 0, "tfinal": 0},
    "to one triplet": {"target_r": 1, "tinit": 4, "tfinal": 1, "beta1": 0.5, "beta2": 0.9},
    "one forced allocation": {"tinit": 8, "tfinal": 3, "deltaT": 100},
}


SLOW = ("to one triplet", "one forced allocation")  # each compiles for seconds, and the others cover it nearly


@pytest.mark.parametrize(
    "fields",
    [pytest.param(fields, id=name, marks=[pytest.mark.slow] * (name in SLOW)) for name, fields in SCHEDULES.items()],
)
def test_every_step_of_the_schedule_is_the_oracles(fields):
    adapter, got = whole_run(**fields)
    want = oracle_run(adapter, random_grads(adapter))
    assert_same_run(adapter, got, want)
    final = sum(map(sum, want[-1][1].mask.values()))
    assert final == adapter.config.target_r * len(WEIGHTS)


@pytest.mark.slow
def test_eager_steps_are_those_of_a_compiled_scan():
    adapter = trained(new_adapter(tinit=1, tfinal=1, total_step=5, target_modules=["up"]))
    grads = random_grads(adapter, 5)
    got = run(adapter, grads, jit=False)
    assert_same_run(adapter, got, oracle_run(adapter, grads))
    chex.assert_trees_all_close(got, run(adapter, grads), rtol=1e-5, atol=1e-6)


def test_between_allocations_a_triplet_may_come_back_and_after_the_last_it_may_not():
    _, history = whole_run(**RETURNING)
    gone = lambda step: ~np.asarray(history[step - 1][1].mask["up"])  # noqa: E731
    E = lambda step: np.asarray(history[step - 1][0]["up"].E)[:, 0]  # noqa: E731
    assert gone(6).any()
    np.testing.assert_array_equal(E(6)[gone(6)], 0)
    assert np.all(E(7)[gone(6)] != 0)
    np.testing.assert_array_equal(gone(7), gone(6))
    for step in range(8, 13):
        np.testing.assert_array_equal(gone(step), gone(8))
        np.testing.assert_array_equal(E(step)[gone(8)], 0)
        assert np.all(E(step)[~gone(8)] != 0)


def test_importance_is_forgotten_at_the_last_allocation_and_no_longer_measured():
    _, history = whole_run()
    before, last, after = (history[step - 1][1] for step in (8, 9, 12))
    assert all(np.any(np.asarray(leaf)) for leaf in jax.tree.leaves((before.exp_avg_ipt, before.exp_avg_unc)))
    for state in (last, after):
        chex.assert_trees_all_equal(state.exp_avg_ipt, jax.tree.map(jnp.zeros_like, state.exp_avg_ipt))
        chex.assert_trees_all_equal(state.exp_avg_unc, jax.tree.map(jnp.zeros_like, state.exp_avg_unc))


def test_a_whole_training_compiles_once_and_the_updates_inside_are_the_inner_optimizers():
    adapter, inner = trained(new_adapter(target_modules=["up", "mix"])), optax.adam(0.01)
    optimizer = adalora.rank_allocator(inner, adapter)
    alone = jax.jit(inner.update)

    @jax.jit
    def step(grads, state, trainable):
        return optimizer.update(grads, state, trainable)

    grads = random_grads(adapter)
    trainable, state, inner_state = adapter.trainable, optimizer.init(adapter.trainable), inner.init(adapter.trainable)
    for i in range(STEPS):
        now = jax.tree.map(lambda leaf, i=i: leaf[i], grads)
        updates, state = step(now, state, trainable)
        wanted, inner_state = alone(now, inner_state, trainable)
        for name, factors in updates.items():
            chex.assert_trees_all_close((factors.A, factors.B), (wanted[name].A, wanted[name].B), rtol=1e-5)
        chex.assert_trees_all_close(state.inner, inner_state, rtol=1e-5)
        trainable = optax.apply_updates(trainable, updates)
    assert step._cache_size() == 1
    assert state.step == STEPS


def test_updates_take_extra_arguments_to_the_inner_optimizer():
    def update(grads, state, params=None, *, scale, **_):
        return jax.tree.map(lambda grad: -scale * grad, grads), state

    inner = optax.GradientTransformationExtraArgs(lambda _: optax.EmptyState(), update)
    adapter = trained(new_adapter(target_modules=["up"]))
    optimizer = adalora.rank_allocator(inner, adapter)
    ones = jax.tree.map(jnp.ones_like, adapter.trainable)
    state = optimizer.init(adapter.trainable)
    updates, _ = jax.jit(lambda state: optimizer.update(ones, state, adapter.trainable, scale=3.0))(state)
    chex.assert_trees_all_equal(updates, jax.tree.map(lambda leaf: -3 * leaf, ones))


def test_a_step_whose_gradients_are_not_finite_is_not_measured():
    adapter = trained(new_adapter(target_modules=["up"]))
    optimizer = adalora.rank_allocator(optax.apply_if_finite(optax.sgd(RATE), 5), adapter)
    update, grads = jax.jit(optimizer.update), jax.tree.map(lambda leaf: leaf[0], random_grads(adapter))
    _, state = update(grads, optimizer.init(adapter.trainable), adapter.trainable)
    for bad in (np.nan, np.inf):
        broken = {"up": grads["up"]._replace(A=grads["up"].A.at[1, 2].set(bad))}
        updates, after = update(broken, state, adapter.trainable)
        assert after.step == 2
        chex.assert_trees_all_equal((after.exp_avg_ipt, after.exp_avg_unc), (state.exp_avg_ipt, state.exp_avg_unc))
        chex.assert_trees_all_equal(updates, jax.tree.map(jnp.zeros_like, updates))


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_importance_is_measured_in_float32_and_masked_triplets_are_exactly_zero_in_half_precision(dtype):
    adapter = trained(new_adapter(target_modules=["up"]))
    adapter = adapter.with_trainable(jax.tree.map(lambda leaf: leaf.astype(dtype), adapter.trainable))
    history = run(adapter, random_grads(adapter))
    assert {leaf.dtype for leaf in jax.tree.leaves(history[0][0])} == {jnp.dtype(dtype)}
    state = history[0][1]
    assert {leaf.dtype for leaf in jax.tree.leaves(state[1:3])} == {jnp.dtype("float32")}
    value = np.asarray(history[0][0]["up"].B, np.float64)
    grad = np.asarray(random_grads(adapter)["up"].B[0], np.float64)
    np.testing.assert_allclose(state.exp_avg_ipt["up"].B, 0.15 * np.abs(value * grad), rtol=1e-5)
    for trainable, state in history[8:]:
        for name, mask in state.mask.items():
            E = np.asarray(trainable[name].E, np.float32)[..., 0]
            np.testing.assert_array_equal(E[~np.asarray(mask)], 0)
            assert np.all(E[np.asarray(mask)] != 0)


def test_one_array_is_smoothed_as_by_the_oracle(rng):
    arrays = [np.abs(rng.standard_normal((4, 5))) for _ in range(2)] + [rng.standard_normal((4, 5)) for _ in range(2)]
    wanted = config(beta1=0.7, beta2=0.9)
    got = smooth(*(jnp.asarray(part, jnp.float32) for part in arrays), config=wanted)
    want = adalora_oracle.smooth(*arrays, beta1=0.7, beta2=0.9)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-7)


def test_scores_of_a_stack_are_those_of_its_weights(rng):
    draw = lambda: SVDFactors(rng.random((3, 4, 8)), rng.random((3, 4, 1)), rng.random((3, 8, 4)))  # noqa: E731
    ipt, unc = draw(), draw()
    got = triplet_scores(*(jax.tree.map(lambda part: jnp.asarray(part, jnp.float32), tree) for tree in (ipt, unc)))
    apart = [{str(i): SVDFactors(*(part[i] for part in tree)) for i in range(3)} for tree in (ipt, unc)]
    np.testing.assert_allclose(got, list(adalora_oracle.scores(*apart).values()), rtol=1e-5)


SCORES = {"a": [3.0, 1.0, 2.0], "b": [1.0, 5.0, 0.0]}


@pytest.mark.parametrize(
    ("excess", "kept"),
    [
        (-3, {"a": [True] * 3, "b": [True] * 3}),
        (0, {"a": [True] * 3, "b": [True] * 3}),
        (1, {"a": [True] * 3, "b": [True, True, False]}),
        (2, {"a": [True, False, True], "b": [False, True, False]}),  # two of score 1 go for the second smallest
        (3, {"a": [True, False, True], "b": [False, True, False]}),
        (5, {"a": [False] * 3, "b": [False, True, False]}),
        (6, {"a": [False] * 3, "b": [False] * 3}),
    ],
)
def test_the_lowest_scores_of_all_kernels_go_and_ties_go_together(excess, kept):
    assert adalora_oracle.keep(SCORES, excess) == kept
    scores = {name: jnp.asarray(values) for name, values in SCORES.items()}
    present = {name: np.full(3, True) for name in SCORES}
    got = jax.jit(lambda scores, excess: keep_mask(scores, present, excess))(scores, excess)
    assert {name: mask.tolist() for name, mask in got.items()} == kept


def test_padding_neither_counts_nor_is_kept():
    scores = {"a": jnp.asarray([[3.0, 0.0], [1.0, 2.0]]), "b": jnp.zeros((0,))}
    present = {"a": np.array([[True, False], [True, True]]), "b": np.zeros(0, bool)}
    got = keep_mask(scores, present, 1)
    assert got["a"].tolist() == [[True, False], [False, True]]
    assert keep_mask(scores, present, 0)["a"].tolist() == present["a"].tolist()
    nothing = {"b": np.zeros(0, bool)}
    assert keep_mask({"b": scores["b"]}, nothing, 0)["b"].shape == (0,)


STACK = {f"layers.q.{i}": (6, 8) for i in range(3)}
STACK_LAYOUT = {"layers.q": Layout((1,), (2,), stack_axes=(0,))}
STACK_PARAMS = {"layers": {"q": {"kernel": array(3, 8, 6)}}}
UNEQUAL = {
    "layers.q.0": (True, False, True, True),
    "layers.q.1": (False, False, False, False),
    "layers.q.2": (False, True, True, False),
}


def loaded(kept=UNEQUAL, **fields):
    """A pruned adapter on one array of three weights, so that there is padding."""
    hub = draw_adalora(shapes=STACK, kept=kept, **{"init_r": 4, "target_r": 1, "tfinal": 3, "total_step": 12, **fields})
    return load_adapter(hub, STACK_PARAMS, layouts=STACK_LAYOUT)


def test_a_pruned_adapter_is_trained_on_by_the_schedule_of_its_config():
    adapter = loaded()
    grads = random_grads(adapter)
    got, want = run(adapter, grads), oracle_run(adapter, grads)
    assert_same_run(adapter, got, want)
    # 5 triplets are left of 12: the schedule takes none until its budget is below that, and ends with 3.
    counts = [sum(map(sum, state.mask.values())) for _, state in want]
    assert counts[:3] == [5, 5, 5]
    assert counts[-1] == 3
    for trainable, state in got:
        padding = ~adapter.present["layers.q"]
        np.testing.assert_array_equal(np.asarray(trainable["layers.q"].E)[padding], 0)
        assert not np.asarray(state.mask["layers.q"])[padding].any()


def test_an_adapter_without_a_single_triplet_goes_through_it_all(tmp_path):
    adapter = loaded(dict.fromkeys(STACK, (False,) * 4))
    assert {leaf.size for leaf in jax.tree.leaves(adapter.trainable)} == {0}
    trainable, state = on_device(run(adapter, random_grads(adapter))[-1])
    assert adalora.orthogonal_loss(adapter) == 0
    pruned = adalora.prune(adapter.with_trainable(trainable), state)
    pruned.save_pretrained(tmp_path / "empty")
    again = load_adapter(tmp_path / "empty", STACK_PARAMS, layouts=STACK_LAYOUT)
    chex.assert_trees_all_equal(effective_params(STACK_PARAMS, again), STACK_PARAMS)
    with AdapterCheckpoints(tmp_path / "run", adapter, STACK_PARAMS) as checkpoints:
        checkpoints.save(STEPS, trainable, state)
        restored = checkpoints.restore(trainable, state)
    chex.assert_trees_all_equal((restored.trainable, restored.opt_state), (trainable, state))


@pytest.mark.parametrize("steps", [3, 5, 7, 12])
def test_pruning_leaves_the_update_as_it_is_and_loses_no_triplet(steps):
    made, history = whole_run(**RETURNING)
    trainable, state = on_device(history[steps - 1])
    adapter = made.with_trainable(trainable)
    pruned = adalora.prune(adapter, state)
    for name in adapter.modules:
        np.testing.assert_allclose(pruned.delta_weight(name), adapter.delta_weight(name), rtol=1e-5, atol=1e-6)
    whole, masks = by_weight(adapter, trainable), masks_by_weight(adapter, state.mask)
    for name, factors in by_weight(pruned, pruned.trainable).items():
        kept = tuple(bool(mask or e != 0) for mask, e in zip(masks[name], whole[name].E[:, 0], strict=True))
        assert pruned.config.kept(name) == kept
        wanted = hub_adalora.keep_triplets(whole[name], kept)
        for mine, theirs in zip(factors, wanted, strict=True):
            np.testing.assert_array_equal(mine, theirs)
    left = sum(pruned.config.rank(name) for name in WEIGHTS)
    assert left == {3: 15, 5: 20, 7: 20, 12: 10}[steps]  # after 5 and 7 steps, those that went at 3 and 6 are back
    chex.assert_trees_all_close(merge(params(), pruned), merge(params(), adapter), rtol=1e-5, atol=1e-5)


def test_pruning_a_pruned_adapter_writes_into_the_triplets_that_were_left():
    adapter = loaded()
    trainable, state = on_device(run(adapter, random_grads(adapter))[-1])
    padding = jnp.asarray(~adapter.present["layers.q"])[..., None]
    noisy = {name: factors._replace(E=factors.E + padding) for name, factors in trainable.items()}
    pruned = adalora.prune(adapter.with_trainable(noisy), state)
    masks = masks_by_weight(adapter, state.mask)
    assert sum(map(sum, masks.values())) == 3
    for name, before in UNEQUAL.items():
        left = iter(masks[name])
        assert pruned.config.kept(name) == tuple(kept and next(left) for kept in before)
        want = oracle.svd_delta_weight(*by_weight(adapter, trainable)[name], scaling=adapter.config.scaling)
        np.testing.assert_allclose(pruned.to_interop().delta_weight(name), want, rtol=1e-5, atol=1e-6)
    assert pruned.factors["layers.q"].E.shape[1] == max(map(sum, masks.values()))


def test_pruning_before_the_first_allocation_changes_nothing():
    adapter = new_adapter()
    optimizer = adalora.rank_allocator(optax.sgd(RATE), adapter)
    pruned = adalora.prune(adapter, optimizer.init(adapter.trainable))
    assert pruned.config.rank_pattern is None
    chex.assert_trees_all_equal(pruned, adapter)


def test_the_state_of_the_allocator_is_found_wherever_it_is():
    adapter = new_adapter()
    allocator = adalora.rank_allocator(optax.adam(0.1), adapter)
    nested = optax.chain(optax.clip_by_global_norm(1.0), optax.MultiSteps(allocator, 2).gradient_transformation())
    state = nested.init(adapter.trainable)
    assert isinstance(find_state({"key": 0, "opt": state}), RankAllocatorState)
    adalora.prune(adapter, (state, jax.random.key(0)))
    for other, count in ((optax.adam(0.1).init(adapter.trainable), 0), ((state, state), 2)):
        with pytest.raises(
            ValueError, match=rf"state holds {count} states of a rank_allocator: pass that of the optimizer"
        ):
            adalora.prune(adapter, other)


def test_prune_refuses_what_is_traced_and_the_state_of_another_adapter():
    adapter = new_adapter()
    state = adalora.rank_allocator(optax.sgd(RATE), adapter).init(adapter.trainable)
    with pytest.raises(
        TypeError, match=r"prune makes arrays of other shapes: call it on the results of a jitted function"
    ):
        jax.jit(adalora.prune)(adapter, state)
    with pytest.raises(ValueError, match=r"for another adapter, or for this one before it was pruned"):
        adalora.prune(loaded(), state)


def test_the_allocator_refuses_what_is_not_its_adapters_trainable():
    adapter = new_adapter()
    optimizer = adalora.rank_allocator(optax.sgd(RATE), adapter)
    state, trainable = optimizer.init(adapter.trainable), adapter.trainable
    with pytest.raises(ValueError, match=r"needs the values it updates: call update\(grads, state, trainable\)"):
        optimizer.update(trainable, state)
    fewer = {name: trainable[name] for name in ("up", "mix")}
    smaller = {**trainable, "up": hub_adalora.keep_triplets(trainable["up"], [True, False, False, True])}
    with without_type_checks():
        with pytest.raises(
            ValueError, match=r"\['down'\]\.A has shape none, in the adapter of .* \(4, 12\): pass adapter"
        ):
            optimizer.init(fewer)
        with pytest.raises(
            ValueError, match=r"\['up'\]\.A has shape \(2, 6\), in the adapter of .* \(4, 6\): .* anew for"
        ):
            optimizer.update(smaller, state, trainable)
        with pytest.raises(ValueError, match=r"\['up'\]\.A has shape \(2, 6\)"):
            optimizer.update(trainable, state, smaller)


def test_an_adapter_without_a_schedule_cannot_be_trained():
    hub = draw_adalora(shapes=STACK)
    hub = dataclasses.replace(hub, config=dataclasses.replace(hub.config, total_step=None, inference_mode=True))
    adapter = load_adapter(hub, STACK_PARAMS, layouts=STACK_LAYOUT)
    with pytest.raises(ValueError, match=r"total_step=None: set it to the number of optimizer steps of the training"):
        adalora.rank_allocator(optax.sgd(RATE), adapter)
    with pytest.raises(
        ValueError, match=r"total_step=4 and tfinal=3 allocate at step 1, before importance was measured"
    ):
        adalora.rank_allocator(optax.sgd(RATE), new_adapter(tinit=0, tfinal=3, total_step=4))


def task(effective, x):
    hidden = jnp.tanh(x @ effective["up"]["kernel"]) @ effective["down"]["kernel"]
    return (hidden**2).mean() + sum((x[:, :1] * effective["mix"]["kernel"].sum((1, 2))).mean(0) ** 2)


def make_step(optimizer):
    @jax.jit
    def step(trainable, state, adapter, base, x):
        def loss(trainable):
            now = adapter.with_trainable(trainable)
            return task(effective_params(base, now), x) + adalora.orthogonal_loss(now)

        value, grads = jax.value_and_grad(loss)(trainable)
        updates, state = optimizer.update(grads, state, trainable)
        return optax.apply_updates(trainable, updates), state, value

    return step


def batch(i):
    return jnp.asarray(np.random.default_rng(i).standard_normal((10, 6)), jnp.float32)


def test_a_resumed_training_is_the_uninterrupted_one_bit_for_bit(tmp_path):
    adapter, base = new_adapter(deltaT=2), params()
    optimizer = adalora.rank_allocator(optax.adam(0.01), adapter)
    step = make_step(optimizer)
    trainable, state = adapter.trainable, optimizer.init(adapter.trainable)
    with AdapterCheckpoints(tmp_path / "run", adapter, base) as checkpoints:
        for i in range(STEPS):
            if i == 5:  # between two allocations, with triplets gone and some of them back
                checkpoints.save(i, trainable, state)
            trainable, state, value = step(trainable, state, adapter, base, batch(i))
    assert step._cache_size() == 1
    fresh = new_adapter(deltaT=2)
    with AdapterCheckpoints(tmp_path / "run", fresh, base) as checkpoints:
        start, resumed, resumed_state = checkpoints.restore(fresh.trainable, optimizer.init(fresh.trainable))
    assert start == 5
    assert not np.asarray(resumed_state.mask["mix"]).all()
    for i in range(start, STEPS):
        resumed, resumed_state, again = step(resumed, resumed_state, fresh, base, batch(i))
    assert value == again
    chex.assert_trees_all_equal((resumed, resumed_state), (trainable, state))


def test_a_checkpoint_of_another_adapter_is_refused_line_by_line(tmp_path):
    adapter, base = loaded(), STACK_PARAMS
    optimizer = adalora.rank_allocator(optax.sgd(RATE), adapter)
    with AdapterCheckpoints(tmp_path / "run", adapter, base) as checkpoints:
        checkpoints.save(1, adapter.trainable, optimizer.init(adapter.trainable))
    AdapterCheckpoints(tmp_path / "run", adapter, base).close()
    same_shapes = {**UNEQUAL, "layers.q.2": (True, False, True, False)}
    cases = [
        (loaded(same_shapes), r"triplets of layers\.q\.2: \[1, 2\] in the checkpoint, \[0, 2\] here$"),
        (
            loaded({}),
            r"triplets of layers\.q\.0: \[0, 2, 3\] in the checkpoint, all here\n  - triplets of layers\.q\.1: \[\]",
        ),
        (loaded(lora_alpha=5), r"lora_alpha: 8 in the checkpoint, 5 here$"),
        (
            init(RandLoraConfig(r=4, target_modules=["q"]), base, layouts=STACK_LAYOUT),
            r"method: AdaLoRA in the checkpoint, RandLoRA here$",
        ),
    ]
    for other, line in cases:
        with pytest.raises(AdapterFormatError, match=rf"(?m)another adapter or base model:(\n  - .*)*\n  - {line}"):
            AdapterCheckpoints(tmp_path / "run", other, base)


MESH = pytest.mark.skipif(jax.device_count() < 8, reason="needs 8 devices: tests/conftest.py forces them on CPU")


@MESH
def test_the_factors_lie_with_the_axes_of_their_kernels():
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"))
    specs = {"up": P("tp", "fsdp"), "mix": P(None, "fsdp", "tp")}
    got = adapter_specs(new_adapter(), specs, mesh).factors
    assert got["up"] == SVDFactors(P(None, ("tp",)), P(), P(("fsdp",), None))
    assert got["mix"] == SVDFactors(P(None, None, ("fsdp",)), P(), P(None, ("tp",), None))
    assert got["down"] == SVDFactors(P(None, None), P(), P(None, None))
    uneven = adapter_specs(new_adapter(), {"up": P("fsdp", "tp")}, mesh).factors["up"]  # 6 inputs over 4 devices
    assert uneven == SVDFactors(P(None, None), P(), P(("tp",), None))


SPECS = {"up": P("tp", "fsdp"), "down": P(), "mix": P(None, "fsdp", "tp")}


def train(adapter, base):
    optimizer = adalora.rank_allocator(optax.sgd(0.01), adapter)

    def step(carry, _):
        def loss(trainable):
            now = adapter.with_trainable(trainable)
            effective = effective_params(base, now)
            return sum((leaf["kernel"] ** 2).sum() for leaf in effective.values()) + adalora.orthogonal_loss(now)

        trainable, state = carry
        updates, state = optimizer.update(jax.grad(loss)(trainable), state, trainable)
        return (optax.apply_updates(trainable, updates), state), None

    carry = adapter.trainable, optimizer.init(adapter.trainable)
    return jax.jit(lambda carry: jax.lax.scan(step, carry, length=10)[0])(carry)


@functools.cache
def trained_alone():
    adapter = new_adapter(target_modules=["up", "mix"])
    return adapter, jax.tree.map(np.asarray, train(adapter, params()))


@MESH
@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_on_a_mesh_the_training_is_that_on_one_device(kind):
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(kind, kind))
    place = lambda name, leaf: jax.device_put(leaf, NamedSharding(mesh, SPECS[name]))  # noqa: E731
    base = {name: {"kernel": place(name, leaf["kernel"])} for name, leaf in params().items()}
    adapter = adalora.init(config(target_modules=["up", "mix"]), base, layouts=LAYOUTS, key=jax.random.key(0))
    assert len(adapter.factors["mix"].A.sharding.device_set) == 8
    alone, (want, wanted) = trained_alone()
    chex.assert_trees_all_equal(*(jax.tree.map(np.asarray, each.trainable) for each in (adapter, alone)))
    got, state = train(adapter, base)
    chex.assert_trees_all_close(jax.tree.map(np.asarray, got), want, rtol=1e-4, atol=1e-5)
    assert masks_by_weight(adapter, state.mask) == masks_by_weight(alone, wanted.mask)
    pruned = adalora.prune(adapter.with_trainable(got), state)
    assert sum(pruned.config.rank(name) for name in ("up", *MIXES)) == 8
    shardings = adapter_shardings(pruned, base)
    for leaf, sharding in zip(*map(jax.tree.leaves, (pruned.trainable, shardings.trainable)), strict=True):
        assert leaf.sharding.is_equivalent_to(sharding, leaf.ndim)
