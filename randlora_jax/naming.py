"""Rules on a model: from a built-in table, a YAML file or a list, to layouts that name the weights of its kernels."""

import difflib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from interop.errors import bulleted
from randlora_jax.layout_rules import LayoutRule, Parameter
from randlora_jax.layouts import LEAVES, Layout, module_name
from randlora_jax.named_layouts import LAYOUTS, TABLES

Rules = str | os.PathLike[str] | Sequence[LayoutRule | Mapping[str, Any]]
Layouts = Mapping[str, Layout] | Rules


def resolve_layouts(
    layouts: Layouts | None, leaves: Iterable[tuple[tuple[str, ...], Any]], known: Mapping[str, Layout] | None = None
) -> Mapping[str, Layout]:
    """Layouts by name of kernel, from all that `layouts` may be.

    Args:
        layouts: Layouts by name, which are returned as they are; or rules: the name of a built-in table (one of
            `LAYOUTS`), a YAML file of rules, a list of `LayoutRule`, or dicts of their fields.
        leaves: Path and leaf of each parameter of the model.
        known: Layouts by other means, which the rules only name.

    Raises:
        ValueError: there is no such table or file, the rules are malformed, or do not fit the model.
    """
    if layouts is None:
        return {}
    if isinstance(layouts, Mapping):
        return layouts
    rules, table = read_rules(layouts)
    parameters = [Parameter(module_name(parts), parts[-1], tuple(leaf.shape)) for parts, leaf in leaves if parts]
    return apply_rules(rules, parameters, known or {}, table=table)


def apply_rules(
    rules: Sequence[LayoutRule],
    parameters: Sequence[Parameter],
    known: Mapping[str, Layout],
    *,
    table: str | None = None,
) -> dict[str, Layout]:
    """Layouts of those parameters that a rule is for, by name.

    Args:
        rules: Of a user, each of which must be for some parameter unless optional; or of a built-in table.
        parameters: All parameters of the model.
        known: Layouts by other means, such as `infer_layouts`.
        table: Name of the built-in table. One of its rules must be for some parameter.

    Raises:
        ValueError: a rule is for no parameter, two are for one, two weights get one name, or a rule contradicts what
            is known.
    """
    named: dict[str, Layout] = {}
    by: dict[str, LayoutRule] = {}
    for parameter in parameters:
        for rule in rules:
            layout = rule.layout(parameter, known.get(parameter.name))
            if layout is None:
                continue
            if parameter.name in by:
                both = [by[parameter.name].kernel, rule.kernel]
                raise ValueError(f"two layout rules are for {parameter}, {both}: make one of them stricter.")
            named[parameter.name], by[parameter.name] = layout, rule
    unused = [rule for rule in rules if rule not in by.values() and not rule.optional]
    if table is None and unused:
        raise ValueError(_both_sides("these layout rules are for no kernel", unused, parameters, known))
    if table is not None and not named:
        what = f"none of the kernels is called as in the layouts {table!r}, which are for"
        raise ValueError(_both_sides(what, rules, parameters, known))
    _refuse_equal_names(named)
    return named


def _both_sides(
    what: str, rules: Sequence[LayoutRule], parameters: Sequence[Parameter], known: Mapping[str, Layout]
) -> str:
    """An error that lists rules that are for no kernel, and the kernels that there are."""
    lines = []
    for rule in rules:
        near = [str(parameter) for parameter in parameters if rule.pattern.fullmatch(parameter.name)]
        lines.append(rule.kernel + (f", which {near[0]} fits by its name, but not by its axes" if near else ""))
    kernels = [str(p) for p in parameters if p.name in known or (p.leaf in LEAVES and len(p.shape) > 1)]
    have = bulleted("the kernels are", kernels or list(map(str, parameters)))
    return f"{bulleted(what, lines)}\n{have}\nNames must be matched in full, without a final 'kernel' or 'w'."


def _refuse_equal_names(named: Mapping[str, Layout]) -> None:
    owner: dict[str, str] = {}
    for name, layout in named.items():
        for module in layout.modules or ():
            if module in owner:
                raise ValueError(
                    f"the layout rules call a weight in {owner[module]!r} and one in {name!r} {module!r}: use what"
                    r" differs between them in modules, as a group \1 or the index {i}."
                )
            if module is not None:
                owner[module] = name


def read_rules(source: Rules) -> tuple[tuple[LayoutRule, ...], str | None]:
    """The rules, and the name of the built-in table if it is one.

    Raises:
        ValueError: there is no such table or file, or the rules are malformed.
    """
    if isinstance(source, str) and source in TABLES:
        return TABLES[source], source
    where = "layouts"
    if isinstance(source, str | os.PathLike):
        where, source = str(source), _read_yaml(Path(source))
    rules: Any = source
    if not isinstance(rules, Sequence) or not rules:
        raise ValueError(f"{where}: {source!r} is no list of rules. Give a list of fields of LayoutRule, one or more.")
    return tuple(_rule(number, rule, where) for number, rule in enumerate(rules)), None


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        close = difflib.get_close_matches(str(path), LAYOUTS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(
            f"layouts={str(path)!r} is neither a file nor a built-in table.{hint} Tables are {', '.join(LAYOUTS)}; a"
            " file of rules is YAML, a list of fields of LayoutRule."
        )
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is no YAML: {error}. Quote regular expressions with single quotes.") from error


def _rule(number: int, rule: LayoutRule | Mapping[str, Any], where: str) -> LayoutRule:
    if isinstance(rule, LayoutRule):
        return rule
    fields = list(LayoutRule.__dataclass_fields__)
    if not isinstance(rule, Mapping):
        raise ValueError(f"{where}: rule {number} is {rule!r}, not a mapping of fields: {', '.join(fields)}.")
    unknown = [field for field in rule if field not in fields]
    missing = [field for field in ("kernel", "modules") if field not in rule]
    if unknown or missing:
        raise ValueError(
            f"{where}: rule {number} has the unknown fields {unknown} and lacks {missing}. Fields are"
            f" {', '.join(fields)}; kernel and modules are required."
        )
    return LayoutRule(**rule)
