"""The batch size: what more sequences at once bring, what they cost, and how many the memory holds.

    memory of a sequence = (peak of the largest batch - peak of the smallest) / the sequences between them
    sequences that fit   = the smallest batch + 90% of the free memory / memory of a sequence

Peaks are those of the GPU's allocator: cache, activations and logits. On a CPU, where a process's resident peak says
little, they are the bytes of the keys and values themselves, counted in the cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from grpo_toolkit.errors import OutOfMemoryError
from grpo_toolkit.latency.bench.compare import LARGEST_BATCH, ratios
from grpo_toolkit.latency.bench.measure import Plan
from grpo_toolkit.latency.bench.statistics import MIN_PAIRS
from grpo_toolkit.latency.engines.pool import Source
from grpo_toolkit.latency.engines.protocol import FREE_MEMORY
from grpo_toolkit.latency.rows.review import CONTROL

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterable, Sequence

    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.pool import Engines
    from grpo_toolkit.latency.engines.protocol import Engine
    from grpo_toolkit.latency.rows.row import LatencyRow, Ratio

SIZES: Final = (1, 4, 16)
"""The batch sizes that are timed; on a GPU the largest that fits besides."""

_OF_THE_ROOM: Final = 0.9
"""Of the free memory, what sequences can take: an allocator never fills all of it."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A batch size that was timed.

    Attributes:
        size: sequences at once.
        tpot_s: time per output token of each of them.
        tokens_per_s: of all together, decoding alone.
        memory_bytes: the allocator's peak, or on a CPU the bytes of the KV cache; None where neither is known.
    """

    size: int
    tpot_s: float
    tokens_per_s: float
    memory_bytes: int | None


@dataclass(frozen=True, kw_only=True)
class Batches:
    """The batch sizes of one arm, smallest first.

    Attributes:
        arm: the model.
        points: at least two.
        ratio: the largest batch's time per token over the smallest's, paired by round; None where they took no turns.
        tokens: of one sequence, prompt and answer.
        kv_bytes_per_token: of one sequence, counted in the cache; None where it was not seen.
        sequence_bytes: that one more sequence of `tokens` takes.
        fits: sequences of `tokens` that the free memory holds, by that figure; None where one of the two is unknown.
        is_on_gpu: whether memory is the allocator's.
        failed_at: the batch that ran out of memory, if one did.
    """

    arm: str
    points: tuple[Point, ...]
    ratio: Ratio | None
    tokens: int
    kv_bytes_per_token: float | None
    sequence_bytes: float | None
    fits: int | None
    is_on_gpu: bool
    failed_at: int | None = None

    @property
    def slowdown(self) -> float:
        """The largest batch's time per token over the smallest's: the paired ratio, or without one that of medians."""
        if self.ratio is not None:
            return self.ratio.median
        return self.points[-1].tpot_s / self.points[0].tpot_s

    @property
    def gain(self) -> float:
        """The largest batch's tokens a second over the smallest's."""
        return self.points[-1].size / self.points[0].size / self.slowdown


def batches_of(rows: Sequence[LatencyRow]) -> Batches | None:
    """Return what one arm's rows of several batch sizes say; None of fewer than two sizes that ran."""
    by_size = {row.workload.batch_size: row for row in rows}
    ran = sorted(
        (row for row in by_size.values() if row.tpot_s is not None and row.error is None),
        key=lambda row: row.workload.batch_size,
    )
    if len(ran) < 2:
        return None
    small, large = ran[0], ran[-1]
    paired = ratios(large, small) if large.session == small.session else []
    is_on_gpu = large.memory.peak_allocated_bytes is not None
    length = large.workload.prompt_tokens + large.workload.max_new_tokens
    points = tuple(map(_point, ran))
    sequence = _slope(points[0], points[-1])
    free = small.memory.free_bytes
    failed = [row.workload.batch_size for row in by_size.values() if row.error is not None]
    fits = None
    if sequence and free is not None:
        fits = max(small.workload.batch_size + int(_OF_THE_ROOM * free / sequence), large.workload.batch_size)
        fits = fits if not failed else min(fits, min(failed) - 1)
    kv_bytes = large.memory.kv_bytes
    return Batches(
        arm=large.arm,
        points=points,
        ratio=next((ratio for ratio in paired if ratio.metric == "tpot_s"), None),
        tokens=length,
        # The last token is never fed back, so its keys and values are never made.
        kv_bytes_per_token=None if kv_bytes is None else kv_bytes / (large.workload.batch_size * (length - 1)),
        sequence_bytes=sequence,
        fits=fits,
        is_on_gpu=is_on_gpu,
        failed_at=min(failed, default=None),
    )


def batches_of_rows(rows: Iterable[LatencyRow]) -> Batches | None:
    """Return the batches that a report is about: the export's, or else the last arm's, of the newest sizes.

    Sizes that took turns go before those of sessions of their own, which are alike in all but their size.
    """
    fixed = [row for row in rows if row.workload.kind == "fixed" and row.arm != CONTROL]
    return _newest(fixed, lambda row: row.session) or _newest(fixed, _alike)


def _alike(row: LatencyRow) -> Hashable:
    work = row.workload
    return work.name, work.prompt_tokens, work.image_tokens, work.max_new_tokens, work.lengths


def _newest(rows: Iterable[LatencyRow], key: Callable[[LatencyRow], Hashable]) -> Batches | None:
    groups: dict[Hashable, dict[str, list[LatencyRow]]] = {}
    for row in rows:
        groups.setdefault(key(row), {}).setdefault(row.arm, []).append(row)
    for arms in reversed(groups.values()):
        found = {arm: batches for arm, points in arms.items() if (batches := batches_of(points)) is not None}
        if found:
            return found.get("export") or next(reversed(found.values()))
    return None


def _point(row: LatencyRow) -> Point:
    assert row.tpot_s is not None
    size, peak = row.workload.batch_size, row.memory.peak_allocated_bytes
    return Point(
        size=size,
        tpot_s=row.tpot_s.median,
        tokens_per_s=size / row.tpot_s.median,
        memory_bytes=row.memory.kv_bytes if peak is None else peak,
    )


def _slope(one: Point, other: Point) -> float | None:
    """Return the bytes of one sequence between two batches; None where they are unknown or did not grow."""
    if one.memory_bytes is None or other.memory_bytes is None or other.memory_bytes <= one.memory_bytes:
        return None
    return (other.memory_bytes - one.memory_bytes) / (other.size - one.size)


def time_batches(
    arm: Arm,
    traffic: Traffic,
    *,
    engines: Engines,
    rounds: int,
    budget_s: float,
    sizes: Iterable[int] = SIZES,
) -> list[LatencyRow]:
    """Time one arm at several batch sizes, in turns; on a GPU at the largest that fits, too.

    A size is timed if one answer of it says that warm-up and the fewest rounds stay within the budget; one that runs
    out of memory ends the sizes.

    Args:
        arm: what is asked.
        traffic: one request at a time, of a fixed length.
        engines: loaded models.
        rounds: measured requests per size, at most.
        budget_s: seconds for all of it.
        sizes: in rising order.

    Returns:
        A row a size, named after the sweep that it is a point of; none where fewer than two are affordable.
    """
    trials = _Trials(
        engine=engines.open(arm), arm=arm, traffic=traffic, asks=1 + min(rounds, MIN_PAIRS), budget_s=budget_s
    )
    if all(map(trials.fits, sizes)):
        next(filter(trials.fits, trials.larger()), None)
    if trials.is_out_of_memory and arm.path is not None:  # on a CPU the process has been killed with it
        engines.release(Source(path=arm.path))
    if len(trials.seconds) < 2:
        return []
    left_s = budget_s - trials.spent_s
    return _timed_in_turns(arm, traffic, sorted(trials.seconds), engines=engines, rounds=rounds, budget_s=left_s)


@dataclass(kw_only=True)
class _Trials:
    """One answer of each batch size, as long as the memory holds it and the budget allows all its rounds."""

    engine: Engine
    arm: Arm
    traffic: Traffic
    asks: int
    budget_s: float
    spent_s: float = 0.0
    is_out_of_memory: bool = False
    seconds: dict[int, float] = field(default_factory=dict)
    peaks: dict[int, int | None] = field(default_factory=dict)

    def fits(self, size: int) -> bool:
        """Ask once, and keep the size if it and the smaller ones are affordable."""
        if self.seconds and self.spent_s + max(self.seconds.values()) > self.budget_s:
            return False
        try:
            for _ in range(1 + self.arm.options.is_compiled):  # the first compiles for the size
                answer = self.engine.ask(replace(self.traffic, batch_size=size).batch(-1), self.arm.options)
                self.spent_s += answer.timeline.e2e_s
        except OutOfMemoryError:
            self.is_out_of_memory = True
            return False
        if not self._is_affordable(answer.timeline.e2e_s):
            return False
        self.seconds[size], self.peaks[size] = answer.timeline.e2e_s, answer.peak_allocated_bytes
        return True

    def _is_affordable(self, seconds: float) -> bool:
        return self.spent_s + self.asks * (seconds + sum(self.seconds.values())) <= self.budget_s

    def larger(self) -> list[int]:
        """Return the two largest powers of two that memory and budget should hold by the sizes so far; none on a CPU.

        Both grow by no more a sequence than between the sizes that were asked.
        """
        free = self.engine.environment().get(FREE_MEMORY)
        peaks = [(size, peak) for size, peak in sorted(self.peaks.items()) if peak is not None]
        if free is None or len(peaks) < 2:
            return []
        (least, _), (most, _) = peaks[0], peaks[-1]
        each = max((more - less) / (large - small) for (small, less), (large, more) in pairwise(peaks))
        each_s = (self.seconds[most] - self.seconds[least]) / (most - least)
        if each <= 0:
            return []
        room = min(least + int(_OF_THE_ROOM * int(free) / each), LARGEST_BATCH)
        powers = [size for exponent in range(11) if most < (size := 2**exponent) <= room]
        affordable = [size for size in powers if self._is_affordable(self.seconds[most] + each_s * (size - most))]
        return affordable[::-1][:2]


def _timed_in_turns(
    arm: Arm, traffic: Traffic, sizes: Sequence[int], *, engines: Engines, rounds: int, budget_s: float
) -> list[LatencyRow]:
    arms = [replace(arm, name=f"{arm.name}, batch {size}") for size in sizes]
    name: Callable[[int], str] = f"{traffic.name}_batch_size_{{}}".format
    workloads = {
        one.name: replace(traffic, name=name(size), batch_size=size) for one, size in zip(arms, sizes, strict=True)
    }
    plan = Plan(
        arms=arms,
        traffic=traffic,
        rounds=rounds,
        warmup=1,
        budget_s=max(budget_s, 0.0),
        workloads=workloads,
    )
    return [replace(row, arm=arm.name) for row in plan.measured(engines)]
