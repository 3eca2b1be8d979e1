"""`interop.make_bases` against PEFT itself: 4 kinds x 60 drawn cases, equal to the last bit."""

import math
import warnings
from importlib.metadata import version

import numpy as np
import pytest
from crossing import cross

from interop import RandLoraConfig, make_bases
from interop.shapes import shared_dims

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")

CHUNKS, PER_CHUNK = 6, 10
KINDS = {"bf16": {}, "fp16": {}, "sparse": {"sparse": True}, "very_sparse": {"very_sparse": True}}
EDGES = [  # (seed, r, out, in)
    (2**40 + 3, 32, 128, 64),
    (-17, 7, 12, 33),
    (2**63 - 1, 1, 8, 16),
    (-1, 64, 40, 96),
    (2**32, 5, 20, 20),
    (-(2**63), 3, 8, 8),
    (0, 32, 4096, 64),
    (1, 16, 1024, 2048),
]
# Which of the two generations of torch's kernel this environment draws with.
GENERATION = "torch>=2.12" if tuple(map(int, version("torch").split(".")[:2])) >= (2, 12) else "torch<=2.11"


def drawn_cases():
    """The edge cases, then seeds over int64, ranks over 1..64 and sides log-uniform over 8..4096, always the same."""
    rng = np.random.default_rng(20240229)
    cases = list(EDGES)
    while len(cases) < CHUNKS * PER_CHUNK:
        out, inp = (int(side) for side in np.exp(rng.uniform(math.log(8), math.log(4097), 2)))
        cases.append((int(rng.integers(-(2**63), 2**63 - 1)), int(rng.integers(1, 65)), out, inp))
    return cases


def pefts_bases(seed, r, *layers, **fields):
    """A and B as a PEFT model of these (out, in) layers holds them."""
    model = torch.nn.Sequential()
    for out, inp in layers:
        layer = torch.nn.utils.skip_init(torch.nn.Linear, inp, out, bias=False)  # the weights take no part
        torch.nn.init.zeros_(layer.weight)
        model.append(layer)
    names = [str(i) for i in range(len(layers))]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # std() of a single number, for the cases that end in NaN
        config = peft.RandLoraConfig(r=r, projection_prng_key=seed, target_modules=names, **fields)
        base_model = peft.get_peft_model(model, config).base_model
    return base_model.randlora_A["default"].numpy(), base_model.randlora_B["default"].numpy()


def assert_same_bits(ours, theirs):
    for name, mine, pefts in zip("AB", ours, theirs, strict=True):
        assert pefts.dtype == np.float32, "PEFT casts its bases to the dtype of the model"
        np.testing.assert_array_equal(mine.astype(np.float32).view(np.uint32), pefts.view(np.uint32), err_msg=name)


@pytest.fixture
def recipe(kind, monkeypatch):
    """Put PEFT on a host of this kind, and name the recipe that it then follows."""
    if kind == "fp16":  # what PEFT does on a host without bfloat16
        monkeypatch.setattr("peft.tuners.randlora.model.is_bf16_available", lambda: False)
        return f"{GENERATION}-fp16"
    return GENERATION


# Of each kind every other chunk; all of them in the runs of all cases.
OFTEN = [f"{kind}-{chunk}" for i, kind in enumerate(KINDS) for chunk in range(i % 2, CHUNKS, 2)]


@cross(*OFTEN, kind=list(KINDS), chunk=range(CHUNKS))
def test_bases_equal_those_of_peft_bit_for_bit(kind, chunk, recipe):
    for seed, r, out, inp in drawn_cases()[chunk::CHUNKS]:
        config = RandLoraConfig(r=r, projection_prng_key=seed, **KINDS[kind])
        ours = make_bases(config, max_dim=max(out, inp), min_dim=min(out, inp), recipe=recipe)
        try:
            assert_same_bits(ours, pefts_bases(seed, r, (out, inp), **KINDS[kind]))
        except AssertionError as error:
            raise AssertionError(f"seed={seed} r={r} out={out} in={inp}: {error}") from error


@pytest.mark.parametrize("kind", KINDS)
def test_bases_of_several_layers_are_sized_as_peft_sizes_them(kind, recipe):
    for layers in ([(48, 16), (16, 48)], [(16, 16), (8, 24), (40, 12)], [(8, 64), (8, 32)]):
        config = RandLoraConfig(r=5, projection_prng_key=-17, **KINDS[kind])
        ours = make_bases(config, **shared_dims(layers)._asdict(), recipe=recipe)
        assert_same_bits(ours, pefts_bases(-17, 5, *layers, **KINDS[kind]))


@pytest.mark.parametrize("kind", KINDS)
def test_where_peft_gets_nan_ours_raises_and_nowhere_else(kind, recipe):
    sizes = {"bf16": (1, 1), "fp16": (1, 1)}.get(kind, (2, 3))
    refused = 0
    for seed in range(30):
        theirs = pefts_bases(seed, 1, sizes, **KINDS[kind])
        config = RandLoraConfig(r=1, projection_prng_key=seed, **KINDS[kind])
        if all(np.isfinite(basis).all() for basis in theirs):
            assert_same_bits(make_bases(config, max_dim=max(sizes), min_dim=min(sizes), recipe=recipe), theirs)
        else:
            refused += 1
            with pytest.raises(ValueError, match="so it cannot be normalized"):
                make_bases(config, max_dim=max(sizes), min_dim=min(sizes), recipe=recipe)
    assert refused > 0


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(4096, 4096), (11008, 4096), (4096, 14336)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_bases_of_7b_and_8b_models_equal_those_of_peft_bit_for_bit(kind, sizes, recipe):
    config = RandLoraConfig(r=32, projection_prng_key=2**40 + 3, **KINDS[kind])
    ours = make_bases(config, max_dim=max(sizes), min_dim=min(sizes), recipe=recipe)
    assert_same_bits(ours, pefts_bases(2**40 + 3, 32, sizes, **KINDS[kind]))
