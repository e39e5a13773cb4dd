"""How our callbacks fail: said once, survived, and raised at the end only if asked."""

from __future__ import annotations

import logging
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from grpo_toolkit.errors import GrpoToolkitError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class GuardedCallback(TrainerCallback):  # type: ignore[misc]
    """Reports a failure once instead of raising it into the trainer; with `strict`, raises it at the end."""

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
    def _guarded(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the one place where anything may be caught: training must go on
            message = f"{what} failed: {type(error).__name__}: {error}"
            if message not in self.failures:
                self.failures.append(message)
                logger.error("grpo_toolkit: %s", message, exc_info=not isinstance(error, GrpoToolkitError))
            self._first_error = self._first_error or error

    def _raise_if_strict(self) -> None:
        if self.strict and self._first_error is not None:
            raise self._first_error
