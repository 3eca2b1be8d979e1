"""What the numbers of an adapter belong to: its config, its bases and the kernels it adapts, described and compared.

Kernels and bases are described by checksums, so that a checkpoint can refuse another model without holding its own.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from interop.adalora import AdaLoraConfig
from interop.bases import bases_digest
from interop.errors import bulleted
from interop.fields import AdapterConfig
from randlora_jax.bases import whole_bases
from randlora_jax.kernels import named_leaves
from randlora_jax.layouts import Layout, module_name
from randlora_jax.nnx_places import places_of
from randlora_jax.selection import AnyAdapter

FORMAT, VERSION = "randlora_jax.checkpoint", 1


def describe(adapter: AnyAdapter, params: Any) -> dict[str, Any]:
    """All that decides what the numbers in a checkpoint mean, as JSON gives it back."""
    if adapter.shapes is None:
        raise ValueError("the adapter does not know the shapes of its layers: load_adapter(source, params) finds them.")
    layouts = dict(adapter.layouts)
    described = {
        "format": FORMAT,
        "version": VERSION,
        "config": adapter.config.to_dict(),
        "recipe": adapter.recipe,
        "bases_sha256": None if adapter.bases is None else bases_digest(whole_bases(adapter.bases)),
        "modules": {
            name: {
                "shape": shape,
                "weights": adapter.factors[name][0].shape[:-2],
                "layout": _describe_layout(layouts[name]) if name in layouts else None,
            }
            for name, shape in adapter.shapes
        },
        "kernels": None if params is None else kernel_checksums(params, adapter.modules),
    }
    return json.loads(json.dumps(described))


def differences(saved: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What differs between the descriptions of a checkpoint and of this run, of what decides the update of a kernel."""
    says = lambda what, a, b: f"{what}: {a} in the checkpoint, {b} here"  # noqa: E731
    configs = [AdapterConfig.from_dict({**side["config"], "inference_mode": True}) for side in (saved, here)]
    if configs[0].METHOD != configs[1].METHOD:
        return [says("method", *(config.METHOD for config in configs))]
    lines = []
    for field in ("init_r", "lora_alpha") if isinstance(configs[0], AdaLoraConfig) else ("r", "randlora_alpha"):
        if saved["config"][field] != here["config"][field]:
            lines.append(says(field, saved["config"][field], here["config"][field]))
    one, other = configs
    if isinstance(one, AdaLoraConfig) and isinstance(other, AdaLoraConfig):
        lines += [says(f"triplets of {name}", *kept) for name, kept in _differing_triplets(one, other).items()]
    if saved["bases_sha256"] != here["bases_sha256"]:
        lines.append(says("bases", *map(_describe_bases, (saved, here))))
    for name in sorted(saved["modules"].keys() | here["modules"].keys()):
        modules = [side["modules"].get(name) for side in (saved, here)]
        if None in modules:
            lines.append(says(name, *("not adapted" if module is None else "adapted" for module in modules)))
            continue
        for field in ("shape", "weights", "layout"):
            a, b = (module[field] for module in modules)
            if a != b and None not in (a, b):
                lines.append(says(f"{field} of {name}", a, b))
    kernels = [side["kernels"] or {} for side in (saved, here)]
    for name in sorted(kernels[0].keys() & kernels[1].keys()):
        if kernels[0][name] != kernels[1][name]:
            lines.append(says(f"base kernel {name}", *(side[name] for side in kernels)))
    return lines


def _differing_triplets(saved: AdaLoraConfig, here: AdaLoraConfig) -> dict[str, list[str]]:
    """Which triplets are left in the layers where these are not the same, by name."""
    patterns = [config.rank_pattern or {} for config in (saved, here)]
    kept = {
        key.removesuffix(".lora_E"): [_describe_triplets(pattern.get(key)) for pattern in patterns]
        for key in sorted(patterns[0].keys() | patterns[1].keys())
    }
    return {name: sides for name, sides in kept.items() if sides[0] != sides[1]}


def _describe_triplets(mask: tuple[bool, ...] | None) -> str:
    return "all" if mask is None or all(mask) else str([i for i, kept in enumerate(mask) if kept])


def kernel_checksums(params: Any, modules: tuple[str, ...]) -> dict[str, str]:
    """Dtype, shape and a checksum of each kernel by name: the same on every mesh, and no kernel is moved to the host.

    Args:
        params: A pytree of parameters, or an NNX model with or without adapters.
        modules: Names of the kernels.

    Raises:
        ValueError: a kernel is missing or is no array.
    """
    named = _model_leaves(params) if isinstance(params, nnx.Module) else named_leaves(params)
    leaves = {module_name(parts): leaf for parts, leaf in named}
    missing = [name for name in modules if name not in leaves]
    if missing:
        have = f"it has {len(leaves)} parameters, such as {next(iter(leaves), None)!r}"
        raise ValueError(bulleted(f"params lacks these adapted kernels ({have})", missing))
    arrays = {name: jax.tree.leaves(leaves[name]) for name in modules}  # several if the kernel is quantized
    abstract = [name for name, parts in arrays.items() if not all(isinstance(p, jax.Array | np.ndarray) for p in parts)]
    if abstract:
        raise ValueError(bulleted("params holds no arrays for these kernels, pass None or the values", abstract))
    sums = jax.device_get({name: list(map(_checksum, parts)) for name, parts in arrays.items()})
    return {
        name: f"{leaves[name].dtype}{tuple(leaves[name].shape)} {'-'.join(f'{int(part):08x}' for part in parts)}"
        for name, parts in sums.items()
    }


def _model_leaves(model: nnx.Module) -> list[tuple[tuple[str, ...], Any]]:
    """Path and leaf of each parameter, an adapted kernel under the path of what stands for it."""
    adapted = [(place.parts, place.base.get_value()) for place in places_of(model) if place.adapted]
    return named_leaves(nnx.state(model, nnx.Param)) + adapted


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
    """A sum modulo 2**32 of scrambled bits and positions: exact, so the order of the summands is of no matter."""
    width = jnp.iinfo(array.dtype).bits if jnp.issubdtype(array.dtype, jnp.integer) else jnp.finfo(array.dtype).bits
    unsigned = jnp.dtype(f"uint{min(width, 32)}")  # 64 bits become two words, on an axis of their own
    words = jax.lax.bitcast_convert_type(array, unsigned).astype(jnp.uint32)
    position = jnp.zeros((), jnp.uint32)
    for axis, size in enumerate(words.shape):
        position = position * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    return _scramble(words ^ _scramble(position)).sum(dtype=jnp.uint32)


def _scramble(word: jax.Array) -> jax.Array:
    """A bijection of 32-bit words in which each bit depends on all, the finalizer of MurmurHash3."""
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        word = (word ^ (word >> shift)) * jnp.uint32(factor)
    return word ^ (word >> 16)


def _describe_layout(layout: Layout) -> dict[str, Any]:
    """The axes and what else becomes of dW, and which of the stacked weights are adapted; not what files call them."""
    modules = layout.modules
    adapted = None if modules is None else [index for index, name in enumerate(modules) if name is not None]
    partly = adapted is not None and modules is not None and len(adapted) < len(modules)
    axes = {field: getattr(layout, field) for field in ("in_axes", "out_axes", "stack_axes")}
    changes = {"scale": layout.scale} if layout.scale != 1 else {}
    changes |= {"interleaved": True} if layout.interleaved else {}
    return axes | {"adapted": adapted if partly else None} | changes


def _describe_bases(description: dict[str, Any]) -> str:
    fields = ("projection_prng_key", "sparse", "very_sparse")
    made = ", ".join(f"{field}={description['config'][field]}" for field in fields)
    return f"{description['bases_sha256'][:12]} ({made}, recipe={description['recipe']!r})"
