"""How Sphinx makes the site, and what makes that fail: a public name that has no docstring or no place in `api/`.

The build needs no network: names of other projects are shown, not linked.
"""

import ast
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from functools import cached_property
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

project = "randlora"
release = metadata.version("randlora")
author = copyright = "the randlora authors"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3
exclude_patterns = ["_build", "comparison/*.md"]  # results that comparison.md shows
html_theme = "furo"
html_title = "randlora"
html_copy_source = False
smartquotes = False

autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
autodoc_default_options = {"members": True, "undoc-members": True, "inherited-members": True}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_preprocess_types = False
default_role = "py:obj"  # `name` in a docstring is code, and a link where the name is ours
nitpick_ignore_regex = [
    ("py:obj", r".*"),  # code in docstrings that is no name
    ("py:.*", r"(?!interop\b|randlora_).*"),  # names of other projects
    ("py:class", r".*\.(AdapterOfKind|Model|Params|This|Tree)"),  # type variables
    ("py:class", r".*\.AdapterModel"),  # what RandLoraModel and AdaLoraModel have in common
    # Kinds of values that users pass on or look at, but do not make.
    ("py:class", r".*\.(_\w+|AttachedAdapter|Origin|Packed4bit|Parameter|Prefix|Quantized|Rows8bit|SparseBasis)"),
]

PACKAGES = ("interop", "randlora_jax", "randlora_torch")
# What users are told of. None: the names of `__all__`, or else all that are defined there.
PUBLIC: dict[str, tuple[str, ...] | None] = {
    "interop": None,
    "interop.blockwise": ("Rounding",),
    "interop.bnb": ("Weight4bit", "Weight8bit", "read_folder"),
    "interop.diff": ("LayerDiff",),
    "interop.fields": ("AdapterConfig",),
    "interop.plans": None,
    "interop.shapes": ("Dims",),
    "interop.verify": ("LayerCheck",),
    "randlora_jax": None,
    "randlora_jax.adalora": None,
    "randlora_jax.bases": ("LayerBases",),
    "randlora_jax.checkpoint": None,
    "randlora_jax.linen": None,
    "randlora_jax.quantized": None,
    "randlora_jax.sharding": None,
    "randlora_torch": None,
    "randlora_torch.bases": ("LayerBases",),
    "randlora_torch.kernel_choice": ("Call", "Choice"),
    "randlora_torch.randlora": ("ScaledBases",),
    "randlora_torch.rank_allocator": ("Allocation",),
}
FROM_ROOT = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "FORMAT.md": "format.md"}
_REQUEST = re.compile(r"<!-- (\S+) -->")
_LINK = re.compile(r"\[([^\]]+)\]\(((?![a-z]+:|#)[^)]+)\)")
logger = logging.getLogger(__name__)


def setup(app: Sphinx) -> None:
    """Connect the functions below."""
    jax.Array.__name__ = jax.Array.__qualname__ = "Array"  # jaxtyping's annotations show it, else a private module's
    app.connect("source-read", fill_in)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", mark_code, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", tidy_fields, priority=900)  # after napoleon
    app.connect("object-description-transform", drop_repeated, priority=900)  # after autodoc
    app.connect("missing-reference", find_alias)
    app.connect("env-check-consistency", check_reference)


# What has to be in the reference.


def public_names() -> Iterator[tuple[str, Any]]:
    """Every name that users are told of, in full, and what it stands for."""
    for module_name, names in PUBLIC.items():
        module = importlib.import_module(module_name)
        names = names or getattr(module, "__all__", None) or _defined_in(module)
        for name in (*names, *getattr(module, "_OPTIONAL", ())):
            yield f"{module_name}.{name}", getattr(module, name)


def _defined_in(module: Any) -> list[str]:
    """The public classes and functions of a module, without its type variables."""
    found = vars(module).items()
    return [
        name
        for name, value in found
        if name[0] != "_"
        and getattr(value, "__module__", None) == module.__name__
        and (inspect.isclass(value) or inspect.isroutine(value) or hasattr(value, "__wrapped__"))
    ]


def is_ours(thing: Any) -> bool:
    """Whether a class or function was written here."""
    return str(getattr(thing, "__module__", "")).split(".")[0] in PACKAGES


def function_of(member: Any) -> Any:
    """The function behind a method or property, or None for any other attribute of a class."""
    if isinstance(member, property):
        return member.fget
    if isinstance(member, cached_property):
        return member.func
    function = inspect.unwrap(getattr(member, "__func__", member))
    return function if inspect.isfunction(function) else None


def undocumented() -> Iterator[str]:
    """Public names, and public methods and properties of public classes, without a docstring."""
    for name, thing in public_names():
        if not callable(thing):
            continue  # a constant: its page says what it is
        doc = thing.__doc__ or ""
        if not doc or doc.startswith(f"{name.rsplit('.', 1)[-1]}("):  # the latter is what dataclasses generate
            yield name
        if inspect.isclass(thing):
            yield from (f"{name}.{method}" for method in sorted(_undocumented_methods(thing)))


def _undocumented_methods(kind: type) -> set[str]:
    members = [item for base in kind.__mro__ if is_ours(base) for item in vars(base).items()]
    functions = [(name, function_of(member)) for name, member in members if not name.startswith("_")]
    public = {name for name, function in functions if is_ours(function)}
    return public - {name for name, function in functions if function is not None and function.__doc__}


def check_reference(app: Sphinx, env: Any) -> None:
    """Warn, which fails the build, of what the reference should hold and does not."""
    listed = env.get_domain("py").objects
    for name, _ in public_names():
        if name not in listed:
            logger.warning("%s is public, but missing from docs/api", name, type="api")
    for name in undocumented():
        logger.warning("%s is public, but has no docstring", name, type="api")


# How docstrings are shown.


def skip_member(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what other projects' base classes bring, and attributes, which the docstring of the class explains."""
    return None if is_ours(function_of(thing)) else True


def mark_code(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Mark as code what stands indented below a paragraph, and examples that are no doctests."""
    marked, in_example = [], False
    for number, line in enumerate(lines):
        before = lines[number - 1] if number else ""
        indented = line.startswith("    ")
        if indented and before == "Example:" and not line.lstrip().startswith(">>>"):
            in_example = True
            marked += ["    .. code-block:: python", ""]
        elif indented and not before and number > 1 and lines[number - 2][:1].strip():
            marked += [".. code-block:: python", ""]
        in_example = in_example and (indented or not line)
        marked.append(f"    {line}" if in_example else line)
    lines[:] = marked


def tidy_fields(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Show the types of attributes as code, without the modules that they come from."""
    for number, line in enumerate(lines):
        if line.startswith(":vartype"):
            field, _, kind = line[1:].partition(": ")
            lines[number] = f":{field}: ``{re.sub(r'(?:[A-Za-z_]+[.])+(?=[A-Za-z_])', '', kind)}``"


def drop_repeated(app: Sphinx, domain: str, kind: str, content: Any) -> None:
    """The docstring of a class says what its arguments are: drop autodoc's bare list of them."""
    if (domain, kind) not in (("py", "class"), ("py", "exception")):
        return
    for fields in content.findall(nodes.field_list):
        words = [field[0].astext().split() for field in fields]
        bare = {
            names[-1]
            for field, names in zip(fields, words, strict=True)
            if names[0] == "param" and not field[1].astext()
        }
        for field, names in zip(list(fields), words, strict=True):
            if names[0] == "rtype" or (names[0] in ("param", "type") and names[-1] in bare):
                fields.remove(field)


def find_alias(app: Sphinx, env: Any, node: Any, content: Any) -> Any:
    """Links to a name where it is defined, as type hints have it, lead to where it is public."""
    target = _aliases().get(node["reftarget"]) if node.get("refdomain") == "py" else None
    if target is None:
        return None
    return env.get_domain("py").resolve_xref(env, node["refdoc"], app.builder, "obj", target, node, content)


def _aliases() -> dict[str, str]:
    """By the full name of a definition, the first public name of it."""
    named = [(name, thing) for name, thing in public_names() if hasattr(thing, "__qualname__")]
    return {f"{thing.__module__}.{thing.__qualname__}": name for name, thing in reversed(named)}


# Pages that come from other files of the repository.


def fill_in(app: Sphinx, docname: str, source: list[str]) -> None:
    """Put a file of the repository, or the docstrings of all numbered examples, where a page asks for them."""

    def content(request: re.Match[str]) -> str:
        files = sorted(ROOT.glob(request[1]))
        for path in files:
            app.env.note_dependency(str(path))
        return "\n".join(_describe(path) if path.suffix == ".py" else _on_site(path) for path in files)

    source[0] = _REQUEST.sub(content, source[0])


def _describe(path: Path) -> str:
    title, _, rest = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))).partition("\n")
    return f"## {path.name}\n\n{title}\n\n~~~none\n{rest.strip()}\n~~~\n"


def _on_site(path: Path) -> str:
    """A file's text, its links to other files leading to their pages, if they have one."""

    def link(found: re.Match[str]) -> str:
        text, target = found.groups()
        page = FROM_ROOT.get(target)
        return f"[{text}]({page})" if page else f"`{target}`"

    return _LINK.sub(link, path.read_text(encoding="utf-8"))
