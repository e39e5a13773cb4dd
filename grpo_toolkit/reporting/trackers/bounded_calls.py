"""Calls into a tracker that may raise, hang or be slow: each takes a bounded time, and a class that failed rests.

A tracker's calls differ: scalars are put into a queue, a table asks the server first. So there is one circuit breaker
per tracker with a switch per class of call: the first failure or overrun of a class opens it, its later calls are
skipped, and the other classes go on. All breakers of a training share one budget of time. A call that overruns is
left behind in its thread; what it was given is on disk anyway.
"""

from __future__ import annotations

import contextvars
import threading
import time
from typing import TYPE_CHECKING, Final, Literal

if TYPE_CHECKING:
    from collections.abc import Callable

Kind = Literal["scalars", "media", "tables", "artifacts"]

BUDGET_S: Final = 3.0
"""The most that all trackers together may hold a training up, from the making of its trainer to its end."""

CALL_S: Final = 2.0
"""The most of it that one call may take."""

_FREE_S: Final = 0.25
"""A call that comes back well within this is no delay: putting a row into a queue, drawing a Plotly box."""


class Budget:
    """The seconds that trackers may cost; what one of them used is gone for the others.

    Attributes:
        limit_s: how much there is.
        spent_s: how much of it is used.
    """

    def __init__(self, limit_s: float = BUDGET_S) -> None:
        self.limit_s = limit_s
        self.spent_s = 0.0

    @property
    def left_s(self) -> float:
        return max(0.0, self.limit_s - self.spent_s)

    def spend(self, took_s: float, *, is_fine: bool = False) -> None:
        """Count the seconds that something took: of a call that came back well, what was more than a moment."""
        self.spent_s += max(0.0, took_s - _FREE_S) if is_fine else took_s


class Breaker:
    """A circuit breaker around the calls to one tracker in one training.

    Args:
        budget: the time for all calls together, shared with the training's other trackers.
        call_s: limit for each; a replay, which someone waits for, has wide ones.

    Attributes:
        problems: what went wrong, by class of call; a class in it is not called again.
    """

    def __init__(self, budget: Budget | None = None, *, call_s: float = CALL_S) -> None:
        self.budget = Budget() if budget is None else budget
        self.call_s = call_s
        self.problems: dict[str, str] = {}
        self._said = False

    def call(self, kind: Kind, function: Callable[[], object]) -> bool:
        """Run `function` in a thread of its own, within the time that is left; returns whether it came back well."""
        if kind in self.problems:
            return False
        limit_s = min(self.call_s, self.budget.left_s)
        if limit_s <= 0:
            self.problems[kind] = f"the {self.budget.limit_s:g} s for trackers are used up"
            return False
        errors: list[BaseException] = []

        def guarded() -> None:
            try:
                function()
            except BaseException as error:  # whatever a tracker raises, SystemExit included, stays in here
                errors.append(error)

        started = time.monotonic()
        # A copied context: trackers keep their current run in context variables, which threads do not inherit.
        thread = threading.Thread(target=contextvars.copy_context().run, args=(guarded,), daemon=True)
        thread.start()
        thread.join(limit_s)
        is_late = thread.is_alive()
        self.budget.spend(time.monotonic() - started, is_fine=not is_late and not errors)
        if is_late:
            self.problems[kind] = f"no answer within {limit_s:.1f} s"
        elif errors:
            self.problems[kind] = one_line(errors[0])
        return kind not in self.problems

    def news(self) -> str | None:
        """Return what went wrong, in one line, the first time that it is asked for after something did; then None."""
        if not self.problems or self._said:
            return None
        self._said = True
        return "; ".join(f"{kind}: {problem}" for kind, problem in self.problems.items())

    def hush(self) -> None:
        """Keep `news` silent: a warning about this tracker was logged elsewhere."""
        self._said = True


def one_line(error: BaseException) -> str:
    """Return an error's type and the first line of what it says."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
