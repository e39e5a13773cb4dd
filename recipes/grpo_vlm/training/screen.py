"""The screen of a run: one progress bar, and lines that neither break it nor stick to it.

The trainer's own bar prints every log as a dictionary of twenty keys; trackers and `log_history` have them all.
What other libraries say besides (their bars, and warnings of what they will rename) is left out unless `--verbose`
asks for it; their errors stay.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import TextIO

    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

_LABEL = 12
_SHARES = 10
"""Without a terminal to draw a bar on, a line is printed after every tenth of the steps, and the last."""

_APART_S = 30.0
"""Seconds between two such lines at least."""


def above_bar(text: str, *, file: TextIO | None = None) -> None:
    """Print a line (on standard error by default) above the bar where there is one."""
    from tqdm import tqdm

    to = sys.stderr if file is None else file
    tqdm.write(text, file=to)
    to.flush()


def quiet_libraries() -> None:
    """Keep other libraries' bars and warnings off the screen, in this process and in those that it starts."""
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
        "PYTHONWARNINGS": "ignore::FutureWarning,ignore::DeprecationWarning,ignore::UserWarning",
        "TRANSFORMERS_VERBOSITY": "error",
        "WANDB_SILENT": "true",
    }.items():
        os.environ.setdefault(name, value)
    for category in (FutureWarning, DeprecationWarning, UserWarning):
        warnings.simplefilter("ignore", category)
    import datasets
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    datasets.disable_progress_bars()
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    for name in ("accelerate", "DeepSpeed", "peft", "torch", "trl"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # Imported later, DeepSpeed sets the level of its logger itself; what was given to the logger before then stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


def without_own_bar(trainer: Trainer) -> None:
    """Take the trainer's own bar away; `BarCallback` is in its place."""
    from transformers.trainer_callback import PrinterCallback, ProgressCallback

    for theirs in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(theirs)


class BarCallback(TrainerCallback):
    """A bar such as `step 70/140 · reward 1.68 · accuracy 0.74 · 1.1 s`, or up to ten such lines without a terminal.

    It goes before all callbacks that print at the end of training, so that it is gone by then.
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter) -> None:
        self._now = now
        self._bar: Any = None
        self._figures = ""
        self._open = ExitStack()
        self._began = self._said_at = 0.0
        self._said = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not state.is_world_process_zero:
            return
        from tqdm import tqdm
        from tqdm.contrib.logging import logging_redirect_tqdm

        self._began = self._said_at = self._now()
        self._said = state.global_step * _SHARES // max(state.max_steps, 1)
        if not sys.stderr.isatty():
            return
        self._bar = tqdm(
            total=state.max_steps,
            initial=state.global_step,
            bar_format="step {n_fmt}/{total_fmt} {bar:16} {remaining} left{postfix}",
            dynamic_ncols=True,
            leave=False,
            file=sys.stderr,
        )
        transformers = logging.getLogger("transformers")  # has a handler of its own, and does not propagate
        own = [] if transformers.propagate or not transformers.handlers else [transformers]
        self._open.enter_context(logging_redirect_tqdm([logging.getLogger(), *own]))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs and "reward" in logs:
            self._figures = figures_of(logs)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(self._figures, refresh=False)
            self._bar.update(state.global_step - self._bar.n)
            return
        share = state.global_step * _SHARES // max(state.max_steps, 1)
        is_due = self._now() - self._said_at >= _APART_S or state.global_step >= state.max_steps
        if state.is_world_process_zero and share > self._said and is_due:
            self._said, self._said_at = share, self._now()
            text = f"{state.global_step}/{state.max_steps}"
            print(f"{'step':<{_LABEL}}{' · '.join(filter(None, (text, self._figures)))}", file=sys.stderr, flush=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the bar away; the line that stays says how far training came."""
        self._open.close()
        if self._bar is not None:
            self._bar.close()
            self._bar = None
            took = self._now() - self._began
            text = f"{state.global_step}/{state.max_steps}, {took:.0f} s"
            above_bar(f"{'step':<{_LABEL}}{' · '.join(filter(None, (text, self._figures)))}")


def figures_of(logs: dict[str, Any]) -> str:
    """Return the figures of a log that a person follows: reward, accuracy, seconds of a step."""
    found = [f"reward {float(logs['reward']):.2f}"]
    accuracy = logs.get("rewards/accuracy_reward/mean")
    if accuracy is not None:
        found.append(f"accuracy {float(accuracy):.2f}")
    if logs.get("step_time") is not None:
        found.append(f"{float(logs['step_time']):.1f} s")
    return " · ".join(found)
