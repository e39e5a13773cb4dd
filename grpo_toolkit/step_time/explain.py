"""The explanation of a run's steps: the mean step, its causes, and how far their cures go towards the floor.

    step = floor + what each cause costs + unexplained

Where several causes share a phase, each takes its share of what the ones before it left, and none takes the phase
below what physics asks for: so no second is counted twice.
"""

from __future__ import annotations

import statistics
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Final

from grpo_toolkit.step_time.causes.cause import Mean
from grpo_toolkit.step_time.causes.table import CAUSES
from grpo_toolkit.step_time.rows import NO_CURE, PHASES, FoundCause, StepExplanation

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Mapping, Sequence

    from grpo_toolkit.step_time.rows import StepRow
    from grpo_toolkit.step_time.seen import Seen
    from grpo_toolkit.step_time.work import Machine

WORTH: Final = 0.01
"""The share of a step from which on a cause is worth a line."""

_BETWEEN: Final = ("logging", "evaluation", "saving")
"""Phases that do not happen in every step: their mean is over all steps, however often phases are taken."""

_BUSY: Final = ("reading_rows", "image_processing", "texts", "rollout", "rewards")


def explain_steps(
    rows: Sequence[StepRow],
    seen: Seen | None = None,
    *,
    machine: Machine | None = None,
    ranks: Sequence[StepRow] = (),
    environment: dict[str, str] | None = None,
    in_place: Collection[str] = (),
) -> StepExplanation | None:
    """Explain the steps of one process; None where there are none with phases.

    Args:
        rows: of one process and one session, oldest first.
        seen: of the last step that was looked at closely; without it no cause is looked for.
        machine: the device's speed.
        ranks: rows of the other processes.
        environment: what the times depend on.
        in_place: names of the callbacks that the trainer has: none of them is advised again.
    """
    steady = steady_rows(rows)
    if not steady:
        return None
    mean = mean_of(steady, rows, machine=machine, ranks=ranks)
    causes = [] if seen is None else find_causes(seen, mean, in_place=in_place)
    floor = sum(mean.floors_s.values()) if mean.floors_s else None
    saved = sum(cause.saving_s or 0.0 for cause in causes)
    slowest = max(mean.busy_s, key=lambda rank: mean.busy_s[rank]) if len(mean.busy_s) > 1 else None
    return StepExplanation(
        step=rows[-1].step,
        steps=len(steady),
        wall_s=mean.wall_s,
        phases_s=mean.phases_s,
        parts_s=mean.parts_s,
        clock=steady[-1].clock,
        floor_s=floor,
        floors_s=mean.floors_s or None,
        mfu=_mean(row.mfu for row in steady),
        mbu=_mean(row.mbu for row in steady),
        causes=causes,
        unexplained_s=None if floor is None else mean.wall_s - floor - saved,
        slowest_rank=slowest,
        environment=environment or {},
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        session=rows[-1].session,
    )


def steady_rows(rows: Sequence[StepRow]) -> list[StepRow]:
    """Return the steps to average: with phases, not the first, not looked at closely, or as near to that as can be."""
    known = [row for row in rows if row.phases_s]
    later = [row for row in known if not row.is_first]
    return [row for row in later if not row.is_close] or later or known


def mean_of(
    steady: Sequence[StepRow],
    rows: Sequence[StepRow],
    *,
    machine: Machine | None = None,
    ranks: Sequence[StepRow] = (),
) -> Mean:
    """Return the mean of steady steps, with what happens between steps as a mean over all."""
    phases = _mean_of([row.phases_s for row in steady])
    known = [row for row in rows if row.phases_s and not row.is_first and not row.is_close] or list(steady)
    phases |= {
        name: seconds for name, seconds in _mean_of([row.phases_s for row in known]).items() if name in _BETWEEN
    }
    phases = {name: phases[name] for name in PHASES if name in phases}
    return Mean(
        wall_s=sum(phases.values()),
        phases_s=phases,
        parts_s=_mean_of([row.parts_s for row in steady]),
        floors_s=_mean_of([row.floors_s or {} for row in steady]),
        decode_steps=statistics.fmean(row.work.decode_steps for row in steady),
        rollouts=statistics.fmean(row.work.rollouts for row in steady),
        machine=machine,
        busy_s=_busy(steady, ranks),
    )


def find_causes(seen: Seen, mean: Mean, *, in_place: Collection[str] = ()) -> list[FoundCause]:
    """Return the causes that are worth a line, the one that costs most first; those of unknown cost come last.

    One that is not leaves its seconds to the causes after it. A callback of `in_place` that would be the cure has left
    the cause as it is, for reasons that it says itself.
    """
    left: dict[str, float] = {}
    found: list[FoundCause] = []
    for cause in CAUSES:
        one = cause.rule(seen, mean)
        if one is None:
            continue
        savings = None if one.savings_s is None else _take(one.savings_s, mean, left)
        if savings is not None and sum(savings.values()) < WORTH * mean.wall_s:
            continue
        for name, seconds in (savings or {}).items():
            left[name] = left.get(name, mean.seconds(name)) - seconds
        cure, line = one.cure or cause.cure, one.line or cause.line
        callback = line.partition("(")[0]
        if callback in in_place:
            cure, line = f"{NO_CURE}: {callback} is in place, and leaves this as it is on this machine", ""
        found.append(
            FoundCause(
                cause=cause.name,
                evidence=one.evidence,
                saving_s=None if savings is None else sum(savings.values()),
                savings_s=savings or {},
                cure=cure,
                line=line,
                link=cause.link,
            )
        )
    return sorted(found, key=lambda one: -1.0 if one.saving_s is None else one.saving_s, reverse=True)


def _take(savings: dict[str, float], mean: Mean, left: Mapping[str, float]) -> dict[str, float]:
    """Return a cause's savings out of what is left of each phase above its floor."""
    taken = {}
    for name, seconds in savings.items():
        whole = mean.seconds(name)
        if whole <= 0:
            continue
        rest = left.get(name, whole)
        saved = min(max(seconds, 0.0) * rest / whole, max(rest - mean.floors_s.get(name, 0.0), 0.0))
        if saved > 0:
            taken[name] = saved
    return taken


def _busy(steady: Sequence[StepRow], ranks: Sequence[StepRow]) -> dict[int, float]:
    if not ranks:
        return {}
    by_rank: dict[int, list[float]] = {}
    for row in [*steady, *(row for row in ranks if row.phases_s and not row.is_first)]:
        by_rank.setdefault(row.rank, []).append(sum(row.phases_s.get(name, 0.0) for name in _BUSY))
    return {rank: statistics.fmean(seconds) for rank, seconds in by_rank.items()}


def _mean_of(each: Sequence[dict[str, float]]) -> dict[str, float]:
    names = {name: None for one in each for name in one}
    return {name: statistics.fmean(one.get(name, 0.0) for one in each) for name in names}


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None
