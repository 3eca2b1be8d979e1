"""Rules that hold for the source as a whole: who imports whom, what is documented, how large things get."""

import ast
import importlib
import importlib.util
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("interop", "randlora_jax", "randlora_torch")
FRAMEWORK = {"interop": "numpy", "randlora_jax": "jax", "randlora_torch": "torch"}
INTEROP_MAY_IMPORT = {"interop", "numpy", "ml_dtypes", *sys.stdlib_module_names}
FORBIDDEN = {
    "randlora_jax": {"torch", "transformers", "peft", "bitsandbytes", "randlora_torch"},
    "randlora_torch": {"jax", "jaxlib", "flax", "optax", "randlora_jax"},
}
UNLOADED = {
    "interop": {"jax", "torch", "flax", "transformers", "peft", "bitsandbytes", "randlora_jax", "randlora_torch"},
    "randlora_jax": FORBIDDEN["randlora_jax"],
    "randlora_torch": FORBIDDEN["randlora_torch"],
}
MAX_MODULE_LINES, MAX_FUNCTION_LINES = 400, 60
COMPARISONS = {"allclose", "array_equal", "array_equiv", "isclose", "equal"}

SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
TESTS = sorted((ROOT / "tests").rglob("*.py"))


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_packages(tree):
    """Top-level names of all imports, including those by a literal name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("importlib.import_module", "__import__"):
            if node.args and isinstance(node.args[0], ast.Constant):
                yield node.args[0].value.split(".")[0]


def forbidden_imports(package, tree):
    found = set(imported_packages(tree))
    return found - INTEROP_MAY_IMPORT if package == "interop" else found & FORBIDDEN[package]


def unasserted_comparisons(tree):
    """Statements such as a bare `np.allclose(a, b)`, whose result nobody looks at."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if ast.unparse(node.value.func).split(".")[-1] in COMPARISONS:
                yield node.lineno
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Compare):
            yield node.lineno


def skip_unless_importable(package):
    if not (ROOT / package / "__init__.py").exists():
        pytest.skip(f"{package} has no __init__.py yet")
    if importlib.util.find_spec(FRAMEWORK[package]) is None:
        pytest.skip(f"{FRAMEWORK[package]} is not installed")


def test_every_package_has_sources_to_look_at():
    assert {path.relative_to(ROOT).parts[0] for path in SOURCES} >= {"interop"}
    assert Path(__file__).resolve() in TESTS


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_no_source_file_imports_another_stack(path):
    assert forbidden_imports(path.relative_to(ROOT).parts[0], parse(path)) == set()


@pytest.mark.parametrize(
    ("package", "code", "found"),
    [
        ("interop", "import torch.nn", {"torch"}),
        ("interop", "def f():\n    from jax import numpy", {"jax"}),
        ("interop", "import os, numpy.linalg\nfrom interop.errors import x", set()),
        ("randlora_jax", "import importlib\nimportlib.import_module('torch')", {"torch"}),
        ("randlora_jax", "import jax", set()),
        ("randlora_torch", "try:\n    import flax.nnx as nnx\nexcept ImportError: pass", {"flax"}),
    ],
)
def test_the_import_rule_finds_what_it_forbids(package, code, found):
    assert forbidden_imports(package, ast.parse(code)) == found


@pytest.mark.parametrize("package", PACKAGES)
def test_importing_a_package_loads_no_other_stack(package):
    skip_unless_importable(package)
    code = f"import sys, {package}; print(*sorted({UNLOADED[package]!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


@pytest.mark.parametrize("path", TESTS, ids=name_of)
def test_no_comparison_in_a_test_goes_unasserted(path):
    assert list(unasserted_comparisons(parse(path))) == []


@pytest.mark.parametrize("code", ["np.allclose(a, b)", "torch.equal(a, b)", "jnp.isclose(a, b)", "a == b", "a < b"])
def test_the_comparison_rule_finds_what_it_forbids(code):
    assert list(unasserted_comparisons(ast.parse(f"def test():\n    {code}"))) == [2]
    assert list(unasserted_comparisons(ast.parse(f"def test():\n    assert {code}"))) == []


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_exists_and_is_documented(package):
    skip_unless_importable(package)
    module = importlib.import_module(package)
    assert module.__doc__
    assert len(module.__all__) == len(set(module.__all__)) > 0
    for name in module.__all__:
        value = getattr(module, name)
        if not isinstance(value, str | tuple):
            text = inspect.getdoc(value)
            assert text, name
            assert not text.startswith(f"{name}("), f"{name} has only the docstring that its decorator generates"


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_modules_and_functions_stay_small_and_modules_say_why_they_exist(path):
    tree = parse(path)
    assert ast.get_docstring(tree)
    assert len(path.read_text(encoding="utf-8").splitlines()) <= MAX_MODULE_LINES
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
    lengths = {node.name: node.end_lineno - node.lineno + 1 for node in functions}
    assert {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_marked_as_typed(package):
    assert (ROOT / package / "py.typed").is_file()
