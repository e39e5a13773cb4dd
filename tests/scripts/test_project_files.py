"""The files of an open project name commands, scripts and a version that there are."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Final

import pytest
import yaml

from grpo_toolkit.cli.main import build_parser

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
FORMS = sorted(path for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml") if path.name != "config.yml")
PROJECT: Final = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    for key in ("version", "license"):
        assert f'\n{key} = "{citation[key]}"\n' in PROJECT


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_scripts_and_extras_that_there_are(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    (job,) = yaml.safe_load(text)["jobs"].values()
    ran = "\n".join(step["run"] for step in job["steps"] if "run" in step)
    called = re.findall(r"^bash (\S+)", ran, re.MULTILINE)
    assert called
    assert [name for name in called if not (ROOT / name).is_file()] == []
    extras = re.findall(r"\.\[(\w+)\]", ran)
    assert [name for name in extras if f"\n{name} = [" not in PROJECT] == []
    stacks = job.get("strategy", {}).get("matrix", {}).get("stack", [])
    usage = (ROOT / "scripts" / "test").read_text(encoding="utf-8").partition("[flags of pytest]")[0]
    assert [stack for stack in stacks if stack not in usage] == []


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.name)
def test_an_issue_form_asks_for_commands_that_parse(path: Path) -> None:
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    labels = [part["attributes"].get("label", "") for part in form["body"]]
    commands = [label for label in labels if label.startswith("grpo-toolkit ")]
    assert commands
    for command in commands:
        assert build_parser().parse_known_args(shlex.split(command)[1:])[1] == []
    names = [part["id"] for part in form["body"] if "id" in part]
    assert len(names) == len(set(names))


def test_the_release_checklist_calls_what_there_is() -> None:
    text = (ROOT / "RELEASING.md").read_text(encoding="utf-8")
    scripts = re.findall(r"bash (\S+?)[`\s]", text)
    modules = re.findall(r"python -m (scripts\.\S+?)[`\s]", text)
    assert scripts
    assert modules
    assert [name for name in scripts if not (ROOT / name).is_file()] == []
    assert [name for name in modules if not (ROOT / f"{name.replace('.', '/')}.py").is_file()] == []


def test_a_version_has_a_screen_of_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    versions = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    titles = [version.partition("\n")[0] for version in versions]
    assert titles[0] == "Unreleased"
    assert [title for title in titles[1:] if re.fullmatch(r"\d+\.\d+\.\d+ \(\d{4}-\d\d-\d\d\)", title) is None] == []
    assert all(len(version.splitlines()) <= 50 for version in versions)
