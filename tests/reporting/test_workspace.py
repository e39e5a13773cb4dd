"""The saved W&B workspace: its sections and panels, its JSON, created once and updated after."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

pytest.importorskip("wandb_workspaces", reason="an extra")

from grpo_toolkit.cli import main
from grpo_toolkit.reporting.charts.gallery import CHARTS
from grpo_toolkit.reporting.trackers.metrics import BEST
from grpo_toolkit.reporting.trackers.wandb_workspace import NAME, build_workspace, workspace_json
from tests.support.wandb_runs import environment
from tests.support.wandb_server import WandbServer, running
from tests.support.warm import run_python

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

SECTIONS = ["Trend", "Base vs export", "Answers and causes", "Health of the rollouts"]


def panels(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for section in found["section"]["panelBankConfig"]["sections"] for panel in section["panels"]]


def test_its_sections() -> None:
    found = workspace_json(build_workspace("someone", "grpo"))
    assert [section["name"] for section in found["section"]["panelBankConfig"]["sections"]] == SECTIONS


def test_every_panel_shows_what_is_logged() -> None:
    found = panels(workspace_json(build_workspace("someone", "grpo")))
    metrics = {name for panel in found for name in panel["config"].get("metrics", []) if name.startswith("latency/")}
    assert metrics
    assert {name.rpartition("/")[2] for name in metrics} <= BEST.keys()
    media = {key for panel in found for key in panel["config"].get("mediaKeys", [])}
    charts = {f"latency/charts/{chart.name}" for chart in CHARTS}
    assert media <= charts | {"latency/report", "latency/box/tpot_ms", "latency/box/ttft_ms"}
    lines = [panel for panel in found if panel["viewType"] == "Run History Line Plot"]
    assert {panel["config"]["xAxis"] for panel in lines} == {"train/global_step"}


def test_its_json_round_trips() -> None:
    from wandb_workspaces.workspaces import Workspace, internal

    built = build_workspace("someone", "grpo")
    found = workspace_json(built)
    spec = internal.WorkspaceViewspec.model_validate_json(json.dumps(found))
    view = internal.View(entity="someone", project="grpo", display_name=NAME, name="n", id="i", spec=spec)
    assert workspace_json(Workspace._from_model(view)) == found


@pytest.mark.parametrize(
    ("entity", "project", "message"),
    [("", "grpo", "--entity '' is no name"), ("someone", "someone/grpo", "--project 'someone/grpo' is no name")],
)
def test_names_that_are_none_are_one_line(
    entity: str, project: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["workspace", "--entity", entity, "--project", project, "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


def test_a_dry_run_needs_no_account(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workspace", "--entity", "someone", "--project", "grpo", "--dry-run"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [section["name"] for section in found["section"]["panelBankConfig"]["sections"]] == SECTIONS


def save(server: WandbServer | None, home: Path) -> subprocess.CompletedProcess[str]:
    command = ["-m", "grpo_toolkit.cli", "workspace", "--entity", "someone", "--project", "grpo"]
    return run_python(command, env=environment(home, server), timeout=120)


def test_it_is_created_once_and_updated_after(tmp_path: Path) -> None:
    with running() as server:
        first, second = save(server, tmp_path), save(server, tmp_path)
        assert first.returncode == second.returncode == 0, first.stderr + second.stderr
        assert f"created: {NAME}" in first.stderr
        assert f"updated: {NAME}" in second.stderr
        assert first.stdout == second.stdout
        assert len(server.views) == 1
        (view,) = server.views.values()
        assert view["displayName"] == NAME
        assert [panel["viewType"] for panel in panels(json.loads(view["spec"]))] == [
            panel["viewType"] for panel in panels(workspace_json(build_workspace("someone", "grpo")))
        ]


def test_without_a_key_it_is_one_line(tmp_path: Path) -> None:
    done = save(None, tmp_path)
    assert done.returncode == 2
    assert done.stderr.strip() == (
        "grpo-toolkit: no W&B key here: set WANDB_API_KEY or run `wandb login`; --dry-run needs none"
    )
