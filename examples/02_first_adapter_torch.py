# %% [markdown]
"""A first adapter in torch: a frozen 4-bit network learns to read rotated digits; saved, loaded, switched off, merged.

Run `python examples/02_first_adapter_torch.py`, or the notebook of the same name. It needs `pip install "randlora[bnb]"
scikit-learn`, and takes 15 seconds on two CPU cores; the last line is

    the reloaded adapter gives the same logits; it is in runs/02_first_adapter_torch
"""

# %% [markdown]
# RandLoRA leaves the weights of a model as they are and adds to each an update of full rank, of which only a few
# scalings are trained: `W + dW`, `dW = s * sum_i B_i diag(lambda_i) A diag(gamma_i)` with random bases A and B that all
# layers share.

# %%
import copy
import sys
from pathlib import Path

import bitsandbytes as bnb
import torch
from sklearn.datasets import load_digits
from torch import nn

import randlora_torch

OUT = Path("runs/02_first_adapter_torch")
STEPS = 5 if "--smoke" in sys.argv else 150
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# %% [markdown]
# ## The model you have
#
# Here it is a small network that reads handwritten digits, trained and then quantized to NF4. Yours may be any torch
# model; one of transformers is loaded in 4 bits with `BitsAndBytesConfig(load_in_4bit=True)`.

# %%
torch.manual_seed(0)
images, digits = load_digits(return_X_y=True)  # (1797, 64), (1797,)
upright = torch.tensor(images / 16, dtype=torch.float32, device=DEVICE)
rotated = upright.reshape(-1, 8, 8).rot90(dims=(1, 2)).reshape(-1, 64)  # (N, 64) -> (N, 8, 8) -> (N, 64)
digits = torch.tensor(digits, device=DEVICE)
TRAINING, HELD_OUT = slice(0, 1297), slice(1297, None)


class Network(nn.Module):
    """Images (N, 64) to logits (N, 10)."""

    def __init__(self, linear: type[nn.Module] = nn.Linear):
        super().__init__()
        self.up = linear(64, 256)
        self.mix = linear(256, 256)
        self.head = nn.Linear(256, 10)  # as with transformers, the last layer is not quantized

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        return self.head(self.mix(self.up(x).relu()).relu())


def train(model: nn.Module, pixels: torch.Tensor, learning_rate: float) -> None:
    """Train what requires a gradient with Adam, all images at each step."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=learning_rate)
    for count in range(1, STEPS + 1):
        loss = nn.functional.cross_entropy(model(pixels[TRAINING]), digits[TRAINING])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if count % 50 == 0:
            print(f"step {count}: loss {loss:.4f}")


@torch.no_grad()
def accuracy(model: nn.Module, pixels: torch.Tensor) -> str:
    """The share of held-out images that the model reads right."""
    return f"{(model(pixels[HELD_OUT]).argmax(-1) == digits[HELD_OUT]).float().mean():.1%}"


trained = Network().to(DEVICE)
train(trained, upright, 1e-3)
base = Network(lambda *sizes: bnb.nn.Linear4bit(*sizes, quant_type="nf4", compute_dtype=torch.float32))
base.load_state_dict(trained.state_dict())
base = base.to(DEVICE).requires_grad_(False)  # moving it quantizes it
print("upright images:", accuracy(base, upright), "rotated images:", accuracy(base, rotated))

# %% [markdown]
# ## The adapter
#
# `get_peft_model` attaches it in place and returns the model, which stays what it was. A smaller `r` trains *more*
# parameters: a layer whose short side is m has ceil(m / r) bases, each with r + m scalings. `randlora_alpha / r` scales
# the update.

# %%
config = randlora_torch.RandLoraConfig(r=16, randlora_alpha=160, target_modules="all-linear")
model = randlora_torch.get_peft_model(copy.deepcopy(base), config)
model.print_trainable_parameters()
assert torch.equal(model(rotated), base(rotated))  # lambda starts at zero: nothing has changed yet

# %%
train(model, rotated, 3e-3)
print("rotated images, with the adapter:", accuracy(model, rotated))

# %% [markdown]
# ## Saved, loaded, switched off, merged
#
# The folder is in the format of Hugging Face PEFT; `randlora_jax` and `peft` read it as well.

# %%
model.save_pretrained(OUT)
again = randlora_torch.load_adapter(copy.deepcopy(base), OUT)
assert torch.equal(again(rotated), model(rotated))

again.disable_adapter_layers()
print("upright images, adapter switched off:", accuracy(again, upright))
again.enable_adapter_layers()

# %% [markdown]
# W + dW, rounded to 4 bits again, is not W + dW any more: merging says by how much, layer by layer, and the original
# bytes come back with `unmerge_adapter`. Before serving a merged 4-bit model, look at these numbers, and at its
# accuracy.

# %%
for name, error in again.merge_adapter().items():
    print(f"{name}: rounding takes {error.of_weight:.1%} of the merged weight, {error.of_update:.1%} of the update")
print("rotated images, merged into 4 bits:", accuracy(again, rotated))
again.unmerge_adapter()
assert torch.equal(again(rotated), model(rotated))
print(f"the reloaded adapter gives the same logits; it is in {OUT}")
