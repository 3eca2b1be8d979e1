"""The site is built without a warning; its pages, pictures and reference are complete."""

import importlib.util
import re
import subprocess
import sys
from types import SimpleNamespace

import documents
import pytest

import interop

DOCS = documents.ROOT / "docs"
PAGES = [page for page in documents.PAGES if DOCS in page.parents]
PICTURES = {path.name for path in (DOCS / "pictures").iterdir()}
_PICTURE = re.compile(r"!\[[^\]]+\]\((?!https?:)([^)]+)\)")
_TOCTREE = re.compile(r"^:::\{toctree\}\n(?:(?::[a-z]+:[^\n]*)?\n)*(.*?)^:::$", re.DOTALL | re.MULTILINE)


@pytest.fixture(scope="module")
def conf():
    spec = importlib.util.spec_from_file_location("docs_conf", DOCS / "conf.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def warnings_of_the_reference(conf, monkeypatch):
    """What the check says of a reference that lists these names."""

    def check(listed):
        said = []
        monkeypatch.setattr(conf.logger, "warning", lambda text, name, **_: said.append(text % name))
        conf.check_reference(None, SimpleNamespace(get_domain=lambda name: SimpleNamespace(objects=listed)))
        return said

    return check


def run(*command):
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=900, cwd=DOCS.parent)
    assert (done.returncode, done.stdout.strip()) == (0, ""), f"{done.stdout}\n{done.stderr[-6000:]}"


def test_the_site_is_built_without_a_warning(tmp_path):
    run("-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "--nitpicky", "docs", str(tmp_path))
    assert (tmp_path / "index.html").is_file()


def test_every_page_is_in_the_table_of_contents():
    listed = [line for block in _TOCTREE.findall((DOCS / "index.md").read_text()) for line in block.split()]
    assert sorted([*listed, "index"]) == sorted(path.relative_to(DOCS).with_suffix("").as_posix() for path in PAGES)


def test_every_picture_of_a_page_exists_and_every_picture_is_on_a_page():
    shown = [(path.parent / name).resolve() for path in PAGES for name in _PICTURE.findall(path.read_text())]
    assert [path for path in shown if not path.is_file()] == []
    assert {path.name for path in shown if path.parent == DOCS / "pictures"} == PICTURES


def test_the_pictures_are_those_that_the_script_draws(tmp_path):
    run(str(DOCS / "pictures.py"), "--out", str(tmp_path))
    drawn = {path.name for path in tmp_path.iterdir() if path.stat().st_size > 5000}
    assert drawn == {name for name in PICTURES if not name.startswith("comparison")}  # those come from the examples


def test_what_is_public_has_a_docstring(conf):
    assert list(conf.undocumented()) == []


@pytest.mark.parametrize(
    ("owner", "attribute", "name"),
    [
        (interop, "load", "interop.load"),
        (interop.Adapter, "bind", "interop.Adapter.bind"),
        (interop.Verification.passed, "fget", "interop.Verification.passed"),
    ],
)
def test_a_docstring_that_is_missing_is_found(warnings_of_the_reference, conf, monkeypatch, owner, attribute, name):
    monkeypatch.setattr(getattr(owner, attribute), "__doc__", None)
    listed = dict(conf.public_names())
    assert warnings_of_the_reference(listed) == [f"{name} is public, but has no docstring"]


def test_a_public_name_that_the_reference_lacks_is_found(warnings_of_the_reference, conf):
    listed = dict(conf.public_names())
    assert warnings_of_the_reference(listed) == []
    del listed["randlora_torch.accelerate_peft"], listed["interop.RECIPES"]
    assert sorted(warnings_of_the_reference(listed)) == [
        "interop.RECIPES is public, but missing from docs/api",
        "randlora_torch.accelerate_peft is public, but missing from docs/api",
    ]


def test_a_page_shows_the_files_that_it_asks_for(conf, tmp_path, monkeypatch):
    (tmp_path / "A.md").write_text("[F](FORMAT.md), [S](SECURITY.md), [W](https://x.org)\n")
    (tmp_path / "1.py").write_text('"""Title.\n\nMore.\n"""\n')
    monkeypatch.setattr(conf, "ROOT", tmp_path)
    read, source = [], ["# P\n\n<!-- A.md -->\n<!-- [0-9]*.py -->"]
    conf.fill_in(SimpleNamespace(env=SimpleNamespace(note_dependency=read.append)), "p", source)
    shown = "[F](format.md), `SECURITY.md`, [W](https://x.org)\n"
    assert source == [f"# P\n\n{shown}\n## 1.py\n\nTitle.\n\n~~~none\nMore.\n~~~\n"]
    assert read == [str(tmp_path / "A.md"), str(tmp_path / "1.py")]


def test_every_page_that_is_a_file_of_the_repository_asks_for_it(conf):
    assert {name: (DOCS / page).read_text() for name, page in conf.FROM_ROOT.items()} == {
        name: f"<!-- {name} -->\n" for name in conf.FROM_ROOT
    }


def test_an_indented_paragraph_of_a_docstring_becomes_code(conf):
    lines = ["Do it:", "", "    with it:", "        go()", "", "Args:", "    x: What", "        it is.", ""]
    lines += ["Example:", "    go()", "    stop()"]
    conf.mark_code(None, "function", "name", None, None, lines)
    assert lines[2:4] == [".. code-block:: python", ""]
    assert lines[4:6] == ["    with it:", "        go()"]
    assert lines[7:10] == ["Args:", "    x: What", "        it is."]
    assert lines[-5:] == ["Example:", "    .. code-block:: python", "", "        go()", "        stop()"]
