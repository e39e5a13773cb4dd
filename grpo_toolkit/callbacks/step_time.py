"""The callback that says where a step's time goes."""

from __future__ import annotations

import logging
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.callbacks.guard import GuardedCallback
from grpo_toolkit.model.hardware.environment import environment_of
from grpo_toolkit.model.live_model import base_model, random_state_kept
from grpo_toolkit.model.sharding.ranks import rank, world_size
from grpo_toolkit.reporting.report.page import write_step_report
from grpo_toolkit.reporting.terminal.console import say
from grpo_toolkit.reporting.terminal.step_time import step_lines
from grpo_toolkit.reporting.trackers.step_time import StepMirror
from grpo_toolkit.step_time.clock import StepClock
from grpo_toolkit.step_time.explain import explain_steps, steady_rows
from grpo_toolkit.step_time.seams.look import PASSES
from grpo_toolkit.step_time.setup import (
    compute_dtype,
    largest_forward,
    machine_of,
    model_of,
    settings_of,
    stamps_of_device,
)
from grpo_toolkit.step_time.store import RowWriter, file_of, load_step_review
from grpo_toolkit.step_time.trials import KeptInputs, try_cures
from grpo_toolkit.step_time.watch import StepWatch

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.step_time.rows import StepExplanation, StepRow, TriedCure
    from grpo_toolkit.step_time.seen import Seen
    from grpo_toolkit.step_time.work import Machine

KEPT: Final = 2000
"""Rows that are kept in memory, and that a mean step is the mean of at most."""

PAGE: Final = "step_time.html"

SHOWN_AFTER: Final = 5
"""Steps after which a training is explained for the first time."""

AWAITED_S: Final = 600.0
"""Seconds of training that must be left for that to be said: who waits less reads it at the end."""

logger = logging.getLogger(__name__)


class StepTimeCallback(GuardedCallback):
    """A callback that explains a training step's time: phases that add up, causes that slow it down, their cures.

        trainer = GRPOTrainer(...)
        trainer.add_callback(StepTimeCallback(trainer=trainer))

    Works with any `transformers.Trainer`. A callback is handed no trainer: without `trainer`, what only the trainer
    shows (reward functions, where the backward pass begins, vLLM) is in "other" or beside it. Each step is a line of
    `step_time.jsonl` in `output_dir`, each process has a file of its own.

    On a GPU, phases are taken by CUDA events in the first five steps and in every tenth; they are read a step later,
    and nothing waits for them. The second and the tenth step of a process, and every hundredth, are looked at closely,
    which takes some time of its own: they say so and are left out of means. The training is the same to the last bit.

    Args:
        trainer: the one that it is added to; may also be set later, as an attribute.
        every: of the steps on a GPU, how often phases are taken.
        output_dir: where to put the file; by default the trainer's `output_dir`.
        profile: also profile a few decode steps and a micro-batch of those steps that are looked at closely, for what
            the GPU does in them and what it waits for. Afterwards PyTorch's profiler stays loaded in the process.
        trials: when training is over, also measure what the cures that are callbacks of ours save, on copied inputs of
            the last step that was looked at closely, beside what they are predicted to. In one process.
        floors: also measure the device when training begins, and say what physics asks for.
        now: seconds of the host.
        strict: raise at the end of training if it failed.

    Attributes:
        rows: the last steps of this process, 2,000 of them at most.
        explanation: the newest, once there is one.
    """

    def __init__(
        self,
        *,
        trainer: Any = None,
        every: int = 10,
        output_dir: str | os.PathLike[str] | None = None,
        profile: bool = False,
        trials: bool = False,
        floors: bool = True,
        now: Callable[[], float] = time.perf_counter,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        if every < 1:
            raise ValueError(f"every is {every}; it counts steps, from 1 on")
        self.trainer = trainer
        self.every = every
        self.output_dir = output_dir
        self.profile = profile
        self.trials = trials
        self.floors = floors
        self.now = now
        self.rows: list[StepRow] = []
        self.explanation: StepExplanation | None = None
        self._watch: StepWatch | None = None
        self._mirror = StepMirror()
        self._seen: Seen | None = None
        self._last_step = 0
        self._machine: Machine | None = None
        self._environment: dict[str, str] = {}
        self._file = Path()
        self._writer = RowWriter(self._file)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._let_go()
        self.rows, self.explanation, self._seen, self._machine = [], None, None, None
        with self._guarded("preparing to take a step's time"):
            self._prepare(args, state, kwargs["model"])

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell("epoch_begin")

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the seams at the first one, when every other callback has put its own in."""
        self._tell("install", kwargs["model"], kwargs.get("processing_class"), self.trainer)
        self._tell("step_begin")

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell("substep_end")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell("before_optimizer")

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell("after_optimizer")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell("step_end", state.global_step)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("was", "logging")

    def on_evaluate(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._tell("was", "evaluation")

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tell("was", "saving")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Finish the last step, and put the seams back."""
        self._tell("finish")
        kept = None if self._watch is None else self._watch.kept
        self._let_go()
        if self.rows:
            with self._guarded("explaining the steps"):
                tried = self._tried(kwargs["model"], kept, args) if self.trials else ()
                self._explain(shown=2 * state.is_world_process_zero, tried=tried)
            with self._guarded("writing the steps"):
                self._writer.close()
            if state.is_world_process_zero:
                with self._guarded("showing the steps"):
                    self._show(args)
        self._raise_if_strict()

    def _prepare(self, args: TrainingArguments, state: TrainerState, model: torch.nn.Module) -> None:
        if args.torch_compile:  # hooks would make it stop and start at every forward
            logger.info("grpo_toolkit: no step times: torch_compile is on, and hooks would break its graphs")
            return
        device = base_model(model).device
        dtype = compute_dtype(model, args)
        self._file = file_of(Path(self.output_dir or args.output_dir), rank())
        self._writer = RowWriter(self._file)
        self._environment = environment_of(str(device))
        known = None
        if self.floors:
            with self._guarded("measuring the device", is_vital=False), random_state_kept():
                known, self._machine = model_of(model, compute_dtype=dtype), machine_of(device, dtype)
        self._last_step = state.max_steps
        self._watch = StepWatch(
            self._on_row,
            clock=StepClock(now=self.now, stamps=stamps_of_device(device)),
            every=self.every,
            rank=rank(),
            world_size=world_size(),
            model=known,
            machine=self._machine,
            settings=lambda notes: settings_of(model, args, known, tokens=largest_forward(notes)),
            steps=state.max_steps - state.global_step,
            # One after the images of the first ones are compared, if there is one.
            profiled=min(PASSES + 1, args.gradient_accumulation_steps) if self.profile else 0,
            keeps_inputs=self.trials,
        )
        self._mirror = StepMirror()
        if state.is_world_process_zero:
            self._mirror.begin(self._file.parent, self._watch.session)

    def _on_row(self, row: StepRow, seen: Seen | None) -> None:
        self.rows.append(row)
        del self.rows[:-KEPT]
        self._writer.append(row)
        if row.rank == 0:
            self._mirror.log(row)
        if seen is not None:
            self._seen = seen
        # Once early, for whoever watches; later where there is something new to say.
        is_early = len(self.rows) == SHOWN_AFTER
        if is_early or (seen is not None and len(self.rows) > SHOWN_AFTER):
            is_awaited = row.wall_s * (self._last_step - row.step) > AWAITED_S
            self._explain(shown=int(row.rank == 0 and is_early and is_awaited))

    def _tried(self, model: torch.nn.Module, kept: KeptInputs | None, args: TrainingArguments) -> Sequence[TriedCure]:
        """Try cures for the causes of the mean step; what fails is said and leaves nothing behind."""
        found = explain_steps(self.rows, self._seen, machine=self._machine, in_place=self._callbacks())
        if found is None or kept is None or world_size() > 1 or args.fp16:
            return ()
        steady = steady_rows(self.rows)
        dtype = compute_dtype(model, args)
        tried: list[TriedCure] = []
        with self._guarded("trying cures", is_vital=False):
            tried += try_cures(
                model,
                kept,
                found,
                forwards=statistics.fmean(row.work.forwards for row in steady),
                rollouts=statistics.fmean(row.work.rollouts for row in steady),
                computed_in=dtype if args.bf16 else None,
                now=self.now,
            )
        return tried

    def _explain(self, *, shown: int, tried: Sequence[TriedCure] = ()) -> None:
        """Explain the steps so far, and say so with as many causes as are to be shown; nothing for none."""
        ranks = load_step_review(self._file).ranks if rank() == 0 and world_size() > 1 else ()
        found = explain_steps(
            self.rows,
            self._seen,
            machine=self._machine,
            ranks=[row for row in ranks if row.measured_at >= self.rows[0].measured_at],
            environment=self._environment,
            in_place=self._callbacks(),
        )
        if found is None:
            return
        found = replace(found, tried=list(tried))
        self.explanation = found
        self._writer.append(found)
        if shown:
            say(*step_lines(found, causes=shown))

    def _callbacks(self) -> set[str]:
        """Return the names of the trainer's callbacks; none where it is not known."""
        handler = getattr(self.trainer, "callback_handler", None)
        return {type(callback).__name__ for callback in getattr(handler, "callbacks", ())}

    def _show(self, args: TrainingArguments) -> None:
        """Write the page, and log to the trackers what is left, all from what is on disk."""
        review = load_step_review(self._file)
        page = write_step_report(review, self._file.with_name(PAGE))
        say(f"{'':<12}{page}")
        for line in self._mirror.end(review, self._file.parent / "step_time_charts", args):
            logger.warning("grpo_toolkit: %s", line)

    def _tell(self, event: str, *given: Any) -> None:
        """Tell the watch of an event; at its first failure it is let go of."""
        watch = self._watch
        if watch is None:
            return
        try:
            getattr(watch, event)(*given)
        except Exception as error:  # training must go on
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._let_go()
        with self._guarded("taking a step's time, which is off from here on,"):
            raise error

    def _let_go(self) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            with self._guarded("putting the trainer back"):
                watch.close()
