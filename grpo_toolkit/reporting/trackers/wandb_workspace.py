"""A saved W&B workspace with the latency charts in their place: created once, updated after.

Panels name metrics that `metrics` defines; TRL's own names of rollout health are those of TRL 1.16.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError, TrackerError
from grpo_toolkit.reporting.charts.style import LIGHT
from grpo_toolkit.reporting.trackers.metrics import REPORT_KEY, STEP_METRIC
from grpo_toolkit.reporting.trackers.wandb_environment import api_key

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

NAME: Final = "GRPO inference latency"
_VIEW: Final = "grpolatency"
_ARMS: Final = {"base": LIGHT["base"], "checkpoint": LIGHT["checkpoint"], "export": LIGHT["export"]}
_HEALTH: Final = {
    "Reward": ("train/reward", "train/reward_std"),
    "Completion length": ("train/completions/mean_length", "train/completions/max_length"),
    "Share cut off at the cap": ("train/completions/clipped_ratio",),
    "Entropy": ("train/entropy",),
    "Groups without a difference": ("train/frac_reward_zero_std",),
    "Seconds per step": ("train/step_time",),
}


@dataclass(frozen=True, kw_only=True)
class SavedWorkspace:
    """A saved workspace: its address, and whether it was there before."""

    url: str
    was_there: bool


def build_workspace(entity: str, project: str) -> Workspace:
    """Build the workspace with its four sections; needs no network.

    Raises:
        InputError: no name of an entity or a project.
        TrackerError: wandb-workspaces is not installed.
    """
    for option, name in {"--entity": entity, "--project": project}.items():
        if not name.strip() or "/" in name:
            raise InputError(f"{option} {name!r} is no name; entity and project are given apart, without a slash")
    try:
        import wandb_workspaces.workspaces as ws
    except ImportError as error:
        raise TrackerError("wandb-workspaces is not installed: pip install 'grpo-toolkit[workspace]'") from error
    sections = {
        "Trend": _trend(),
        "Base vs export": _base_and_export(),
        "Answers and causes": _answers(),
        "Health of the rollouts": [_lines(title, names) for title, names in _HEALTH.items()],
    }
    return ws.Workspace(
        entity=entity,
        project=project,
        name=NAME,
        sections=[ws.Section(name=name, panels=panels, is_open=True) for name, panels in sections.items()],
        settings=ws.WorkspaceSettings(x_axis=STEP_METRIC, group_by_prefix="first"),
        auto_generate_panels=False,
    )


def _lines(title: str, names: tuple[str, ...], unit: str = "") -> Any:
    import wandb_workspaces.reports.v2 as wr

    return wr.LinePlot(title=title, x=STEP_METRIC, y=list(names), title_x="training step", title_y=unit)


def _of_arms(title: str, metric: str, unit: str) -> Any:
    return _lines(title, tuple(f"latency/{arm}/{metric}" for arm in _ARMS), unit)


def _trend() -> list[Any]:
    return [
        _of_arms("Time per output token", "tpot_ms_p50", "ms"),
        _of_arms("Time to first token", "ttft_ms_p50", "ms"),
        _of_arms("End to end", "e2e_ms_p50", "ms"),
        _of_arms("Output tokens per second", "output_tokens_per_s_p50", "tokens/s"),
        _of_arms("Peak memory", "peak_memory_mb", "MB"),
    ]


def _base_and_export() -> list[Any]:
    import wandb_workspaces.reports.v2 as wr

    interval = tuple(f"latency/export/tpot_vs_base{end}" for end in ("", "_low", "_high"))
    bars = [f"latency/{arm}/tpot_ms_p50" for arm in (*_ARMS, "export_no_cache")]
    return [
        wr.ScalarChart(title="Export's TPOT over the base's", metric="latency/export/tpot_vs_base"),
        wr.ScalarChart(title="KV cache in use", metric="latency/export/kv_cache_in_use", groupby_aggfunc="min"),
        _lines("Export's TPOT over the base's, 95% interval", interval, "ratio"),
        wr.BarPlot(title="Time per output token", metrics=bars, title_x="ms"),
        wr.MediaBrowser(title="Report", media_keys=[REPORT_KEY]),
        wr.MediaBrowser(title="Spread over requests", media_keys=["latency/box/tpot_ms", "latency/box/ttft_ms"]),
    ]


def _answers() -> list[Any]:
    """Return panels of what every run has: a chart that needs a sweep would be an empty panel in all the others."""
    import wandb_workspaces.reports.v2 as wr

    charts = {
        "lengths": "Length of answers",
        "waterfall": "From arm to arm",
        "first_token": "Until the first token",
        "positions": "Along the answer",
    }
    found = [wr.MediaBrowser(title=title, media_keys=[f"latency/charts/{name}"]) for name, title in charts.items()]
    return [*found, wr.WeavePanelSummaryTable(table_name="latency/table")]


def workspace_json(workspace: Workspace) -> dict[str, Any]:
    """Return what would be saved, as W&B stores it."""
    found: dict[str, Any] = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return found


def save_workspace(workspace: Workspace) -> SavedWorkspace:
    """Save it under a name of its own in the project, so that a second time updates the first one.

    Raises:
        InputError: no key.
        TrackerError: the server did not take it.
    """
    from wandb_workspaces.workspaces import internal

    if api_key() is None:
        raise InputError("no W&B key here: set WANDB_API_KEY or run `wandb login`; --dry-run needs none")
    workspace._internal_name = f"nw-{_VIEW}-v"
    try:
        try:
            before = internal.View.from_name(workspace.entity, workspace.project, workspace._internal_name)
            workspace._internal_id = before.id
        except ValueError as error:
            if "not found in project" not in str(error):
                raise
        was_there = bool(workspace._internal_id)
        saved: Workspace = workspace.save()
    except Exception as error:  # whatever a server and its client raise: it was asked for by name
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise TrackerError(f"W&B did not take the workspace ({type(error).__name__}: {first})") from error
    return SavedWorkspace(url=saved.url, was_there=was_there)
