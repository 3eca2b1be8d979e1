"""Which layers a config means: PEFT's rules for names, without PEFT's silence about names that match nothing."""

import difflib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

from interop.adalora import AdaLoraConfig
from interop.fields import AdapterConfig

MAX_LISTED = 20
NOT_LINEAR = "not a linear layer"
EMBEDDINGS = ("embed_tokens", "lm_head")  # whose base weights PEFT saves along if they are targeted or resized

# What target_modules=None means, by the model_type of a transformers config: PEFT 0.21.2's table for RandLoRA.
_ATTENTION = ("q_proj", "v_proj")
_FUSED = ("query_key_value",)
DEFAULT_TARGETS: dict[str, str | tuple[str, ...]] = {
    **dict.fromkeys(("llama", "llama4", "mistral", "mixtral", "qwen2", "qwen3", "stablelm"), _ATTENTION),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "opt", "gptj", "gpt_neo", "bart"), _ATTENTION),
    **dict.fromkeys(("bloom", "gpt_neox", "chatglm", "RefinedWebModel", "RefinedWeb", "falcon"), _FUSED),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "electra", "layoutlm"), ("query", "value")),
    **dict.fromkeys(("t5", "mt5"), ("q", "v")),
    **dict.fromkeys(("gpt2", "gpt_bigcode"), ("c_attn",)),
    "blip-2": ("q", "v", "q_proj", "v_proj"),
    "btlm": ("c_proj", "c_attn"),
    "codegen": ("qkv_proj",),
    "deberta": ("in_proj",),
    "deberta-v2": ("query_proj", "value_proj"),
    "gemma4": r".*language_model\..*\.(q_proj|v_proj)",
    "mpt": ("Wqkv",),
    "nemotron_h": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "phi": ("q_proj", "v_proj", "fc1", "fc2"),
    "rwkv": ("key", "value", "receptance", "output"),
    "rwkv7": ("r_proj", "k_proj", "v_proj", "o_proj", "key", "value"),
}
# Where its table for AdaLoRA says another thing.
ADALORA_TARGETS = {
    "t5": ("q", "k", "v", "o", "wi", "wo"),
    "mt5": ("q", "k", "v", "o", "wi_0", "wi_1", "wo"),
    **dict.fromkeys(("bart", "opt"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")),
    "roberta": ("query", "key", "value", "dense"),
    "deberta-v2": ("query_proj", "key_proj", "value_proj", "dense"),
}


def resolve_targets(
    config: AdapterConfig,
    layers: Sequence[str],
    *,
    output_layers: Iterable[str] = (),
    other_modules: Iterable[str] | Mapping[str, str] = (),
) -> tuple[str, ...]:
    """The adaptable layers that `config` selects, in the order of `layers`.

    A list entry matches a layer of that name, or whose name ends in "." + entry; a string is a regular expression for
    the whole name; "all-linear" is every layer except `output_layers`. Names may be written with "/" in place of ".",
    as in JAX; then a regular expression must write it throughout. `exclude_modules` follows the same rules, and
    whatever lies in one of `modules_to_save` is left out. `layers_to_transform` restricts the layers that were not
    named in full.

    Args:
        config: What to adapt.
        layers: Names of all layers that can be adapted.
        output_layers: Names of the output heads, which "all-linear" leaves out.
        other_modules: Names of modules that cannot be adapted, for a precise message when an entry means one of them;
            a mapping also says what each of them is instead.

    Raises:
        ValueError: target_modules is None, an entry (or layer index) matches nothing, or nothing is left to adapt.
    """
    wanted = config.target_modules
    others = dict(other_modules) if isinstance(other_modules, Mapping) else dict.fromkeys(other_modules, NOT_LINEAR)
    if wanted is None:
        raise ValueError(f"target_modules=None: name the layers to adapt, or use 'all-linear'. {_listing(layers)}")
    if isinstance(wanted, str) and wanted.lower() == "all-linear":
        heads = set(output_layers)
        chosen = [name for name in layers if name not in heads]
    else:
        chosen = _select("target_modules", wanted, layers, others)
    excluded = {name for name in chosen if in_modules(name, config.modules_to_save)}
    if config.exclude_modules:
        excluded.update(_select("exclude_modules", config.exclude_modules, layers, others))
    chosen = _restrict_to_layers(config, [name for name in chosen if name not in excluded])
    if not chosen:
        raise ValueError(
            f"target_modules={wanted!r} with exclude_modules={config.exclude_modules!r},"
            f" modules_to_save={config.modules_to_save!r} and layers_to_transform={config.layers_to_transform!r}"
            f" leaves no layer to adapt. {_listing(layers)}"
        )
    return tuple(chosen)


def in_modules(name: str, entries: Iterable[str] | None) -> bool:
    """Whether something lies in a module that an entry of `modules_to_save` means: by PEFT, any name that ends so."""
    parts = name.split(".")
    ends = tuple(entries or ())
    return bool(ends) and any(".".join(parts[:k]).endswith(ends) for k in range(1, len(parts) + 1))


def default_targets(model_type: str | None, config: AdapterConfig | None = None) -> str | tuple[str, ...] | None:
    """What `target_modules=None` means for a transformers model, or None if nothing is known of it."""
    of_adalora = ADALORA_TARGETS if isinstance(config, AdaLoraConfig) else {}
    return (DEFAULT_TARGETS | of_adalora).get(model_type or "")


def _matcher(entry: str, *, regex: bool) -> Callable[[str], bool]:
    if regex:
        separator = "/" if "/" in entry else "."
        return lambda name: re.fullmatch(entry, name.replace(".", separator)) is not None
    dotted = entry.replace("/", ".")
    return lambda name: name == dotted or name.endswith("." + dotted)


def _select(field: str, wanted: str | tuple[str, ...], layers: Sequence[str], others: Mapping[str, str]) -> list[str]:
    """Layers matched by the entries of one config field; every entry must match at least one."""
    entries = (wanted,) if isinstance(wanted, str) else wanted
    matched: set[str] = set()
    for entry in entries:
        try:
            hits = list(filter(_matcher(entry, regex=isinstance(wanted, str)), layers))
        except re.error as error:
            raise ValueError(f"{field}={entry!r} is not a valid regular expression: {error}.") from error
        if not hits:
            raise ValueError(_no_match(field, entry, layers, others, regex=isinstance(wanted, str)))
        matched.update(hits)
    return [name for name in layers if name in matched]


def _no_match(field: str, entry: str, layers: Sequence[str], others: Mapping[str, str], *, regex: bool) -> str:
    message = f"{field} entry {entry!r} matches none of the {len(layers)} adaptable layers."
    if regex and any(map(_matcher(entry, regex=False), layers)):
        return f"{message} A string is a regular expression for the whole name; for a suffix write [{entry!r}]."
    unsupported = list(filter(_matcher(entry, regex=regex), others))
    if unsupported:
        name = unsupported[0]
        return f"{message} It matches {name!r}, which is {others[name]}. {_listing(layers)}"
    near = _nearest(entry.replace("/", "."), layers)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    return f"{message}{hint} {_listing(layers)}"


def _nearest(entry: str, layers: Sequence[str]) -> list[str]:
    """Up to three endings of names, of as many parts as the entry has, that it may be a misspelling of."""
    count = entry.count(".") + 1
    endings = list(dict.fromkeys(".".join(name.split(".")[-count:]) for name in layers))
    close = difflib.get_close_matches(entry, endings, n=3, cutoff=0.75)
    return close or difflib.get_close_matches(entry, endings, n=1, cutoff=0.5)


def _listing(layers: Sequence[str]) -> str:
    """The candidates, one per distinct ending (a deep model repeats each of them in every layer)."""
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    shown = ", ".join(endings[:MAX_LISTED]) + (", ..." if len(endings) > MAX_LISTED else "")
    return f"Adaptable layers end in: {shown}." if endings else "The model has no adaptable layer."


def _layer_index(name: str, patterns: tuple[str, ...]) -> int | None:
    """Index of the block that `name` lies in: the first number after a module list (any, or one named in patterns)."""
    for pattern in (rf"(?:^|.*?\.){pattern}" for pattern in patterns) if patterns else (r".*?\.[^.]*",):
        found = re.match(rf"{pattern}\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None


def _restrict_to_layers(config: AdapterConfig, chosen: list[str]) -> list[str]:
    """Of the layers that were not named in full, those in the blocks that `layers_to_transform` lists."""
    indices, patterns = config.layers_to_transform, config.layers_pattern or ()
    if indices is None or indices == ():
        if patterns:
            raise ValueError(
                f"layers_pattern={patterns!r} selects among layers_to_transform: set that too, or drop this."
            )
        return chosen
    if isinstance(config.target_modules, str) and config.target_modules.lower() != "all-linear":
        raise ValueError(
            f"layers_to_transform={indices!r} needs target_modules to be a list: a regular expression, such as"
            f" {config.target_modules!r}, can name the layer indices itself."
        )
    wanted = {indices} if isinstance(indices, int) else set(indices)
    try:
        index = {name: _layer_index(name, (patterns,) if isinstance(patterns, str) else patterns) for name in chosen}
    except re.error as error:
        raise ValueError(f"layers_pattern={patterns!r} is not a valid regular expression: {error}.") from error
    missing = wanted - set(index.values())
    if missing:
        present = sorted({i for i in index.values() if i is not None})
        raise ValueError(
            f"layers_to_transform={sorted(missing)} matches no targeted layer: the indices found are {present}"
            f" (layers_pattern={config.layers_pattern!r}). Correct the indices or the pattern."
        )
    named = set(config.target_modules or ()) if not isinstance(config.target_modules, str) else set()
    return [name for name in chosen if name in named or index[name] in wanted]
