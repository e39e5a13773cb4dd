"""The callback that checks a resumed training."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from grpo_toolkit.errors import CheckpointError, GrpoToolkitError, ResumeError
from grpo_toolkit.model.resume_check import ResumeReport, ensure_checkpoint_weights, is_checkpoint_of
from grpo_toolkit.model.resume_window import leave_moments, match_moments, name_moments
from grpo_toolkit.model.sharding.gather import is_sharded
from grpo_toolkit.model.sharding.ranks import exchange

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.model.moments import Match

logger = logging.getLogger(__name__)


class ResumeGuardCallback(TrainerCallback):  # type: ignore[misc]
    """A callback that makes a resumed training go on from its checkpoint's weights, and proves that it does.

    On a resume the live weights are held against the checkpoint's, tensor by tensor; those that the trainer could
    not match are loaded before the first step. `load_best_model_at_end` is checked the same way. The optimizer's
    moments are loaded by the names of their parameters, which this callback keeps in the optimizer's groups: versions
    of transformers list parameters in other orders and groups. Sharded models (FSDP, ZeRO-3) are left to their own
    loaders, which do not have these faults.

    Pass it to the trainer's `callbacks=`: one that `add_callback` adds later does not see the moments being loaded.

    Args:
        checkpoint: the folder that is resumed from, if it is not in `output_dir`.

    Raises:
        ResumeError: from `train()`, before its first step, if weights or moments cannot be made the checkpoint's:
            training on from others would be worse than stopping.

    Attributes:
        report: what was found about the weights; None without a resume.
        moments: what was found about the optimizer's moments.
    """

    def __init__(self, checkpoint: str | os.PathLike[str] | None = None) -> None:
        self.checkpoint = None if checkpoint is None else Path(checkpoint)
        self.report: ResumeReport | None = None
        self.moments: Match | None = None
        self._stop_naming: Callable[[], None] | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Wait for the optimizer to load its state, which happens before `on_train_begin`."""
        match_moments(kwargs["model"], partial(setattr, self, "moments"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        leave_moments(model)
        if not is_sharded(model):
            self._stop_naming = name_moments(model)
        if self.moments is not None and state.is_world_process_zero:
            level = logging.WARNING if self.moments.is_rearranged else logging.INFO
            logger.log(level, "grpo_toolkit: %s", self.moments)
        if state.global_step == 0:
            return
        problem: str | None = None
        try:
            folder = self._resumed_from(args, state)
            self._ensure(kwargs["model"], folder, state)
        except ResumeError as error:
            problem = str(error)
        except (CheckpointError, OSError) as error:  # nothing is proven wrong: training may go on
            if state.is_world_process_zero:
                logger.warning("grpo_toolkit: it is not proven that this resume has its weights: %s", error)
        # All ranks stop if one has to, rather than wait for it in the first step.
        found = [said for said in (problem, *exchange(problem)) if said is not None]
        if found:
            raise ResumeError(found[0])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._stop_naming is not None:  # no optimizer of torch's has stepped
            self._stop_naming()
        best = state.best_model_checkpoint
        if args.load_best_model_at_end and best is not None and Path(best).is_dir():
            try:
                self._ensure(kwargs["model"], Path(best), state)
            except (GrpoToolkitError, OSError) as error:
                logger.error("grpo_toolkit: the best model was not loaded: %s", error)

    def _ensure(self, model: torch.nn.Module, folder: Path, state: TrainerState) -> None:
        if is_sharded(model):
            return
        self.report = ensure_checkpoint_weights(model, folder)
        if state.is_world_process_zero:
            logger.log(logging.WARNING if self.report.restored else logging.INFO, "grpo_toolkit: %s", self.report)

    def _resumed_from(self, args: TrainingArguments, state: TrainerState) -> Path:
        named = args.resume_from_checkpoint if isinstance(args.resume_from_checkpoint, str) else None
        usual = Path(args.output_dir, f"checkpoint-{state.global_step}")
        candidates = [self.checkpoint, None if named is None else Path(named), usual]
        for folder in candidates:
            if folder is not None and is_checkpoint_of(folder, state):
                return folder
        raise CheckpointError(
            f"{usual}: not the checkpoint of this resume at step {state.global_step}; name the one that is: "
            "ResumeGuardCallback(checkpoint=...)"
        )
