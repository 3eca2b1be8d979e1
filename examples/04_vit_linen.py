"""A vision transformer in Flax linen, scanned over its layers and rematerialized, learns a second task by RandLoRA.

Run `python examples/04_vit_linen.py`. A ViT learns to tell scikit-learn's handwritten digits 0 to 4 apart. Then it is
frozen, and an adapter of 6 percent of its size learns 5 to 9, beside a ViT that learns them from scratch. How the
stacked kernels lie is read off the traced model. It needs `pip install "randlora[jax]" scikit-learn`, and takes about
a minute on two CPU cores; the last line is

    the reloaded model and adapter give the same logits; they are in runs/04_vit_linen
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from flax import linen as nn
from flax import serialization
from sklearn.datasets import load_digits

from randlora_jax import RandLoraConfig, infer_layouts, init, lazy_params, load_adapter, print_trainable_parameters

CONFIG = RandLoraConfig(r=8, randlora_alpha=80, target_modules=["query", "key", "value", "out", "up", "down", "head"])
HELD_OUT, BATCH_SIZE = 500, 64  # the last images of the data set are held out


class Images(NamedTuple):
    """Images (N, 8, 8) with pixels from 0 to 1, and the digits (N,) that they show."""

    pixels: np.ndarray
    digits: np.ndarray


class Block(nn.Module):
    """Attention, then feed-forward, each on a normalized copy and added to the stream."""

    @nn.compact
    def __call__(self, x: jax.Array, _: None) -> tuple[jax.Array, None]:
        """One layer of the stream (B, T, D): the carry, and nothing to stack."""
        x = x + nn.MultiHeadDotProductAttention(num_heads=4, name="attention")(nn.LayerNorm()(x))
        hidden = nn.gelu(nn.Dense(4 * x.shape[-1], name="up")(nn.LayerNorm()(x)))
        return x + nn.Dense(x.shape[-1], name="down")(hidden), None


class ViT(nn.Module):
    """Patches of 2 x 2 pixels, four blocks whose kernels are stacked, the mean over the patches, ten logits."""

    @nn.compact
    def __call__(self, pixels: jax.Array) -> jax.Array:
        """Images (B, 8, 8) to logits (B, 10)."""
        grid = pixels.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3)  # (B, 8, 8) -> (B, 4, 2, 4, 2) -> (B, 4, 4, 2, 2)
        x = nn.Dense(64, name="patches")(grid.reshape(-1, 16, 4))  # (B, 4, 4, 2, 2) -> (B, T=16, 4) -> (B, T, D)
        x = x + self.param("positions", nn.initializers.normal(0.02), (16, 64))
        scanned = nn.scan(nn.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=4)
        x, _ = scanned(name="encoder")(x, None)
        return nn.Dense(10, name="head")(nn.LayerNorm(name="norm")(x).mean(1))


predict = jax.jit(ViT().apply)
predict_adapted = jax.jit(lambda variables, adapter, pixels: ViT().apply(lazy_params(variables, adapter), pixels))


def main() -> None:
    """Train the model, adapt it, compare, save, reload, check."""
    options = parse_arguments()
    training, held_out = load_images()
    low, high = (Images(*(array[rows] for array in training)) for rows in (training.digits < 5, training.digits >= 5))
    fresh = jax.jit(ViT().init)(jax.random.key(0), low.pixels[:1])
    train_whole = trainer(lambda variables, _: variables, options.steps, learning_rate=2e-3)
    variables = train_whole("0 to 4", fresh, None, low)
    scratch = train_whole("5 to 9, from scratch", fresh, None, high)

    layouts = infer_layouts(ViT().apply, variables, low.pixels[:1])  # print it for a table
    adapter = init(CONFIG, variables, layouts=layouts)
    print_trainable_parameters(adapter, variables)
    adapted = lambda factors, frozen: lazy_params(frozen[0], frozen[1].with_trainable(factors))  # noqa: E731
    train_adapter = trainer(adapted, options.steps, learning_rate=2.5e-3)
    adapter = adapter.with_trainable(train_adapter("5 to 9, adapter", adapter.trainable, (variables, adapter), high))

    before, logits = predict(variables, held_out.pixels), predict_adapted(variables, adapter, held_out.pixels)
    unseen = held_out.digits >= 5
    print(f"0 to 4: {accuracy(before, held_out, ~unseen):.1%} held-out accuracy of the model")
    print(f"5 to 9: {accuracy(before, held_out, unseen):.1%} of the model, which has never seen them")
    print(f"5 to 9: {accuracy(logits, held_out, unseen):.1%} with its adapter")
    print(f"5 to 9: {accuracy(predict(scratch, held_out.pixels), held_out, unseen):.1%} of one trained from scratch")

    adapter.save_pretrained(options.out / "adapter")
    (options.out / "model.msgpack").write_bytes(serialization.to_bytes(variables))
    reread = serialization.from_bytes(fresh, (options.out / "model.msgpack").read_bytes())
    again = load_adapter(options.out / "adapter", reread, layouts=layouts)
    if not np.array_equal(predict_adapted(reread, again, held_out.pixels), logits):
        sys.exit("the reloaded model and adapter give other logits")
    print(f"the reloaded model and adapter give the same logits; they are in {options.out}")


def parse_arguments() -> argparse.Namespace:
    """The command line; `--smoke` makes every part a few steps long."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default="runs/04_vit_linen", help="where to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=300, help="steps of each training (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="a few steps of everything, as a test")
    options = parser.parse_args()
    options.steps = 4 if options.smoke else options.steps
    return options


def load_images() -> tuple[Images, Images]:
    """Images to train on and images to hold out, from the files that scikit-learn brings along."""
    data = load_digits()
    pixels = (data.images / 16).astype(np.float32)
    return tuple(Images(pixels[part], data.target[part]) for part in (slice(-HELD_OUT), slice(-HELD_OUT, None)))


def trainer(variables_of: Callable, steps: int, *, learning_rate: float) -> Callable:
    """A function that trains a tree with AdamW, where the model computes with `variables_of(tree, frozen)`."""
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0, learning_rate, max(1, steps // 10), steps))

    @jax.jit
    def step(tree: Any, state: Any, frozen: Any, batch: Images) -> tuple[Any, Any, jax.Array]:
        def loss(tree: Any) -> jax.Array:
            logits = ViT().apply(variables_of(tree, frozen), batch.pixels)
            return optax.softmax_cross_entropy_with_integer_labels(logits, batch.digits).mean()

        value, grads = jax.value_and_grad(loss)(tree)
        updates, state = optimizer.update(grads, state, tree)
        return optax.apply_updates(tree, updates), state, value

    def train(name: str, tree: Any, frozen: Any, images: Images) -> Any:
        state, rng = optimizer.init(tree), np.random.default_rng(0)
        for count in range(1, steps + 1):
            rows = rng.choice(len(images.digits), BATCH_SIZE, replace=False)
            tree, state, loss = step(tree, state, frozen, Images(*(array[rows] for array in images)))
            if count % 100 == 0:
                print(f"{name}: step {count}/{steps}, loss {loss:.3f}", file=sys.stderr)
        return tree

    return train


def accuracy(logits: jax.Array, images: Images, among: np.ndarray) -> float:
    """The share, among some images, of those whose likeliest digit is the right one."""
    return float((np.asarray(logits).argmax(-1) == images.digits)[among].mean())


if __name__ == "__main__":
    main()
