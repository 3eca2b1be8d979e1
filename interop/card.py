"""The model card beside an adapter: only what the adapter itself says, and how to load it in both stacks."""

import contextlib
import json
import os
import re
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from string import Template

from interop.adalora import AdaLoraConfig
from interop.adapter import Adapter
from interop.errors import legible
from interop.fields import AdapterConfig
from interop.regularfile import read_at_most

CARD_NAME = "README.md"
MAX_READ = 1 << 16  # bytes; the mark stands near the top
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

PEFT reads it as well: `peft.PeftModel.from_pretrained(model, $here)`.$in_peft

## Use it in JAX

```python
import randlora_jax

randlora_jax.attach(model, $here)  # a Flax NNX model; or

adapter = randlora_jax.load_adapter($here, params)  # any pytree of parameters
weights = randlora_jax.effective_params(params, adapter)  # W + dW
```

Where the JAX model calls or arranges its kernels otherwise than the names below, pass `layouts`.

## Adapted layers

$layers

## Other trained tensors
$others
""")


def model_card(adapter: Adapter) -> str:
    """The text of an adapter's README.md, with the metadata that the Hugging Face hub reads on top."""
    config, base = adapter.config, _base_model(adapter.config)
    front = [
        *_base_line(base),
        "library_name: peft",
        "tags:",
        *dict.fromkeys((f"- {config.METHOD.lower()}", "- randlora")),
    ]
    facts = _of_adalora(adapter) if isinstance(config, AdaLoraConfig) else _of_randlora(adapter)
    facts["trainable parameters"] = f"{adapter.num_trainable:,d} in {len(adapter.factors)} layers"
    facts["stored as"] = ", ".join(sorted({str(part.dtype) for parts in adapter.factors.values() for part in parts}))
    here = _quoted("path/to/this/folder")
    return _TEXT.substitute(
        front="\n".join(front),
        mark=MARK,
        method=config.METHOD,
        of=f" for {_code(base)}" if base else "",
        summary=_SUMMARY[config.METHOD],
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        load_base=_load_base(config, base),
        in_peft=_in_peft(adapter),
        here=here,
        layers="\n".join(f"- {_code(name)}{_size(adapter, name)}" for name in adapter.factors),
        others="".join(f"\n- {_code(key)}" for key in sorted(adapter.saved_weights)) or "\n- none",
    )


_LORA_TEXT = Template("""---
$front
---
$mark

# LoRA of rank $rank$of

The closest updates of rank $rank to those of a $method adapter. The relative error of a layer is
`|dW - B A| / |dW|` in Frobenius norm.

| layer | relative error |
| --- | --- |
$errors
""")


def lora_card(adapter: Adapter, rank: int, errors: Mapping[str, float]) -> str:
    """The text of the README.md beside a LoRA that stands for an adapter: what it leaves out."""
    base = _base_model(adapter.config)
    return _LORA_TEXT.substitute(
        front="\n".join([*_base_line(base), "library_name: peft", "tags:", "- lora"]),
        mark=MARK,
        rank=rank,
        of=f" for {_code(base)}" if base else "",
        method=adapter.config.METHOD,
        errors="\n".join(
            f"| {_code(name).replace('|', chr(92) + '|')} | {error:.2e} |" for name, error in errors.items()
        ),
    )


def _base_line(base: str) -> list[str]:
    return [f"base_model: {_quoted(base)}"] if base and _REPOSITORY.fullmatch(base) else []


# What a base model is called on the hub, and what a path may look like besides. Any other name is left out, as it goes
# into YAML, Markdown and Python.
_REPOSITORY = re.compile(r"(?a)\w[\w.-]*(/\w[\w.-]*)?")
_PATH = re.compile(r"[\w .,:/\\~@+=-]{1,200}")


def _base_model(config: AdapterConfig) -> str:
    name = config.base_model_name_or_path or ""
    return name if _PATH.fullmatch(name) and name.strip() == name else ""


def _quoted(text: str) -> str:
    """A string in Python and in YAML."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: str) -> str:
    """A text as code in Markdown, inside more backticks in a row than it has itself. In a table, "|" would end it."""
    text = legible(text)
    fence = "`" * (1 + max(map(len, re.findall("`+", text)), default=0))
    space = " " if "`" in (text[:1], text[-1:]) or text.startswith(" ") else ""
    return f"{fence}{space}{text}{space}{fence}"


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
    if not isinstance(name, str) or not re.fullmatch(r"(?a)[A-Z]\w*", name):
        return "\nmodel = ...  # the base model"
    folder = _quoted(base or "path/to/the/base/model")
    return f"from transformers import {name}\n\nmodel = {name}.from_pretrained({folder})"


def _in_peft(adapter: Adapter) -> str:
    config = adapter.config
    if isinstance(config, AdaLoraConfig) or config.save_projection or config.ternary or not adapter.recipe:
        return ""
    return f" It draws the bases itself, and draws these under the torch that {_code(adapter.recipe)} names only."


def _of_randlora(adapter: Adapter) -> dict[str, str]:
    config = adapter.config
    kind = "very sparse" if config.very_sparse else "sparse" if config.sparse else "dense"
    seed = f"seed {config.projection_prng_key}, "
    where = "in the file" if config.save_projection else "rebuilt from the seed"
    return {
        "r, alpha": f"{config.r}, {config.randlora_alpha}",
        "bases": f"{kind}, {'' if config.save_projection and not adapter.recipe else seed}{where}",
        "recipe of the bases": _code(adapter.recipe) if adapter.recipe else "unknown",
    }


def _of_adalora(adapter: Adapter) -> dict[str, str]:
    config = adapter.config
    ranks = [len(factors.E) for factors in adapter.factors.values()]
    return {
        "ranks": f"{sum(ranks)} in all, {min(ranks)} to {max(ranks)} a layer; training began with {config.init_r} each",
        "alpha": f"{config.lora_alpha}",
    }


def _size(adapter: Adapter, name: str) -> str:
    return f" ({' x '.join(map(str, adapter.shapes[name]))})" if adapter.shapes else ""


def write_card(card: str, directory: Path) -> None:
    """Put a card into a folder, unless the README.md there is somebody else's; if it cannot be, warn."""
    try:
        _write(card, directory)
    except OSError as error:
        message = f"the adapter was saved, but not its {CARD_NAME} ({error}). model_card=False silences this."
        warnings.warn(message, stacklevel=3)


def _write(card: str, directory: Path) -> None:
    place = directory / CARD_NAME
    if os.path.lexists(place) and not _is_ours(place):
        return
    new = directory / f".{CARD_NAME}.{secrets.token_hex(8)}.new"
    try:
        new.write_text(card, encoding="utf-8", newline="\n")
        os.replace(new, place)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(new)


def _is_ours(place: Path) -> bool:
    try:
        return MARK.encode() in read_at_most(place, MAX_READ)
    except FileNotFoundError:  # no regular file
        return False
