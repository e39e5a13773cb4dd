"""The review of `latency.jsonl`: the rows for each question (arms side by side, sweeps, course over training).

Only rows that took turns (one session, one workload) are compared with each other; a sweep shows the newest row of
each point.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow
from grpo_toolkit.latency.rows.store import FILE_NAME, PARTIAL_NAME, read_rows

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from grpo_toolkit.latency.rows.row import Ratio, Summary

FOLDER_NAME: Final = "latency"
CONTROL: Final = "control"
"""The arm of an A/A control: the first arm against itself, which says how far to trust the rest, and is no model."""

_ORDER: Final = ("base", "checkpoint", "export")
_SWEPT: Final = re.compile(r"_(batch_size|new_tokens|prompt_tokens|image_tokens|lengths)_\w+$")


@dataclass(frozen=True, kw_only=True)
class Review:
    """The rows of a run, oldest first, each id once.

    Attributes:
        path: the folder of `latency.jsonl`; the report and the pictures lie beside it.
    """

    path: Path
    rows: Sequence[LatencyRow] = field(default_factory=list)
    explanations: Sequence[ExplanationRow] = field(default_factory=list)

    @property
    def arms(self) -> list[LatencyRow]:
        """The newest comparison: rows of one session and one workload, base first.

        Several arms go before one alone, exact lengths before live ends, one sequence before a batch.
        """
        groups = [visit.main for visit in visits_of(self)]
        fitness = [(len(group) > 1, *_rank(group)[:2], _rank(group)[3]) for group in groups]
        return next((g for g, fit in reversed(list(zip(groups, fitness, strict=True))) if fit == max(fitness)), [])

    @property
    def ratios(self) -> list[tuple[LatencyRow, Ratio]]:
        """Every ratio of the newest comparison, with its row."""
        return [(row, ratio) for row in self.arms for ratio in row.ratios]

    @property
    def batches(self) -> list[LatencyRow]:
        """The newest row of every arm and batch size of the workload that was measured at most sizes.

        Rows belong together by the length of their prompts; of sizes that took turns, whose padding to the longest
        prompt may differ, by their session.
        """
        sizes: dict[str, set[int]] = {}
        lengths: dict[str, set[int]] = {}
        for row in self.rows:
            sizes.setdefault(row.session, set()).add(row.workload.batch_size)
            lengths.setdefault(row.session, set()).add(row.workload.prompt_tokens)
        in_turns = {session for session, found in sizes.items() if len(found) > 1 and len(lengths[session]) > 1}
        return _sweep(
            self.rows,
            lambda row: row.workload.batch_size,
            lambda row: (
                row.session if row.session in in_turns else (row.workload.prompt_tokens, row.workload.image_tokens)
            ),
        )

    @property
    def images(self) -> list[LatencyRow]:
        """The newest row of every arm and number of image tokens of the workload with most numbers."""
        rows = [row for row in self.rows if row.workload.image_tokens is not None]
        return _sweep(rows, lambda row: row.workload.image_tokens or 0, lambda row: row.workload.batch_size)

    @property
    def natural(self) -> list[LatencyRow]:
        """The newest rows that ended where the model ended them, one per arm and thinking."""
        rows = [row for row in self.rows if row.workload.kind == "natural" and row.tokens is not None]
        rows = [row for row in rows if row.arm != CONTROL]
        newest = {(row.arm, row.workload.thinking): row for row in rows}
        return sorted(newest.values(), key=lambda row: arm_order(row.arm))


def load_review(path: str | os.PathLike[str]) -> Review:
    """Read a run's rows.

    Args:
        path: `latency.jsonl`, the folder that holds it, or an output folder with `latency/latency.jsonl`.

    Raises:
        InputError: no such file, or lines in it that are no rows.
    """
    given = Path(path)
    places = [given] if given.is_file() else [given / FOLDER_NAME / FILE_NAME, given / FILE_NAME]
    found = next((place for place in places if any(file.is_file() for file in _files(place))), None)
    if found is None:
        raise InputError(
            f"{given}: no {FILE_NAME} in it or in its folder {FOLDER_NAME}; LatencyCallback and grpo-toolkit bench "
            "write one"
        )
    kept = [row for file in _files(found) if file.is_file() for row in read_rows(file)]
    rows = list({row.id: row for row in kept}.values())
    return Review(
        path=found.parent,
        rows=[row for row in rows if isinstance(row, LatencyRow)],
        explanations=[row for row in rows if isinstance(row, ExplanationRow)],
    )


def _files(path: Path) -> list[Path]:
    """Return a file of rows, and beside it where those of a measurement are that goes on or ended with its process."""
    return [path, path.with_name(PARTIAL_NAME)] if path.name == FILE_NAME else [path]


def is_swept(row: LatencyRow) -> bool:
    """Return whether a row is a point of a sweep, which its workload's name says."""
    return _SWEPT.search(row.workload.name) is not None


def comparisons(rows: Iterable[LatencyRow]) -> list[list[LatencyRow]]:
    """Group rows that took turns (one session, one workload) and ended well, base first, in measured order."""
    groups: dict[Hashable, dict[str, LatencyRow]] = {}
    for row in rows:
        if row.error is None and row.e2e_s is not None and row.arm != CONTROL:
            groups.setdefault((row.session, row.step, *_workload_key(row)), {}).setdefault(row.arm, row)
    return [sorted(group.values(), key=lambda row: arm_order(row.arm)) for group in groups.values()]


def _workload_key(row: LatencyRow) -> tuple[Hashable, ...]:
    """Return the key of rows that answer one question; with natural ends, images may be of any size."""
    work = row.workload
    image = None if work.kind == "natural" else work.image_tokens
    return work.name, work.kind, work.batch_size, work.thinking, work.max_new_tokens, work.lengths, image


def _rank(group: Sequence[LatencyRow]) -> tuple[bool, bool, int, bool]:
    """Rank a comparison as the one to show: exact lengths, no point of a sweep, many arms, one sequence."""
    work = group[0].workload
    return work.kind == "fixed", _SWEPT.search(work.name) is None, len(group), work.batch_size == 1


def arm_order(arm: str) -> tuple[int, str]:
    """Order arms: base, checkpoint, export, each followed by its variants; then the others by name.

    The same arm of two runs, `base (one)` and `base (other)`, is equal: they stay in the order of the runs.
    """
    name = arm.partition(" (")[0]
    for place, known in enumerate(_ORDER):
        if name == known or name.startswith(f"{known}_"):
            return place, name
    return len(_ORDER), name


def key_part(name: str) -> str:
    """Return a name for use in a metric's key: no slash and no dot, which trackers read as levels."""
    return re.sub(r"[^A-Za-z0-9_\-]+", "_", name).strip("_") or "unnamed"


def median_of(summary: Summary | None, factor: float = 1.0) -> float | None:
    """Return a figure's median in another unit, None where it was not measured."""
    return None if summary is None else summary.median * factor


def _sweep(
    rows: Iterable[LatencyRow], point: Callable[[LatencyRow], int], other: Callable[[LatencyRow], Hashable]
) -> list[LatencyRow]:
    """Return the sweep with most points, of workloads that differ in `point` alone; the first of equals."""
    series: dict[Hashable, list[LatencyRow]] = {}
    for row in rows:
        if row.workload.kind == "fixed" and row.arm != CONTROL:
            work, settings = row.workload, row.settings
            name = _SWEPT.sub("", work.name)
            key = (name, work.max_new_tokens, work.thinking, work.lengths, settings.device, other(row))
            series.setdefault(key, []).append(row)
    counts = {key: len({point(row) for row in found}) for key, found in series.items()}
    most = max(counts.values(), default=0)
    if most < 2:
        return []
    chosen = next(found for key, found in series.items() if counts[key] == most)
    newest = {(row.arm, point(row)): row for row in chosen}
    points = Counter(arm for arm, _ in newest)
    found = [row for row in newest.values() if points[row.arm] > 1]
    return sorted(found, key=lambda row: (arm_order(row.arm), point(row)))


@dataclass(frozen=True, kw_only=True)
class Visit:
    """The rows of one step of a training, or of one session without a training.

    Attributes:
        step: of the training; 0 without one.
        main: the comparison that stands for it: exact lengths, most arms.
        arms: the same, with what was timed at that step besides (the model in training, between two steps).
        natural: the arms on the workload that ends where the model ends it.
        ids: of all rows.
    """

    step: int
    main: list[LatencyRow]
    arms: list[LatencyRow]
    natural: list[LatencyRow]
    ids: list[str]


def visits_of(review: Review) -> list[Visit]:
    """Group rows by step, or by session where there was no training; oldest first."""
    found: dict[Hashable, list[LatencyRow]] = {}
    for row in review.rows:
        found.setdefault(row.session if row.step is None else row.step, []).append(row)
    visits = (_visit(rows) for rows in found.values())
    return [visit for visit in visits if visit is not None]


def _visit(rows: Sequence[LatencyRow]) -> Visit | None:
    groups = comparisons(rows)
    if not groups:
        return None
    best = max(map(_rank, groups))
    main = [group for group in groups if _rank(group) == best][-1]
    alike = {row.arm: row for group in groups if _rank(group)[:2] == best[:2] for row in group}
    arms = [*main, *(row for arm, row in alike.items() if arm not in {own.arm for own in main})]
    natural = [group for group in groups if group[0].workload.kind == "natural"]
    natural = [group for group in natural if len(group) == max(map(len, natural))]  # not the few asked another way
    return Visit(
        step=rows[0].step or 0,
        main=main,
        arms=sorted(arms, key=lambda row: arm_order(row.arm)),
        natural=natural[-1] if natural else [],
        ids=[row.id for row in rows],
    )
