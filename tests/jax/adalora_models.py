"""What the tests of AdaLoRA adapt: two plain kernels, and one array that holds three weights."""

import jax
import jax.numpy as jnp
import numpy as np

from interop import AdaLoraConfig
from randlora_jax import Layout, adalora

SCHEDULE = {"init_r": 4, "target_r": 2, "tinit": 2, "tfinal": 3, "total_step": 12}
LAYOUTS = {"mix": Layout((1,), (2,), stack_axes=(0,))}
MIXES = ("mix.0", "mix.1", "mix.2")
WEIGHTS = {"down": (6, 12), **dict.fromkeys(MIXES, (8, 8)), "up": (12, 6)}


def array(*shape, seed=0, dtype=jnp.float32):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


def params(dtype=jnp.float32):
    return {
        "up": {"kernel": array(6, 12, dtype=dtype), "bias": array(12, dtype=dtype)},
        "down": {"kernel": array(12, 6, dtype=dtype)},
        "mix": {"kernel": array(3, 8, 8, dtype=dtype)},
    }


def config(**fields):
    return AdaLoraConfig(**{**SCHEDULE, "lora_alpha": 4, "target_modules": ["up", "down", "mix"], **fields})


def new_adapter(dtype=jnp.float32, **fields):
    return adalora.init(config(**fields), params(dtype), layouts=LAYOUTS, key=jax.random.key(0))


def trained(adapter, seed=7):
    """The adapter with random factors, as after training; padding stays zero."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape) / 2, leaf.dtype)  # noqa: E731
    drawn = jax.tree.map(draw, adapter.trainable)
    for name, rows in adapter.present.items():
        A, E, B = drawn[name]
        drawn[name] = drawn[name]._replace(A=A * rows[..., None], E=E * rows[..., None], B=B * rows[..., None, :])
    return adapter.with_trainable(drawn)


def by_weight(adapter, trainable):
    """A tree like the adapter's trainable as numpy's SVDFactors by weight, without padding."""
    return dict(adapter.with_trainable(trainable).to_interop().factors)


def masks_by_weight(adapter, masks):
    """A tree of masks as lists of bools by weight, without padding."""
    found = {}
    for name, modules in adapter.weight_names.items():
        rows, present = (np.atleast_2d(part) for part in (masks[name], adapter.present[name]))
        found |= {module: rows[i][present[i]].tolist() for i, module in enumerate(modules)}
    return found
