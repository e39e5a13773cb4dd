"""The gate: the largest slowdown against the first arm with which a run does not count as failed.

An arm misses the gate if it is slower beyond doubt (the 95% interval of its paired ratio lies above 1) and by more
than is allowed in the median, in time per token or end to end. It misses it too without its KV cache where the first
arm has one, whatever the clock says: on a GPU both can take the same time until the context is long.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.rows.row import LatencyRow

MAX_SLOWDOWN: Final = "max-slowdown"
_HELD: Final = {"tpot_s": "time per output token", "e2e_s": "end to end"}


@dataclass(frozen=True, kw_only=True)
class Missed:
    """An arm that missed the gate on one workload, with the figure that shows it."""

    arm: str
    path: str
    workload: str
    reason: str

    def __str__(self) -> str:
        return f"{self.arm} misses the gate ({self.workload}): {self.reason}"


def gate_of(text: str) -> float:
    """Return the largest allowed ratio of times that a text such as `max-slowdown=1.05` names.

    Raises:
        InputError: another name, or a limit that is not a number from 1 on.
    """
    name, _, value = text.partition("=")
    try:
        limit = float(value)
    except ValueError:
        limit = math.nan
    if name != MAX_SLOWDOWN or not 1 <= limit < math.inf:
        raise InputError(f"gate {text!r}: expected {MAX_SLOWDOWN}=RATIO with a ratio of 1 or more, such as 1.05")
    return limit


def missed_by(max_slowdown: float, rows: Sequence[LatencyRow]) -> list[Missed]:
    """Return the arms that miss a gate.

    Args:
        max_slowdown: the largest allowed ratio of times.
        rows: arms that took turns, with their ratios against the first. Arms whose cache was switched off by the
            caller are left out: they are slow on purpose.
    """
    found = []
    first = rows[0]
    for row in rows[1:]:
        reason = "" if row.settings.use_cache is False else _reason(max_slowdown, row, first)
        if reason:
            found.append(Missed(arm=row.arm, path=row.path, workload=row.workload.name, reason=reason))
    return found


def _reason(max_slowdown: float, row: LatencyRow, first: LatencyRow) -> str:
    if row.error is not None and first.error is None:
        return row.error
    if row.proof.is_cached is False and first.proof.is_cached:
        steps = ", ".join(map(str, row.proof.step_lengths[:4]))
        return f"its KV cache is off (tokens fed a step: {steps}, ...), that of {first.arm} is on"
    for ratio in row.ratios:
        if ratio.low is None or ratio.high is None:
            continue
        if ratio.metric in _HELD and ratio.against == first.arm and ratio.low > 1:
            times = f"{ratio.median:.2f} times as long as {first.arm} ({ratio.low:.2f} to {ratio.high:.2f})"
            if ratio.median > max_slowdown:
                return f"{_HELD[ratio.metric]} {times}, allowed are {max_slowdown:g}"
    return ""
