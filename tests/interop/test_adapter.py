import dataclasses

import ml_dtypes
import numpy as np
import oracle
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import LAYERS, SHAPES, draw_adapter, draw_factors, ranks, shapes
from tolerances import TOLERANCE

from interop import (
    DEFAULT_RECIPE,
    RECIPES,
    Adapter,
    AdapterFormatError,
    Bases,
    Factors,
    RandLoraConfig,
    bases_digest,
    init_adapter,
    make_bases,
)


def adapter_of(factors, shape, *, r, alpha=640):
    """One layer named `layer` with these factors, as an adapter."""
    return Adapter(
        config=RandLoraConfig(r=r, randlora_alpha=alpha),
        factors={"layer": Factors(factors["lam"], factors["gamma"])},
        bases=Bases(factors["A"], factors["B"]),
        shapes={"layer": shape},
    )


@given(
    seed=st.integers(0, 2**16),
    shape=shapes,
    r=ranks,
    spare=st.sampled_from([0, 1, 5]),
    alpha=st.sampled_from([1, -3.5]),
)
def test_delta_weight_is_the_sum_over_bases_of_the_oracle(seed, shape, r, spare, alpha):
    # B has as many bases as its min_dim asks for, so only whole multiples of r can be spare.
    factors = draw_factors(seed, shape=shape, r=r)
    long, short = max(shape), min(shape)
    larger = draw_factors(seed + 1, shape=(long + short + spare, short + spare), r=r)
    factors.update(A=larger["A"], B=larger["B"])
    got = adapter_of(factors, shape, r=r, alpha=alpha).delta_weight("layer")
    assert got.dtype == np.float64
    assert got.shape == shape
    want = oracle.delta_weight(**factors, scaling=alpha / r, shape=shape)
    np.testing.assert_allclose(got, want, **TOLERANCE["float64"])


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_delta_weight_is_exact_for_the_stored_values_whatever_their_dtype(shape, dtype):
    factors = draw_factors(5, shape=shape, r=3, dtype=dtype)
    got = adapter_of(factors, shape, r=3).delta_weight("layer", shape)
    np.testing.assert_allclose(
        got, oracle.delta_weight(**factors, scaling=640 / 3, shape=shape), rtol=1e-12, atol=1e-10
    )


@pytest.mark.parametrize("shape", SHAPES)
def test_random_factors_give_an_update_of_full_rank(shape):
    adapter = draw_adapter(1, shapes={"x": shape}, r=3)
    assert np.linalg.matrix_rank(adapter.delta_weight("x")) == min(shape)


@pytest.mark.parametrize("r", [1, 3, 4, 20])
def test_a_new_adapter_starts_at_zero_with_gamma_one_over_the_larger_of_its_sides(r):
    adapter = init_adapter(RandLoraConfig(r=r), LAYERS)
    assert adapter.modules == tuple(sorted(LAYERS))
    assert adapter.shapes == LAYERS
    assert adapter.recipe == DEFAULT_RECIPE
    for name, (lam, gamma) in adapter.factors.items():
        n, m = -(-min(LAYERS[name]) // r), min(LAYERS[name])
        assert (lam.shape, gamma.shape, lam.dtype, gamma.dtype) == ((r, n), (n, m), np.float32, np.float32)
        np.testing.assert_array_equal(lam, 0)
        np.testing.assert_array_equal(gamma, np.float32(1 / max(n, m)))
        np.testing.assert_array_equal(adapter.delta_weight(name), np.zeros(LAYERS[name]))


def test_init_weights_false_starts_at_normal_lambda_and_gamma_one_over_the_long_side(rng):
    shape = (80, 64)
    adapter = init_adapter(RandLoraConfig(r=8, init_weights=False), {"x": shape}, rng=rng)
    lam, gamma = adapter.factors["x"]
    np.testing.assert_array_equal(gamma, np.float32(1 / 80))
    np.testing.assert_allclose([lam.mean(), lam.std()], [0, 1], atol=0.5)
    again = init_adapter(RandLoraConfig(r=8, init_weights=False), {"x": shape}, rng=np.random.default_rng(0))
    np.testing.assert_array_equal(again.factors["x"].lam, lam)


def test_init_weights_false_needs_a_generator():
    with pytest.raises(
        ValueError, match=r"init_weights=False draws lambda at random: pass rng=numpy\.random\.default_rng"
    ):
        init_adapter(RandLoraConfig(r=2, init_weights=False), {"x": (4, 4)})


def test_no_layers_make_no_adapter():
    with pytest.raises(ValueError, match=r"shapes is empty.*Check target_modules"):
        init_adapter(RandLoraConfig(r=2), {})


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_new_adapter_holds_the_bases_of_the_recipe_sized_for_all_layers(recipe):
    adapter = init_adapter(RandLoraConfig(r=2), {"up": (12, 6), "down": (6, 12)}, recipe=recipe)
    want = make_bases(adapter.config, max_dim=12, min_dim=12, recipe=recipe)
    assert bases_digest(adapter.bases) == bases_digest(want)
    assert adapter.recipe == recipe


def test_the_trainable_count_is_the_number_of_lambda_and_gamma_values():
    adapter = draw_adapter(r=4)
    assert adapter.num_trainable == 2 * (2 * (4 + 6)) + 2 * (4 + 8)


def test_modules_are_sorted_by_name_whatever_the_order_given():
    adapter = draw_adapter()
    backwards = dict(reversed(adapter.factors.items()))
    shuffled = dataclasses.replace(adapter, factors=backwards, shapes=dict(reversed(adapter.shapes.items())))
    assert shuffled.modules == adapter.modules == tuple(sorted(LAYERS))
    assert list(shuffled.shapes) == sorted(LAYERS)


def test_the_shape_can_be_given_if_the_adapter_does_not_know_it():
    adapter = dataclasses.replace(draw_adapter(), shapes=None)
    want = draw_adapter().delta_weight("block.0.down")
    np.testing.assert_array_equal(adapter.delta_weight("block.0.down", (6, 12)), want)
    with pytest.raises(ValueError, match=r"the shape of 'block\.0\.down' is not recorded .*: pass shape=\(out, in\)\."):
        adapter.delta_weight("block.0.down")


def test_delta_weight_refuses_unknown_modules_and_shapes_that_do_not_fit():
    adapter = draw_adapter()
    with pytest.raises(KeyError, match=r"module 'nope' is not adapted; adapter\.modules lists the 3 that are\."):
        adapter.delta_weight("nope")
    with pytest.raises(ValueError, match=r"shape=\(12, 7\) does not fit 'block\.0\.up': it must be \(12, 6\)\."):
        adapter.delta_weight("block.0.up", (12, 7))


@pytest.mark.parametrize("shape", [(40, 6), (6, 12)])
def test_delta_weight_refuses_a_long_side_beyond_the_bases_or_a_contradiction_of_the_recorded_shape(shape):
    adapter = draw_adapter()
    assert adapter.shapes["block.0.up"] == (12, 6)
    with pytest.raises(ValueError, match=r"does not fit 'block\.0\.up'"):
        adapter.delta_weight("block.0.up", shape)


def test_without_bases_the_remedy_is_to_bind():
    adapter = dataclasses.replace(draw_adapter(), bases=None)
    with pytest.raises(
        ValueError, match=r"this adapter has no bases yet: give it its model's .*adapter\.bind\(shapes\)"
    ):
        adapter.delta_weight("block.0.up")


def test_bind_makes_the_bases_that_the_adapter_was_made_with():
    adapter = draw_adapter(recipe="torch<=2.11")
    bare = dataclasses.replace(adapter, bases=None, shapes=None)
    bound = bare.bind({**LAYERS, "lm_head": (500, 8)})
    assert bound.shapes == LAYERS
    assert bases_digest(bound.bases) == bases_digest(adapter.bases)
    assert bound.recipe == "torch<=2.11"
    assert (bare.bases, bare.shapes) == (None, None)
    assert dataclasses.replace(bare, recipe=None).bind(LAYERS).recipe == DEFAULT_RECIPE


def test_bind_keeps_bases_that_are_there():
    adapter = draw_adapter(recipe="torch<=2.11")
    bound = dataclasses.replace(adapter, shapes=None, recipe=None).bind(LAYERS)
    assert bound.bases is adapter.bases
    assert bound.recipe is None


def test_bind_lists_the_layers_a_model_lacks():
    message = r"(?s)the model lacks these adapted layers \(it has 2 linear layers, such as 'a'\):\n  - block\.0\.down\n"
    with pytest.raises(AdapterFormatError, match=message + r"  - block\.0\.up\n  - block\.1\.mix$"):
        draw_adapter().bind({"a": (1, 2), "b": (3, 4)})
    with pytest.raises(AdapterFormatError, match=r"\(it has 0 linear layers\)"):
        draw_adapter().bind({})


def test_bind_lists_the_layers_that_have_another_shape():
    message = (
        r"the adapter was made for another base model:\n  - block\.0\.up: the model has \(12, 7\), the adapter was made"
        r" for \(12, 6\)\n  - block\.1\.mix: the model has \(9, 8\), the adapter was made for \(8, 8\)$"
    )
    with pytest.raises(AdapterFormatError, match=message):
        draw_adapter().bind({**LAYERS, "block.0.up": (12, 7), "block.1.mix": (9, 8)})


def test_bind_checks_shapes_that_the_file_did_not_record():
    bare = dataclasses.replace(draw_adapter(), shapes=None)
    with pytest.raises(
        AdapterFormatError, match=r"block\.0\.up: gamma \(2, 6\) does not fit a layer of shape \(12, 7\)"
    ):
        bare.bind({**LAYERS, "block.0.up": (12, 7)})
    with pytest.raises(AdapterFormatError, match=r"block\.0\.up: its long side 99 exceeds that of the bases, 12"):
        bare.bind({**LAYERS, "block.0.up": (99, 6)})


def test_long_lists_of_findings_are_cut_and_counted():
    many = {f"layer{i:02}": (4, 4) for i in range(11)}
    with pytest.raises(AdapterFormatError, match=r"layer07\n  - \.\.\. and 3 more$"):
        draw_adapter(shapes=many).bind({})


def with_factor(name, lam, gamma):
    return lambda adapter: {"factors": {**adapter.factors, name: Factors(lam, gamma)}}


ZERO = np.zeros
MISFITS = {
    "no layer": (
        lambda adapter: {"factors": {}, "shapes": {}},
        r"the adapter is inconsistent:\n  - it adapts no layer",
    ),
    "shape without factors": (
        lambda adapter: {"shapes": {**LAYERS, "extra": (4, 4)}},
        r"\['extra'\] have factors or a shape, but not both",
    ),
    "factors without shape": (
        lambda adapter: {"shapes": {"block.0.up": (12, 6)}},
        r"\['block\.0\.down', 'block\.1\.mix'\] have factors or a shape",
    ),
    "lambda of another r": (
        with_factor("block.1.mix", ZERO((3, 2)), ZERO((2, 8))),
        r"block\.1\.mix: lambda \(3, 2\) and gamma \(2, 8\) do not fit r=4; for a short side m they are \(4, ceil",
    ),
    "gamma too wide for n": (
        with_factor("block.1.mix", ZERO((4, 2)), ZERO((2, 9))),
        r"block\.1\.mix: lambda \(4, 2\) and gamma \(2, 9\) do not fit r=4",
    ),
    "gamma with one axis": (
        with_factor("block.1.mix", ZERO((4, 2)), ZERO(8)),
        r"block\.1\.mix: lambda \(4, 2\) and gamma \(8,\) do not fit r=4",
    ),
    "empty gamma": (
        with_factor("block.1.mix", ZERO((4, 0)), ZERO((0, 0))),
        r"lambda \(4, 0\) and gamma \(0, 0\) do not",
    ),
    "gamma of another layer": (
        lambda adapter: {"shapes": {**LAYERS, "block.1.mix": (8, 7)}},
        r"block\.1\.mix: gamma \(2, 8\) does not fit a layer of shape \(8, 7\)",
    ),
    "bases with two axes": (
        lambda adapter: {"bases": Bases(adapter.bases.A[:, 0], adapter.bases.B)},
        r"bases A \(4, 12\) and B \(12, 3, 4\) must have 3 axes: \(r, 1, min_dim\) and \(max_dim, n, r\)",
    ),
    "bases of another r": (
        lambda adapter: {"bases": Bases(adapter.bases.A[:3], adapter.bases.B)},
        r"bases A \(3, 1, 12\) and B \(12, 3, 4\) do not fit r=4: expected \(4, 1, 12\) and \(12, 3, 4\)",
    ),
    "bases with too few blocks": (
        lambda adapter: {"bases": Bases(adapter.bases.A, adapter.bases.B[:, :2])},
        r"bases A \(4, 1, 12\) and B \(12, 2, 4\) do not fit r=4: expected",
    ),
    "bases too narrow": (
        lambda adapter: {"bases": Bases(adapter.bases.A[..., :4], adapter.bases.B[:, :1]), "shapes": None},
        r"block\.1\.mix: its short side 8 exceeds that of the bases, 4",
    ),
    "bases too short": (
        lambda adapter: {"bases": Bases(adapter.bases.A, adapter.bases.B[:11])},
        r"block\.0\.up: its long side 12 exceeds that of the bases, 11",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_parts_that_do_not_fit_together_are_refused_at_construction(case):
    change, message = MISFITS[case]
    adapter = draw_adapter()
    with pytest.raises(AdapterFormatError, match=message):
        dataclasses.replace(adapter, **change(adapter))


def test_every_misfit_is_listed_at_once():
    adapter = draw_adapter()
    with pytest.raises(AdapterFormatError) as caught:
        dataclasses.replace(
            adapter,
            config=RandLoraConfig(r=5),
            shapes={**LAYERS, "extra": (1, 1)},
            bases=Bases(ZERO(3, np.float32), ZERO(3)),
        )
    assert (
        str(caught.value).count("\n  - ") == 1 + 1 + len(LAYERS) + 1
    )  # shapes, dtype of B, r of each layer, axes of the bases


def test_an_adapter_is_frozen_and_compared_by_identity():
    adapter = draw_adapter()
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.recipe = None
    assert adapter != dataclasses.replace(adapter)
