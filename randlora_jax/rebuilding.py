"""W + dW where a model reads a kernel that it multiplies with itself, and a policy to make it again in backward.

The model's own product keeps W + dW for backward, a second copy of the kernels. A policy of `jax.checkpoint` is asked
for one equation at a time, and to refuse W + dW alone would save the dW that it is made of, of the same size. So all of
W + dW has to be one equation to jax: the forward rule of a `custom_vjp` with `optimize_remat` is.
"""

from typing import Any

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array

from interop.bases import Bases
from randlora_jax.kernels import AnyFactors, Kernel, combine_kernel, kernel_delta, on_explicit_mesh

WEIGHT_NAME = "randlora_weight"  # of W + dW, in `jax.checkpoint`


def adapted_kernel(
    weight: Array,
    bases: Bases | None,
    factors: AnyFactors,
    kernel: Kernel,
    *,
    scaling: float,
    dtype: np.dtype | None = None,
) -> Array:
    """W + dW as `combine_kernel` gives it, as one equation that `rebuild_weights` recognizes.

    Not so on a mesh with explicit axes.

    Raises:
        ValueError: as `combine_kernel`.
    """
    options: dict[str, Any] = {"scaling": scaling, "dtype": dtype}
    if on_explicit_mesh(weight):
        return combine_kernel(weight, bases, factors, kernel, **options)

    def combined(weight: Array, bases: Bases | None, factors: AnyFactors) -> Array:
        # By its forward rule: forward mode on top of reverse mode cannot pass a custom_vjp inside of this one.
        folded, _ = jax.vjp(lambda factors: combine_kernel(weight, bases, factors, kernel, **options), factors)
        return checkpoint_name(folded, WEIGHT_NAME)

    def forward(weight: Array, bases: Bases | None, factors: AnyFactors) -> tuple[Array, Any]:
        return combined(weight, bases, factors), (bases, factors)

    def backward(kept: tuple[Bases | None, AnyFactors], grad: Array) -> tuple[Array, None, AnyFactors]:
        bases, factors = kept
        delta, pull_back = jax.vjp(lambda factors: kernel_delta(bases, factors, kernel, **options), factors)
        return grad, None, *pull_back(grad.astype(delta.dtype))  # all that is used of delta: XLA never makes it

    rule = jax.custom_vjp(combined)
    rule.defvjp(forward, backward, optimize_remat=True)
    return rule(weight, bases, factors)


def rebuild_weights(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """A policy of `jax.checkpoint` that saves everything except W + dW, which backward makes again.

    For scanned models that multiply with W + dW themselves (`lazy_params`, `attach`) and are not rematerialized anyway;
    `nn.remat` and `nnx.remat` take a policy, too:

        layer = jax.checkpoint(layer, policy=randlora_jax.rebuild_weights)  # then jax.lax.scan(layer, ...)

    Backward then needs a kernel less of memory for each layer, and the product `B U` once more. It has to be around the
    layer inside the scan: around all of it, jax makes the W + dW of all layers again before the first is used. Outside
    of a scan XLA decides when to make it again, on CPU early, which saves nothing. `effective_params` makes all W + dW
    before the model runs, out of this policy's reach. `adapted_linear` and `RandLoraLinear` need none of this.
    """
    inner = (getattr(value, "jaxpr", value) for value in parameters.values())
    equations = [equation for jaxpr in inner for equation in getattr(jaxpr, "eqns", ())]
    return all(equation.params.get("name") != WEIGHT_NAME for equation in equations)
