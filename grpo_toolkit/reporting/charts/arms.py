"""Charts of arms side by side: bars, time along the answer, distributions, answer lengths, over the training."""

from __future__ import annotations

from statistics import median, quantiles
from typing import TYPE_CHECKING, Final

from grpo_toolkit.latency.rows.review import visits_of
from grpo_toolkit.reporting.charts.style import (
    LIGHT,
    colours_of,
    horizontal_only,
    is_variant,
    label_of,
    legend_below,
    line_look,
    lying_on,
    milliseconds,
    name_arms,
    new_figure,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import LatencyRow

_SMOOTH_FROM: Final = 96


def draw_bars(review: Review) -> Figure | None:
    """Draw the median time per output token, quartiles as whiskers."""
    rows = [row for row in review.arms if row.tpot_s is not None]
    if not rows:
        return None
    figure = new_figure(1.0 + 0.5 * len(rows))
    axes = figure.subplots()
    colours = colours_of([row.arm for row in rows])
    for place, row in enumerate(rows):
        assert row.tpot_s is not None
        middle, low, high = (value * 1e3 for value in (row.tpot_s.median, row.tpot_s.q1, row.tpot_s.q3))
        axes.barh(place, middle, color=colours[row.arm], height=0.6)
        axes.errorbar(
            middle, place, xerr=[[middle - low], [high - middle]], color=LIGHT["ink"], capsize=3, linewidth=1
        )
        text = f"{milliseconds(row.tpot_s.median)} ms"
        axes.annotate(text, (high, place), xytext=(6, 0), textcoords="offset points", va="center", weight="bold")
    name_arms(axes, [label_of(row.arm) for row in rows])
    axes.set_xlabel("time per output token (ms)")
    axes.set_xlim(0, max(row.tpot_s.q3 for row in rows if row.tpot_s is not None) * 1e3 * 1.18)
    return figure


def draw_positions(review: Review) -> Figure | None:
    """Draw the time between tokens along the answer: flat with a KV cache, climbing without one."""
    rows = [row for row in review.arms if token_gaps(row)]
    if not rows:
        return None
    figure = new_figure()
    axes = figure.subplots()
    colours = colours_of([row.arm for row in rows])
    curves = {row.arm: _quartile_curves(row) for row in rows}
    top = 1.12 * max(sorted(high)[int(len(high) * 0.98)] for _, _, high in curves.values())
    beneath = lying_on({arm: middle for arm, (_, middle, _) in curves.items()}, top)
    for arm, (low, middle, high) in curves.items():
        tokens = range(2, len(middle) + 2)
        axes.fill_between(tokens, low, high, color=colours[arm], alpha=0.16, linewidth=0)
        axes.plot(tokens, middle, color=colours[arm], **line_look(arm, beneath))
    axes.set_xlabel("output token")
    axes.set_ylabel("time since the token before (ms)")
    axes.set_ylim(0, top)
    legend_below(figure)
    return figure


def _quartile_curves(row: LatencyRow) -> tuple[list[float], list[float], list[float]]:
    spread = [_quartiles(column) for column in token_gaps(row)]
    low, middle, high = (_smooth([part[index] * 1e3 for part in spread]) for index in range(3))
    return low, middle, high


def token_gaps(row: LatencyRow) -> list[list[float]]:
    """Return per token position the gaps of the sequences that reach it, as long as at least half of them do."""
    columns: list[list[float]] = []
    streams = [times for timeline in row.timelines for times in timeline.streams_s]
    for times in streams:
        for position in range(1, len(times)):
            if len(columns) < position:
                columns.append([])
            columns[position - 1].append(times[position] - times[position - 1])
    return [column for column in columns if 2 * len(column) >= len(streams)]


def _quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _smooth(values: list[float]) -> list[float]:
    """Return a running median over a few neighbours where there are too many tokens to see single ones."""
    reach = 0 if len(values) < _SMOOTH_FROM else max(1, len(values) // 100)
    return [median(values[max(0, at - reach) : at + reach + 1]) for at in range(len(values))]


def distributions_caption(review: Review) -> str:
    """Return how to read the boxes, and which measured arms are not among them."""
    left_out = [label_of(row.arm) for row in review.arms if row.timelines and row not in _in_boxes(review)]
    rest = f" Left out, as it would squeeze the others: {'; '.join(left_out)}." if left_out else ""
    return f"A dot a measured request; the box is median and quartiles.{rest}"


def _in_boxes(review: Review) -> list[LatencyRow]:
    rows = [row for row in review.arms if row.timelines]
    return [row for row in rows if not is_variant(row.arm)] or rows


def draw_distributions(review: Review) -> Figure | None:
    """Draw every measured request as a dot over its arm's box: TTFT, TPOT, E2E."""
    rows = _in_boxes(review)
    if not rows:
        return None
    times = [request_times_ms(row) for row in rows]
    figure = new_figure(3.0)
    colours = colours_of([row.arm for row in rows])
    for axes, metric in zip(figure.subplots(1, 3), times[0], strict=True):
        _draw_boxes(axes, rows, [of_row[metric] for of_row in times], colours)
        axes.set_title(f"{metric} (ms)", loc="left")
    handles = [figure.axes[0].plot([], [], "s", color=colours[row.arm])[0] for row in rows]
    legend_below(figure, handles, [label_of(row.arm) for row in rows])
    return figure


def request_times_ms(row: LatencyRow) -> dict[str, list[float]]:
    """Return TTFT, TPOT and E2E of every measured request, in milliseconds."""
    timed = [timeline for timeline in row.timelines if timeline.token_times_s]
    return {
        "TTFT": [timeline.ttft_s * 1e3 for timeline in timed],
        "TPOT": [tpot * 1e3 for timeline in timed if (tpot := timeline.tpot_s) is not None],
        "E2E": [timeline.e2e_s * 1e3 for timeline in timed],
    }


def _draw_boxes(axes: Axes, rows: Sequence[LatencyRow], values: list[list[float]], colours: dict[str, str]) -> None:
    for place, (row, found) in enumerate(zip(rows, values, strict=True)):
        if not found:
            continue
        colour = colours[row.arm]
        axes.boxplot(
            found,
            positions=[place],
            widths=0.62,
            showfliers=False,
            medianprops={"color": colour, "linewidth": 2},
            boxprops={"color": colour},
            whiskerprops={"color": colour},
            capprops={"color": colour},
        )
        # Spread by order, not at random: the same rows give the same picture.
        spread = [place + 0.22 * ((index * 0.618) % 1 - 0.5) for index in range(len(found))]
        axes.scatter(spread, found, s=9, color=colour, alpha=0.55, linewidths=0)
    axes.set_xticks([])
    axes.margins(y=0.12)
    horizontal_only(axes)


def draw_lengths(review: Review) -> Figure | None:
    """Draw the share of answers that are at least so long: all tokens, and think and answer apart."""
    rows = [row for row in review.natural if len(row.timelines) > 1]
    if not rows:
        return None
    figure = new_figure()
    axes = figure.subplots()
    colours = colours_of([row.arm for row in rows])
    styles = {"output": "-", "think": "--", "answer": ":"}
    beneath = lying_on(
        {_answers_of(row): sorted(map(float, _lengths(row, "output"))) for row in rows},
        max(max(_lengths(row, "output")) for row in rows),
    )
    for row in rows:
        for kind, style in styles.items():
            lengths = sorted(_lengths(row, kind))
            if not lengths:
                continue
            shares = [100 * (1 - index / len(lengths)) for index in range(len(lengths))]
            look = line_look(_answers_of(row), beneath) if kind == "output" else {}
            axes.step([0, *lengths], [100, *shares], where="post", color=colours[row.arm], linestyle=style, **look)
    words = {"output": "solid: all", "think": "dashed: think", "answer": "dotted: answer"}
    shown = [word for kind, word in words.items() if any(_lengths(row, kind) for row in rows)]
    axes.set_xlabel(f"output tokens ({', '.join(shown)})" if len(shown) > 1 else "output tokens")
    axes.set_ylabel("answers at least this long (%)")
    axes.set_xlim(left=0)
    axes.locator_params(axis="x", integer=True)
    axes.set_ylim(0, 104)
    _mark_cap(axes, rows)
    legend_below(figure, columns=3)
    return figure


def _lengths(row: LatencyRow, kind: str) -> list[int]:
    if kind == "output":
        return [length for t in row.timelines for length in (t.output_lengths or [t.output_tokens])]
    found = [getattr(timeline, f"{kind}_tokens") for timeline in row.timelines]
    return [length for length in found if length is not None]


def _answers_of(row: LatencyRow) -> str:
    return label_of(row.arm) + {None: "", True: ", thinking", False: ", direct"}[row.workload.thinking]


def _mark_cap(axes: Axes, rows: Sequence[LatencyRow]) -> None:
    """Mark the cap, and how many answers ran into it."""
    capped = sum(row.tokens.capped for row in rows if row.tokens is not None)
    caps = {row.workload.max_new_tokens for row in rows}
    if capped and len(caps) == 1:
        (cap,) = caps
        axes.axvline(cap, color=LIGHT["soft"], linewidth=1, linestyle=(0, (2, 2)))
        text = f"cap: {capped} of {sum(len(row.timelines) for row in rows)} answers"
        axes.annotate(
            text, (cap, 100), xytext=(-5, 4), textcoords="offset points", ha="right", va="bottom", fontsize=8.5
        )
        axes.set_ylim(top=112)  # room for it above the lines


def draw_trend(review: Review) -> Figure | None:
    """Draw the time per output token of every arm at every measured step."""
    points: dict[str, dict[int, LatencyRow]] = {}
    for visit in visits_of(review):
        for row in visit.arms:
            if row.step is not None and row.tpot_s is not None and not is_variant(row.arm):
                points.setdefault(row.arm, {})[row.step] = row
    if len({step for steps in points.values() for step in steps}) < 2:
        return None
    figure = new_figure()
    axes = figure.subplots()
    colours = colours_of(list(points))
    medians = {
        arm: [row.tpot_s.median * 1e3 for _, row in sorted(steps.items()) if row.tpot_s is not None]
        for arm, steps in points.items()
    }
    beneath = lying_on(medians, max(map(max, medians.values())))
    for arm, steps in points.items():
        found = [(step, row.tpot_s) for step, row in sorted(steps.items()) if row.tpot_s is not None]
        x = [step for step, _ in found]
        axes.fill_between(
            x, [s.q1 * 1e3 for _, s in found], [s.q3 * 1e3 for _, s in found], color=colours[arm], alpha=0.16, lw=0
        )
        axes.plot(x, medians[arm], "o-", ms=4, color=colours[arm], **line_look(arm, beneath))
    axes.set_xlabel("training step")
    axes.set_ylabel("time per output token (ms)")
    axes.set_ylim(bottom=0)
    legend_below(figure)
    return figure
