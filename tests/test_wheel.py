"""What a stranger gets: the contents of the sdist and the wheel, and the README followed word for word."""

import email
import os
import tarfile
import tomllib
import zipfile
from pathlib import Path

import documents
import pytest
import wheel
from packaging.metadata import Metadata

ROOT = documents.ROOT
README = ROOT / "README.md"
PACKAGES = ("interop", "randlora_jax", "randlora_torch")
GOLDEN = ROOT / "tests" / "golden" / "peft-0.21.2" / "canonical"
ONLY_IN_GIT = {".gitignore", ".ci/run"}
GENERATED = {"PKG-INFO", "setup.cfg"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

SMALL_PAGE = """
```bash
pip install "randlora[jax]"       # Flax
# PyTorch
pip install "randlora[bnb]" tqdm
pip install "randlora[jax,bnb]"   # both, to move adapters
```

<!-- road: torch moving -->

```python
import interop

value = len("of interop")
```

<!-- road: flax -->
```python
raise ValueError("of the Flax road")
```

```python
raise ValueError("of no road")
```

<!-- road: torch -->
```bash
randlora --version | cut -d" " -f1; ls -A; basename $(dirname $(dirname $(command -v randlora)))
```

```text
randlora
bare
```

<!-- road: torch -->
```python
print(value)
```

```text
{value}
```
"""


@pytest.fixture(scope="session")
def built(tmp_path_factory):
    return wheel.build(tmp_path_factory.mktemp("build"))


@pytest.fixture(scope="session")
def bare(built, tmp_path_factory):
    """The environment of `pip install randlora`, without an extra."""
    return wheel.Environment(tmp_path_factory.mktemp("environments") / "bare", built.wheel)


@pytest.fixture
def small_page(tmp_path):
    def write(value=10):
        page = tmp_path / "SMALL.md"
        page.write_text(SMALL_PAGE.replace("{value}", str(value)), encoding="utf-8")
        return page

    return write


@pytest.fixture
def empty(tmp_path):
    (tmp_path / "empty").mkdir()
    return tmp_path / "empty"


def test_the_sdist_holds_what_tests_and_docs_need(built):
    with tarfile.open(built.sdist) as archive:
        files = [
            Path(member.name).relative_to(f"randlora-{PROJECT['version']}") for member in archive if member.isfile()
        ]
    held = {path.as_posix() for path in files if path.parts[0] != "randlora.egg-info"}
    assert held - GENERATED == set(wheel.sources()) - ONLY_IN_GIT - GENERATED


def test_the_wheel_holds_the_packages_their_markers_and_nothing_else(built):
    names = set(zipfile.ZipFile(built.wheel).namelist())
    metadata = {name for name in names if name.split("/")[0] == f"randlora-{PROJECT['version']}.dist-info"}
    assert names - metadata == {path for path in wheel.sources() if path.split("/")[0] in PACKAGES}
    assert {f"{package}/py.typed" for package in PACKAGES} < names
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)
    assert built.wheel.name == f"randlora-{PROJECT['version']}-py3-none-any.whl"


def test_the_metadata_are_valid_and_say_what_pyproject_says(built):
    archive = zipfile.ZipFile(built.wheel)
    text = archive.read(f"randlora-{PROJECT['version']}.dist-info/METADATA")
    metadata = Metadata.from_email(text, validate=True)
    assert (metadata.name, str(metadata.version)) == ("randlora", PROJECT["version"])
    assert str(metadata.requires_python) == PROJECT["requires-python"]
    assert (metadata.license_expression, metadata.license_files) == (PROJECT["license"], PROJECT["license-files"])
    assert set(metadata.provides_extra) == set(PROJECT["optional-dependencies"])
    plain = {requirement.name for requirement in metadata.requires_dist if requirement.marker is None}
    assert plain == {"numpy", "ml_dtypes"}
    assert email.message_from_bytes(text)["Description-Content-Type"] == "text/markdown"
    assert metadata.description.strip() == README.read_text(encoding="utf-8").strip()
    scripts = archive.read(f"randlora-{PROJECT['version']}.dist-info/entry_points.txt").decode()
    assert scripts.split() == ["[console_scripts]", "randlora", "=", PROJECT["scripts"]["randlora"]]


def test_without_an_extra_only_numpy_and_ml_dtypes_come_along(bare):
    assert {distribution.name for distribution in wheel.closure(["randlora"], bare.site)} == {"numpy", "ml_dtypes"}
    for name in ("jax", "torch", "safetensors", "yaml", "pip"):
        assert f"No module named {name!r}" in bare.run("python", "-c", f"import {name}", cwd=bare.site).stderr


def test_without_an_extra_the_hub_and_its_command_work(bare, empty):
    code = "import interop, sys; print(len(interop.load(sys.argv[1]).modules))"
    loaded = bare.run("python", "-c", code, GOLDEN, cwd=empty)
    assert loaded.returncode == 0, loaded.stderr
    assert int(loaded.stdout) > 0
    shown = bare.run("randlora", "--help", cwd=empty)
    assert shown.returncode == 0
    assert "randlora COMMAND --help" in shown.stdout
    assert bare.run("randlora", "--version", cwd=empty).stdout == f"randlora {PROJECT['version']}\n"
    inspected = bare.run("randlora", "inspect", GOLDEN, cwd=empty)
    assert inspected.returncode == 0, inspected.stderr
    assert f"modules               {loaded.stdout.strip()}\n" in inspected.stdout
    assert not list(empty.iterdir())


@pytest.mark.parametrize(("stack", "extra"), [("randlora_jax", "jax"), ("randlora_torch", "torch")])
def test_a_stack_without_its_extra_says_what_to_install(bare, empty, stack, extra):
    done = bare.run("python", "-c", f"import {stack}", cwd=empty)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert last.endswith(f" is not installed. Run: pip install 'randlora[{extra}]'")


def test_every_road_comment_of_the_readme_belongs_to_a_block():
    marked = [block.roads for block in documents.blocks(README) if block.roads]
    assert README.read_text(encoding="utf-8").count("<!-- road:") == len(marked)
    assert {road for roads in marked for road in roads} == set(wheel.ROADS)


@pytest.mark.parametrize("road", wheel.ROADS)
def test_the_readme_followed_word_for_word_on_each_road(built, empty, tmp_path, road):
    requirements = wheel.install_requirements(README, road)
    wheel.Environment(tmp_path / road, built.wheel, requirements).follow(README, road, empty)


@pytest.mark.slow
@pytest.mark.skipif("RANDLORA_TEST_INDEX" not in os.environ, reason="installs from the index: RANDLORA_TEST_INDEX=1")
@pytest.mark.parametrize("road", wheel.ROADS)
def test_the_readme_followed_with_what_the_index_has(built, empty, tmp_path, road):
    requirements = wheel.install_requirements(README, road)
    wheel.Environment(tmp_path / road, built.wheel, requirements, from_index=True).follow(README, road, empty)


def test_a_road_is_its_own_blocks_in_order_in_its_environment(bare, small_page, empty):
    page = small_page()
    assert wheel.install_requirements(page, "flax") == ["randlora[jax]"]
    assert wheel.install_requirements(page, "torch") == ["randlora[bnb]", "tqdm"]
    assert wheel.install_requirements(page, "moving") == ["randlora[jax,bnb]"]
    bare.follow(page, "torch", empty)


def test_a_road_that_does_not_do_what_the_page_says_is_found(bare, small_page, empty):
    with pytest.raises(AssertionError, match=r"SMALL\.md, line 38"):
        bare.follow(small_page(value=11), "torch", empty)
    with pytest.raises(AssertionError, match="has no block with output that is marked <!-- road: moving -->"):
        bare.follow(small_page(), "moving", empty)
    page = small_page()
    page.write_text("<!-- road: torch -->\n```json\n{}\n```\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="only these run"):
        bare.follow(page, "torch", empty)
    with pytest.raises(AssertionError, match="no `pip install` line with the comment 'PyTorch'"):
        wheel.install_requirements(page, "torch")


def test_a_requirement_that_is_not_met_is_named(bare):
    with pytest.raises(AssertionError, match="no-such-distribution is required, and not installed"):
        wheel.closure(["no-such-distribution"], bare.site)
    with pytest.raises(AssertionError, match="numpy>=1000"):
        wheel.closure(["numpy>=1000"], bare.site)
