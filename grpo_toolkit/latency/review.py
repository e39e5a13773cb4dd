"""Which rows of `latency.jsonl` answer which question: the arms side by side, the sweeps, the course over training.

Only rows that took turns (one session, one workload) are compared with each other; a sweep shows the newest row of
each point.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.row import ExplanationRow, LatencyRow
from grpo_toolkit.latency.store import FILE_NAME, read_rows

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from grpo_toolkit.latency.row import Ratio, Summary, Timeline

FOLDER_NAME: Final = "latency"
_ORDER: Final = ("base", "checkpoint", "export")


@dataclass(frozen=True, kw_only=True)
class Review:
    """All rows of a run, oldest first, each id once.

    Attributes:
        path: the folder of `latency.jsonl`; the report and the pictures lie beside it.
    """

    path: Path
    rows: Sequence[LatencyRow] = field(default_factory=list)
    explanations: Sequence[ExplanationRow] = field(default_factory=list)

    @property
    def arms(self) -> list[LatencyRow]:
        """The newest comparison: rows of one session and one workload, base first."""
        groups = comparisons(self.rows)
        return groups[-1] if groups else []

    @property
    def exports(self) -> list[list[LatencyRow]]:
        """The main comparison of every session, oldest first: one a measured export."""
        return comparisons(self.rows)

    @property
    def ratios(self) -> list[tuple[LatencyRow, Ratio]]:
        """Every ratio that the newest comparison holds, with the row whose it is."""
        return [(row, ratio) for row in self.arms for ratio in row.ratios]

    def ratio(self, arm: str = "export", against: str = "base", metric: str = "tpot_s") -> Ratio | None:
        """The newest paired ratio of one arm against another, None where it was not computed."""
        found = (r for row, r in self.ratios if (row.arm, r.against, r.metric) == (arm, against, metric))
        return next(found, None)

    @property
    def batches(self) -> list[LatencyRow]:
        """The newest row of every arm and batch size, where an arm has several sizes."""
        return _sweep(self.rows, lambda row: row.workload.batch_size, lambda row: row.workload.name != "natural")

    @property
    def images(self) -> list[LatencyRow]:
        """The newest row of every arm and number of image tokens with its phases, where an arm has several."""
        return _sweep(
            self.rows,
            lambda row: row.workload.image_tokens,
            lambda row: row.workload.image_tokens is not None and row.workload.batch_size == 1,
        )

    @property
    def natural(self) -> list[LatencyRow]:
        """The newest rows that ended where the model ended them, one per arm and thinking."""
        rows = [row for row in self.rows if row.workload.kind == "natural" and row.tokens is not None]
        return _newest(rows, lambda row: (row.arm, row.workload.thinking))


def load_review(path: str | os.PathLike[str]) -> Review:
    """Read a run's rows.

    Args:
        path: `latency.jsonl`, the folder that holds it, or an output folder with `latency/latency.jsonl`.

    Raises:
        InputError: no such file, or lines in it that are no rows.
    """
    given = Path(path)
    places = [given] if given.is_file() else [given / FOLDER_NAME / FILE_NAME, given / FILE_NAME]
    found = next((place for place in places if place.is_file()), None)
    if found is None:
        raise InputError(
            f"{given}: no {FILE_NAME} in it or in its folder {FOLDER_NAME}; LatencyCallback and grpo-toolkit bench "
            "write one"
        )
    rows = list({row.id: row for row in read_rows(found)}.values())
    return Review(
        path=found.parent,
        rows=[row for row in rows if isinstance(row, LatencyRow)],
        explanations=[row for row in rows if isinstance(row, ExplanationRow)],
    )


def comparisons(rows: Iterable[LatencyRow]) -> list[list[LatencyRow]]:
    """Per session and step the workload on which most arms were timed, the first one where several tie."""
    sessions: dict[Hashable, dict[Hashable, dict[str, LatencyRow]]] = {}
    for row in rows:
        if row.error is not None or row.e2e_s is None:
            continue
        work, settings = row.workload, row.settings
        group = sessions.setdefault((row.session, row.step), {})
        images = 0 if work.image_tokens is None else work.prompt_tokens
        key = (work.name, work.kind, work.batch_size, work.thinking, work.max_new_tokens, settings.engine, images)
        group.setdefault(key, {}).setdefault(row.arm, row)
    return [
        sorted(max(groups.values(), key=len).values(), key=lambda row: arm_order(row.arm))
        for groups in sessions.values()
    ]


def arm_order(arm: str) -> tuple[int, str]:
    """Base, checkpoint, export, each followed by its variants; then the others by name."""
    for place, name in enumerate(_ORDER):
        if arm == name or arm.startswith(f"{name}_"):
            return place, arm
    return len(_ORDER), arm


def key_part(name: str) -> str:
    """A name as part of a metric's key: no slash and no dot, which trackers read as levels."""
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", name).strip("_") or "unnamed"


def tpot_of(timeline: Timeline) -> float | None:
    """Seconds per output token of one request; None where it has fewer than two."""
    times = timeline.token_times_s
    return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def median_of(summary: Summary | None, factor: float = 1.0) -> float | None:
    """A figure's median in another unit, None where it was not measured."""
    return None if summary is None else summary.median * factor


def _newest(rows: Iterable[LatencyRow], key: Callable[[LatencyRow], Hashable]) -> list[LatencyRow]:
    return sorted({key(row): row for row in rows}.values(), key=lambda row: arm_order(row.arm))


def _sweep(
    rows: Sequence[LatencyRow], point: Callable[[LatencyRow], int | None], wanted: Callable[[LatencyRow], bool]
) -> list[LatencyRow]:
    """The rows of those sessions' workloads in which an arm has more than one point."""
    swept: dict[Hashable, set[int | None]] = {}
    for row in rows:
        if wanted(row):
            swept.setdefault((row.session, row.workload.name, row.arm), set()).add(point(row))
    chosen = [row for row in rows if wanted(row) and len(swept[row.session, row.workload.name, row.arm]) > 1]
    return sorted(
        _newest(chosen, lambda row: (row.arm, point(row))), key=lambda row: (arm_order(row.arm), point(row) or 0)
    )


@dataclass(frozen=True, kw_only=True)
class Visit:
    """What one export's measurement left: its main comparison, and the ids of all rows of that session and step."""

    step: int
    arms: Sequence[LatencyRow]
    ids: Sequence[str]


def visits_of(review: Review) -> list[Visit]:
    """One per session and step that was measured to its end, oldest first."""
    found = []
    for arms in review.exports:
        first = arms[0]
        ids = [row.id for row in review.rows if (row.session, row.step) == (first.session, first.step)]
        found.append(Visit(step=first.step or 0, arms=arms, ids=ids))
    return found
