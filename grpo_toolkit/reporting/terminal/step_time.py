"""A step's time for a terminal: phases beside their floor, then each cause with evidence, cost and cure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_toolkit.step_time.causes.table import BY_NAME

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grpo_toolkit.step_time.rows import FoundCause, StepExplanation, TriedCure

BAR: Final = 30
"""Letters of the bar of a phase that takes the whole step."""

_ROOM: Final = 80 - 12
"""Columns beside the labels of a callback's lines."""


def step_time(row: StepExplanation) -> RenderableType:
    """Return the whole explanation: the phases, then the causes."""
    title = f"Where a step's time goes: {seconds_text(row.wall_s)} s, mean of {row.steps} to step {row.step}"
    parts: list[RenderableType] = [Text(title, "bold"), _phases(row), Text()]
    parts += [_cause(row, found) for found in row.causes]
    return Group(*parts, _end(row))


def step_lines(row: StepExplanation, *, causes: int = 3) -> list[str]:
    """Return the explanation in a few lines of 80 columns: the causes that something can be done about.

    A cure that does not fit beside its cause is on the line below. The page has the whole.
    """
    largest = sorted(row.phases_s.items(), key=lambda item: -item[1])[:3]
    shares = ", ".join(f"{phase_title(name)} {seconds / row.wall_s:.0%}" for name, seconds in largest if row.wall_s)
    lines = [f"{'step time':<12}{seconds_text(row.wall_s)} s at step {row.step}: {shares}"]
    for found in [found for found in row.causes if found.is_curable][:causes]:
        lines += [f"{'':<12}{text}" for text in _cause_lines(found)]
    return [*lines, *(f"{'':<12}{tried_text(tried)}" for tried in row.tried)]


def _cause_lines(found: FoundCause) -> list[str]:
    costs = "" if found.saving_s is None else f"{seconds_text(found.saving_s)} s of it: "
    text, cure = f"{costs}{cause_title(found.cause)}", f"-> {found.line}"
    if not found.line:
        return [text]
    return [f"{text} {cure}"] if len(text) + len(cure) < _ROOM else [text, cure]


def tried_text(tried: TriedCure) -> str:
    """Return what a cure saved when it was tried, beside the prediction."""
    return (
        f"tried: {tried.line} saves {seconds_text(tried.measured_s)} s a step, "
        f"{seconds_text(tried.predicted_s)} s predicted"
    )


def phase_title(name: str) -> str:
    """Return a phase's name for people."""
    return name.rpartition("/")[2].replace("_", " ")


def cause_title(cause: str) -> str:
    """Return a cause's name for people."""
    return BY_NAME[cause].title if cause in BY_NAME else cause


def seconds_text(seconds: float) -> str:
    """Return seconds with as many places as are worth reading."""
    return f"{seconds:.0f}" if seconds >= 100 else f"{seconds:.1f}" if seconds >= 10 else f"{seconds:.3f}"


def _phases(row: StepExplanation) -> Table:
    table = Table(box=None, header_style="dim")
    table.add_column("phase")
    for name in ("seconds", "share", "floor"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    floors = row.floors_s or {}
    for phase, seconds in row.phases_s.items():
        floor = sum(value for name, value in floors.items() if name.partition("/")[0] == phase)
        share = seconds / row.wall_s if row.wall_s else 0.0
        table.add_row(
            Text(phase_title(phase), "dim" if phase == "other" else ""),
            seconds_text(seconds),
            f"{share:.0%}",
            seconds_text(floor) if floor else "",
            Text("█" * round(BAR * max(share, 0.0)), "cyan"),
        )
        inside = {name: value for name, value in row.parts_s.items() if name.startswith(f"{phase}/")}
        for name, value in inside.items():
            if value >= 0.01 * row.wall_s:
                indent = "  " * name.count("/")
                floor_text = seconds_text(floors[name]) if name in floors else ""
                table.add_row(
                    Text(f"{indent}{phase_title(name)}", "dim"), Text(seconds_text(value), "dim"), "", floor_text
                )
    floor_s = "" if row.floor_s is None else seconds_text(row.floor_s)
    table.add_row(Text("step", "bold"), Text(seconds_text(row.wall_s), "bold"), "", Text(floor_s, "bold"))
    return table


def _cause(row: StepExplanation, found: FoundCause) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=12, justify="right")
    grid.add_column(ratio=1)
    saving = "?" if found.saving_s is None else f"-{seconds_text(found.saving_s)} s"
    share = "" if found.saving_s is None or not row.wall_s else f"of {seconds_text(row.wall_s)}"
    grid.add_row(
        Text(saving, "bold green"), Text.assemble((cause_title(found.cause), "yellow"), "  ", (found.cause, "dim"))
    )
    grid.add_row(Text(share, "dim"), Text(found.evidence))
    cure = Text(found.cure, "dim")
    if found.line:
        cure.append("\n→ ", "bold green").append(found.line, "default")
    grid.add_row("", cure)
    return Padding(grid, (0, 0, 1, 0))


def _end(row: StepExplanation) -> Text:
    lines = []
    if row.floor_s is not None and row.unexplained_s is not None:
        lines.append(
            f"what physics asks for: {seconds_text(row.floor_s)} s; above it and in no cause: "
            f"{seconds_text(row.unexplained_s)} s, {row.unexplained_s / row.wall_s:.0%} of the step"
        )
    lines += [tried_text(tried) for tried in row.tried]
    if row.mfu is not None:
        mbu = "" if row.mbu is None else f", MBU of decoding {row.mbu:.1%}"
        lines.append(f"MFU {row.mfu:.1%}{mbu}")
    if row.slowest_rank is not None:
        lines.append(f"the slowest process is rank {row.slowest_rank}")
    return Text("\n".join(lines))
