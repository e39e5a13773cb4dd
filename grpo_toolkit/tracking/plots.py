"""Pictures of latency rows, with matplotlib."""

from __future__ import annotations

from statistics import median
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from grpo_toolkit.latency.row import LatencyRow

_COLOURS: Final = {"export": "#2a7f62", "base": "#5b7b9a", "checkpoint": "#b08a3c", "export_no_cache": "#b5523b"}
_LABELS: Final = {
    "base": "base",
    "checkpoint": "checkpoint,\nplain trainer",
    "export": "export",
    "export_no_cache": "export,\ncache off",
}


def latency_chart(rows: Sequence[LatencyRow], path: Path) -> Path:
    """Draw time per output token and time by token position for every arm; writes a PNG.

    On the left the median TPOT with its quartiles; on the right the time between a token and the one before it,
    along the answer: flat with a KV cache, climbing without one.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9.6, 3.6), dpi=130, layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_bars(bars, [row for row in rows if row.tpot_s is not None])
    _draw_curves(curves, rows)
    first = rows[0]
    figure.suptitle(
        f"{(first.parameters or 0) / 1e6:.1f} M parameters, {first.workload.max_new_tokens} new tokens after "
        f"{first.workload.prompt_tokens}, batch {first.workload.batch_size}, {first.environment['hardware']}",
        fontsize=9,
        color="#555555",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _draw_bars(axes: Any, rows: Sequence[LatencyRow]) -> None:
    for position, row in enumerate(rows):
        assert row.tpot_s is not None
        median, low, high = (value * 1e3 for value in (row.tpot_s.median, row.tpot_s.q1, row.tpot_s.q3))
        axes.barh(position, median, color=_COLOURS.get(row.arm, "#888888"), height=0.62)
        axes.errorbar(
            median, position, xerr=[[median - low], [high - median]], color="#333333", capsize=3, linewidth=1
        )
        axes.annotate(
            f"{median:.1f} ms", (high, position), xytext=(6, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_yticks(range(len(rows)), [_LABELS.get(row.arm, row.arm) for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("time per output token (ms), median and quartiles")
    axes.margins(x=0.22)
    axes.set_xlim(left=0)
    _plain(axes)


def _draw_curves(axes: Any, rows: Sequence[LatencyRow]) -> None:

    for row in rows:
        gaps = [
            [late - early for early, late in zip(t.token_times_s, t.token_times_s[1:], strict=False)]
            for t in row.timelines
        ]
        middle = [median(column) * 1e3 for column in zip(*gaps, strict=False)]
        label = _LABELS.get(row.arm, row.arm).replace("\n", " ")
        axes.plot(
            range(2, len(middle) + 2), middle, color=_COLOURS.get(row.arm, "#888888"), linewidth=1.4, label=label
        )
    axes.set_xlabel("token")
    axes.set_ylabel("time since the last token (ms)")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _plain(axes)


def _plain(axes: Any) -> None:
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.tick_params(labelsize=9)
    axes.xaxis.label.set_size(9)
    axes.yaxis.label.set_size(9)
