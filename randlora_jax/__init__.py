"""RandLoRA (arXiv:2502.00987) for JAX and Flax: pure functions on any pytree, and adapters attached to Flax models.

What AdaLoRA has besides, such as its own `init` and the allocator of ranks, is in `randlora_jax.adalora`.
"""

try:
    import flax  # noqa: F401
    import jax  # noqa: F401
    import jaxtyping  # noqa: F401
    import optax  # noqa: F401
    import yaml  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(f"{error.name} is not installed. Run: pip install 'randlora[jax]'", name=error.name) from error

from interop.adalora import AdaLoraConfig
from interop.config import RandLoraConfig
from randlora_jax.adalora import AdaLoraAdapter
from randlora_jax.adapter import RandLoraAdapter
from randlora_jax.bases import layer_bases, make_bases
from randlora_jax.contraction import adapted_linear, apply_delta
from randlora_jax.gradients import delta_weight
from randlora_jax.layout_rules import LayoutRule
from randlora_jax.layouts import Layout
from randlora_jax.linen import lazy_params
from randlora_jax.named_layouts import LAYOUTS
from randlora_jax.nnx import attach, detach, extract, model_layouts
from randlora_jax.nnx_linear import RandLoraBases, RandLoraLinear
from randlora_jax.nnx_places import active_adapter, adapter_names
from randlora_jax.nnx_switching import bound_bases, delete_adapter, disable_adapters, enable_adapters, set_adapter
from randlora_jax.nnx_weight import RandLoraBasis, RandLoraParam
from randlora_jax.params import (
    count_trainable,
    effective_params,
    find_targets,
    init,
    load_adapter,
    merge,
    name_layouts,
    print_trainable_parameters,
    unmerge,
)
from randlora_jax.rebuilding import rebuild_weights
from randlora_jax.tracing import InferredLayouts, infer_layouts
from randlora_jax.training import accumulate_gradients

__all__ = [
    "LAYOUTS",
    "AdaLoraAdapter",
    "AdaLoraConfig",
    "InferredLayouts",
    "Layout",
    "LayoutRule",
    "RandLoraAdapter",
    "RandLoraBases",
    "RandLoraBasis",
    "RandLoraConfig",
    "RandLoraLinear",
    "RandLoraParam",
    "accumulate_gradients",
    "active_adapter",
    "adapted_linear",
    "adapter_names",
    "apply_delta",
    "attach",
    "bound_bases",
    "count_trainable",
    "delete_adapter",
    "delta_weight",
    "detach",
    "disable_adapters",
    "effective_params",
    "enable_adapters",
    "extract",
    "find_targets",
    "infer_layouts",
    "init",
    "layer_bases",
    "lazy_params",
    "load_adapter",
    "make_bases",
    "merge",
    "model_layouts",
    "name_layouts",
    "print_trainable_parameters",
    "rebuild_weights",
    "set_adapter",
    "unmerge",
]
