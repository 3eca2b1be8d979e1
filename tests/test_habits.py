"""The project's habits hold together: workflows, templates and hooks name what exists, and versions agree."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
CALLING_MAKE = [path for path in WORKFLOWS if path.name != "release.yml"]
FORMS = sorted(path for path in (GITHUB / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
HOOKS = ROOT / ".pre-commit-config.yaml"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CHANGELOG = ROOT / "CHANGELOG.md"
MAY_USE = re.compile(r"actions/[\w-]+@v\d+|pypa/gh-action-pypi-publish@release/v1")
# What jobs may do besides reading the sources.
MAY_WRITE = {
    ("release.yml", "publish"): {"id-token"},
    ("release.yml", "release"): {"contents"},
    ("docs.yml", "deploy"): {"pages", "id-token"},
}


def parse(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def name_of(path):
    return path.name


def make_targets():
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    (phony,) = re.findall(r"^\.PHONY: (.+)$", text, re.MULTILINE)
    targets = set(phony.split())
    assert targets == set(re.findall(r"^([a-z][a-z-]*):(?!=)", text, re.MULTILINE))
    return targets


def called(text):
    """Targets of the `make` commands in a text, such as a script or Markdown."""
    command = r"(?:^ *|`|: |&& )make ([a-z][a-z-]*)(?=\s*(?:$|[`#&]|[A-Z]+=))"
    return set(re.findall(command, text, re.MULTILINE))


def steps(job):
    return job.get("steps", [])


def write_permissions(job):
    return {name for name, value in job.get("permissions", {}).items() if value == "write"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_workflows_run_with_least_permissions_in_bounded_time_by_known_actions(path):
    workflow = parse(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]
    for name, job in workflow["jobs"].items():
        assert write_permissions(job) == MAY_WRITE.get((path.name, name), set())
        needs = job.get("needs", [])
        assert set([needs] if isinstance(needs, str) else needs) <= set(workflow["jobs"])
        if "uses" in job:
            assert (ROOT / job["uses"]).is_file()
            continue
        assert job["timeout-minutes"] <= 60
        for step in steps(job):
            assert ("uses" in step) != ("run" in step)
            assert "uses" not in step or MAY_USE.fullmatch(step["uses"]), step


@pytest.mark.parametrize("path", [*CALLING_MAKE, HOOKS, ROOT / "CONTRIBUTING.md", ROOT / "README.md"], ids=name_of)
def test_every_make_target_that_is_named_exists(path):
    assert set() < called(path.read_text(encoding="utf-8")) <= make_targets()


def test_ci_runs_make_check_on_the_oldest_python_and_a_new_one_and_follows_the_readme():
    jobs = parse(GITHUB / "workflows" / "ci.yml")["jobs"]
    assert called("\n".join(step.get("run", "") for step in steps(jobs["check"]))) == {"check"}
    oldest = PROJECT["requires-python"].removeprefix(">=")
    assert jobs["check"]["strategy"]["matrix"]["python"] == [oldest, "3.13"]
    scripts = [step.get("run", "") for step in steps(jobs["package"])]
    assert any("-m slow tests/test_wheel.py" in script for script in scripts)
    for path in re.findall(r"tests/[\w./-]+", "\n".join(scripts)):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("path", WORKFLOWS, ids=name_of)
def test_scripts_of_workflows_are_valid_bash(path):
    scripts = [step["run"] for job in parse(path)["jobs"].values() for step in steps(job) if "run" in step]
    assert scripts
    for script in scripts:
        plain = re.sub(r"\$\{\{.*?\}\}", "value", script)
        subprocess.run(["bash", "-n"], input=plain, text=True, check=True)


def check_versions(folder, tag, changelog):
    """The first check of a release, as GitHub runs it."""
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    (script,) = [
        step["run"] for step in steps(parse(GITHUB / "workflows" / "release.yml")["jobs"]["version"]) if "run" in step
    ]
    (folder / "python").symlink_to(sys.executable)
    env = {**os.environ, "GITHUB_REF_NAME": tag, "PATH": os.pathsep.join([str(folder), os.environ["PATH"]])}
    return subprocess.run(
        ["bash", "-eo", "pipefail", "-c", script], cwd=folder, env=env, capture_output=True, text=True, check=False
    )


SECTIONS = """# Changelog

## [Unreleased]

- Later.

## [{}] - 2026-01-31

- Now.

## [0.0.1] - 2025-01-31

- Then.
"""


def test_a_release_whose_three_versions_agree_has_its_section_as_notes(tmp_path):
    done = check_versions(tmp_path, f"v{PROJECT['version']}", SECTIONS.format(PROJECT["version"]))
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "notes.md").read_text(encoding="utf-8").strip() == "- Now."


@pytest.mark.parametrize(
    ("tag", "section", "said"),
    [
        ("v9.9.9", PROJECT["version"], f"tag v9.9.9, version {PROJECT['version']} in pyproject.toml"),
        (PROJECT["version"], PROJECT["version"], "tag"),
        (f"v{PROJECT['version']}", "9.9.9", f"CHANGELOG.md has no section ## [{PROJECT['version']}]"),
    ],
)
def test_a_release_whose_versions_differ_is_stopped(tmp_path, tag, section, said):
    done = check_versions(tmp_path, tag, SECTIONS.format(section))
    assert done.returncode == 1
    assert said in done.stdout


def test_the_changelog_has_unreleased_changes_or_the_version_first():
    titles = re.findall(r"^## (.+)$", CHANGELOG.read_text(encoding="utf-8"), re.MULTILINE)
    assert titles[0] == "[Unreleased]"
    released = [re.fullmatch(r"\[(\d+)\.(\d+)\.(\d+)\] - \d{4}-\d\d-\d\d", title) for title in titles[1:]]
    assert all(released), titles
    numbers = [tuple(map(int, match.groups())) for match in released]
    assert numbers == sorted(set(numbers), reverse=True)
    assert all(number <= tuple(map(int, PROJECT["version"].split("."))) for number in numbers)


@pytest.mark.parametrize("path", FORMS, ids=name_of)
def test_issue_forms_have_the_fields_that_github_asks_for(path):
    form = parse(path)
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert any(field.get("validations", {}).get("required") for field in fields)
    assert (
        len({field["id"] for field in fields}) == len({field["attributes"]["label"] for field in fields}) == len(fields)
    )
    assert {field["type"] for field in form["body"]} <= {"markdown", "textarea", "input", "dropdown", "checkboxes"}


def test_there_are_forms_for_bugs_and_features_and_a_template_for_pull_requests():
    assert [path.name for path in FORMS] == ["bug.yml", "feature.yml"]
    assert parse(GITHUB / "ISSUE_TEMPLATE" / "config.yml") == {"blank_issues_enabled": True}
    template = (GITHUB / "PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    assert called(template) == {"check"}


def test_hooks_are_local_and_their_commands_exist():
    (repo,) = parse(HOOKS)["repos"]
    assert repo["repo"] == "local"
    stages = {hook["id"]: hook.get("stages", parse(HOOKS)["default_stages"]) for hook in repo["hooks"]}
    assert stages == {"ruff-format": ["pre-commit"], "ruff-check": ["pre-commit"], "check": ["pre-push"]}
    for hook in repo["hooks"]:
        program, command = hook["entry"].split()[:2]
        assert hook["language"] == "system"
        if program == "make":
            assert command in make_targets()
        else:
            assert program == ".venv/bin/ruff"
            tool = Path(sys.executable).with_name("ruff")
            assert subprocess.run([tool, command, "--help"], capture_output=True, check=False).returncode == 0
