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

LIMITS_S: Final[dict[Kind, float]] = {"scalars": 0.8, "media": 0.8, "tables": 1.5, "artifacts": 1.2}
"""How long one call may hold the training up. They sum to less than five seconds: that is the most that a tracker
which hangs in every class can cost over a whole training, because a class is not tried again."""


class Breaker:
    """Bounded calls for one tracker in one training.

    Attributes:
        problems: what went wrong, by class of call; a class in it is not called again.
        waited_s: how long all calls together took.
    """

    def __init__(self, *, limits_s: dict[Kind, float] | None = None) -> None:
        self.limits_s = dict(LIMITS_S if limits_s is None else limits_s)
        self.problems: dict[str, str] = {}
        self.waited_s = 0.0
        self._said = False

    def call(self, kind: Kind, function: Callable[[], object]) -> bool:
        """Run `function` in a thread of its own, within the class's time; whether it came back and did not raise."""
        if kind in self.problems:
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
        thread.join(self.limits_s[kind])
        self.waited_s += time.monotonic() - started
        if thread.is_alive():
            self.problems[kind] = f"no answer within {self.limits_s[kind]:g} s"
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
