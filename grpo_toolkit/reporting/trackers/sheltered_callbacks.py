"""The trainer's own tracker callbacks (`WandbCallback` and its kin), kept from raising into the training.

They stand before ours in the trainer's list and are asked first, and a callback is not told who else is in that list:
so their classes are wrapped, once, when a trainer with our callback is made. The wrapper acts in that trainer alone,
which it knows by its `args`; everywhere else the methods do what they did. There is no public way: neither
transformers nor W&B has a setting that keeps a tracker's error out of `trainer.train()`.
"""

from __future__ import annotations

import functools
import time
import weakref
from typing import TYPE_CHECKING, Any, Final, Protocol

from grpo_toolkit.reporting.trackers.bounded_calls import one_line

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from transformers import TrainerCallback, TrainingArguments

    from grpo_toolkit.reporting.trackers.bounded_calls import Breaker

_IS_SHELTERED: Final = "_grpo_toolkit_is_sheltered"


class Failed(Protocol):
    """An answer to an event of a tracker's callback that raised."""

    def __call__(
        self, callback: TrainerCallback, tracker: str, error: Exception, *, took_s: float, had_begun: bool
    ) -> AbstractContextManager[None] | None:
        """Return the state in which to try the event once more; None: the callback rests from now on.

        Args:
            callback: whose event it was.
            tracker: its name in `report_to`.
            error: what it raised.
            took_s: how long it took.
            had_begun: whether its run had been opened before.
        """


_shelters: dict[int, tuple[weakref.ref[TrainingArguments], Failed]] = {}
_resting: weakref.WeakSet[TrainerCallback] = weakref.WeakSet()


def shelter(args: TrainingArguments, failed: Failed) -> None:
    """Keep every tracker's callback from raising into the training of these `args`; `failed` is called instead."""
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

    key = id(args)
    _shelters[key] = (weakref.ref(args, lambda _: _shelters.pop(key, None)), failed)
    for tracker in args.report_to:
        if (callback_class := INTEGRATION_TO_CALLBACK.get(tracker)) is not None:
            _wrap(callback_class, tracker)


def shelter_tables(breaker: Breaker) -> None:
    """Keep a table that W&B does not take from raising into the training; after one, tables rest.

    TRL logs completions as a table (`log_completions`) from the trainer itself, so no callback can be asked: the open
    run's `wandb.log` is wrapped, until that run is finished. W&B asks who we are at the first table alone, and gives
    up after `WANDB_HTTP_TIMEOUT` (5 s here) where nobody answers.
    """
    import wandb

    log = wandb.log

    @functools.wraps(log)
    def guarded(data: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(value, wandb.Table) for value in data.values()):
            log(data, *args, **kwargs)
        elif "tables" not in breaker.problems:
            started = time.monotonic()
            try:
                log(data, *args, **kwargs)
            except wandb.Error as error:
                breaker.problems["tables"] = one_line(error)
                breaker.budget.spend(time.monotonic() - started)

    wandb.log = guarded


def _wrap(callback_class: type, tracker: str) -> None:
    for name, method in dict(vars(callback_class)).items():
        if name.startswith("on_") and callable(method) and not hasattr(method, _IS_SHELTERED):
            setattr(callback_class, name, _sheltered(method, tracker))


def _sheltered(method: Callable[..., Any], tracker: str) -> Callable[..., Any]:
    @functools.wraps(method)
    def event(callback: TrainerCallback, args: TrainingArguments, *rest: Any, **kwargs: Any) -> Any:
        failed = _failed_of(args)
        if failed is None:
            return method(callback, args, *rest, **kwargs)
        if callback in _resting:
            return None
        had_begun = bool(getattr(callback, "_initialized", False))
        started = time.monotonic()
        try:
            return method(callback, args, *rest, **kwargs)
        except Exception as error:  # training goes on without its tracker, whatever is wrong with it
            took_s = time.monotonic() - started
            again = failed(callback, tracker, error, took_s=took_s, had_begun=had_begun)
        try:
            if again is not None:
                with again:
                    return method(callback, args, *rest, **kwargs)
        except Exception as error:
            failed(callback, tracker, error, took_s=0.0, had_begun=True)
        _resting.add(callback)
        return None

    setattr(event, _IS_SHELTERED, True)
    return event


def _failed_of(args: TrainingArguments) -> Failed | None:
    known = _shelters.get(id(args))
    return known[1] if known is not None and known[0]() is args else None
