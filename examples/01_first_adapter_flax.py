# %% [markdown]
"""A first adapter in Flax: a frozen network learns to read rotated digits; saved, loaded, switched off, merged.

Run `python examples/01_first_adapter_flax.py`, or the notebook of the same name. It needs `pip install "randlora[jax]"
scikit-learn`, and takes 15 seconds on two CPU cores; the last line is

    the reloaded adapter gives the same logits; it is in runs/01_first_adapter_flax
"""

# %% [markdown]
# RandLoRA leaves the weights of a model as they are and adds to each an update of full rank, of which only a few
# scalings are trained: `W + dW`, `dW = s * sum_i B_i diag(lambda_i) A diag(gamma_i)` with random bases A and B that all
# layers share.

# %%
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

import randlora_jax

OUT = Path("runs/01_first_adapter_flax")
STEPS = 5 if "--smoke" in sys.argv else 150

# %% [markdown]
# ## The model you have
#
# Here it is a small network that reads handwritten digits. Yours may be any NNX model, with weights loaded from
# anywhere.

# %%
images, digits = load_digits(return_X_y=True)  # (1797, 64), (1797,)
upright = jnp.asarray(images / 16, jnp.float32)
rotated = jnp.asarray(np.rot90(images.reshape(-1, 8, 8) / 16, axes=(1, 2)).reshape(-1, 64), jnp.float32)
digits = jnp.asarray(digits)
TRAINING, HELD_OUT = slice(0, 1297), slice(1297, None)


class Network(nnx.Module):
    """Images (N, 64) to logits (N, 10)."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(64, 256, rngs=rngs)
        self.mix = nnx.Linear(256, 256, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits."""
        return self.head(nnx.relu(self.mix(nnx.relu(self.up(x)))))


def train(model: nnx.Module, pixels: jax.Array, kind: type, learning_rate: float) -> None:
    """Train the variables of one kind with Adam, all images at each step."""
    optimizer = nnx.Optimizer(model, optax.adam(learning_rate), wrt=kind)

    @nnx.jit
    def step(model: nnx.Module, optimizer: nnx.Optimizer) -> jax.Array:
        def loss(model: nnx.Module) -> jax.Array:
            logits = model(pixels[TRAINING])
            return optax.softmax_cross_entropy_with_integer_labels(logits, digits[TRAINING]).mean()

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, kind))(model)
        optimizer.update(model, grads)
        return value

    for count in range(1, STEPS + 1):
        value = step(model, optimizer)
        if count % 50 == 0:
            print(f"step {count}: loss {value:.4f}")


def accuracy(model: nnx.Module, pixels: jax.Array) -> str:
    """The share of held-out images that the model reads right."""
    return f"{(model(pixels[HELD_OUT]).argmax(-1) == digits[HELD_OUT]).mean():.1%}"


model = Network(nnx.Rngs(0))
train(model, upright, nnx.Param, 1e-3)
base = nnx.clone(model)  # to compare with, and to load the adapter onto again
print("upright images:", accuracy(model, upright), "rotated images:", accuracy(model, rotated))

# %% [markdown]
# ## The adapter
#
# `attach` puts it on the model, in place. A smaller `r` trains *more* parameters: a layer whose short side is m has
# ceil(m / r) bases, each with r + m scalings. `randlora_alpha / r` scales the update.

# %%
config = randlora_jax.RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear")
randlora_jax.attach(model, config)
randlora_jax.print_trainable_parameters(randlora_jax.extract(model), nnx.state(base, nnx.Param))
assert jnp.array_equal(model(rotated), base(rotated))  # lambda starts at zero: nothing has changed yet

# %% [markdown]
# The optimizer gets `RandLoraParam`, which is lambda and gamma. (`nnx.Param` would be the base.)

# %%
train(model, rotated, randlora_jax.RandLoraParam, 3e-3)
print("rotated images, with the adapter:", accuracy(model, rotated))

# %% [markdown]
# ## Saved, loaded, switched off, merged
#
# The folder is in the format of Hugging Face PEFT; `randlora_torch` and `peft` read it as well.

# %%
randlora_jax.extract(model).save_pretrained(OUT)
again = randlora_jax.attach(nnx.clone(base), OUT)
assert jnp.array_equal(again(rotated), model(rotated))

randlora_jax.disable_adapters(again)
print("upright images, adapter switched off:", accuracy(again, upright))
randlora_jax.enable_adapters(again)

randlora_jax.detach(again, merge=True)  # an ordinary model again, with W + dW for W
print("rotated images, merged:", accuracy(again, rotated))
assert jnp.allclose(again(rotated), model(rotated), atol=1e-4)
print(f"the reloaded adapter gives the same logits; it is in {OUT}")
