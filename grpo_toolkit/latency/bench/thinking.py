"""The cost of thinking: the same questions with and without the instruction to think, in turns.

Within one answer, thinking is the time until the first token of the answer proper (`think_markers`). Beside an answer
to the same question without the instruction, it is what the answer takes longer: the difference of a round, in tokens
and in seconds, and its share of the time end to end. What it buys is the reward of both.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Final

from grpo_toolkit.latency.bench.compare import Comparison, compare_control, with_control
from grpo_toolkit.latency.bench.measure import Plan
from grpo_toolkit.latency.bench.statistics import Estimate, estimate, paired_ratio
from grpo_toolkit.latency.bench.workload import THINKING, made_up, traffic_of, usual_image_tokens
from grpo_toolkit.latency.engines.arms import processor_of
from grpo_toolkit.latency.rows.review import CONTROL
from grpo_toolkit.model.generation.thinking_instruction import find_thinking

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Sequence

    from grpo_toolkit.latency.bench.progress import Progress
    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.pool import Engines
    from grpo_toolkit.latency.rows.row import LatencyRow
    from grpo_toolkit.latency.rows.timeline import Timeline
    from grpo_toolkit.model.generation.request import Request

_DIRECT: Final = ", asked directly"


@dataclass(frozen=True, kw_only=True)
class Thinking:
    """The cost of thinking in one arm's answers, and what it buys.

    Attributes:
        arm: the model.
        before_answer: the share of an answer's time (0 to 1) before the first token of its answer proper; None where
            no answer has one.
        first_answer_s: median seconds until that token, asked with the instruction and without it.
        tokens, seconds: by how much an answer is longer, and takes longer, than without the instruction.
        share: the same seconds over those of the answer with it.
        rewards: the mean rewards with the instruction and without it; None where nothing paid.
        judged_by: the names of the reward functions.
        think_tokens, output_tokens: of an answer with the instruction, medians.

    What compares is None where nothing was asked without the instruction.
    """

    arm: str
    before_answer: Estimate | None
    first_answer_s: tuple[float | None, float | None]
    tokens: Estimate | None = None
    seconds: Estimate | None = None
    share: Estimate | None = None
    rewards: tuple[float, float | None] | None = None
    judged_by: str | None = None
    think_tokens: float | None = None
    output_tokens: float | None = None


def compare_thinking(
    plan: Plan, direct: Traffic, *, engines: Engines | None = None, control: bool = False, only: Collection[str] = ()
) -> tuple[Comparison, Comparison]:
    """Carry a plan out with arms that are asked without the instruction besides, all of them in turns.

    Args:
        plan: its traffic asks for thoughts.
        direct: the same questions without the instruction.
        engines: loaded models, used again and left open.
        control: time the first arm a second time, on both.
        only: the names of the arms that are asked both ways; () asks all so.

    Returns:
        The answers without the instruction, and those with it. The rows of both are of one session.
    """
    arms = with_control(plan.arms) if control else list(plan.arms)
    beside = [replace(arm, name=f"{arm.name}{_DIRECT}") for arm in arms if not only or arm.name in only]
    workloads = dict.fromkeys([arm.name for arm in beside], direct)
    rows = replace(plan, arms=[*arms, *beside], workloads=workloads).measured(engines)
    return compare_control([*map(plain_arm, rows[len(arms) :])]), compare_control(rows[: len(arms)])


def ask_both_ways(
    arm: Arm,
    requests: Sequence[Request] = (),
    *,
    instruction: str | None = None,
    rounds: int = 6,
    max_new_tokens: int = 256,
    budget_s: float | None = None,
    progress: Progress | None = None,
    engines: Engines | None = None,
) -> list[LatencyRow]:
    """Ask one model natural questions with and without the instruction to think, in turns.

    Args:
        arm: the model.
        requests: everyday questions by default, with an image where the model sees.
        instruction: as for `find_thinking`; of made-up questions `THINKING` by default.
        rounds, max_new_tokens, budget_s, progress, engines: as for `measure_latency`.

    Returns:
        The row without the instruction and the row with it; none where no request has one.
    """
    asked = list(requests)
    if not asked:
        processor = processor_of([arm])
        image_tokens = usual_image_tokens(processor)
        questions = made_up(processor, kind="natural", image_tokens=image_tokens, max_new_tokens=max_new_tokens)
        asked, instruction = [questions.make(number) for number in range(rounds)], instruction or THINKING
    thinking, direct = find_thinking(asked, instruction)
    if not thinking:
        return []
    make = partial(traffic_of, kind="natural", max_new_tokens=max_new_tokens)
    plan = Plan(
        arms=[arm],
        traffic=replace(make(thinking), name="natural_thinking", thinking=True),
        rounds=rounds,
        budget_s=budget_s,
        progress=progress,
    )
    compared = compare_thinking(plan, replace(make(direct), name="natural", thinking=False), engines=engines)
    return [row for comparison in compared for row in comparison.rows]


def compare_asked(
    plan: Plan, direct: Traffic | None, *, engines: Engines | None = None, control: bool = False
) -> list[Comparison]:
    """Carry a plan out: one comparison, or with `direct` two, without the instruction to think and with it.

    Args:
        plan, direct, engines, control: as for `compare_thinking`.
    """
    if direct is not None:
        return list(compare_thinking(plan, direct, engines=engines, control=control))
    return [compare_control(replace(plan, arms=with_control(plan.arms) if control else plan.arms).measured(engines))]


def plain_arm(row: LatencyRow) -> LatencyRow:
    """Return a row under its arm's own name, also where it was asked without the instruction."""
    return replace(row, arm=row.arm.removesuffix(_DIRECT))


def thinking_in(rows: Iterable[LatencyRow]) -> list[Thinking]:
    """Return the cost of thinking of each arm in the newest session that asked it natural questions.

    An arm whose answers hold no thoughts at all, with or without the instruction, is left out.
    """
    found: dict[str, dict[bool, LatencyRow]] = {}
    sessions: dict[str, str] = {}
    for row in rows:
        work = row.workload
        if work.kind != "natural" or work.batch_size > 1 or row.arm == CONTROL or not row.timelines:
            continue
        if sessions.setdefault(row.arm, row.session) != row.session:
            sessions[row.arm], found[row.arm] = row.session, {}
        found.setdefault(row.arm, {})[row.workload.thinking is not False] = row
    costs = (thinking_of(pair[True], pair.get(False)) for pair in found.values() if True in pair)
    return [cost for cost in costs if cost is not None]


def thinking_of(row: LatencyRow, direct: LatencyRow | None = None) -> Thinking | None:
    """Return the cost of thinking in a row's answers, beside those of a row asked without the instruction.

    None where no answer thinks and nothing was asked without the instruction.
    """
    lines = row.timelines
    shares = [line.first_answer_s / line.e2e_s for line in lines if line.first_answer_s is not None]
    thinks = any(line.think_tokens for line in lines)
    if direct is None and not thinks:
        return None
    found = Thinking(
        arm=row.arm,
        before_answer=_within(estimate(shares), 0.0, 1.0) if thinks else None,
        first_answer_s=(_median(lines, "first_answer_s"), None),
        rewards=None if (paid := mean_reward(lines)) is None else (paid, None),
        judged_by=row.judged_by,
        think_tokens=_median(lines, "think_tokens"),
        output_tokens=_median(lines, "output_tokens"),
    )
    if direct is None or len(direct.timelines) != len(lines):
        return found
    pairs = list(zip(lines, direct.timelines, strict=True))
    mine, theirs = mean_reward(lines), mean_reward(direct.timelines)
    return replace(
        found,
        first_answer_s=(found.first_answer_s[0], _median(direct.timelines, "first_answer_s")),
        tokens=estimate([float(one.output_tokens - other.output_tokens) for one, other in pairs]),
        seconds=estimate([one.e2e_s - other.e2e_s for one, other in pairs]),
        share=_share(pairs),
        rewards=None if mine is None else (mine, theirs),
    )


def _within(found: Estimate | None, least: float, most: float) -> Estimate | None:
    """Return an estimate whose interval, which few rounds have widened, holds nothing that cannot be."""
    if found is None or found.low is None or found.high is None:
        return found
    return replace(found, low=max(found.low, least), high=min(found.high, most))


def _share(pairs: Sequence[tuple[Timeline, Timeline]]) -> Estimate:
    """Return what of an answer's time it would not take without the instruction: 1 - 1 / the paired ratio."""
    ratio = paired_ratio([one.e2e_s for one, _ in pairs], [other.e2e_s for _, other in pairs], name="direct")
    low, high = (None if end is None else 1 - 1 / end for end in (ratio.low, ratio.high))
    return Estimate(median=1 - 1 / ratio.median, low=low, high=high, rounds=ratio.pairs)


def subject_of(found: Sequence[Thinking]) -> Thinking | None:
    """Return the cost that a report is about: the export's, else that of the last arm asked both ways, or at all."""
    asked = [cost for cost in found if cost.share is not None] or list(found)
    return next((cost for cost in asked if cost.arm == "export"), asked[-1] if asked else None)


def _median(lines: Sequence[Timeline], name: str) -> float | None:
    there = [value for line in lines if (value := getattr(line, name)) is not None]
    return float(statistics.median(there)) if there else None


def mean_reward(lines: Sequence[Timeline]) -> float | None:
    """Return the mean reward of answers; None where nothing paid."""
    paid = [line.reward for line in lines if line.reward is not None]
    return statistics.fmean(paid) if paid else None
