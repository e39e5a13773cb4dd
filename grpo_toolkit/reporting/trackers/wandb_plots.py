"""Custom charts for W&B that need no network: its bar and line presets, and boxes as Plotly."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from grpo_toolkit.reporting.charts.style import colours_of, is_variant, label_of

if TYPE_CHECKING:
    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import LatencyRow


def tpot_bars(review: Review) -> dict[str, Any]:
    """Return a `plot.bar` of the median time per output token of every arm, in milliseconds."""
    import wandb

    data = [[label_of(row.arm), row.tpot_s.median * 1e3] for row in review.arms if row.tpot_s is not None]
    if not data:
        return {}
    table = wandb.Table(columns=["arm", "tpot_ms_p50"], data=data)
    title = "Time per output token (ms), median"
    return {"latency/tpot_bar": wandb.plot.bar(table, "arm", "tpot_ms_p50", title=title)}


def tpot_lines(review: Review) -> dict[str, Any]:
    """Return a `plot.line_series` of the time since the token before, in milliseconds, by output token."""
    import wandb

    lines = {label_of(row.arm): _gaps_ms(row) for row in review.arms}
    lines = {name: values for name, values in lines.items() if values}
    if not lines:
        return {}
    chart = wandb.plot.line_series(
        xs=[list(range(2, len(values) + 2)) for values in lines.values()],
        ys=list(lines.values()),
        keys=list(lines),
        title="Time since the token before (ms), median",
        xname="output token",
    )
    return {"latency/positions": chart}


def _gaps_ms(row: LatencyRow) -> list[float]:
    """Return the median gap before each token that every sequence has."""
    times = [times for timeline in row.timelines for times in timeline.streams_s]
    shortest = min(map(len, times), default=0)
    return [median(t[at] - t[at - 1] for t in times) * 1e3 for at in range(1, shortest)]


def box_plots(review: Review) -> dict[str, Any]:
    """Return a Plotly figure a metric with a box an arm, but the arm whose cache is off, which would squeeze them."""
    from plotly import graph_objects

    rows = [row for row in review.arms if row.timelines and not is_variant(row.arm)]
    colours = colours_of([row.arm for row in rows])
    figures = {}
    for name, title in {"ttft_ms": "TTFT", "tpot_ms": "TPOT", "e2e_ms": "E2E"}.items():
        boxes = [
            graph_objects.Box(y=values, name=label_of(row.arm), marker_color=colours[row.arm], boxpoints="all")
            for row in rows
            if (values := _values_ms(row, name))
        ]
        if boxes:
            figures[name] = graph_objects.Figure(boxes)
            figures[name].update_layout(
                title=f"{title} over requests", yaxis_title=f"{title} (ms)", template="plotly_white", showlegend=False
            )
    return figures


def _values_ms(row: LatencyRow, name: str) -> list[float]:
    times = [timeline for timeline in row.timelines if timeline.token_times_s]
    if name == "tpot_ms":
        return [tpot * 1e3 for timeline in times if (tpot := timeline.tpot_s) is not None]
    return [(timeline.ttft_s if name == "ttft_ms" else timeline.e2e_s) * 1e3 for timeline in times]
