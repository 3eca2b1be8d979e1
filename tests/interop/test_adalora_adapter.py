"""Adapters of AdaLoRA in numpy."""

import dataclasses
from math import erf, sqrt

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import KEPT, LAYERS, SCHEDULE, SHAPES, draw_adalora, draw_adapter, shapes
from tolerances import TOLERANCE

from interop import AdaLoraConfig, Adapter, AdapterFormatError, Bases, Factors, SVDFactors, init_adapter
from interop.adalora import keep_triplets


def config(**fields):
    return AdaLoraConfig(**{"total_step": 10, **fields})


def adapter_of(factors, *, rank, **fields):
    """One layer named `layer` with these factors, of `rank + 1` triplets of which the last was taken away."""
    fields = {"init_r": rank + 1, "inference_mode": True, **fields}
    mask = {"layer": [True] * rank + [False]}
    return Adapter(config=AdaLoraConfig(**fields).with_kept(mask), factors={"layer": factors})


def draw_parts(seed, shape, rank, dtype=np.float32):
    rng = np.random.default_rng(seed)
    sizes = ((rank, shape[1]), (rank, 1), (shape[0], rank))
    return SVDFactors(*(rng.standard_normal(size).astype(dtype) for size in sizes))


@given(
    seed=st.integers(0, 2**16),
    shape=shapes,
    rank=st.sampled_from([0, 1, 3, 20]),
    alpha=st.sampled_from([1, 32.5]),
    dtype=st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]),
)
def test_delta_weight_is_the_sum_over_triplets_of_the_oracle(seed, shape, rank, alpha, dtype):
    factors = draw_parts(seed, shape, rank, dtype)
    adapter = adapter_of(factors, rank=rank, lora_alpha=alpha)
    got = adapter.delta_weight("layer")
    assert got.dtype == np.float64
    want = oracle.svd_delta_weight(*factors, scaling=alpha / (rank + 1 + 1e-5))
    np.testing.assert_allclose(got, want, strict=True, **TOLERANCE["float64"])
    np.testing.assert_array_equal(adapter.delta_weight("layer", shape), got)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_update_has_the_rank_that_is_left(shape):
    adapter = adapter_of(draw_parts(1, shape, 3), rank=3)
    assert np.linalg.matrix_rank(adapter.delta_weight("layer")) == min(3, *shape)


def test_shapes_follow_from_the_factors_even_of_rank_0():
    adapter = dataclasses.replace(draw_adalora(kept=KEPT), shapes=None)
    assert adapter.shapes == LAYERS
    assert list(adapter.shapes) == list(adapter.modules) == sorted(LAYERS)
    assert [len(factors.E) for factors in adapter.factors.values()] == [0, 2, 4]
    np.testing.assert_array_equal(adapter.delta_weight("block.0.down"), np.zeros((6, 12)), strict=True)


def test_a_triplet_that_was_taken_away_is_one_whose_value_is_zero():
    whole, pruned = draw_adalora(), draw_adalora(kept=KEPT)
    for name, (A, E, B) in whole.factors.items():
        E = np.where(np.array(KEPT[name])[:, None], E, 0)
        want = oracle.svd_delta_weight(A, E, B, scaling=whole.config.scaling)
        np.testing.assert_allclose(pruned.delta_weight(name), want, rtol=1e-12, atol=1e-12)


def test_delta_weight_refuses_unknown_modules_and_shapes_that_do_not_fit():
    adapter = draw_adalora()
    with pytest.raises(KeyError, match=r"module 'nope' is not adapted; adapter\.modules lists the 3 that are\."):
        adapter.delta_weight("nope")
    with pytest.raises(ValueError, match=r"shape=\(6, 12\) does not fit 'block\.0\.up': it must be \(12, 6\)\."):
        adapter.delta_weight("block.0.up", (6, 12))


def test_the_trainable_count_is_the_number_of_values_left():
    assert draw_adalora().num_trainable == 4 * (12 + 6 + 1) * 2 + 4 * (8 + 8 + 1)
    assert draw_adalora(kept=KEPT).num_trainable == 2 * (12 + 6 + 1) + 4 * (8 + 8 + 1)


def test_keep_triplets_takes_rows_of_a_and_e_and_columns_of_b():
    A, E, B = draw_parts(0, (5, 7), 4)
    kept = keep_triplets(SVDFactors(A, E, B), [False, True, False, True])
    for got, want in zip(kept, (A[[1, 3]], E[[1, 3]], B[:, [1, 3]]), strict=True):
        np.testing.assert_array_equal(got, want, strict=True)
    for got, want in zip(keep_triplets(SVDFactors(A, E, B), (True,) * 4), (A, E, B), strict=True):
        np.testing.assert_array_equal(got, want, strict=True)
    assert [part.shape for part in keep_triplets(kept, np.zeros(2, bool))] == [(0, 7), (0, 1), (5, 0)]


@pytest.mark.parametrize("framework", ["jax.numpy", "torch"])
@pytest.mark.parametrize("mask", [(True, False), (False, False)])
def test_keep_triplets_works_on_arrays_of_any_framework(framework, mask):
    asarray = pytest.importorskip(framework).asarray
    factors = draw_parts(0, (5, 7), 2)
    want = keep_triplets(factors, mask)
    for got, expected in zip(keep_triplets(SVDFactors(*map(asarray, factors)), mask), want, strict=True):
        np.testing.assert_array_equal(np.asarray(got), expected, strict=True)


def test_a_new_adapter_starts_with_no_update_and_pefts_distribution():
    adapter = init_adapter(config(), {"wide": (300, 200), "b": (4, 9)}, rng=np.random.default_rng(0))
    assert adapter.shapes == {"wide": (300, 200), "b": (4, 9)}
    assert (adapter.bases, adapter.recipe) == (None, None)
    for name, (A, E, B) in adapter.factors.items():
        np.testing.assert_array_equal(E, np.zeros((12, 1), np.float32), strict=True)
        assert (A.dtype, B.dtype) == (np.float32, np.float32)
        np.testing.assert_array_equal(adapter.delta_weight(name), np.zeros(adapter.shapes[name]), strict=True)
    for part in (adapter.factors["wide"].A, adapter.factors["wide"].B):
        assert_normal(part, 0.02)


def test_without_init_lora_weights_all_three_are_standard_normal():
    adapter = init_adapter(config(init_lora_weights=False, init_r=500), {"x": (40, 30)}, rng=np.random.default_rng(0))
    for part in adapter.factors["x"]:
        assert part.dtype == np.float32
        assert_normal(part, 1.0)


def assert_normal(values, std):
    """Kolmogorov-Smirnov at level 1e-4, against N(0, std^2)."""
    ordered = np.sort(values.ravel().astype(np.float64)) / std
    cdf = np.array([(1 + erf(value / sqrt(2))) / 2 for value in ordered])
    ranks = np.arange(len(ordered) + 1) / len(ordered)
    distance = max((ranks[1:] - cdf).max(), (cdf - ranks[:-1]).max())
    assert distance * sqrt(len(ordered)) < 2.23


def test_the_same_generator_gives_the_same_numbers_whatever_the_order_of_the_layers():
    first, second = (
        init_adapter(config(), dict(layers), rng=np.random.default_rng(7))
        for layers in (LAYERS.items(), reversed(LAYERS.items()))
    )
    other = init_adapter(config(), LAYERS, rng=np.random.default_rng(8))
    for name, factors in first.factors.items():
        for part, same in zip(factors, second.factors[name], strict=True):
            np.testing.assert_array_equal(part, same, strict=True)
        assert (factors.A != other.factors[name].A).mean() > 0.99
    drawn = np.concatenate([factors.A.ravel() for factors in first.factors.values()])
    assert len(np.unique(drawn)) > 0.99 * drawn.size


REFUSED_STARTS = [
    ({}, None, r"AdaLoRA draws A and B at random: pass rng=numpy\.random\.default_rng\(seed\)\."),
    (
        {"rank_pattern": {"block.0.up.lora_E": [True] * 12}},
        0,
        r"rank_pattern is a result of training: a new adapter starts with rank_pattern=None\.",
    ),
    ({"total_step": None, "inference_mode": True}, 0, r"total_step=None: set it to the number of optimizer steps"),
    ({"target_r": 12, "inference_mode": True}, 0, r"target_r=12: must be below init_r=12"),
]


@pytest.mark.parametrize(("fields", "seed", "message"), REFUSED_STARTS, ids=lambda value: str(value)[:40])
def test_a_new_adapter_needs_a_generator_a_schedule_and_no_rank_pattern(fields, seed, message):
    rng = None if seed is None else np.random.default_rng(seed)
    with pytest.raises(ValueError, match=message):
        init_adapter(config(**fields), LAYERS, rng=rng)


def test_no_layers_make_no_adapter():
    with pytest.raises(ValueError, match=r"it adapts no layer"):
        init_adapter(config(), {}, rng=np.random.default_rng(0))


def test_bind_keeps_the_shapes_of_a_model_that_has_more_layers():
    bound = draw_adalora(kept=KEPT).bind({**LAYERS, "lm_head": (500, 8)})
    assert (bound.shapes, bound.bases, bound.recipe) == (LAYERS, None, None)


def test_bind_lists_the_layers_a_model_lacks():
    message = r"the model lacks these adapted layers \(it has 1 linear layers, such as 'a'\):\n  - block\.0\.down\n"
    with pytest.raises(AdapterFormatError, match=message + r"  - block\.0\.up\n  - block\.1\.mix$"):
        draw_adalora().bind({"a": (1, 2)})


def test_bind_lists_the_layers_that_have_another_shape():
    message = (
        r"the adapter was made for another base model:\n  - block\.0\.down: the model has \(6, 13\), the adapter was"
        r" made for \(6, 12\)\n  - block\.0\.up: the model has \(6, 12\), the adapter was made for \(12, 6\)$"
    )
    unbound = dataclasses.replace(draw_adalora(kept=KEPT), shapes=None)
    with pytest.raises(AdapterFormatError, match=message):
        unbound.bind({**LAYERS, "block.0.up": (6, 12), "block.0.down": (6, 13)})


def with_parts(name, *sizes, dtype=np.float32):
    parts = SVDFactors(*(np.zeros(size, dtype) for size in sizes))
    return lambda adapter: {"factors": {**adapter.factors, name: parts}}


MISFITS = {
    "no layer": (lambda adapter: {"factors": {}, "shapes": {}}, r"- it adapts no layer"),
    "rank of another pattern": (
        lambda adapter: {"config": adapter.config.with_kept({"block.1.mix": [True, False, False, False]})},
        r"block\.1\.mix: lora_A \(4, 8\), lora_E \(4, 1\) and lora_B \(8, 4\) do not fit 1 triplets"
        r" \(init_r, rank_pattern\): they are \(r, in\), \(r, 1\), \(out, r\)$",
    ),
    "init_r of another adapter": (
        lambda adapter: {"config": dataclasses.replace(adapter.config, init_r=5)},
        r"block\.0\.up: lora_A \(4, 6\), lora_E \(4, 1\) and lora_B \(12, 4\) do not fit 5 triplets",
    ),
    "A of another rank": (
        with_parts("block.1.mix", (3, 8), (4, 1), (8, 4)),
        r"block\.1\.mix: lora_A \(3, 8\), .* do not fit 4 triplets",
    ),
    "E of another rank": (
        with_parts("block.1.mix", (4, 8), (3, 1), (8, 4)),
        r"lora_E \(3, 1\) .* do not fit 4 triplets",
    ),
    "B of another rank": (
        with_parts("block.1.mix", (4, 8), (4, 1), (8, 3)),
        r"lora_B \(8, 3\) do not fit 4 triplets",
    ),
    "E with one axis": (with_parts("block.1.mix", (4, 8), (4,), (8, 4)), r"lora_E \(4,\) .* do not fit"),
    "E of two columns": (with_parts("block.1.mix", (4, 8), (4, 2), (8, 4)), r"lora_E \(4, 2\) .* do not fit"),
    "A with one axis": (with_parts("block.1.mix", (4,), (4, 1), (8, 4)), r"lora_A \(4,\), .* do not fit"),
    "A of a convolution": (with_parts("block.1.mix", (4, 2, 4), (4, 1), (8, 4)), r"lora_A \(4, 2, 4\), .* do not fit"),
    "B without axes": (with_parts("block.1.mix", (4, 8), (4, 1), ()), r"lora_B \(\) do not fit"),
    "no inputs": (with_parts("block.1.mix", (4, 0), (4, 1), (8, 4)), r"lora_A \(4, 0\), .* do not fit"),
    "no outputs": (with_parts("block.1.mix", (4, 8), (4, 1), (0, 4)), r"lora_B \(0, 4\) do not fit"),
    "another layer": (
        lambda adapter: {"shapes": {**LAYERS, "block.0.up": (6, 12)}},
        r"block\.0\.up: lora_A \(4, 6\) and lora_B \(12, 4\) do not fit a layer of shape \(6, 12\)$",
    ),
    "shape without factors": (
        lambda adapter: {"shapes": {**LAYERS, "extra": (4, 4)}},
        r"\['extra'\] have factors or a shape, but not both",
    ),
    "pattern of unknown layers": (
        lambda adapter: {"config": adapter.config.with_kept({"x": [False] * 4, "block.1.mix": [True] * 4})},
        r"rank_pattern names \['x\.lora_E'\], which are not adapted$",
    ),
    "float64": (
        with_parts("block.1.mix", (4, 8), (4, 1), (8, 4), dtype=np.float64),
        r"block\.1\.mix\.E is float64: store it as float32, bfloat16 or float16",
    ),
    "bases": (
        lambda adapter: {"bases": Bases(np.zeros((4, 1, 8), np.float32), np.zeros((8, 2, 4), np.float32))},
        r"an AdaLoRA adapter has no bases and no recipe$",
    ),
    "recipe": (lambda adapter: {"recipe": "torch>=2.12"}, r"an AdaLoRA adapter has no bases and no recipe$"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_together_are_refused_at_construction(case):
    change, message = MISFITS[case]
    adapter = draw_adalora()
    with pytest.raises(AdapterFormatError, match=rf"^the adapter is inconsistent:\n(.*\n)*.*{message}"):
        dataclasses.replace(adapter, **change(adapter))


def test_every_misfit_is_listed_at_once():
    adapter = draw_adalora()
    broken = SVDFactors(*(part.astype(np.float64) for part in adapter.factors["block.1.mix"]))
    with pytest.raises(AdapterFormatError) as caught:
        dataclasses.replace(
            adapter,
            config=AdaLoraConfig(**{**SCHEDULE, "init_r": 5}, rank_pattern={"x.lora_E": [True] * 5}),
            factors={**adapter.factors, "block.1.mix": broken},
            shapes={**LAYERS, "extra": (1, 1)},
            recipe="torch>=2.12",
        )
    # a shape too many, three dtypes, the rank of three layers (of which the last is cut), the pattern, the recipe
    assert str(caught.value).count("\n  - ") == 8 + 1
    assert str(caught.value).endswith("... and 1 more")


def test_factors_of_the_other_method_are_named_not_a_crash():
    ada, rand = draw_adalora(), draw_adapter()
    message = r"a layer has lam and gamma in RandLoRA, unlike these:\n  - block\.0\.down\n"
    with pytest.raises(AdapterFormatError, match=message):
        dataclasses.replace(rand, factors=ada.factors)
    message = r"a layer has A and E and B in AdaLoRA, unlike these:\n  - block\.0\.up$"
    mixed = {**ada.factors, "block.0.up": Factors(*rand.factors["block.0.up"])}
    with pytest.raises(AdapterFormatError, match=message):
        dataclasses.replace(ada, factors=mixed)
