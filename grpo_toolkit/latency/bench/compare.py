"""The comparison of arms: the faster one, by how much, and whether this machine can tell."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.short_repr import HtmlTable
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.bench.measure import Plan, traffic_for
from grpo_toolkit.latency.bench.pairs import pairs_of
from grpo_toolkit.latency.bench.progress import shown
from grpo_toolkit.latency.bench.statistics import MIN_PAIRS, allow_for, paired_ratio, span
from grpo_toolkit.latency.engines.arms import named_arms
from grpo_toolkit.latency.rows.review import CONTROL
from grpo_toolkit.latency.rows.row import METRICS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from typing import Any

    from grpo_toolkit.latency.bench.measure import Keep
    from grpo_toolkit.latency.bench.progress import Progress
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.pool import Engines
    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.latency.rows.row import LatencyRow, Ratio, Summary

LARGEST_BATCH: Final = 1024


@dataclass(frozen=True, kw_only=True, repr=False)
class Comparison(HtmlTable):
    """A comparison of arms that took turns.

    Attributes:
        rows: one per arm; the first is what the others' `ratios` are against.
        control: the first arm once more, with its ratios against itself; None if it was not asked for.
    """

    rows: tuple[LatencyRow, ...]
    control: LatencyRow | None = None

    def ratio(self, arm: str, metric: str = "tpot_s") -> Ratio:
        """Return an arm's time over the first arm's.

        Raises:
            InputError: no such arm, or it has no such ratio (it is the first, or ran out of memory).
        """
        for row in (*self.rows, *([] if self.control is None else [self.control])):
            for ratio in row.ratios:
                if row.arm == arm and ratio.metric == metric:
                    return ratio
        raise InputError(f"no ratio of {metric} for an arm {arm!r}: it was not measured, or against nothing")

    def table_rows(self) -> list[dict[str, object]]:
        return [
            {
                "arm": row.arm,
                "TTFT ms": _ms(row.ttft_s),
                "TPOT ms": _ms(row.tpot_s),
                "E2E ms": _ms(row.e2e_s),
                "TPOT over the first": "; ".join(
                    f"{ratio.median:.3f} ({span(ratio)}): {ratio.verdict}"
                    for ratio in row.ratios
                    if ratio.metric == "tpot_s"
                ),
            }
            for row in (*self.rows, *([] if self.control is None else [self.control]))
        ]


def compare_latency(
    base: str | os.PathLike[str] | Sequence[Arm] | Mapping[str, str | os.PathLike[str]],
    export: Any = None,
    *,
    requests: Any = None,
    device: str | None = None,
    new_tokens: int = 64,
    rounds: int = 12,
    warmup: int | None = None,
    options: Options | None = None,
    control: bool = True,
    roofline: bool = False,
    precision: float | None = None,
    budget_s: float | None = None,
    least_rounds: int = MIN_PAIRS,
    progress: Progress | bool | None = None,
    keep: Keep | None = None,
    engines: Engines | None = None,
) -> Comparison:
    """Time an export and its base in turns and say: slower, faster, the same, or undecided.

        compare_latency("Qwen2.5-VL-3B", "out/export", device="cuda")
        compare_latency({"base": base, "mine": mine, "theirs": theirs}, "What is it?")

    Args:
        base: the base's folder; or all that is to be timed, as {name: folder} or arms, of which the first is what the
            others are compared with.
        export: the export's folder; or after arms, the requests.
        requests: as for `measure_latency`.
        device: as for `measure_latency`.
        new_tokens: tokens to generate per request.
        rounds: measured requests per arm; fewer than six never give a verdict.
        warmup: as for `measure_latency`.
        options: how the folders of a mapping are loaded and run.
        control: time the first arm a second time, in a process of its own; a difference that is no larger than
            between those two is "cannot tell".
        roofline: as for `measure_latency`.
        precision: as for `measure_latency`.
        budget_s: as for `measure_latency`.
        least_rounds: rounds after which the budget may end them; with fewer than six there is no verdict.
        progress: as for `measure_latency`.
        keep: called after every round with the rows so far, which are not compared yet.
        engines: as for `measure_latency`.

    Raises:
        InputError, CheckpointError, WorkerError: as `measure_latency`.
    """
    if isinstance(base, (str, os.PathLike)):
        if not isinstance(export, (str, os.PathLike)):
            raise InputError("compare_latency takes two folders, base and export, or {name: folder}")
        arms: Sequence[Arm] | Mapping[str, str | os.PathLike[str]] = {"base": base, "export": export}
    else:
        arms, requests = base, requests if requests is not None else export
    named = named_arms(arms, options, device=device)
    if control and named:
        named = with_control(named)
    with shown(progress, [arm.name for arm in named]) as called:
        plan = Plan(
            arms=named,
            traffic=traffic_for(requests, new_tokens, arms=named),
            rounds=rounds,
            warmup=warmup,
            roofline=roofline,
            precision=precision,
            budget_s=budget_s,
            progress=called,
            keep=keep,
            least_rounds=least_rounds,
        )
        return compare_control(plan.measured(engines))


def with_control(arms: Sequence[Arm]) -> list[Arm]:
    """Return the arms, and the first of them once more in a process of its own."""
    return [*arms, replace(arms[0], name=CONTROL, process=1 + max(arm.process for arm in arms))]


def compare_control(rows: Sequence[LatencyRow]) -> Comparison:
    """Compare rows of which one may be the control (see `compare_rows`)."""
    control = next((row for row in rows if row.arm == CONTROL), None)
    return compare_rows([row for row in rows if row is not control], control=control)


def _ms(summary: Summary | None) -> str:
    return "" if summary is None else f"{summary.median * 1e3:.2f}"


def compare_rows(rows: Sequence[LatencyRow], *, control: LatencyRow | None = None) -> Comparison:
    """Compare rows that took turns, also ones read back from `latency.jsonl`.

    Raises:
        InputError: they are of different sessions.
    """
    if len({row.session for row in (*rows, *([] if control is None else [control]))}) > 1:
        raise InputError("rows of different sessions did not take turns and cannot be compared round by round")
    first = rows[0]
    if control is not None:
        control = replace(control, ratios=ratios(control, first))
    floor = {} if control is None else {ratio.metric: ratio for ratio in control.ratios}
    compared = [
        replace(row, ratios=[allow_for(ratio, floor.get(ratio.metric)) for ratio in ratios(row, first)])
        for row in rows[1:]
    ]
    return Comparison(rows=(replace(first, ratios=[]), *compared), control=control)


def ratios(row: LatencyRow, against: LatencyRow) -> list[Ratio]:
    """Return an arm's ratios against another, for every metric.

    A round in which one of them has no TPOT, its answer having arrived at once, is left out of that ratio and counted;
    where fewer than `MIN_PAIRS` are left then, there is none.
    """
    found: list[Ratio] = []
    if not row.timelines or len(row.timelines) != len(against.timelines):
        return found
    for metric in METRICS:
        both = pairs_of(row.timelines, against.timelines, metric)
        left_out = len(row.timelines) - len(both)
        if both and (left_out == 0 or len(both) >= MIN_PAIRS):
            times, others = zip(*both, strict=True)
            found.append(replace(paired_ratio(times, others, name=against.arm, metric=metric), left_out=left_out))
    return found


def doubling() -> Iterator[int]:
    """Yield the batch sizes 1, 2, 4, ..., to be left when nothing fits any more."""
    size = 1
    while size <= LARGEST_BATCH:
        yield size
        size *= 2


def sweep_batches(
    arms: Sequence[Arm], sizes: Iterable[int], compare: Callable[[Sequence[Arm], int], Sequence[Comparison]]
) -> Iterator[Comparison]:
    """Compare arms at one batch size after the other.

    Args:
        arms: what is compared; one that ran out of memory is asked nothing larger.
        sizes: in this order, such as `doubling()`.
        compare: compares the arms that are left at one size, on one workload or several.
    """
    left = list(arms)
    for size in sizes:
        compared = compare(left, size)
        yield from compared
        failed = {row.arm for comparison in compared for row in comparison.rows if row.error is not None}
        left = [arm for arm in left if arm.name not in failed]
        if not left:
            return
