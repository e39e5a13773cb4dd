"""The base of callbacks whose failures are logged once, survived, and raised at the end only if asked."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from grpo_toolkit.errors import GrpoToolkitError, PeerError
from grpo_toolkit.model.sharding.ranks import exchange, rank, world_size

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class GuardedCallback(TrainerCallback):  # type: ignore[misc]
    """A callback that logs a failure once and lets training go on; with `strict` it raises at the end."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self.failures: list[str] = []
        self._first_error: Exception | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier training's failures."""
        self.failures.clear()
        self._first_error = None

    @contextmanager
    def _guarded(self, what: str, *, is_vital: bool = True) -> Iterator[None]:
        """Survive what goes wrong inside; what is not vital is logged and counts as no failure."""
        try:
            yield
        except Exception as error:  # the one place where anything may be caught: training must go on
            message = f"{what} failed: {type(error).__name__}: {error}"
            if not is_vital:
                logger.warning("grpo_toolkit: %s", message)
                return
            if message not in self.failures:
                self.failures.append(message)
                where = f" (rank {rank()})" if world_size() > 1 else ""
                is_known = isinstance(error, GrpoToolkitError)
                logger.error("grpo_toolkit%s: %s", where, message, exc_info=not is_known)
            self._first_error = self._first_error or error

    def _agree(self) -> bool:
        """Return whether no rank has failed so far; waits for all ranks, so call it on every one."""
        said: list[str | None] = ["no answer"]
        with self._guarded("agreeing with the other ranks"):
            said = exchange(self.failures[0] if self.failures else None)
        for number, problem in enumerate(said):
            if problem is not None and self._first_error is None:  # said already, where it happened
                self._first_error = PeerError(f"rank {number}: {problem}")
                self.failures.append(str(self._first_error))
        return not any(said)

    def _raise_if_strict(self) -> None:
        if self.strict and self._first_error is not None:
            raise self._first_error
