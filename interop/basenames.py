"""Which tensors of a base model an adapter means: its names, which may lack or have a prefix more than the file's.

A file of `GPT2Model` names `h.0.attn.c_attn.weight` what is `transformer.h.0.attn.c_attn` in the `GPT2LMHeadModel` that
was adapted; transformers adds and strips such a prefix when it loads.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

from interop.adapter import Adapter
from interop.errors import bulleted
from interop.fields import AdapterConfig
from interop.targets import EMBEDDINGS, in_modules

_HEADS = ("ForCausalLM", "LMHeadModel", "ForMaskedLM", "ForConditionalGeneration")  # their output may be tied
_EMBEDDED = ("embed_tokens", "wte", "word_embeddings", "shared", "embed_in", "tokens_embed")
_TRIED = 8  # modules that a prefix is looked for with
# The layers that are transformers' Conv1D, (in, out), by the model_type of a config: whatever a file says, they are.
_CONV1D_LAYERS = ("c_attn", "q_attn", "c_fc", "c_proj")
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer", "clvp", "clvp_decoder")


class BaseNames(NamedTuple):
    """What an adapter's parts are called in the base.

    Attributes:
        weights: The name of the weight of each adapted module.
        saved: The name of each of `saved_weights`, by its key there.
    """

    weights: dict[str, str]
    saved: dict[str, str]


def match_names(adapter: Adapter, base: Collection[str], config: Mapping[str, Any]) -> BaseNames:
    """Find the adapter's parts among the names of the base's weights, as they are or with one prefix more or less.

    Args:
        adapter: Any.
        base: The names of its tensors.
        config: The content of its config.json.

    Raises:
        ValueError: a part has no place in the base, or it is open which; both sides are listed.
    """
    own = {key: _torch_name(key) for key in adapter.saved_weights}
    rename = _renaming(adapter, base, set(own.values()))
    weights = {module: rename(f"{module}.weight") for module in adapter.modules}
    saved = {key: name if name in base else rename(name) for key, name in own.items()}
    known = {*base, *saved.values()}
    missing = [module for module, name in weights.items() if name not in known]
    if missing:
        raise ValueError(_unknown_modules(missing, base, config))
    _check_new(adapter.config, own, saved, base)
    _check_tied(saved, base, config)
    return BaseNames(weights, saved)


def _torch_name(key: str) -> str:
    return key.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _renaming(adapter: Adapter, base: Collection[str], saved: set[str]) -> Callable[[str], str]:
    """From a name in the adapter to one in the base: the only prefix to strip or add that fits the most modules."""
    names = [f"{module}.weight" for module in adapter.modules]

    def fits(rename: Callable[[str], str]) -> int:
        return sum(rename(name) in base or name in saved for name in names)

    same: Callable[[str], str] = str
    if fits(same) == len(names):
        return same
    few = names[:_TRIED]
    others = [*map(_stripping, _prefixes(few)), *map(_adding, _added_prefixes(few, base))]
    best = max(map(fits, others), default=0)
    found = [rename for rename in others if fits(rename) == best]
    if best <= fits(same):
        return same
    if len(found) > 1:
        candidates = [f"{names[0]} -> {rename(names[0])}" for rename in found]
        raise ValueError(bulleted("the adapter's names fit more than one part of the base", candidates))
    return found[0]


def _prefixes(names: Iterable[str]) -> list[str]:
    """What could be stripped: everything that ends in a dot in front of a name."""
    parts = [name.split(".") for name in names]
    return sorted({".".join(part[:count]) + "." for part in parts for count in range(1, len(part) - 1)})


def _added_prefixes(names: Iterable[str], base: Collection[str]) -> list[str]:
    found = {key.removesuffix(name) for name in names for key in base if key.endswith(f".{name}")}
    return sorted(found)


def _stripping(prefix: str) -> Callable[[str], str]:
    return lambda name: name.removeprefix(prefix)


def _adding(prefix: str) -> Callable[[str], str]:
    return lambda name: prefix + name


def _unknown_modules(missing: list[str], base: Collection[str], config: Mapping[str, Any]) -> str:
    have = ", ".join(repr(name) for name in sorted(base) if name.endswith(".weight"))
    lines = []
    for module in missing:
        tied = module.rpartition(".")[2] in ("lm_head", "embed_out") and _may_be_tied(base, config)
        lines.append(
            f"{module}: it is tied to the input embeddings, which merging would change as well. Load the base in"
            " transformers, untie the two (tie_word_embeddings=False), save it, and merge into that."
            if tied
            else f"{module}.weight"
        )
    shown = have if len(have) < 400 else f"{have[:400]}..."
    return bulleted(f"the base lacks these adapted layers, with any prefix (it has {shown})", lines)


def _may_be_tied(base: Collection[str], config: Mapping[str, Any]) -> bool:
    """Whether a language model's file has no output embeddings of its own."""
    architectures = config.get("architectures") or ()
    untied = config.get("tie_word_embeddings") is False or any(_is_head(name) for name in base)
    return not untied and (
        bool(config.get("tie_word_embeddings")) or any(str(name).endswith(_HEADS) for name in architectures)
    )


def _is_head(name: str) -> bool:
    return name.split(".")[-2:] in (["lm_head", "weight"], ["embed_out", "weight"])


def _check_new(config: AdapterConfig, own: dict[str, str], saved: dict[str, str], base: Collection[str]) -> None:
    """Only whole modules may be new to the base; a bias that no layer of the base has would be dropped on loading."""
    wrong = []
    for key, name in saved.items():
        module = own[key].rpartition(".")[0]
        whole = in_modules(module, config.modules_to_save) or module.rpartition(".")[2] in EMBEDDINGS
        if name not in base and not whole:
            wrong.append(f"{name} ({key})")
    if wrong:
        raise ValueError(bulleted("the base has no place for these trained weights; it is another model", wrong))
    if len(set(saved.values())) < len(saved):
        raise ValueError(bulleted("several trained weights have the same name in the base", sorted(saved.values())))


def _check_tied(saved: dict[str, str], base: Collection[str], config: Mapping[str, Any]) -> None:
    """Trained input embeddings of a tied base: the output keeps the old ones in training, but not in the file."""
    if not _may_be_tied(base, config) or any(map(_is_head, saved.values())):
        return
    wrong = [name for name in saved.values() if name.split(".")[-2:-1] and name.split(".")[-2] in _EMBEDDED]
    if wrong:
        raise ValueError(
            bulleted(
                "the base ties its output to these embeddings, which the adapter trained alone. Load the base in"
                " transformers, untie the two (tie_word_embeddings=False), save it, and merge into that",
                wrong,
            )
        )


def unties(names: BaseNames, base: Collection[str]) -> bool:
    """Whether the adapter brings output embeddings that the base's file had not, being tied."""
    return any(_is_head(name) and name not in base for name in names.saved.values())


def is_known_conv1d(name: str, config: Mapping[str, Any]) -> bool | None:
    """Whether the weight of that name is stored (in, out), by the kind of model; None for a kind that has no Conv1D."""
    if config.get("model_type") not in _CONV1D_MODELS:
        return None
    return name.endswith(".weight") and name.split(".")[-2] in _CONV1D_LAYERS
