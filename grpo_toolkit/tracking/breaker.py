"""Calls into a tracker that may raise, hang or be slow: each costs a bounded time, and a class that failed rests.

A tracker's calls differ: scalars are put into a queue, a table asks the server first. So there is one circuit breaker
per class of call: the first failure or overrun of a class opens it, its later calls are skipped, and the other classes
go on. A call that overruns is left behind in its thread; what it was given is on disk anyway.
"""

from __future__ import annotations

import contextvars
import threading
import time
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["scalars", "media", "tables", "artifacts"]

BUDGET_S: Final = 4.5
"""The most that all calls into one tracker may hold a training up, from its first step to its end."""

CALL_S: Final = 2.5
"""The most of it that one call may take."""

_FREE_S: Final = 0.25
"""A call that comes back well within this is no delay: putting a row into a queue, drawing a Plotly box."""


class Breaker:
    """Bounded calls for one tracker in one training.

    Args:
        budget_s, call_s: limits for all calls together and for each; a replay, which someone waits for, has wide ones.

    Attributes:
        problems: what went wrong, by class of call; a class in it is not called again.
        waited_s: how much of the budget is used.
    """

    def __init__(self, *, budget_s: float = BUDGET_S, call_s: float = CALL_S) -> None:
        self.budget_s = budget_s
        self.call_s = call_s
        self.problems: dict[str, str] = {}
        self.waited_s = 0.0
        self._said = False

    def call(self, kind: Kind, function: Callable[[], object]) -> bool:
        """Run `function` in a thread of its own, within what is left of the time; whether it came back well."""
        if kind in self.problems:
            return False
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                function()
            except BaseException as error:  # whatever a tracker raises, SystemExit included, stays in here
                errors.append(error)

        limit_s = min(self.call_s, self.budget_s - self.waited_s)
        if limit_s <= 0:
            self.problems[kind] = f"the {self.budget_s:g} s for trackers are used up"
            return False
        started = time.monotonic()
        # A copied context: trackers keep their current run in context variables, which threads do not inherit.
        thread = threading.Thread(target=contextvars.copy_context().run, args=(guarded,), daemon=True)
        thread.start()
        thread.join(limit_s)
        took_s = time.monotonic() - started
        is_fine = not thread.is_alive() and not errors
        self.waited_s += max(0.0, took_s - _FREE_S) if is_fine else took_s
        if thread.is_alive():
            self.problems[kind] = f"no answer within {limit_s:.1f} s"
        elif errors:
            text = str(errors[0]).strip().splitlines()
            self.problems[kind] = f"{type(errors[0]).__name__}: {text[0]}" if text else type(errors[0]).__name__
        return kind not in self.problems

    def news(self) -> str | None:
        """What went wrong, in one line, the first time that it is asked for after something did; then None."""
        if not self.problems or self._said:
            return None
        self._said = True
        return "; ".join(f"{kind}: {problem}" for kind, problem in self.problems.items())
