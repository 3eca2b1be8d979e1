"""What the tests draw: shapes, seeds, configs and factors. Sizes come from short lists, as each new one recompiles."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from interop import DEFAULT_RECIPE, AdaLoraConfig, Factors, RandLoraConfig, SVDFactors, init_adapter
from interop.adalora import keep_triplets

# (out, in): square, wide, tall, a single row or column, coprime sides, multiples of the common ranks.
SHAPES = ((8, 8), (6, 10), (10, 6), (1, 5), (5, 1), (12, 7), (7, 12), (16, 4), (4, 16))
RANKS = (1, 2, 3, 4, 8)
EDGE_SEEDS = (0, 1, -1, -17, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 3, 2**63 - 1, 2**63, 2**64 - 1, -(2**63))

shapes = st.sampled_from(SHAPES)
ranks = st.sampled_from(RANKS)
seeds = st.one_of(st.sampled_from(EDGE_SEEDS), st.integers(-(2**63), 2**64 - 1))
module_names = st.sampled_from(("q_proj", "mlp.up_proj", "layers.0.k", "layers.10.k", "größe"))
_names = st.lists(st.sampled_from(("q_proj", "v_proj", "mlp.up")), min_size=1, max_size=3, unique=True)
_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=5), inner, max_size=2),
    max_leaves=4,
)
_unknown_fields = st.dictionaries(st.sampled_from(("new_field", "zeta")), _json, max_size=2)


@st.composite
def configs(draw):
    """A valid `RandLoraConfig` with every field drawn."""
    return RandLoraConfig(
        r=draw(ranks),
        randlora_alpha=draw(st.integers(1, 1000) | st.floats(-1e6, 1e6)),
        projection_prng_key=draw(seeds),
        save_projection=draw(st.booleans()),
        sparse=draw(st.booleans()),
        very_sparse=draw(st.booleans()),
        randlora_dropout=draw(st.sampled_from((0.0, 0.1, 0.99))),
        bias=draw(st.sampled_from(("none", "all", "randlora_only"))),
        init_weights=draw(st.booleans()),
        **draw(_common_fields()),
    )


@st.composite
def schedules(draw):
    """Fields of an AdaLoRA schedule in which ranks fall."""
    target_r, tinit, tfinal = draw(st.sampled_from((1, 2, 3, 7))), draw(st.integers(0, 9)), draw(st.integers(0, 9))
    return {
        "target_r": target_r,
        "init_r": target_r + draw(st.sampled_from((1, 2, 5))),
        "tinit": tinit,
        "tfinal": tfinal,
        "total_step": tinit + tfinal + draw(st.integers(1, 40)),
        "deltaT": draw(st.sampled_from((1, 2, 3, 10))),
    }


@st.composite
def adalora_configs(draw):
    """A valid `AdaLoraConfig` with every field drawn."""
    schedule = draw(schedules())
    mask = st.lists(st.booleans(), min_size=schedule["init_r"], max_size=schedule["init_r"])
    return AdaLoraConfig(
        **schedule,
        beta1=draw(st.floats(0.01, 0.99)),
        beta2=draw(st.floats(0.01, 0.99)),
        orth_reg_weight=draw(st.sampled_from((0, 0.5, 10.0))),
        rank_pattern=draw(st.none() | st.dictionaries(module_names.map("{}.lora_E".format), mask, max_size=2)),
        lora_alpha=draw(st.integers(1, 1000) | st.floats(1e-3, 1e6)),
        lora_dropout=draw(st.sampled_from((0.0, 0.1, 0.99))),
        init_lora_weights=draw(st.booleans() | st.just("gaussian")),
        bias=draw(st.sampled_from(("none", "all", "lora_only"))),
        **draw(_common_fields()),
    )


@st.composite
def _common_fields(draw):
    """The fields that configs of all methods have, but `bias`."""
    targets = draw(st.none() | st.just("all-linear") | _names | st.just(r".*\.q_proj"))
    layers = None
    if targets is None or targets == "all-linear" or isinstance(targets, list):
        layers = draw(st.none() | st.integers(0, 3) | st.lists(st.integers(0, 3), min_size=1, max_size=2))
    return {
        "target_modules": targets,
        "exclude_modules": draw(st.none() | _names),
        "fan_in_fan_out": draw(st.booleans()),
        "modules_to_save": draw(st.none() | _names),
        "layers_to_transform": layers,
        "layers_pattern": None if layers is None else draw(st.none() | st.just("layers") | _names),
        "task_type": draw(st.none() | st.just("CAUSAL_LM")),
        "inference_mode": draw(st.booleans()),
        "auto_mapping": draw(st.none() | st.just({"base_model_class": "Net", "parent_library": "lib"})),
        "unknown_fields": draw(_unknown_fields),
    }


def draw_factors(seed, *, shape, r, spare=0, dtype=np.float32):
    """Random A (r, 1, m + spare), B (M + spare, n + spare, r), lam and gamma for a layer of shape (out, in).

    `spare` makes the bases larger than the layer needs, as they are when another layer of the model is larger. The
    keys are the arguments of `oracle.delta_weight`.
    """
    rng = np.random.default_rng(seed)
    long, short = max(shape), min(shape)
    n = -(-short // r)
    sizes = {"A": (r, 1, short + spare), "B": (long + spare, n + spare, r), "lam": (r, n), "gamma": (n, short)}
    return {name: rng.standard_normal(size).astype(dtype) for name, size in sizes.items()}


LAYERS = {"block.0.up": (12, 6), "block.0.down": (6, 12), "block.1.mix": (8, 8)}


def draw_adapter(seed=0, *, shapes=LAYERS, recipe=DEFAULT_RECIPE, **fields):
    """An adapter with random lambda and gamma, as after training."""
    config = RandLoraConfig(**{"r": 4, "init_weights": False, "target_modules": sorted(shapes), **fields})
    rng = np.random.default_rng(seed)
    adapter = init_adapter(config, shapes, recipe=recipe, rng=rng)
    factors = {
        name: Factors(lam, rng.standard_normal(gamma.shape, np.float32))
        for name, (lam, gamma) in adapter.factors.items()
    }
    return dataclasses.replace(adapter, factors=factors)


SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 1, "tfinal": 2, "total_step": 10}
# Of the four triplets of each layer of LAYERS: some, none (a layer may lose all of them), and all.
KEPT = {
    "block.0.up": (True, False, False, True),
    "block.0.down": (False,) * 4,
    "block.1.mix": (True,) * 4,
}


def draw_adalora(seed=0, *, shapes=LAYERS, kept=None, dtype=np.float32, **fields):
    """An AdaLoRA adapter with random A, E and B, as after training; `kept` by module name takes triplets away."""
    config = AdaLoraConfig(**{**SCHEDULE, "target_modules": sorted(shapes), **fields})
    rng = np.random.default_rng(seed)
    adapter = init_adapter(config, shapes, rng=rng)
    factors = {
        name: SVDFactors(*(rng.standard_normal(part.shape).astype(dtype) for part in parts))
        for name, parts in adapter.factors.items()
    }
    if kept is not None:
        config = config.with_kept(kept)
        factors = {name: keep_triplets(parts, config.kept(name)) for name, parts in factors.items()}
    return dataclasses.replace(adapter, config=config, factors=factors)
