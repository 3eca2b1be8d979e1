"""RandLoRA (arXiv:2502.00987) for JAX and Flax: pure functions on any pytree, and adapters attached to NNX models."""

from interop.config import RandLoraConfig
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.bases import layer_bases, make_bases
from randlora_jax.gradients import apply_delta, delta_weight
from randlora_jax.layouts import Layout
from randlora_jax.nnx import RandLoraParam, attach, detach, extract
from randlora_jax.params import count_trainable, effective_params, init, merge, print_trainable_parameters, unmerge

__all__ = [
    "Layout",
    "RandLoraAdapter",
    "RandLoraConfig",
    "RandLoraParam",
    "apply_delta",
    "attach",
    "count_trainable",
    "delta_weight",
    "detach",
    "effective_params",
    "extract",
    "init",
    "layer_bases",
    "make_bases",
    "merge",
    "print_trainable_parameters",
    "unmerge",
]
