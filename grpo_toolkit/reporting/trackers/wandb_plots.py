"""Custom charts for W&B that need no network: its bar and line presets, and boxes as Plotly."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any

from grpo_toolkit.reporting.charts.arms import request_times_ms, token_gaps
from grpo_toolkit.reporting.charts.style import colours_of, is_variant, label_of

if TYPE_CHECKING:
    from grpo_toolkit.latency.rows.review import Review


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

    lines = {label_of(row.arm): [median(gaps) * 1e3 for gaps in token_gaps(row)] for row in review.arms}
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


def box_plots(review: Review) -> dict[str, Any]:
    """Return a Plotly figure a metric with a box an arm, but the arm whose cache is off, which would squeeze them."""
    from plotly import graph_objects

    rows = [row for row in review.arms if row.timelines and not is_variant(row.arm)]
    colours = colours_of([row.arm for row in rows])
    times = {row.arm: request_times_ms(row) for row in rows}
    figures = {}
    for metric in ("TTFT", "TPOT", "E2E"):
        boxes = [
            graph_objects.Box(y=found[metric], name=label_of(arm), marker_color=colours[arm], boxpoints="all")
            for arm, found in times.items()
            if found[metric]
        ]
        if boxes:
            figure = figures[f"{metric.lower()}_ms"] = graph_objects.Figure(boxes)
            figure.update_layout(
                title=f"{metric} over requests",
                yaxis_title=f"{metric} (ms)",
                template="plotly_white",
                showlegend=False,
            )
    return figures
