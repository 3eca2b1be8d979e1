"""`randlora inspect`: what an adapter folder holds, without any framework."""

import argparse
import dataclasses
import warnings
from typing import Any

from interop.adalora import AdaLoraConfig, SVDFactors
from interop.adapter import Adapter
from interop.bases import RECIPES, bases_digest, make_bases
from interop.commands.shared import add_json, add_source, open_source, show
from interop.config import RandLoraConfig
from interop.contents import trained_tensors
from interop.errors import legible
from interop.files import adapter_names
from interop.integrity import tensors_digest
from interop.progress import progress
from interop.shapes import shared_dims

HELP = "show what is inside an adapter folder: modules, ranks, parameters, bytes, recipe, hashes"
EXAMPLES = """\
randlora inspect adapter
randlora inspect adapter --json
randlora inspect adapter --no-recipes           where drawing all bases takes too long
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments."""
    add_source(parser, "folder")
    parser.add_argument("--no-recipes", action="store_true", help="do not draw the bases that each recipe would give")
    add_json(parser)


def run(options: argparse.Namespace) -> int:
    """Print the summary."""
    names = adapter_names(options.folder) if options.folder.is_dir() else ()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a missing recipe is in the summary
        adapter = open_source(options, options.folder)
    show(Summary(adapter, names, not options.no_recipes), options.json)
    return 0


@dataclasses.dataclass(frozen=True)
class Summary:
    """What an adapter holds; `str` of it is a table.

    Attributes:
        adapter: The adapter.
        names: The adapters of its folder.
        with_recipes: Whether to draw the bases that each recipe would give.
    """

    adapter: Adapter
    names: tuple[str, ...]
    with_recipes: bool

    def to_dict(self) -> dict[str, Any]:
        """All of it as JSON-compatible values."""
        adapter, config = self.adapter, self.adapter.config
        parts = [part for factors in adapter.factors.values() for part in factors]
        of_method = _of_adalora(config) if isinstance(config, AdaLoraConfig) else self._of_randlora()
        return {
            "method": config.METHOD,
            "base_model": config.base_model_name_or_path,
            **of_method,
            "trainable_parameters": adapter.num_trainable,
            "trainable_bytes": sum(part.nbytes for part in parts),
            "tensors_sha256": tensors_digest(trained_tensors(adapter)),
            "adapters": list(self.names),
            "other_tensors": sorted(adapter.saved_weights),
            "modules": {name: _module(adapter, name) for name in adapter.factors},
        }

    def _of_randlora(self) -> dict[str, Any]:
        config, bases = self.adapter.config, self.adapter.bases
        return {
            "r": config.r,
            "randlora_alpha": config.randlora_alpha,
            "bases": "very_sparse" if config.very_sparse else "sparse" if config.sparse else "dense",
            "seed": config.projection_prng_key,
            "recipe": self.adapter.recipe,
            "bases_in_file": config.save_projection,
            "bases_sha256": None if bases is None else bases_digest(bases),
            "bases_shapes": None if bases is None else {"A": list(bases.A.shape), "B": list(bases.B.shape)},
            "bases_bytes": None if bases is None else sum(array.nbytes for array in bases),
            "recipes": recipe_digests(self.adapter) if self.with_recipes else None,
        }

    def __str__(self) -> str:
        """The facts, then a line for each module."""
        facts = self.to_dict()
        modules, recipes = facts.pop("modules"), facts.pop("recipes", None)
        lines = []
        for name, value in facts.items():
            grouped = type(value) is int and name not in ("seed", "r")
            lines.append(f"{name:<21} {value:,d}" if grouped else f"{name:<21} {value}")
        if recipes is not None:
            lines.append("each recipe would give bases of this SHA-256")
            lines += [f"  {recipe:<19} {digest}" for recipe, digest in recipes.items()]
        lines.append(f"{'modules':<21} {len(modules)}")
        modules = {legible(name): module for name, module in modules.items()}
        width = max(map(len, modules))
        return "\n".join([*lines, *(f"  {name:<{width}}  {_in_words(module)}" for name, module in modules.items())])


def _of_adalora(config: AdaLoraConfig) -> dict[str, Any]:
    fields = ("init_r", "target_r", "lora_alpha", "tinit", "tfinal", "total_step")
    return {**{name: getattr(config, name) for name in fields}, "pruned": config.rank_pattern is not None}


def recipe_digests(adapter: Adapter) -> dict[str, str]:
    """SHA-256 of the bases that each recipe would give, or why there is none."""
    config, dims = adapter.config, None
    if adapter.bases is not None:
        dims = adapter.bases.dims
    elif adapter.shapes is not None:
        dims = shared_dims(adapter.shapes.values())
    if dims is None:
        return dict.fromkeys(RECIPES, "unknown, as the file does not say how large the layers are")
    found: dict[str, str] = {}
    for recipe in progress(RECIPES, "drawing bases"):
        if config.ternary and found:  # the same under every recipe
            found[recipe] = next(iter(found.values()))
        else:
            found[recipe] = _digest(config, dims._asdict(), recipe)
    return found


def _digest(config: RandLoraConfig, dims: dict[str, int], recipe: str) -> str:
    try:
        return bases_digest(make_bases(config, **dims, recipe=recipe))
    except ValueError as error:
        return f"none: {error}"


def _module(adapter: Adapter, name: str) -> dict[str, Any]:
    factors = adapter.factors[name]
    if isinstance(factors, SVDFactors):
        rank = {"rank": len(factors.E)}
    else:
        rank = {"short_side": factors.gamma.shape[1], "num_bases": factors.gamma.shape[0]}
    return {
        "shape": None if adapter.shapes is None else list(adapter.shapes[name]),
        **rank,
        "parameters": sum(part.size for part in factors),
        "dtype": str(factors[0].dtype),
    }


def _in_words(module: dict[str, Any]) -> str:
    size = "x".join(map(str, module["shape"])) if module["shape"] else f"short side {module['short_side']}"
    units = f"rank {module['rank']:>4}" if "rank" in module else f"{module['num_bases']:>4} bases"
    return f"{size:>13}  {units}  {module['parameters']:>11,d} {module['dtype']}"
