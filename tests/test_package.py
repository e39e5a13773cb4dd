"""The public face: names, and what an import costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_toolkit

PACKAGE = Path(grpo_toolkit.__file__).parent
HEAVY = ("torch", "transformers", "peft", "wandb", "trl", "numpy", "rich", "matplotlib")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def test_all_is_the_table_of_lazy_names() -> None:
    assert grpo_toolkit.__all__ == sorted(grpo_toolkit._MODULES)
    for name in grpo_toolkit.__all__:
        assert getattr(grpo_toolkit, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LatencyCalback'"):
        _ = grpo_toolkit.LatencyCalback


@pytest.mark.parametrize("code", ["import grpo_toolkit", "import grpo_toolkit.cli; grpo_toolkit.cli.build_parser()"])
def test_importing_costs_nothing(code: str) -> None:
    check = f"{code}; import sys; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, atexit; sys.argv = ['grpo-toolkit', '--help']\n"
        f"atexit.register(lambda: print('HEAVY', sorted(set({HEAVY!r}) & set(sys.modules))))\n"
        "from grpo_toolkit.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert "usage: grpo-toolkit" in done.stdout
    assert done.stdout.strip().endswith("HEAVY []")


def test_recipes_use_the_public_names_alone() -> None:
    for path in (PACKAGE.parent / "recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_toolkit"):
                assert node.module == "grpo_toolkit", path
                assert {alias.name for alias in node.names} <= set(grpo_toolkit.__all__), path


def test_only_the_trackers_name_wandb() -> None:
    importers = {name for name, path in MODULES.items() if "wandb" in _imports(path)}
    assert importers == {
        "reporting.trackers.wandb_run",
        "reporting.trackers.wandb_plots",
        "reporting.trackers.wandb_environment",
        "reporting.trackers.sheltered_callbacks",
        "reporting.trackers.replay",
    }


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in whole if name.removeprefix("grpo_toolkit.") in MODULES}
            found |= modules or {node.module}
    return found
