"""The commit that the package runs from."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

import grpo_toolkit
from grpo_toolkit.model.hardware import toolkit_commit as module

PACKAGE = Path(grpo_toolkit.__file__).parent


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_checkout_has_a_commit_and_an_installed_copy_has_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("__init__.py", "model/__init__.py", "model/hardware/__init__.py", "model/hardware/toolkit_commit.py"):
        (tmp_path / "grpo_toolkit" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PACKAGE / name, tmp_path / "grpo_toolkit" / name)
    found: list[str | None] = []

    def ask() -> None:
        monkeypatch.setattr(module, "_PACKAGE", tmp_path / "grpo_toolkit")
        module.toolkit_commit.cache_clear()
        found.append(module.toolkit_commit())

    ask()  # no checkout at all
    git(tmp_path, "init", "-q")
    ask()  # a copy that is installed inside a checkout, and not tracked by it
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "one")
    ask()
    (tmp_path / "grpo_toolkit" / "__init__.py").write_text("")
    ask()
    module.toolkit_commit.cache_clear()
    commit = git(tmp_path, "rev-parse", "--short=12", "HEAD")
    assert found == [None, None, commit, f"{commit}, changed"]
