"""How bases lie in memory: no bit of them is lost, and what layers do not use is drawn again when files need it."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import SHAPES, ranks, seeds

from interop import RECIPES, Bases, RandLoraConfig, make_bases
from interop.shapes import Dims, shared_dims, used_dims
from interop.storage import Origin, Stored, join_ternary, restore, split_ternary, store, used_bases

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
DTYPES = [np.dtype(np.float32), BFLOAT16, np.dtype(np.float16)]
KINDS = [{}, {"sparse": True}, {"very_sparse": True}]
UP_AND_DOWN = [(24, 9), (9, 24), (9, 9)]  # PEFT's bases are for (24, 24); the layers use (24, 9)
kinds, layers = st.sampled_from(KINDS), st.lists(st.sampled_from(SHAPES), min_size=1, max_size=4)


def drawn(config, dims, recipe=RECIPES[0]):
    try:
        return make_bases(config, **dims._asdict(), recipe=recipe)
    except ValueError:  # a basis that is constant cannot be normalized
        assume(False)


def assert_same_bits(got, want):
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == np.ascontiguousarray(want).tobytes()


@given(seeds, ranks, kinds, st.sampled_from(SHAPES), st.sampled_from(RECIPES))
def test_what_recipes_draw_is_stored_and_restored_bit_for_bit(seed, r, fields, shape, recipe):
    config = RandLoraConfig(r=r, projection_prng_key=seed, **fields)
    for basis in drawn(config, shared_dims([shape]), recipe):
        stored = store(basis)
        assert stored.values.nbytes <= basis.size * (1 if fields else 2)
        assert_same_bits(restore(stored, basis.dtype), basis)
        wide = basis.astype(np.float32)  # as PEFT writes them
        assert store(wide).values.nbytes == stored.values.nbytes
        assert_same_bits(restore(store(wide), wide.dtype), wide)


@pytest.mark.parametrize("fields", KINDS[1:], ids=str)
def test_ternary_bases_are_signs_and_one_float32_scale(fields):
    for basis in make_bases(RandLoraConfig(r=8, **fields), max_dim=40, min_dim=32):
        codes, scale = split_ternary(basis)
        assert codes.dtype == np.int8
        assert set(np.unique(codes)) == {-1, 0, 1}
        assert scale == np.float32(scale) == np.abs(basis).max()
        assert_same_bits(join_ternary(codes, scale), basis)


@given(
    st.lists(st.sampled_from([-1, 0, 1]), min_size=1, max_size=6),
    st.floats(min_value=0, exclude_min=True, allow_infinity=False, width=16),
    st.sampled_from(DTYPES),
)
def test_any_array_of_three_values_around_zero_is_split_and_joined(codes, scale, dtype):
    scale = np.asarray(scale, dtype)
    assume(0 < scale < np.inf)
    basis = (np.asarray(codes, np.float32) * np.float32(scale)).astype(dtype)
    split = split_ternary(basis)
    assert split.values.tolist() == codes
    assert split.scale == (scale if any(codes) else 0.0)
    assert_same_bits(restore(split, dtype), basis)


@pytest.mark.parametrize(
    "values",
    [
        [1.0, -0.0],
        [np.nan, 1.0],
        [1.0, np.nan],
        [np.inf, -np.inf],
        [1.0, np.inf],
        [1.0, -1.0000001],
        [1.0, 0.5],
        [0.0, 1.0, 2.0],
        [1e-45, 1.0],
    ],
    ids=str,
)
def test_what_is_not_ternary_to_the_last_bit_is_not_split(values):
    assert split_ternary(np.asarray(values, np.float32)) is None


def test_a_value_that_differs_only_far_inside_is_found():
    basis = np.ones((3, 2**20), np.float32)
    assert split_ternary(basis).scale == 1.0
    basis[2, -1] = np.nextafter(np.float32(1), np.float32(2))
    assert split_ternary(basis) is None
    assert_same_bits(store(basis).values, basis)


@given(st.lists(st.floats(width=32), min_size=2, max_size=5), st.sampled_from(DTYPES), st.sampled_from([None, *DTYPES]))
def test_any_numbers_are_stored_and_restored_bit_for_bit(numbers, dtype, prefer):
    with np.errstate(over="ignore"):
        basis = np.asarray(numbers, np.float32).astype(dtype)
    assume(not np.isnan(basis.astype(np.float32)).any())
    stored = store(basis, prefer=prefer)
    assert stored.values.dtype.itemsize <= dtype.itemsize
    assert_same_bits(restore(stored, dtype), basis)


def test_the_dtype_that_is_preferred_is_taken_if_it_holds_every_number():
    basis = np.asarray([0.5, 0.25, 3.0], BFLOAT16)
    assert store(basis, prefer=np.dtype(np.float16)).values.dtype == np.float16
    assert store(basis).values is basis
    assert store(basis, prefer=np.dtype(np.float32)).values is basis
    large = np.asarray([0.5, 0.25, 70000.0], BFLOAT16)
    assert store(large, prefer=np.dtype(np.float16)).values is large
    assert store(np.asarray([0.1, 0.2], np.float32)) == Stored(pytest.approx([0.1, 0.2]), 1.0)


@given(layers, ranks)
def test_the_used_block_is_a_prefix_of_pefts_bases_that_holds_what_each_layer_uses(shapes, r):
    used, whole = used_dims(shapes), shared_dims(shapes)
    assert used.max_dim == whole.max_dim
    assert used.min_dim <= whole.min_dim
    assert all(max(shape) <= used.max_dim and min(shape) <= used.min_dim for shape in shapes)
    assert any(min(shape) == used.min_dim for shape in shapes)


@given(seeds, ranks, kinds, layers, st.sampled_from(RECIPES), st.sampled_from(DTYPES[:2]))
def test_from_the_used_block_the_whole_bases_come_back_bit_for_bit(seed, r, fields, shapes, recipe, dtype):
    config = RandLoraConfig(r=r, projection_prng_key=seed, target_modules=["x"], **fields)
    whole = drawn(config, shared_dims(shapes), recipe)
    if not fields:
        whole = Bases(*(basis.astype(np.float32) for basis in whole)) if dtype == np.float32 else whole
    for drawn_by in (None, recipe):
        bases, origin = used_bases(whole, shapes, config, drawn_by=drawn_by)
        assert bases.dims == used_dims(shapes)
        assert (origin is None) == (bases.dims == whole.dims)
        again = bases if origin is None else origin.whole(bases)
        for got, want in zip(again, whole, strict=True):
            assert_same_bits(got, want)


def test_bases_that_no_recipe_draws_are_held_as_a_whole():
    config = RandLoraConfig(r=4)
    made = make_bases(config, max_dim=24, min_dim=24)
    assert used_bases(made, UP_AND_DOWN, config).origin == Origin(config, Dims(24, 24), RECIPES[0])
    changed = made.B.copy()
    changed[-1, -1, -1] += 1  # where no layer looks
    for foreign in (Bases(made.A, changed), Bases(made.A[..., ::-1], made.B), Bases(made.A, -made.B)):
        held, origin = used_bases(foreign, UP_AND_DOWN, config)
        assert held is foreign
        assert origin is None
    assert used_bases(made, UP_AND_DOWN, RandLoraConfig(r=4, projection_prng_key=1)).origin is None


def test_two_adapters_whose_bases_are_drawn_alike_have_one_origin_whatever_else_they_are():
    made = make_bases(RandLoraConfig(r=4), max_dim=24, min_dim=24)
    configs = [RandLoraConfig(r=4, target_modules=["a"], randlora_alpha=3), RandLoraConfig(r=4, save_projection=False)]
    first, second = (used_bases(made, UP_AND_DOWN, config).origin for config in configs)
    assert first == second
    assert hash(first) == hash(second)


@pytest.mark.parametrize("part", ["seed", "sparsity", "recipe", "A", "B"])
def test_bases_that_were_changed_in_memory_are_not_completed(part):
    config = RandLoraConfig(r=4)
    used, origin = used_bases(make_bases(config, max_dim=24, min_dim=24), UP_AND_DOWN, config)
    other = {
        "seed": origin._replace(config=dataclasses.replace(config, projection_prng_key=1)),
        "sparsity": origin._replace(config=dataclasses.replace(config, sparse=True)),
        "recipe": origin._replace(recipe=RECIPES[-1]),
    }
    if part in ("A", "B"):
        used = used._replace(**{part: getattr(used, part) * np.asarray(2, BFLOAT16)})
    with pytest.raises(
        ValueError, match=r"the bases in memory are not those that projection_prng_key=\d and the recip"
    ):
        other.get(part, origin).whole(used)
