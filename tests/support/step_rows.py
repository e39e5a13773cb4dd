"""Rows of steps as a training leaves them, with figures that are easy to follow."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.step_time.explain import explain_steps
from grpo_toolkit.step_time.rows import StepExplanation, StepRow, Work
from grpo_toolkit.step_time.seen import Seen, VisionSeen
from grpo_toolkit.step_time.store import append_step_rows, file_of

if TYPE_CHECKING:
    from pathlib import Path

PHASES = {"reading_rows": 1.0, "rollout": 4.0, "forward": 2.0, "backward": 3.0, "optimizer": 0.5, "other": 0.5}
SEEN = Seen(vision=VisionSeen(images=8, distinct=1, attention_calls=400, attention_layers=4))


def step_row(step: int, *, rank: int = 0, session: str = "s", **changes: Any) -> StepRow:
    phases = PHASES | changes.pop("phases_s", {})
    values: dict[str, Any] = {
        "step": step,
        "rank": rank,
        "wall_s": sum(phases.values()),
        "phases_s": phases,
        "parts_s": {"rollout/prefill": 1.0, "rollout/decode": 3.0, "forward/vision": 1.5},
        "is_first": step == 1,
        "is_close": step == 2,
        "work": Work(rollouts=1, decode_steps=10),
        "floors_s": {"rollout/decode": 0.5, "forward": 0.25, "backward": 0.75},
        "floor_s": 1.5,
        "mfu": 0.04,
        "mbu": 0.1,
        "measured_at": "2026-11-29T12:00:00+00:00",
        "session": session,
    }
    return StepRow(**(values | changes))


def explanation() -> StepExplanation:
    """Return what explains six steps."""
    found = explain_steps([step_row(step) for step in range(1, 7)], SEEN)
    assert found is not None
    return found


def write_run(folder: Path, *, steps: int = 6, ranks: int = 1, **changes: Any) -> list[StepRow]:
    """Write a run's files, with an explanation at the end."""
    rows = [step_row(step, **changes) for step in range(1, steps + 1)]
    others = [
        step_row(step, rank=rank, phases_s={"rollout": 4.0 + 2 * rank})
        for rank in range(1, ranks)
        for step in range(1, steps + 1)
    ]
    for rank in range(1, ranks):
        append_step_rows(file_of(folder, rank), [row for row in others if row.rank == rank])
    found = explain_steps(rows, SEEN, ranks=others, environment={"hardware": "a card"})
    assert found is not None
    append_step_rows(file_of(folder), [*rows, found])
    return rows
