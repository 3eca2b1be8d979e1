"""Optimizers that are made for an adapter's pytree, on the state of the NNX model that it is attached to."""

from typing import Any

import jax
import optax
from flax import nnx

from interop.contents import PARTS
from randlora_jax.kernels import AnyFactors, align_factors, unalign_factors
from randlora_jax.layouts import module_name, path_parts
from randlora_jax.nnx_places import active_adapter, adapted_weights, existing_adapter


def on_model(tx: optax.GradientTransformation, model: nnx.Module) -> optax.GradientTransformationExtraArgs:
    """`tx`, an optimizer for `extract(model).trainable`, as one for `nnx.Optimizer(model, ..., wrt=RandLoraParam)`.

        allocator = adalora.rank_allocator(optax.adam(1e-3), extract(model))
        optimizer = nnx.Optimizer(model, adalora.on_model(allocator, model), wrt=RandLoraParam)
        ...  # the loss: task + adalora.orthogonal_loss(extract(model))
        adalora.prune(extract(model), optimizer.opt_state).save_pretrained("folder")

    Raises:
        ValueError: no adapter is active on the model.
    """
    name = existing_adapter(model, active_adapter(model))
    parts = {path: weight.adapters[name] for path, weight in adapted_weights(model) if name in weight.adapters}
    kernels = {path: part.kernel for path, part in sorted(parts.items())}
    kinds = {path: type(part.factors()) for path, part in parts.items()}
    tx = optax.with_extra_args_support(tx)

    def gathered(state: Any) -> dict[str, AnyFactors]:
        """The factors by kernel, from a tree as `nnx.state(model, RandLoraParam)` gives it."""
        found: dict[str, dict[str, Any]] = {path: {} for path in kernels}
        for path, leaf in jax.tree_util.tree_leaves_with_path(state):
            kernel, part = _place(path)
            found[kernel][part] = leaf
        aligned = {path: kinds[path](*(found[path][part] for part in PARTS[kinds[path]])) for path in kernels}
        return {
            path: unalign_factors(factors, kernels[path], kernels[path].kernel_shape)[0]
            for path, factors in aligned.items()
        }

    def scattered(trainable: dict[str, AnyFactors], like: Any) -> Any:
        """The inverse of `gathered`, into a tree of the given structure."""
        aligned = {
            path: dict(zip(PARTS[kinds[path]], align_factors(factors, kernels[path]), strict=True))
            for path, factors in trainable.items()
        }

        def pick(path: tuple[Any, ...], _: Any) -> Any:
            kernel, part = _place(path)
            return aligned[kernel][part]

        return jax.tree_util.tree_map_with_path(pick, like)

    def init(params: Any) -> Any:
        return tx.init(gathered(params))

    def update(grads: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        updates, state = tx.update(gathered(grads), state, None if params is None else gathered(params), **extra)
        return scattered(updates, grads), state

    return optax.GradientTransformationExtraArgs(init, update)


def _place(path: tuple[Any, ...]) -> tuple[str, str]:
    """Kernel and name of a factor, from its path `<kernel>.adapters.<adapter>.<name>` in a model's state."""
    parts = path_parts(path)
    return module_name(parts[:-3]), parts[-1]
