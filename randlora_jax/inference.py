"""Models called with numpy arrays, for what compares stacks without knowing them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx


def call(model: nnx.Module, inputs: np.ndarray) -> Any:
    """The model's output for token ids, or other inputs."""
    return nnx.jit(lambda model, inputs: model(inputs))(model, jnp.asarray(inputs))
