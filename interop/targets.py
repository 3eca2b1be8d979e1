"""Which layers a config means: PEFT's rules for names, without PEFT's silence about names that match nothing."""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

from interop.config import RandLoraConfig

MAX_LISTED = 20


def resolve_targets(
    config: RandLoraConfig,
    layers: Sequence[str],
    *,
    output_layers: Iterable[str] = (),
    other_modules: Iterable[str] = (),
) -> tuple[str, ...]:
    """The adaptable layers that `config` selects, in the order of `layers`.

    A list entry matches a layer of that name, or whose name ends in "." + entry; a string is a regular expression for
    the whole name; "all-linear" is every layer except `output_layers`. `exclude_modules` follows the same rules.

    Args:
        config: Its target_modules, exclude_modules, layers_to_transform and layers_pattern are read.
        layers: Names of all layers that can be adapted.
        output_layers: Names of the output heads, which "all-linear" leaves out.
        other_modules: Names of modules that cannot be adapted, for a precise message when an entry means one of them.

    Raises:
        ValueError: target_modules is None, an entry (or layer index) matches nothing, or nothing is left to adapt.
    """
    if config.target_modules is None:
        raise ValueError(f"target_modules=None: name the layers to adapt, or use 'all-linear'. {_listing(layers)}")
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        heads = set(output_layers)
        chosen = [name for name in layers if name not in heads]
    else:
        chosen = _select("target_modules", config.target_modules, layers, tuple(other_modules))
    if config.exclude_modules:
        excluded = set(_select("exclude_modules", config.exclude_modules, layers, tuple(other_modules)))
        chosen = [name for name in chosen if name not in excluded]
    chosen = _restrict_to_layers(config, chosen)
    if not chosen:
        raise ValueError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} and"
            f" layers_to_transform={config.layers_to_transform!r} leaves no layer to adapt. {_listing(layers)}"
        )
    return tuple(chosen)


def _matcher(entry: str, *, regex: bool) -> Callable[[str], bool]:
    if regex:
        return lambda name: re.fullmatch(entry, name) is not None
    return lambda name: name == entry or name.endswith("." + entry)


def _select(field: str, wanted: str | tuple[str, ...], layers: Sequence[str], others: tuple[str, ...]) -> list[str]:
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


def _no_match(field: str, entry: str, layers: Sequence[str], others: tuple[str, ...], *, regex: bool) -> str:
    message = f"{field} entry {entry!r} matches none of the {len(layers)} adaptable layers."
    if regex and any(map(_matcher(entry, regex=False), layers)):
        return f"{message} A string is a regular expression for the whole name; for a suffix write [{entry!r}]."
    unsupported = list(filter(_matcher(entry, regex=regex), others))
    if unsupported:
        return f"{message} It matches {unsupported[0]!r}, which is not a linear layer. {_listing(layers)}"
    endings = {".".join(name.split(".")[-k:]): None for name in layers for k in range(1, name.count(".") + 2)}
    near = difflib.get_close_matches(entry, list(endings), n=1, cutoff=0.5)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{message}{hint} {_listing(layers)}"


def _listing(layers: Sequence[str]) -> str:
    """The candidates, one per distinct ending (a deep model repeats each of them in every layer)."""
    endings = list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in layers))
    shown = ", ".join(endings[:MAX_LISTED]) + (", ..." if len(endings) > MAX_LISTED else "")
    return f"Adaptable layers end in: {shown}." if endings else "The model has no adaptable layer."


def _layer_index(name: str, patterns: tuple[str, ...]) -> int | None:
    """Index of the block that `name` lies in: the number after a module list (any list, or one named in patterns)."""
    for pattern in patterns or (r"[^.]*",):
        found = re.match(rf".*\.{pattern}\.(\d+)\.", name)
        if found:
            return int(found[1])
    return None


def _restrict_to_layers(config: RandLoraConfig, chosen: list[str]) -> list[str]:
    if config.layers_to_transform is None:
        return chosen
    wanted = config.layers_to_transform
    wanted = {wanted} if isinstance(wanted, int) else set(wanted)
    patterns = config.layers_pattern or ()
    patterns = (patterns,) if isinstance(patterns, str) else patterns
    index = {name: _layer_index(name, patterns) for name in chosen}
    missing = wanted - set(index.values())
    if missing:
        present = sorted({i for i in index.values() if i is not None})
        raise ValueError(
            f"layers_to_transform={sorted(missing)} matches no targeted layer: the indices found are {present}"
            f" (layers_pattern={config.layers_pattern!r}). Correct the indices or the pattern."
        )
    return [name for name in chosen if index[name] in wanted]
