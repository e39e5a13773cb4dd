"""The public face: names, what an import costs, and the floors of the house."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import grpo_toolkit

if TYPE_CHECKING:
    from collections.abc import Sequence

PACKAGE = Path(grpo_toolkit.__file__).parent
ROOT = PACKAGE.parent
# From the ground up: a room may import from the rooms below it, and what stands on one floor does not know each other.
FLOORS = (
    {"errors"},
    {"checkpoint"},
    {"doctor"},
    {"model"},
    {"merge"},
    {"export", "latency", "step_time"},
    {"reporting"},
    {"callbacks", "cli"},
)
# The same inside the larger rooms; what is not named stands on the second floor of "model".
INNER_FLOORS = {
    "latency": ({"rows"}, {"engines"}, {"bench"}, {"explain", "tune"}),
    "reporting": ({"charts", "terminal"}, {"report"}, {"trackers"}),
    "model": ({"live_model", "memory"}, {"*"}, {"generation"}, {"rollouts"}),
}
HEAVY = ("torch", "transformers", "peft", "wandb", "trl", "numpy", "rich", "matplotlib")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}


def test_all_is_the_table_of_lazy_names() -> None:
    assert grpo_toolkit.__all__ == sorted(grpo_toolkit._MODULES)
    older = {"Arm": "LatencyArm", "Options": "RunOptions", "Request": "GenerationRequest"}
    for name in grpo_toolkit.__all__:
        assert getattr(grpo_toolkit, name).__name__ == older.get(name, name)


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


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downward(name: str) -> None:
    room = name.partition(".")[0]
    for imported in _own_imports(name):
        other = imported.partition(".")[0]
        assert other == room or _floor(FLOORS, other) < _floor(FLOORS, room), f"{name} imports {imported}"
        if other == room and room in INNER_FLOORS:
            here, there = (_floor(INNER_FLOORS[room], part.split(".")[1]) for part in (name, imported))
            same = name.split(".")[1] == imported.split(".")[1]
            assert there < here or same or (here == there == 1 and room == "model"), f"{name} imports {imported}"


def test_there_is_no_circle_of_imports() -> None:
    try:
        tuple(TopologicalSorter({name: _own_imports(name) for name in MODULES}).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_a_folder_is_read_with_the_standard_library_alone() -> None:
    ground = [name for name in MODULES if name.partition(".")[0] in ("errors", "checkpoint", "doctor")]
    code = (
        f"import importlib, sys; [importlib.import_module('grpo_toolkit.' + name) for name in {ground!r}]\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert set(ast.literal_eval(done.stdout)) <= {"grpo_toolkit", "__main__", "_distutils_hack"}


def test_only_commands_and_reporting_print() -> None:
    printing = {name for name, path in MODULES.items() if re.search(r"\bprint\(|rich\b", path.read_text())}
    assert {name.partition(".")[0] for name in printing} <= {"cli", "reporting"}


def test_recipes_use_the_public_names_alone() -> None:
    for path in (PACKAGE.parent / "recipes").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_toolkit"):
                assert node.module == "grpo_toolkit", path
                assert {alias.name for alias in node.names} <= set(grpo_toolkit.__all__), path


def test_only_the_trackers_name_wandb() -> None:
    importers = {name for name in MODULES if "wandb" in _imports(name)}
    assert importers
    assert all(name.startswith("reporting.trackers.") for name in importers)


def _floor(floors: Sequence[set[str]], room: str) -> int:
    return next((height for height, rooms in enumerate(floors) if room in rooms), 1)


def _own_imports(name: str) -> set[str]:
    """The modules of the package that one imports, also inside functions and under TYPE_CHECKING."""
    own = {imported.removeprefix("grpo_toolkit.") for imported in _imports(name)}
    return {imported for imported in own if imported in MODULES}


def _imports(name: str) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            modules = {name for name in whole if name.removeprefix("grpo_toolkit.") in MODULES}
            found |= modules or {node.module}
    return found
