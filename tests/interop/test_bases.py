import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from interop import DEFAULT_RECIPE, RECIPES, Bases, RandLoraConfig, bases_digest, make_bases
from interop.bases import identify_recipe

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "bases_sha256.json").read_text())
CASES = [(key, digest) for group in GOLDEN.values() for key, digest in group.items()]
KINDS = {"dense": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}
TERNARY = ["sparse", "very_sparse"]
KEY = re.compile(r"(?P<recipe>\S+) (?P<kind>\S+) seed=(?P<seed>-?\d+) r=(?P<r>\d+) (?P<max_dim>\d+)x(?P<min_dim>\d+)")


def same_values(ours, theirs):
    pairs = zip(ours, theirs, strict=True)
    return all((a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes()) for a, b in pairs)


def test_the_golden_file_covers_every_recipe_and_kind():
    seen = {KEY.fullmatch(key).group("recipe", "kind") for key, _ in CASES}
    dense = {
        ("torch<=2.11", "bf16"),
        ("torch<=2.11-fp16", "fp16"),
        ("torch>=2.12", "bf16"),
        ("torch>=2.12-fp16", "fp16"),
    }
    assert dense == {pair for pair in seen if pair[1] not in TERNARY}
    assert {recipe for recipe, _ in seen} == set(RECIPES)
    assert {kind for _, kind in seen} == {"bf16", "fp16", "sparse", "very_sparse"}
    assert len(CASES) == 48


@pytest.mark.parametrize(("key", "digest"), CASES, ids=[key for key, _ in CASES])
def test_bases_have_the_digest_recorded_under_a_real_torch(key, digest):
    case = KEY.fullmatch(key)
    config = RandLoraConfig(r=int(case["r"]), projection_prng_key=int(case["seed"]), **KINDS.get(case["kind"], {}))
    bases = make_bases(config, max_dim=int(case["max_dim"]), min_dim=int(case["min_dim"]), recipe=case["recipe"])
    assert bases_digest(bases) == digest


@given(seed=seeds, r=st.sampled_from([3, 4, 9]), recipe=st.sampled_from(RECIPES), kind=st.sampled_from([*KINDS]))
def test_equal_arguments_give_equal_bits_and_the_low_32_seed_bits_decide(seed, r, recipe, kind):
    first, second = (
        make_bases(RandLoraConfig(r=r, projection_prng_key=key, **KINDS[kind]), max_dim=24, min_dim=16, recipe=recipe)
        for key in (seed, seed % 2**32)
    )
    assert same_values(first, second)
    other = make_bases(
        RandLoraConfig(r=r, projection_prng_key=(seed + 1) % 2**32, **KINDS[kind]),
        max_dim=24,
        min_dim=16,
        recipe=recipe,
    )
    assert not same_values(first, other)


@given(seed=seeds, kind=st.sampled_from([*KINDS]), recipe=st.sampled_from(RECIPES))
def test_bases_have_unit_standard_deviation(seed, kind, recipe):
    config = RandLoraConfig(r=8, projection_prng_key=seed, **KINDS[kind])
    bases = make_bases(config, max_dim=64, min_dim=32, recipe=recipe)
    assert bases.A.shape == (8, 1, 32)
    assert bases.B.shape == (64, 4, 8)
    assert bases.dims == (64, 32)
    for basis in bases:
        # Stored in 8 bits of mantissa and divided by a deviation rounded to them.
        np.testing.assert_allclose(basis.astype(np.float64).std(ddof=1), 1, rtol=2**-7)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_names_the_dtype_of_dense_bases(recipe):
    want = np.dtype(np.float16 if recipe.endswith("-fp16") else ml_dtypes.bfloat16)
    assert {basis.dtype for basis in make_bases(RandLoraConfig(r=4), max_dim=8, min_dim=8, recipe=recipe)} == {want}


@pytest.mark.parametrize("kind", TERNARY)
def test_ternary_bases_are_float32_and_the_same_under_every_recipe(kind):
    config = RandLoraConfig(r=4, projection_prng_key=7, **KINDS[kind])
    all_recipes = [make_bases(config, max_dim=40, min_dim=30, recipe=recipe) for recipe in RECIPES]
    for bases in all_recipes:
        assert same_values(bases, all_recipes[0])
        for basis in bases:
            assert basis.dtype == np.float32
            zero, magnitude = np.unique(np.abs(basis))
            assert zero == 0 < magnitude


@pytest.mark.parametrize(("kind", "density"), [("sparse", 1 / 3), ("very_sparse", 1 / 10)])
def test_ternary_bases_have_the_promised_density(kind, density):
    B = make_bases(RandLoraConfig(r=10, **KINDS[kind]), max_dim=400, min_dim=100).B
    # 40000 draws: the standard error is below 0.0024 for either sign.
    for sign in (1, -1):
        np.testing.assert_allclose((np.sign(B) == sign).mean(), density / 2, atol=0.008)


def test_very_sparse_wins_over_sparse():
    both = make_bases(RandLoraConfig(r=4, sparse=True, very_sparse=True), max_dim=64, min_dim=64)
    assert same_values(both, make_bases(RandLoraConfig(r=4, very_sparse=True), max_dim=64, min_dim=64))
    assert not same_values(both, make_bases(RandLoraConfig(r=4, sparse=True), max_dim=64, min_dim=64))


def test_the_four_recipes_give_four_different_dense_pairs():
    pairs = [make_bases(RandLoraConfig(r=4), max_dim=16, min_dim=16, recipe=recipe) for recipe in RECIPES]
    assert len({bases_digest(bases) for bases in pairs}) == 4
    assert DEFAULT_RECIPE in RECIPES


def test_a_draw_in_several_chunks_is_one_draw(monkeypatch):
    arguments = {"max_dim": 48, "min_dim": 33}
    whole = {kind: make_bases(RandLoraConfig(r=5, **KINDS[kind]), **arguments) for kind in KINDS}
    monkeypatch.setattr("interop.bases._CHUNK", 7)
    for kind, bases in whole.items():
        assert same_values(make_bases(RandLoraConfig(r=5, **KINDS[kind]), **arguments), bases)
        assert bases_digest(bases) == bases_digest(Bases(*map(np.copy, bases)))


def test_an_unknown_recipe_is_refused_with_the_list_of_recipes():
    with pytest.raises(ValueError, match=r"recipe='torch' is not known: choose one of \['torch>=2\.12', .*-fp16'\]\."):
        make_bases(RandLoraConfig(r=4), max_dim=8, min_dim=8, recipe="torch")


@pytest.mark.parametrize(("max_dim", "min_dim"), [(8, 16), (8, 0), (0, 0), (-4, -8)])
def test_impossible_sizes_are_refused(max_dim, min_dim):
    with pytest.raises(
        ValueError, match=rf"max_dim={max_dim}, min_dim={min_dim}: needs 1 <= min_dim <= max_dim\. Swap"
    ):
        make_bases(RandLoraConfig(r=4), max_dim=max_dim, min_dim=min_dim)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_dense_basis_of_one_number_cannot_be_normalized_and_the_message_names_r(recipe):
    message = (
        r"basis A of shape \(1, 1, 1\) has no spread \(r=1, min_dim=1, projection_prng_key=5\), so it cannot be"
        r" normalized\. Use a larger r, or leave layers this small out of target_modules\."
    )
    with pytest.raises(ValueError, match=message):
        make_bases(RandLoraConfig(r=1, projection_prng_key=5), max_dim=9, min_dim=1, recipe=recipe)


def refused_seeds(kind):
    """The seeds below 50 whose ternary bases of r=1 and two columns cannot be normalized, with their messages."""
    for seed in range(50):
        config = RandLoraConfig(r=1, projection_prng_key=seed, **KINDS[kind])
        try:
            bases = make_bases(config, max_dim=2, min_dim=2)
        except ValueError as error:
            yield seed, str(error)
        else:
            assert all(np.isfinite(basis).all() for basis in bases)


@pytest.mark.parametrize("kind", TERNARY)
def test_an_all_zero_or_constant_ternary_basis_is_refused_and_the_message_names_the_setting(kind):
    refused = dict(refused_seeds(kind))
    assert 5 <= len(refused) <= 45
    for seed, message in refused.items():
        assert re.fullmatch(
            r"basis (A of shape \(1, 1, 2\)|B of shape \(2, 2, 1\)) (is zero everywhere|has no spread)"
            rf" \(r=1, min_dim=2, projection_prng_key={seed}\), so it cannot be normalized\. Use sparse=True instead of"
            r" very_sparse=True, dense bases, a larger r or another projection_prng_key\.",
            message,
        )
    assert any("is zero everywhere" in message for message in refused.values())


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_recipe_of_dense_bases_is_recognized_however_they_are_stored(recipe):
    config = RandLoraConfig(r=5, projection_prng_key=-17)
    bases = make_bases(config, max_dim=33, min_dim=12, recipe=recipe)
    assert identify_recipe(config, bases) == recipe
    stored = Bases(*(basis.astype(np.float32) for basis in bases))
    assert identify_recipe(config, stored) == recipe
    assert bases_digest(stored) == bases_digest(bases)


def test_no_recipe_is_claimed_for_bases_of_another_seed_or_edited_or_misshaped():
    config = RandLoraConfig(r=5, projection_prng_key=1)
    A, B = make_bases(config, max_dim=33, min_dim=12)
    edited = B.copy()
    edited[-1, -1, -1] += 1
    assert identify_recipe(RandLoraConfig(r=5, projection_prng_key=2), Bases(A, B)) is None
    assert identify_recipe(config, Bases(A, edited)) is None
    assert identify_recipe(config, Bases(A, B[:, :2])) is None
    assert identify_recipe(config, Bases(A[:4], B)) is None
    assert identify_recipe(config, Bases(A, B[:11])) is None
    sparse = RandLoraConfig(r=5, projection_prng_key=1, sparse=True)
    assert identify_recipe(sparse, Bases(A, B)) is None
    assert identify_recipe(sparse, make_bases(sparse, max_dim=33, min_dim=12)) in RECIPES


def test_no_recipe_is_claimed_where_the_seed_gives_a_constant_basis():
    # Good bases from elsewhere, of a config whose own bases could not be normalized: no reason to fail.
    seed, _ = next(refused_seeds("sparse"))
    config = RandLoraConfig(r=1, sparse=True, projection_prng_key=seed)
    foreign = Bases(np.array([[[1.0, -1.0]]], np.float32), np.array([[[1.0], [0.0]], [[0.0], [-1.0]]], np.float32))
    assert identify_recipe(config, foreign) is None
    single = Bases(np.ones((1, 1, 1), np.float32), np.ones((3, 1, 1), np.float32))
    assert identify_recipe(RandLoraConfig(r=1), single) is None


def test_the_digest_covers_values_and_shapes():
    A, B = make_bases(RandLoraConfig(r=4), max_dim=8, min_dim=8)
    digest = bases_digest(Bases(A, B))
    flipped = B.copy()
    flipped[3, 1, 2] = -flipped[3, 1, 2]
    assert re.fullmatch(r"[0-9a-f]{64}", digest)
    assert bases_digest(Bases(A, flipped)) != digest
    assert bases_digest(Bases(A.reshape(4, 8, 1), B)) != digest
    assert bases_digest(Bases(B, A)) != digest
    assert bases_digest(Bases(A, np.asfortranarray(B))) == digest
