"""Charts of a training's steps: phases along the training, the way down to the floor, the spread, the processes."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.reporting.charts.style import LIGHT, horizontal_only, legend_below, new_figure
from grpo_toolkit.step_time.causes.table import BY_NAME
from grpo_toolkit.step_time.explain import steady_rows
from grpo_toolkit.step_time.rows import PHASES

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.figure import Figure

    from grpo_toolkit.step_time.rows import StepRow
    from grpo_toolkit.step_time.store import StepReview

SHOWN: Final = 7
"""Phases with a colour of their own; the smaller ones are drawn together."""

_COLOURS: Final = ("export", "other1", "checkpoint", "other2", "other3", "other4", "base")


def main_phases(rows: Sequence[StepRow]) -> list[str]:
    """Return the phases that take most, in the order of a step."""
    totals = {name: sum(row.phases_s.get(name, 0.0) for row in rows) for name in PHASES}
    most = sorted(totals, key=lambda name: totals[name], reverse=True)[:SHOWN]
    return [name for name in PHASES if name in most and totals[name] > 0]


def draw_phases(review: StepReview) -> Figure | None:
    """Draw a stacked bar a step with phases; the dashed line is the floor."""
    rows = [row for row in review.steps if row.phases_s]
    if not rows:
        return None
    figure = new_figure(3.3)
    axes = figure.subplots()
    names = main_phases(rows)
    bottom = [0.0] * len(rows)
    places = range(len(rows))
    stacks = [(name, [row.phases_s.get(name, 0.0) for row in rows]) for name in names]
    stacks.append(("smaller ones", [row.wall_s - sum(row.phases_s.get(n, 0.0) for n in names) for row in rows]))
    for place, (name, heights) in enumerate(stacks):
        colour = LIGHT["grid"] if name == "smaller ones" else LIGHT[_COLOURS[place % len(_COLOURS)]]
        axes.bar(places, heights, bottom=bottom, width=0.85, color=colour, label=name.replace("_", " "))
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    floors = [row.floor_s for row in rows]
    if all(floor is not None for floor in floors):
        axes.plot(places, [floor or 0.0 for floor in floors], "--", color=LIGHT["ink"], linewidth=1, label="floor")
    every = max(1, len(rows) // 10)
    axes.set_xticks(list(places)[::every], [str(row.step) for row in rows][::every])
    axes.set_xlabel("step")
    axes.set_ylabel("seconds")
    horizontal_only(axes)
    legend_below(figure)
    return figure


def waterfall_of(review: StepReview) -> list[tuple[str, float]]:
    """Return the bars of the waterfall, in seconds: the step, what each cause takes off it, the rest, the floor."""
    if not review.explanations:
        return []
    row = review.explanations[-1]
    known = [found for found in row.causes if found.saving_s]
    bars = [("step", row.wall_s)]
    bars += [(BY_NAME[f.cause].title if f.cause in BY_NAME else f.cause, -(f.saving_s or 0.0)) for f in known]
    if row.floor_s is not None and row.unexplained_s is not None:
        bars += [("unexplained", -row.unexplained_s), ("floor", row.floor_s)]
    return bars


def draw_step_waterfall(review: StepReview) -> Figure | None:
    """Draw the way from the mean step to what physics asks for, a bar a cause; hatched is in no cause."""
    bars = waterfall_of(review)
    if len(bars) < 2:
        return None
    figure = new_figure(1.0 + 0.36 * len(bars))
    axes = figure.subplots()
    height = 0.0
    for place, (name, seconds) in enumerate(bars):
        is_level = name in ("step", "floor")
        start = 0.0 if is_level else height
        end = seconds if is_level else height + seconds
        if name == "unexplained":
            axes.barh(place, end - start, left=start, color="none", edgecolor=LIGHT["soft"], hatch="////", height=0.66)
        else:
            colour = LIGHT["checkpoint"] if name == "step" else LIGHT["base"] if name == "floor" else LIGHT["other2"]
            axes.barh(place, end - start, left=start, color=colour, height=0.66)
        text = f"{seconds:.2f}" if is_level else f"\N{MINUS SIGN}{abs(seconds):.2f}"
        axes.annotate(text, (max(start, end), place), xytext=(4, 0), textcoords="offset points", va="center")
        height = end
    axes.set_yticks(range(len(bars)), [textwrap.fill(name, 34) for name, _ in bars])
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], labelsize=8)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.margins(x=0.14)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds of a step")
    return figure


def draw_spread(review: StepReview) -> Figure | None:
    """Draw the spread of each phase over steps, as boxes."""
    rows = steady_rows(review.steps)
    if len(rows) < 3:
        return None
    names = main_phases(rows)
    figure = new_figure(0.9 + 0.34 * len(names))
    axes = figure.subplots()
    values = [[row.phases_s.get(name, 0.0) for row in rows] for name in names]
    drawn = axes.boxplot(values, **_across(), widths=0.6, patch_artist=True, flierprops={"markersize": 3})
    for box in drawn["boxes"]:
        box.set(facecolor=LIGHT["grid"], edgecolor=LIGHT["soft"])
    for line in drawn["medians"]:
        line.set(color=LIGHT["export"])
    for line in (*drawn["whiskers"], *drawn["caps"]):
        line.set(color=LIGHT["soft"])
    for dots in drawn["fliers"]:
        dots.set(markeredgecolor=LIGHT["soft"])
    axes.set_yticks(range(1, len(names) + 1), [name.replace("_", " ") for name in names])
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"])
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds")
    return figure


def draw_ranks(review: StepReview) -> Figure | None:
    """Draw the mean step of each process, as stacked bars."""
    by_rank: dict[int, list[StepRow]] = {}
    for row in [*steady_rows(review.steps), *(row for row in review.ranks if row.phases_s and not row.is_first)]:
        by_rank.setdefault(row.rank, []).append(row)
    if len(by_rank) < 2:
        return None
    figure = new_figure(1.1 + 0.34 * len(by_rank))
    axes = figure.subplots()
    ranks = sorted(by_rank)
    left = [0.0] * len(ranks)
    for place, name in enumerate(main_phases([row for rows in by_rank.values() for row in rows])):
        widths = [sum(row.phases_s.get(name, 0.0) for row in by_rank[r]) / len(by_rank[r]) for r in ranks]
        colour = LIGHT[_COLOURS[place % len(_COLOURS)]]
        axes.barh(range(len(ranks)), widths, left=left, color=colour, height=0.66, label=name.replace("_", " "))
        left = [low + width for low, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(ranks)), [f"rank {rank}" for rank in ranks])
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("seconds of a step")
    legend_below(figure)
    return figure


def _across() -> dict[str, Any]:
    """Return what lays a box plot on its side: `orientation` is new in matplotlib 3.10, `vert` goes in 3.13."""
    import matplotlib

    return {"orientation": "horizontal"} if matplotlib.__version_info__ >= (3, 10) else {"vert": False}
