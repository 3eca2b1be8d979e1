# %% [markdown]
"""An adapter trained in Flax goes on training in torch, comes back, and is served merged; nothing is lost on the way.

Run `python examples/03_move_an_adapter.py`. It needs `pip install "randlora[jax,torch]" scikit-learn`, and takes 15
seconds on two CPU cores; the last line is

    Flax and torch give the same logits; the adapters are in runs/03_move_an_adapter
"""

# %% [markdown]
# Both stacks, and PEFT, agree on what an adapter is: the bases that a seed gives, lambda and gamma of each layer, and
# how they are paired. So moving is renaming, and any round trip gives the same bytes.

# %%
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import nnx
from sklearn.datasets import load_digits

import interop
import randlora_jax
import randlora_torch

OUT = Path("runs/03_move_an_adapter")
STEPS = 5 if "--smoke" in sys.argv else 200

# %% [markdown]
# ## One model in two stacks
#
# The layers have the same names in both. (For models of libraries whose names differ there are tables of layouts,
# `randlora_jax.LAYOUTS`, and rules of your own.) The weights are random here: the adapter does all the learning.

# %%
images, digits = load_digits(return_X_y=True)  # (1797, 64), (1797,)
pixels = (images / 16).astype(np.float32)
TRAINING, HELD_OUT = slice(0, 1297), slice(1297, None)


class Network(nnx.Module):
    """Images (N, 64) to logits (N, 10), in Flax."""

    def __init__(self, rngs: nnx.Rngs):
        self.up = nnx.Linear(64, 256, rngs=rngs)
        self.head = nnx.Linear(256, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """The logits."""
        return self.head(nnx.relu(self.up(x)))


class TorchNetwork(torch.nn.Module):
    """The same in torch."""

    def __init__(self) -> None:
        super().__init__()
        self.up = torch.nn.Linear(64, 256)
        self.head = torch.nn.Linear(256, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.head(self.up(x).relu())


def new_flax() -> Network:
    """The model without an adapter; the same weights at each call."""
    return Network(nnx.Rngs(0))


def new_torch() -> TorchNetwork:
    """The weights of `new_flax`, whose kernels are (in, out) where torch's weights are (out, in)."""
    model, source = TorchNetwork(), new_flax()
    for name in ("up", "head"):
        layer, linear = getattr(source, name), getattr(model, name)
        linear.weight.data = torch.tensor(np.asarray(layer.kernel).T)
        linear.bias.data = torch.tensor(np.asarray(layer.bias))
    return model


def accuracy(logits: np.ndarray) -> str:
    """The share of held-out images that are read right."""
    return f"{(np.asarray(logits)[HELD_OUT].argmax(-1) == digits[HELD_OUT]).mean():.1%}"


# %% [markdown]
# ## Trained in Flax

# %%
config = randlora_jax.RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear")
flax_model = randlora_jax.attach(new_flax(), config)
optimizer = nnx.Optimizer(flax_model, optax.adam(3e-3), wrt=randlora_jax.RandLoraParam)


@nnx.jit
def step(model: nnx.Module, optimizer: nnx.Optimizer) -> None:
    """One step of Adam, all images at once."""

    def loss(model: nnx.Module) -> jax.Array:
        logits = model(jnp.asarray(pixels[TRAINING]))
        return optax.softmax_cross_entropy_with_integer_labels(logits, jnp.asarray(digits[TRAINING])).mean()

    optimizer.update(model, nnx.grad(loss, argnums=nnx.DiffState(0, randlora_jax.RandLoraParam))(model))


for _ in range(STEPS):
    step(flax_model, optimizer)
print("trained in Flax:", accuracy(flax_model(jnp.asarray(pixels))))
randlora_jax.extract(flax_model).save_pretrained(OUT / "from_flax")

# %% [markdown]
# ## On to torch
#
# `convert` takes the model as it is, or the folder, and returns what the other stack attaches.

# %%
moved = interop.convert(flax_model, to="torch")
torch_model = randlora_torch.load_adapter(new_torch(), moved, is_trainable=True)
with torch.no_grad():
    difference = np.abs(torch_model(torch.tensor(pixels)).numpy() - np.asarray(flax_model(jnp.asarray(pixels)))).max()
print(f"largest difference of the logits: {difference:.1e}")
assert difference < 1e-4

torch_model.save_pretrained(OUT / "from_torch")
names = ("from_flax", "from_torch")
assert len({(OUT / name / "adapter_model.safetensors").read_bytes() for name in names}) == 1  # not a bit is lost

# %% [markdown]
# `verify` says the same of any two adapters, folders or models: the update of every layer by the definition in float64,
# by JAX and by torch. On the command line it is `randlora verify A B`.

# %%
report = interop.verify(OUT / "from_flax", torch_model)
print("verified:", report.passed, {layer.module: layer.identical for layer in report.layers})
assert report.passed
command = [Path(sys.executable).with_name("randlora"), "inspect", OUT / "from_torch"]
print(subprocess.run(command, capture_output=True, text=True, check=True).stdout)

# %% [markdown]
# ## It goes on there, and comes back

# %%
trained = [parameter for parameter in torch_model.parameters() if parameter.requires_grad]
torch_optimizer = torch.optim.Adam(trained, lr=1e-3)
for _ in range(STEPS):
    loss = torch.nn.functional.cross_entropy(
        torch_model(torch.tensor(pixels[TRAINING])), torch.tensor(digits[TRAINING])
    )
    loss.backward()
    torch_optimizer.step()
    torch_optimizer.zero_grad()
torch_model.save_pretrained(OUT / "adapter")
back = randlora_jax.attach(new_flax(), OUT / "adapter")
print("trained on in torch, read in Flax:", accuracy(back(jnp.asarray(pixels))))
changed = interop.diff(OUT / "from_flax", OUT / "adapter")  # on the command line: randlora diff A B
print("by |difference| / |dW|:", {layer.module: f"{layer.relative:.2f}" for layer in changed.layers})

# %% [markdown]
# ## Served
#
# Merged, the model is an ordinary one again, in either stack. For servers that know LoRA only, `export_lora` gives the
# closest LoRA of a rank, and says how far from the adapter it is.

# %%
merged = torch_model.merge_and_unload()
with torch.no_grad():
    in_torch = merged(torch.tensor(pixels)).numpy()
in_flax = np.asarray(randlora_jax.detach(back, merge=True)(jnp.asarray(pixels)))
np.testing.assert_allclose(in_torch, in_flax, atol=1e-3)  # of logits around 10
print("merged:", accuracy(in_torch))

exported = interop.export_lora(OUT / "adapter", OUT / "as_lora", rank=8)
print("a LoRA of rank 8 misses, of each update:", {name: f"{error:.0%}" for name, error in exported.errors.items()})
print(f"Flax and torch give the same logits; the adapters are in {OUT}")
