"""The watch over a training's steps: from the events of a callback to a row a step.

A step begins where its rows begin to be read and ends where the next one's do, so logging, evaluation and saving after
it are in it. Its device time is read a step later, when the device has long got there; nothing waits for it.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.step_time.clock import OTHER, StepClock, is_readable, measure, stamps_of
from grpo_toolkit.step_time.rows import PHASES, StepRow
from grpo_toolkit.step_time.seams.look import look_closely
from grpo_toolkit.step_time.seams.model import ModelSeams
from grpo_toolkit.step_time.seams.notes import StepNotes
from grpo_toolkit.step_time.seams.trainer import TrainerSeams
from grpo_toolkit.step_time.trials import KeptInputs, keep_inputs
from grpo_toolkit.step_time.work import floors_of, work_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from grpo_toolkit.step_time.clock import Interval
    from grpo_toolkit.step_time.seen import Seen, Settings
    from grpo_toolkit.step_time.work import Machine, Model

FIRST_STEPS: Final = 5
"""Steps at the beginning that are sampled each."""

LOOKS: Final = (2, 10)
"""Steps of a process that are looked at closely, and from then on every `LOOKS_EVERY`."""

LOOKS_EVERY: Final = 100


@dataclass(kw_only=True)
class _Pending:
    """A step that is over and was not read yet."""

    step: int
    count: int
    notes: StepNotes
    seen: Seen | None
    intervals: list[Interval]


class StepWatch:
    """The watch over a training, which turns its events into rows.

    Args:
        on_row: called with each row, and with what was seen of it where it was looked at closely.
        clock: what takes the time.
        every: of the steps after the first five, which are sampled on a device that runs behind its host.
        rank, world_size: of this process.
        model, machine: for what physics asks for; None where that is not known.
        settings: asked at the end of a step that is looked at closely.
        steps: that this process is to train; the only one is looked at closely.
        profiled: the micro-batch of such a step that is profiled, from 1, as some decode steps are; 0: nothing is.
        keeps_inputs: whether inputs of a step that is looked at closely are copied.

    Attributes:
        seen: of the last step that was looked at closely.
        session: of all rows.
        kept: inputs of the last step that was looked at closely, if they are copied.
    """

    def __init__(
        self,
        on_row: Callable[[StepRow, Seen | None], None],
        *,
        clock: StepClock | None = None,
        every: int = 10,
        rank: int = 0,
        world_size: int = 1,
        model: Model | None = None,
        machine: Machine | None = None,
        settings: Callable[[StepNotes], Settings],
        steps: int | None = None,
        profiled: int = 0,
        keeps_inputs: bool = False,
    ) -> None:
        self.clock = clock or StepClock()
        self.seen: Seen | None = None
        self.session = uuid.uuid4().hex
        self._on_row = on_row
        self._every = every
        self._rank, self._world_size = rank, world_size
        self._model, self._machine, self._settings = model, machine, settings
        self._steps = steps
        self._profiled, self._keeps_inputs = profiled, keeps_inputs
        self.kept = KeptInputs()
        self._seams: ModelSeams | None = None
        self._trainer_seams: TrainerSeams | None = None
        self._border = 0
        self._count = 0
        self._over: tuple[int, StepNotes, Seen | None] | None = None
        self._pending: list[_Pending] = []
        self._sample(self._count + 1)

    @property
    def failed(self) -> bool:
        """Return whether a seam has failed, so that there are no more rows."""
        return self._seams is not None and self._seams.failed

    def install(self, model: Any, processing_class: Any, trainer: Any = None) -> None:
        """Take the seams. After every other callback's `on_train_begin`: ours stands before what they install."""
        if self._seams is None:
            self._seams = ModelSeams(model, self.clock, profiled=self._profiled)
            self._trainer_seams = TrainerSeams(trainer, self._seams, processing_class, on_reading=self._on_reading)

    def close(self) -> None:
        """Put everything back."""
        if self._trainer_seams is not None:
            self._trainer_seams.close()
        if self._seams is not None:
            self._seams.close()
        self._seams = self._trainer_seams = None

    def epoch_begin(self) -> None:
        """From the first one on, the first step's rows are read."""
        if self._count == 0:
            self._between()

    def step_begin(self) -> None:
        """All rows of the step have been read."""
        assert self._seams is not None
        before = self.clock.take(self._border)
        if self._over is not None:
            self._finish(before)
        self._border = 0
        self._count += 1
        self._sample(self._count)
        if self._seams.notes is None:
            self._seams.notes = self._new_notes(self._count)
        self._seams.is_open = True
        self.clock.switch(OTHER)
        self._read()

    def substep_end(self) -> None:
        """A micro-batch is done."""
        self._end_profile()
        self.clock.switch(OTHER)

    def before_optimizer(self) -> None:
        """Gradients are there, and clipped."""
        self._end_profile()
        if self._trainer_seams is not None and self._trainer_seams.sees_backward and self.clock.path == (OTHER,):
            self.clock.rename("optimizer", "clipping")
        self.clock.switch("optimizer")

    def after_optimizer(self) -> None:
        """The weights are new; the trainer sets the next learning rate and lets go of the gradients."""
        self.clock.switch("optimizer", "gradients")

    def step_end(self, step: int) -> None:
        """The step has trained; logging, evaluation and saving come, then the next one's rows."""
        assert self._seams is not None
        self._seams.is_open = False
        self.clock.leave_all()
        self._between()
        notes, self._seams.notes = self._seams.notes or StepNotes(), None
        seen = None
        if notes.is_close:
            self.clock.rename("logging")
            self._seams.guarded(self._look, notes)
            seen = self.seen
            self._between()
        self._over = (step, notes, seen)

    def _end_profile(self) -> None:
        if self._seams is None or not self._seams.is_profiling:
            return
        self.clock.enter("logging")  # reading what a device did takes seconds
        self._seams.guarded(self._seams.end_profile)
        if self.clock.path == ("logging",):
            self.clock.leave()

    def was(self, phase: str) -> None:
        """Name what has been going on since the step ended, or since the last such call."""
        if self._seams is None or not self._seams.is_open:
            self.clock.rename(phase)
            self._between()

    def finish(self) -> None:
        """End the watch: finish the last step, and read those that were not."""
        if self._over is not None:
            self.clock.rename("logging")
            self._finish(self.clock.take())
        if self._pending and self.clock.stamps is not None:
            self.clock.stamps.wait()
        self._read()

    def _between(self) -> None:
        """Between steps: rows are read, unless the trainer shows where that begins."""
        shows = self._trainer_seams is not None and self._trainer_seams.sees_reading
        self.clock.is_stamping = self.clock.is_stamping or self._is_sampled(self._count + 1)
        self.clock.switch("logging" if shows else "reading_rows")
        self._border = self.clock.closed

    def _on_reading(self) -> None:
        """The trainer begins to read a step's rows."""
        if self._seams is None or self._seams.is_open:
            return
        self.clock.switch("reading_rows")
        self._border = self.clock.closed
        self._seams.notes = self._new_notes(self._count + 1)

    def _new_notes(self, count: int) -> StepNotes:
        return StepNotes(is_close=count in LOOKS or count % LOOKS_EVERY == 0 or self._steps == 1)

    def _is_sampled(self, count: int) -> bool:
        return self.clock.stamps is None or count <= FIRST_STEPS or count % self._every == 0

    def _sample(self, count: int) -> None:
        self.clock.is_stamping = self.clock.stamps is not None and self._is_sampled(count)

    def _look(self, notes: StepNotes) -> None:
        assert self._seams is not None
        seams = self._seams
        if self._keeps_inputs:
            self.kept = keep_inputs(notes, seams.live)
        self.seen = look_closely(notes, seams.live, towers=seams.towers, settings=self._settings(notes))

    def _finish(self, intervals: list[Interval]) -> None:
        assert self._over is not None
        (step, notes, seen), self._over = self._over, None
        if not self.failed and intervals:
            self._pending.append(_Pending(step=step, count=self._count, notes=notes, seen=seen, intervals=intervals))

    def _read(self) -> None:
        while self._pending and is_readable(self._pending[0].intervals, self.clock.stamps):
            pending = self._pending.pop(0)
            self._on_row(self._row(pending), pending.seen)
            if self.clock.stamps is not None:
                self.clock.stamps.give_back(stamps_of(pending.intervals))

    def _row(self, pending: _Pending) -> StepRow:
        found = measure(pending.intervals, self.clock.stamps)
        is_known = found.is_stamped or self.clock.stamps is None
        phases: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        parts: dict[str, float] = {}
        for path, seconds in found.paths_s.items():
            phases[path[0]] = phases.get(path[0], 0.0) + seconds
            for depth in range(2, len(path) + 1):
                name = "/".join(path[:depth])
                parts[name] = parts.get(name, 0.0) + seconds
        phases = {name: seconds for name, seconds in phases.items() if seconds or name == OTHER}
        work = work_of(pending.notes, self._model, self.seen)
        floors = None
        if self._model is not None and self._machine is not None:
            floors = floors_of(pending.notes, self._model, self._machine, self.seen)
        return StepRow(
            step=pending.step,
            rank=self._rank,
            world_size=self._world_size,
            wall_s=found.wall_s,
            phases_s=phases if is_known else {},
            parts_s=parts if is_known else {},
            clock="events" if found.is_stamped else "host",
            is_first=pending.count == 1 or any(one.compiles for one in pending.notes.rollouts),
            is_close=pending.notes.is_close,
            work=work,
            floors_s=floors,
            floor_s=None if floors is None else sum(floors.values()),
            mfu=self._mfu(work.flops, found.wall_s),
            mbu=self._mbu(work.decode_bytes, parts.get("rollout/decode") if is_known else None),
            measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            session=self.session,
        )

    def _mfu(self, flops: float | None, wall_s: float) -> float | None:
        if flops is None or self._machine is None or wall_s <= 0:
            return None
        return flops / (wall_s * self._machine.flops_per_s)

    def _mbu(self, count: float | None, decode_s: float | None) -> float | None:
        if not count or self._machine is None or not decode_s:
            return None
        return count / (decode_s * self._machine.bandwidth_bytes_per_s)
