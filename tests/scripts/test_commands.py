"""The scripts start as modules, and none of them needs the tests."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.warm import run_python

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
COMMANDS = sorted(
    ".".join(path.relative_to(SCRIPTS.parent).with_suffix("").parts)
    for path in SCRIPTS.rglob("*.py")
    if "ArgumentParser(" in path.read_text(encoding="utf-8")
)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_of_every_command(module: str) -> None:
    done = run_python(["-m", module, "--help"], cwd=SCRIPTS.parent)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: ")


def test_no_script_imports_from_the_tests() -> None:
    imports = re.compile(r"^\s*(from|import) tests\b|sys\.path", re.MULTILINE)
    assert [path.name for path in SCRIPTS.rglob("*.py") if imports.search(path.read_text(encoding="utf-8"))] == []
