"""The model card beside an adapter: only what the adapter itself says, and how to load it in both stacks."""

import contextlib
import json
import os
import secrets
from pathlib import Path
from string import Template

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.fields import AdapterConfig

CARD_NAME = "README.md"
MARK = "<!-- Written by randlora with the adapter, and anew at each save as long as this line stands here. -->"

_TEXT = Template("""---
$front
---
$mark

# $method adapter$of

$summary

| | |
| --- | --- |
$facts

## Use it in PyTorch

```python
import randlora_torch
$load_base
randlora_torch.load_adapter(model, $here)
```

PEFT reads it as well: `peft.PeftModel.from_pretrained(model, $here)`.

## Use it in JAX

```python
import randlora_jax

randlora_jax.attach(model, $here)  # a Flax NNX model
adapter = randlora_jax.load_adapter($here, params)  # any pytree of parameters
```

Where the JAX model calls or arranges its kernels otherwise than the names below, pass `layouts`.

## Adapted layers

$layers
""")


def model_card(adapter: Adapter) -> str:
    """The text of an adapter's README.md, with the metadata that the Hugging Face hub reads on top."""
    config = adapter.config
    base, here = " ".join((config.base_model_name_or_path or "").split()), json.dumps("path/to/this/folder")
    front = [f"base_model: {json.dumps(base)}"] if base else []
    front += ["library_name: peft", "tags:", f"- {config.METHOD.lower()}", "- randlora"]
    facts = _of_adalora(adapter) if isinstance(config, AdaLoraConfig) else _of_randlora(adapter)
    facts["trainable parameters"] = f"{adapter.num_trainable:,d} in {len(adapter.factors)} layers"
    facts["stored as"] = ", ".join(sorted({str(part.dtype) for parts in adapter.factors.values() for part in parts}))
    if adapter.saved_weights:
        facts["other trained tensors"] = ", ".join(f"`{key}`" for key in sorted(adapter.saved_weights))
    return _TEXT.substitute(
        front="\n".join(dict.fromkeys(front)),
        mark=MARK,
        method=config.METHOD,
        of=f" for {base}" if base else "",
        summary=_SUMMARY[config.METHOD],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        load_base=_load_base(config, base),
        here=here,
        layers="\n".join(f"- `{name}`{_size(adapter, name)}" for name in adapter.factors),
    )


_SUMMARY = {
    "RandLoRA": (
        "A full-rank update `dW = s * B (lambda * A * gamma)` of frozen random bases A and B and trained scalings"
        " lambda and gamma ([arXiv:2502.00987](https://arxiv.org/abs/2502.00987))."
    ),
    "AdaLoRA": (
        "A low-rank update `dW = s * B (E * A)`, whose ranks were chosen layer by layer in training"
        " ([arXiv:2303.10512](https://arxiv.org/abs/2303.10512))."
    ),
}


_AUTO_CLASSES = {"CAUSAL_LM": "AutoModelForCausalLM", "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM"}
_AUTO_CLASSES |= {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}


def _load_base(config: AdapterConfig, base: str) -> str:
    """Code that gives the base model, as far as the config says which it is."""
    mapping = config.auto_mapping or {}
    of_transformers = str(mapping.get("parent_library", "")).startswith("transformers.")
    name = mapping.get("base_model_class") if of_transformers else _AUTO_CLASSES.get(config.task_type or "")
    if not isinstance(name, str) or not name.isidentifier():
        return "\nmodel = ...  # the base model"
    folder = json.dumps(base or "path/to/the/base/model")
    return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({folder})"


def _of_randlora(adapter: Adapter) -> dict[str, str]:
    config = adapter.config
    kind = "very sparse" if config.very_sparse else "sparse" if config.sparse else "dense"
    where = "in the file, once" if config.save_projection else "rebuilt from the seed"
    return {
        "r, alpha": f"{config.r}, {config.randlora_alpha:g}",
        "bases": f"{kind}, seed {config.projection_prng_key}, {where}",
        "recipe of the bases": f"`{adapter.recipe}`" if adapter.recipe else "unknown; they are in the file",
    }


def _of_adalora(adapter: Adapter) -> dict[str, str]:
    config = adapter.config
    ranks = [len(factors.E) for factors in adapter.factors.values()]
    return {
        "ranks": f"{sum(ranks)} in all, {min(ranks)} to {max(ranks)} a layer; training began with {config.init_r} each",
        "alpha": f"{config.lora_alpha:g}",
    }


def _size(adapter: Adapter, name: str) -> str:
    return f" ({' x '.join(map(str, adapter.shapes[name]))})" if adapter.shapes else ""


def write_card(adapter: Adapter, directory: Path) -> None:
    """Put the card into a folder, unless the README.md there is somebody else's."""
    place = directory / CARD_NAME
    try:
        if MARK not in place.read_text(encoding="utf-8"):
            return
    except FileNotFoundError:
        pass
    except ValueError:  # no UTF-8
        return
    new = directory / f".{CARD_NAME}.{secrets.token_hex(8)}.new"
    try:
        new.write_text(model_card(adapter), encoding="utf-8", newline="\n")
        os.replace(new, place)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(new)
