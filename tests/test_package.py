"""The public face: names, what an import costs, and the floors of the house."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import grpo_toolkit

PACKAGE = Path(grpo_toolkit.__file__).parent
HEAVY = ("torch", "transformers", "peft", "wandb", "trl", "numpy", "rich", "matplotlib")

# From the ground up: a module may import from its own floor and from those below it.
FLOORS = [
    {"errors", "exchange"},
    {"reading", "names"},
    {"checkpoint"},
    {"defaults", "portable", "whole", "manifest", "stream", "merge.lora"},
    {"doctor.families", "doctor.files", "doctor.names", "doctor.jsontext", "doctor.rewrite"},
    {"doctor.folder", "doctor.findings", "doctor.digests", "doctor.tensors", "doctor.parse"},
    {"doctor.rules.adapter", "doctor.rules.cache", "doctor.rules.dialect", "doctor.rules.dtypes"},
    {"doctor.rules.files", "doctor.rules.processing", "doctor.rules.tied", "doctor.rules.weights"},
    {"doctor.diagnose"},
    {"doctor.catalogue", "doctor.plan", "doctor.repair", "doctor.text"},
    {"dialect"},
    {"cache", "distributed", "room"},
    {"ahead", "buffers", "probe", "attention", "parking", "whole_weights", "evidence"},
    {"saving", "inference", "inputs"},
    {"shards", "merge.adapter", "merge.base"},
    {"merge.experts"},
    {"merge.plan"},
    {"merge.worker"},
    {"merge.merge", "merge.live", "recast"},
    {"weights"},
    {"resume", "worker", "processing", "replay", "checks"},
    {"policy"},
    {"latency.row", "latency.sizes", "latency.gpus"},
    {
        "latency.schema",
        "latency.statistics",
        "latency.store",
        "latency.workload",
        "latency.environment",
        "latency.engines.markers",
    },
    {"latency.engines.protocol", "latency.engines.timers", "latency.engines.toggles", "latency.engines.extensions"},
    {"latency.engines.local", "latency.engines.streamed"},
    {"latency.engines.process", "latency.engines.endpoint"},
    {"latency.arms"},
    {"latency.roofline"},
    {"latency.rows"},
    {"latency.measure"},
    {"hub", "verify", "latency.compare"},
    {"latency.audit", "latency.effects", "latency.split", "latency.sweep"},
    {"latency.causes", "latency.predict", "latency.pool"},
    {"latency.lengths"},
    {"latency.explain", "latency.tuned", "latency.gate"},
    {"latency.tune"},
    {"latency.review"},
    {"export"},
    {"tracking.console", "tracking.doctor", "tracking.breaker", "tracking.trackers", "tracking.wandb_environment"},
    {"tracking.shelter", "tracking.wandb_exit"},
    {"tracking.charts.style", "tracking.metrics", "tracking.findings", "tracking.explain"},
    {"tracking.charts.arms", "tracking.charts.causes", "tracking.charts.sweeps", "tracking.headline"},
    {"tracking.charts.gallery", "tracking.wandb_plots", "tracking.tensorboard"},
    {"tracking.report", "tracking.wandb", "tracking.trackio", "tracking.model_card", "tracking.workspace"},
    {"tracking.mirror", "tracking.replay"},
    {"doctor.commands", "tracking.commands"},
    {"latency.commands", "latency.explain_command", "latency.tune_command"},
    {"callbacks.guard", "callbacks.positions", "callbacks.prompts"},
    {"callbacks.kv_cache", "callbacks.resume_guard", "callbacks.export"},
    {"callbacks.latency", "cli"},
]
STANDARD_LIBRARY_ONLY = {
    "errors",
    "exchange",
    "reading",
    "checkpoint",
    "names",
    "defaults",
    "portable",
    "whole",
    "manifest",
    "stream",
} | {module for floor in FLOORS for module in floor if module.startswith("doctor.") and module != "doctor.rewrite"}


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


def test_every_module_stands_on_one_floor() -> None:
    assert sorted(MODULES) == sorted(name for floor in FLOORS for name in floor)


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_point_downward(name: str) -> None:
    height = {module: level for level, floor in enumerate(FLOORS) for module in floor}
    for imported in _imports(MODULES[name]):
        if imported.startswith("grpo_toolkit."):
            other = imported.removeprefix("grpo_toolkit.")
            assert height[other] <= height[name], f"{name} imports {other}, which stands above it"


@pytest.mark.parametrize("name", sorted(STANDARD_LIBRARY_ONLY))
def test_the_ground_floors_need_the_standard_library_only(name: str) -> None:
    # huggingface_hub is asked for the cache's layout in one function, when a Hub name is looked up.
    allowed = set(sys.stdlib_module_names) | {"grpo_toolkit", "huggingface_hub"}
    assert {imported.partition(".")[0] for imported in _imports(MODULES[name])} <= allowed


def test_recipes_use_the_public_names_alone() -> None:
    for path in (PACKAGE.parent / "recipes").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("grpo_toolkit"):
                assert node.module == "grpo_toolkit", path
                assert {alias.name for alias in node.names} <= set(grpo_toolkit.__all__), path


def test_only_tracking_names_wandb() -> None:
    importers = {name for name, path in MODULES.items() if "wandb" in _imports(path)}
    assert importers == {
        "tracking.wandb",
        "tracking.wandb_plots",
        "tracking.wandb_environment",
        "tracking.shelter",
        "tracking.replay",
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
