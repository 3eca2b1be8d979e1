"""Every way to compute with an adapter obeys the same laws on every kind of model: the table in `surfaces` x laws."""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from flax import nnx
from tolerances import TOLERANCE

from interop import Bases, RandLoraConfig, load
from randlora_jax import (
    RandLoraParam,
    attach,
    bound_bases,
    detach,
    effective_params,
    extract,
    init,
    lazy_params,
    load_adapter,
    merge,
    unmerge,
)
from tests.jax.surfaces import CASES, QUICK, formula_grads, kernels_of, oracle_kernels, with_kernels


class Step(NamedTuple):
    """What a training step knows after its backward pass."""

    loss: Any
    output: Any
    grads: Any


def loss_of(output):
    return (output.astype(jnp.float32) ** 2).sum(), output


class Functional:
    """`effective_params` or `lazy_params`: a pure function of params and adapter."""

    def __init__(self, case, surface):
        self.case, self.surface = case, surface
        self.jitted = jax.jit(jax.value_and_grad(self.loss, has_aux=True), compiler_options=QUICK)

    def forward(self, trainable, adapter, params, x):
        return self.case.model.forward(self.surface(params, adapter.with_trainable(trainable)), x)

    def loss(self, *arguments):
        return loss_of(self.forward(*arguments))

    def step(self, adapter):
        (loss, output), grads = self.jitted(adapter.trainable, adapter, self.case.model.params, self.case.inputs)
        return Step(loss, output, grads)

    def eager(self, adapter):
        if self.surface is effective_params:  # nothing of ours is left to do inside the model
            return plain_of(self.case).step(self.kernels(adapter)).output
        return self.forward(adapter.trainable, adapter, self.case.model.params, self.case.inputs)

    def kernels(self, adapter):
        return kernels_of(nn.meta.unbox(self.surface(self.case.model.params, adapter)), self.case.targets)

    def train(self, adapter):
        """Losses of a few steps, and the arrays that must not move, before and after."""
        frozen = (self.case.model.params, adapter.bases)
        before, losses = to_bytes(frozen), []
        optimizer = OPTIMIZER
        state = optimizer.init(adapter.trainable)
        for _ in range(STEPS):
            step = self.step(adapter)
            updates, state = optimizer.update(step.grads, state, adapter.trainable)
            adapter = adapter.with_trainable(optax.apply_updates(adapter.trainable, updates))
            losses.append(float(step.loss))
        return losses, adapter, before, to_bytes(frozen)


class Attached:
    """`attach` on an NNX model, with or without `bound_bases`."""

    def __init__(self, case, binding):
        self.case, self.binding = case, binding
        # nnx.jit takes no compiler_options; with them, this is what it does.
        self.jitted = jax.jit(self.of_parts, static_argnums=0, compiler_options=QUICK)

    def model(self, adapter):
        return attach(self.case.model.module(), adapter)

    def of_parts(self, graph, state, x):
        model = nnx.merge(graph, state)

        def loss(model):
            with self.binding(model):
                return loss_of(model(x))

        return nnx.value_and_grad(loss, argnums=nnx.DiffState(0, RandLoraParam), has_aux=True)(model)

    def step_of(self, model):
        (loss, output), grads = self.jitted(*nnx.split(model), self.case.inputs)
        return Step(loss, output, grads)

    def step(self, adapter):
        model = self.model(adapter)
        step = self.step_of(model)
        nnx.update(model, step.grads)
        return step._replace(grads=extract(model).trainable)

    def eager(self, adapter):
        model = self.model(adapter)
        with self.binding(model):
            return model(self.case.inputs)

    def kernels(self, adapter):
        module = self.model(adapter)
        weights = {name: module for name in self.case.targets}
        for name in weights:
            for part in name.split("."):
                weights[name] = getattr(weights[name], part)
        return {
            name: getattr(layer, "kernel", getattr(layer, "w", None)).get_value() for name, layer in weights.items()
        }

    def train(self, adapter):
        model, losses = self.model(adapter), []
        frozen = lambda: to_bytes((nnx.state(model, nnx.Not(RandLoraParam)), extract(model).bases))  # noqa: E731
        before = frozen()
        optimizer = nnx.Optimizer(model, OPTIMIZER, wrt=RandLoraParam)
        for _ in range(STEPS):
            step = self.step_of(model)
            optimizer.update(model, step.grads)
            losses.append(float(step.loss))
        return losses, extract(model), before, frozen()


STEPS = 2
# The decay of 1% a step moves whatever the optimizer sees, also a bfloat16 array that gets no gradient.
OPTIMIZER = optax.chain(optax.scale(1e-3), optax.add_decayed_weights(0.01), optax.scale(-1.0))
SURFACES = {
    "effective_params": lambda case: Functional(case, effective_params),
    "lazy_params": lambda case: Functional(case, lazy_params),
    "attach": lambda case: Attached(case, contextlib.nullcontext),
    "bound": lambda case: Attached(case, bound_bases),
}


def to_bytes(tree):
    return {
        jax.tree_util.keystr(path): np.asarray(leaf).tobytes()
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }


def config_of(case, **fields):
    """A config by which all kernels of the case are adapted; a scaling of 1.5 keeps updates of order 1."""
    names = [module for name, layout in case.layouts.items() for module in layout.modules or (name,)]
    targets = [name for name in names if name is not None]
    return RandLoraConfig(**{"r": case.r, "randlora_alpha": 1.5 * case.r, "target_modules": targets, **fields})


def trained(adapter, seed=7):
    """The adapter with random lambda and gamma, as after training."""
    rng = np.random.default_rng(seed)
    leaves = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 4, leaf.dtype), adapter.trainable)
    return adapter.with_trainable(leaves)


class Plain:
    """The model without an adapter, as a function of its kernels: what the laws compare with."""

    def __init__(self, case):
        self.case = case

        def loss(kernels, params, x):
            return loss_of(case.model.forward(with_kernels(params, kernels), x))

        self.jitted = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=QUICK)

    def step(self, kernels):
        """Loss, output and gradients of the kernels."""
        typed = {name: jnp.asarray(kernel, self.case.dtype) for name, kernel in kernels.items()}
        (loss, output), grads = self.jitted(typed, self.case.model.params, self.case.inputs)
        return Step(loss, output, grads)

    @functools.cached_property
    def base(self):
        return self.step(kernels_of(self.case.model.params, self.case.targets))

    @functools.cached_property
    def adapted(self):
        """With the oracle's kernels, and gradients of lambda and gamma by the written-out formula."""
        step = self.step(oracle_kernels(self.case, adapter_of(self.case)))
        return step._replace(grads=formula_grads(self.case, adapter_of(self.case), step.grads))


@functools.cache
def plain_of(case):
    return Plain(case)


@functools.cache
def start_of(case):
    return init(config_of(case), case.model.params, layouts=case.layouts)


@functools.cache
def adapter_of(case):
    return trained(start_of(case))


class Bench:
    """What one case of the table gives on one surface, computed once and looked at by every law."""

    def __init__(self, case, surface):
        self.case, self.plain, self.surface = case, plain_of(case), SURFACES[surface](case)
        self.start, self.adapter = start_of(case), adapter_of(case)

    step = functools.cached_property(lambda self: self.surface.step(self.adapter))
    kernels = functools.cached_property(lambda self: self.surface.kernels(self.adapter))

    def tolerance(self, operation):
        return TOLERANCE[self.case.dtype, operation]


@functools.cache
def bench_of(case, surface):
    return Bench(case, surface)


def pairs():
    for case in CASES:
        for surface in case.surfaces + case.slow:
            marks = [pytest.mark.slow] * (surface in case.slow)
            yield pytest.param((case, surface), id=f"{case} by {surface}", marks=marks)


@pytest.fixture(params=pairs())
def bench(request):
    return bench_of(*request.param)


def float64(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf).astype(np.float64), tree)


def assert_close(got, want, **tolerance):
    chex.assert_trees_all_close(float64(got), float64(want), **tolerance)


def test_a_new_adapter_changes_no_bit_of_a_kernel_and_nothing_of_the_output(bench):
    base = kernels_of(bench.case.model.params, bench.case.targets)
    assert to_bytes(bench.surface.kernels(bench.start)) == to_bytes(base)
    assert_close(bench.surface.step(bench.start).output, bench.plain.base.output, **bench.tolerance("forward"))


def test_effective_kernels_are_the_oracles(bench):
    assert_close(bench.kernels, oracle_kernels(bench.case, bench.adapter), **bench.tolerance("delta_weight"))
    base = kernels_of(bench.case.model.params, bench.case.targets)
    moved = jax.tree.map(lambda got, old: np.abs(got - old).max(), float64(bench.kernels), float64(base))
    assert min(jax.tree.leaves(moved)) > 0.1
    assert {leaf.dtype for leaf in jax.tree.leaves(bench.kernels)} == {jnp.dtype(bench.case.dtype)}


def test_the_output_is_that_of_the_plain_model_with_the_oracles_kernels(bench):
    assert_close(bench.step.output, bench.plain.adapted.output, **bench.tolerance("gradient"))


def test_gradients_are_those_of_the_written_out_formula(bench):
    assert jax.tree.structure(bench.step.grads) == jax.tree.structure(bench.adapter.trainable)
    assert_close(bench.step.grads, bench.plain.adapted.grads, **bench.tolerance("gradient"))


def test_jit_equals_eager(bench):
    assert_close(bench.step.output, bench.surface.eager(bench.adapter), **bench.tolerance("gradient"))


def test_training_moves_every_lambda_and_gamma_and_no_bit_of_anything_else(bench):
    losses, after, before_bytes, after_bytes = bench.surface.train(bench.adapter)
    assert np.all(np.isfinite(losses))
    assert before_bytes == after_bytes
    for old, new in zip(*map(jax.tree.leaves, (bench.adapter.trainable, after.trainable)), strict=True):
        assert np.asarray(old).tobytes() != np.asarray(new).tobytes()


@pytest.mark.parametrize("case", [case for case in CASES if case.surfaces], ids=str)
def test_merge_then_unmerge_is_the_identity(case):
    params, adapter = case.model.params, trained(start_of(case))
    merged = merge(params, adapter)
    restored = unmerge(merged, adapter)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(float64((params, merged))))
    # Two roundings of values up to `largest`, each of half a unit in the last place.
    assert_close(restored, params, rtol=0, atol=float(largest * jnp.finfo(case.dtype).eps))
    assert to_bytes(with_kernels(merged, dict.fromkeys(case.targets))) == to_bytes(
        with_kernels(params, dict.fromkeys(case.targets))
    )


# --- Laws on fewer cases ---------------------------------------------------------------------


def case_named(name):
    return next(case for case in CASES if case.name == name)


def some(*names_and_surfaces):
    """Benches of the table by "case by surface"."""
    parts = [name.rsplit(" by ", 1) for name in names_and_surfaces]
    return pytest.mark.parametrize(
        "bench", [bench_of(case_named(name), surface) for name, surface in parts], ids=names_and_surfaces
    )


@pytest.mark.parametrize(
    ("name", "surface"),
    [
        ("experts", "effective_params"),
        ("linen scan on axis 1, remat", "lazy_params"),
    ],
)
def test_a_batch_of_adapters_by_vmap_is_each_adapter_alone(name, surface):
    bench = bench_of(case_named(name), surface)
    adapters = [bench.adapter, trained(bench.start, seed=8), bench.start]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[adapter.trainable for adapter in adapters])
    one = jax.value_and_grad(bench.surface.loss, has_aux=True)
    many = jax.jit(jax.vmap(one, in_axes=(0, None, None, None)), compiler_options=QUICK)
    (losses, outputs), grads = many(stacked, bench.adapter, bench.case.model.params, bench.case.inputs)
    for i, adapter in enumerate(adapters):
        want = bench.surface.step(adapter)
        got = Step(losses[i], outputs[i], jax.tree.map(lambda leaf, i=i: leaf[i], grads))
        assert_close(got, want, **bench.tolerance("gradient"))
    assert np.abs(outputs[0] - outputs[1]).max() > 0.1


def test_each_example_of_a_batch_can_have_its_own_adapter():
    bench = bench_of(case_named("linen Dense"), "lazy_params")
    adapters = [trained(bench.start, seed=seed) for seed in range(4)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *[adapter.trainable for adapter in adapters])
    mixed = jax.jit(jax.vmap(bench.surface.forward, in_axes=(0, None, None, 0)), compiler_options=QUICK)
    outputs = mixed(stacked, bench.adapter, bench.case.model.params, bench.case.inputs)
    want = jnp.stack([bench.surface.step(adapter).output[i] for i, adapter in enumerate(adapters)])
    assert_close(outputs, want, **bench.tolerance("gradient"))


NAN_CASES = ["kernels in a dict by effective_params", "linen Dense by lazy_params", "nnx Linear by attach"]


@some(*NAN_CASES, "nnx scan on axis 1, remat by bound")
def test_the_first_step_from_zero_meets_no_nan_and_moves_lambda_only(bench):
    with jax.debug_nans(True):
        step = bench.surface.step(bench.start)
    for name, (lam, gamma) in step.grads.items():
        assert np.all(np.abs(np.asarray(lam)).max(axis=(-2, -1)) > 1e-3), name
        np.testing.assert_array_equal(gamma, np.zeros_like(gamma))


@some(*NAN_CASES)
def test_what_a_model_does_not_use_of_the_bases_may_be_anything(bench):
    A, B = bench.adapter.bases
    r = bench.case.r  # the adapter of a larger model has r columns, one base and four rows more
    larger = Bases(
        jnp.pad(A, ((0, 0), (0, 0), (0, r)), constant_values=jnp.nan),
        jnp.pad(B, ((0, 4), (0, 1), (0, 0)), constant_values=jnp.nan),
    )
    step = bench.surface.step(dataclasses.replace(bench.adapter, bases=larger))
    assert_close(step, bench.step, **bench.tolerance("gradient"))


def test_remat_of_effective_params_has_the_gradients_of_the_formula():
    bench = bench_of(case_named("kernels in a dict"), "effective_params")
    rematted = jax.value_and_grad(jax.checkpoint(bench.surface.loss), has_aux=True)
    arguments = (bench.adapter.trainable, bench.adapter, bench.case.model.params, bench.case.inputs)
    (loss, output), grads = jax.jit(rematted, compiler_options=QUICK)(*arguments)
    assert_close(Step(loss, output, grads), bench.plain.adapted, **bench.tolerance("gradient"))


ROUNDED = [
    "kernels in a dict by effective_params",
    "linen scan on axis 1, remat by lazy_params",
    "nnx Linear by attach",
]


@some(*ROUNDED)
def test_a_compute_dtype_rounds_the_operands_only(bench):
    """B and the scaled A are rounded, their product is summed in float32."""
    rounded = dataclasses.replace(bench.adapter, dtype=np.dtype(jnp.bfloat16))
    got = bench.surface.kernels(rounded)
    for name, exact in bench.kernels.items():
        assert got[name].dtype == jnp.float32
        difference = np.abs(np.asarray(got[name] - exact))
        assert 1e-5 < difference.max() < 0.05
        # Not rounded to bfloat16: the result has more digits than that.
        assert np.any(np.asarray(got[name] != got[name].astype(jnp.bfloat16)))


@some(*ROUNDED)
def test_a_compute_dtype_gives_float32_gradients_near_the_exact_ones_under_jit(bench):
    rounded = dataclasses.replace(bench.adapter, dtype=np.dtype(jnp.bfloat16))
    step = bench.surface.step(rounded)
    assert {leaf.dtype for leaf in jax.tree.leaves((step.grads, rounded.trainable))} == {np.dtype("float32")}
    assert_close(step.grads, bench.step.grads, rtol=0.1, atol=0.1 * largest(bench.step.grads))
    assert largest(jax.tree.map(jnp.subtract, step.grads, bench.step.grads)) > 0


def test_a_compute_dtype_needs_no_scaling_to_run_under_jit():
    """With a scaling of 1 nothing is left between the product and its transposition, and XLA makes them one."""
    case = case_named("kernels in a dict")
    adapter = init(config_of(case, randlora_alpha=case.r), case.model.params, dtype=jnp.bfloat16)
    got = jax.jit(effective_params)(case.model.params, trained(adapter))
    assert_close(got, effective_params(case.model.params, trained(adapter)), **TOLERANCE["float32", "merge"])


def largest(tree):
    return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_the_rounded_product_is_that_of_rounded_operands_in_float64():
    case = case_named("kernels in a dict")
    adapter = dataclasses.replace(adapter_of(case), dtype=np.dtype(jnp.bfloat16))
    params = case.model.params
    got = kernels_of(effective_params(params, adapter), case.targets)
    A, B = float64(tuple(map(np.asarray, adapter.bases)))
    for name, (out, inp) in adapter.shapes:
        lam, gamma = float64(adapter.factors[name])
        (r, n), short = lam.shape, min(out, inp)
        scaled = (lam[:, :, None] * A[:, :, :short] * gamma).reshape(r * n, short)
        scaled = np.asarray(jnp.asarray(scaled.astype(np.float32)).astype(jnp.bfloat16), np.float64)
        delta = adapter.config.scaling * B[: max(out, inp), :n].reshape(-1, n * r) @ scaled
        want = float64(params[name]["kernel"]) + (delta.T if out >= inp else delta)
        # A value on the border between two bfloat16 may be rounded to the other one: allow one such in a sum.
        np.testing.assert_allclose(float64(got[name]), want, rtol=0, atol=2**-8)
        assert np.median(np.abs(float64(got[name]) - want)) < 1e-6


def test_bases_can_be_stored_in_bfloat16_and_the_file_holds_them_so(tmp_path):
    case = case_named("kernels in a dict")
    wide = init(config_of(case), case.model.params, recipe="torch<=2.11-fp16")
    assert {part.dtype for part in wide.bases} == {np.dtype("float16")}
    adapter = trained(wide).with_bases_dtype(jnp.bfloat16)
    assert {part.dtype for part in adapter.bases} == {np.dtype(jnp.bfloat16)}
    adapter.save_pretrained(tmp_path)
    assert {part.dtype for part in load(tmp_path).bases} == {np.dtype(jnp.bfloat16)}
    again = load_adapter(tmp_path, case.model.params)
    assert to_bytes(again.bases) == to_bytes(adapter.bases)
    assert to_bytes(effective_params(case.model.params, again)) == to_bytes(
        effective_params(case.model.params, adapter)
    )


def test_rounded_bases_cannot_be_left_out_of_the_file(tmp_path):
    case = case_named("kernels in a dict")
    adapter = init(config_of(case, save_projection=False), case.model.params, recipe="torch<=2.11-fp16")
    with pytest.raises(ValueError, match="save_projection"):
        adapter.with_bases_dtype(jnp.bfloat16).save_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("name", "surface"), [("kernels in a dict", "effective_params"), ("linen scan on axis 1, remat", "lazy_params")]
)
def test_asking_for_gradients_of_the_bases_gives_zeros_at_no_cost(name, surface):
    """No product is computed for them: they are as many with and without."""
    bench = bench_of(case_named(name), surface)

    def loss(trainable, bases):
        adapter = dataclasses.replace(bench.adapter, bases=bases)
        return bench.surface.loss(trainable, adapter, bench.case.model.params, bench.case.inputs)[0]

    bases = jax.tree.map(lambda part: part.astype(jnp.float32), bench.adapter.bases)
    without, with_bases = (
        str(jax.make_jaxpr(jax.grad(loss, argnums=argnums))(bench.adapter.trainable, bases)).count("dot_general")
        for argnums in (0, (0, 1))
    )
    assert without == with_bases > 0
    grads = jax.jit(jax.grad(loss, argnums=1), compiler_options=QUICK)(bench.adapter.trainable, bases)
    assert largest(grads) == 0


@pytest.mark.parametrize("name", ["nnx Linear", "nnx scan on axis 1, remat"])
def test_detaching_with_merge_leaves_what_merge_makes_of_the_params(name):
    case = case_named(name)
    model = attach(case.model.module(), adapter_of(case))
    merged = nnx.state(detach(model, merge=True))
    assert_close(merged, merge(case.model.params, adapter_of(case)), **TOLERANCE["float32", "merge"])
    base = nnx.state(detach(attach(case.model.module(), adapter_of(case))))
    assert to_bytes(base) == to_bytes(case.model.params)


@pytest.mark.parametrize("target", ["up", "mlp/~/up"])
def test_haikus_names_with_slashes_can_be_listed_as_targets(target):
    params = {"mlp/~/up": {"w": jnp.ones((8, 12))}, "mlp/~/down": {"w": jnp.ones((12, 8))}}
    assert len(init(RandLoraConfig(r=4, target_modules=[target]), params).modules) == 1
