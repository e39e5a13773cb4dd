"""The clock of a training step: time cut into phases that add up, because each moment belongs to exactly one.

The time between two marks belongs to the path that was current then, such as ("rollout", "prefill"). On a GPU the host
runs ahead of the device, so a mark may carry a CUDA event besides: the time between two events is the device's, waits
for the host included, and all of it together is the step. Events are recorded without waiting and read a step later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

Path = tuple[str, ...]

OTHER: Final = "other"
"""The phase of everything that nothing else was seen to take."""

PREPARING: Final = "preparing"
"""The phase of what a trainer itself does between the beginning of a micro-batch and its forward."""


class Stamps(Protocol):
    """A source of marks on a device's own timeline."""

    def stamp(self) -> Any:
        """Return a mark that the device will reach after all that it was given so far."""

    def is_reached(self, stamp: Any) -> bool:
        """Return whether the device has got there, without waiting."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Return the time between two marks that were reached."""

    def give_back(self, stamps: Iterable[Any]) -> None:
        """Take marks back that nobody reads any more."""

    def wait(self) -> None:
        """Wait until the device has got to all of them, once a training is over."""


class CudaStamps:
    """Stamps that are CUDA events, used again and again.

    Args:
        event: makes one; by default `torch.cuda.Event(enable_timing=True)`.
        wait: waits for the device; by default `torch.cuda.synchronize`.
    """

    def __init__(self, event: Callable[[], Any] | None = None, wait: Callable[[], object] | None = None) -> None:
        self._make = event or _cuda_event
        self._wait = wait or _synchronize
        self._spare: list[Any] = []

    def stamp(self) -> Any:
        event = self._spare.pop() if self._spare else self._make()
        event.record()
        return event

    def is_reached(self, stamp: Any) -> bool:
        return bool(stamp.query())

    def seconds(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3

    def give_back(self, stamps: Iterable[Any]) -> None:
        self._spare += stamps

    def wait(self) -> None:
        self._wait()


def _cuda_event() -> Any:
    import torch

    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def _synchronize() -> None:
    import torch

    torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True, slots=True)
class Mark:
    """A moment: on the host, and where it was stamped on the device too."""

    host_s: float
    stamp: Any = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """The time between two marks and what it was spent on."""

    path: Path
    begin: Mark
    end: Mark


class StepClock:
    """A clock that is told what is going on, and cuts time accordingly.

        clock = StepClock()
        clock.switch("forward")
        clock.enter("forward", "vision")
        clock.leave()
        clock.switch("backward")
        intervals = clock.take()

    Args:
        now: seconds of the host; any origin.
        stamps: marks of the device beside them; None where the host waits for its device anyway.

    Attributes:
        is_stamping: whether marks from here on are stamped.
    """

    def __init__(self, *, now: Callable[[], float] = time.perf_counter, stamps: Stamps | None = None) -> None:
        self.stamps = stamps
        self.is_stamping = False
        self._now = now
        self._stack: list[Path] = [(OTHER,)]
        self._closed: list[Interval] = []
        self._begin = self._mark()

    @property
    def path(self) -> Path:
        """The path of what is going on."""
        return self._stack[-1]

    @property
    def closed(self) -> int:
        """The number of intervals that are over."""
        return len(self._closed)

    def switch(self, *path: str) -> None:
        """Go on as this from here on; inside of something that was entered, once that is left."""
        if len(self._stack) == 1:
            self._cut()
        self._stack[0] = path

    def enter(self, *path: str) -> None:
        """Be this until `leave`."""
        self._cut()
        self._stack.append(path)

    def move_on(self, *path: str) -> None:
        """Go on as this in place of what was entered last."""
        self._cut()
        self._stack[-1] = path

    def leave(self) -> None:
        """End what was entered last.

        Raises:
            RuntimeError: nothing was entered.
        """
        if len(self._stack) == 1:
            raise RuntimeError("nothing was entered that could be left")
        self._cut()
        self._stack.pop()

    def leave_all(self) -> None:
        """End whatever was entered."""
        while len(self._stack) > 1:
            self.leave()

    def rename(self, *path: str) -> None:
        """Name what has been going on since the last mark, as is known only now."""
        self._stack[-1] = path

    def take(self, count: int | None = None) -> list[Interval]:
        """Return the oldest intervals (by default all, the open one too) and forget them."""
        if count is None:
            self._cut()
            count = len(self._closed)
        taken, self._closed = self._closed[:count], self._closed[count:]
        return taken

    def _cut(self) -> None:
        end = self._mark()
        self._closed.append(Interval(path=self._stack[-1], begin=self._begin, end=end))
        self._begin = end

    def _mark(self) -> Mark:
        stamp = self.stamps.stamp() if self.is_stamping and self.stamps is not None else None
        return Mark(host_s=self._now(), stamp=stamp)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The seconds of a step. `paths_s` adds up to `wall_s`; `is_stamped`: all of it by the device's marks."""

    wall_s: float
    paths_s: dict[Path, float]
    is_stamped: bool


def is_readable(intervals: Sequence[Interval], stamps: Stamps | None) -> bool:
    """Return whether the device has reached the last mark of a step, without waiting for it."""
    last = next((one.end.stamp for one in reversed(intervals) if one.end.stamp is not None), None)
    return last is None or stamps is None or stamps.is_reached(last)


def measure(intervals: Sequence[Interval], stamps: Stamps | None) -> Measured:
    """Return the seconds of a step's intervals by path.

    The wall time is the host's. What the device's marks add up to can differ from it by what the device was behind at
    the two ends; that difference is `other`.
    """
    wall_s = intervals[-1].end.host_s - intervals[0].begin.host_s if intervals else 0.0
    paths: dict[Path, float] = {}
    is_stamped = bool(intervals)
    for one in intervals:
        begin, end = one.begin.stamp, one.end.stamp
        if stamps is None or begin is None or end is None:
            is_stamped = False
            seconds = one.end.host_s - one.begin.host_s
        else:
            seconds = stamps.seconds(begin, end)
        paths[one.path] = paths.get(one.path, 0.0) + seconds
    paths[OTHER,] = paths.get((OTHER,), 0.0) + wall_s - sum(paths.values())
    return Measured(wall_s=wall_s, paths_s=paths, is_stamped=is_stamped)


def stamps_of(intervals: Iterable[Interval]) -> list[Any]:
    """Return the stamps in a step that no other step reads: the last one is the next step's first."""
    return [one.begin.stamp for one in intervals if one.begin.stamp is not None]
