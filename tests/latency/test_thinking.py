"""The cost of thinking: one session with and without the instruction, paired round by round."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.latency.bench.measure import Plan
from grpo_toolkit.latency.bench.statistics import estimate
from grpo_toolkit.latency.bench.thinking import compare_thinking, subject_of, thinking_in, thinking_of
from grpo_toolkit.latency.bench.workload import traffic_of
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.rows.review import Review, visits_of
from grpo_toolkit.latency.rows.row import Workload
from grpo_toolkit.latency.rows.timeline import Timeline
from grpo_toolkit.model.generation.judge import Judge
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.generation.thinking_instruction import find_thinking
from grpo_toolkit.reporting.report.headline import question_sentences
from grpo_toolkit.reporting.report.screen_lines import question_lines
from grpo_toolkit.reporting.terminal.two_questions import thinking_parts
from grpo_toolkit.reporting.trackers.metrics import question_figures
from tests.support.latency_rows import row

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.latency.rows.row import LatencyRow

SYSTEM = "First think in <think> </think>, then answer in <answer> </answer>."


def answered(tokens: int, index: int, *, think: int, reward: float | None = None) -> Timeline:
    """An answer of so many tokens, 10 ms each after 100 ms, a little slower from round to round."""
    slow = 1 + 0.01 * (index % 3)
    times = [slow * (0.1 + 0.01 * token) for token in range(tokens)]
    return Timeline(
        token_times_s=times, prompt_tokens=50, output_tokens=tokens, think_tokens=think,
        answer_tokens=tokens - think, first_answer_s=times[think], reward=reward,
    )  # fmt: skip


def natural(arm: str, lines: list[Timeline], *, thinking: bool | None, session: str = "asked") -> LatencyRow:
    workload = Workload(
        name="natural" if thinking is not False else "natural_direct", kind="natural", requests=len(lines),
        prompt_tokens=50, max_new_tokens=256, thinking=thinking,
    )  # fmt: skip
    return row(
        arm, session=session, timelines=lines, workload=workload, tag=f"{thinking}", ratios=[], judged_by="accuracy"
    )


def pair(rounds: int = 8, arm: str = "export") -> tuple[LatencyRow, LatencyRow]:
    thinks = [answered(61, index, think=40, reward=float(index % 2)) for index in range(rounds)]
    direct = [answered(21, index, think=0, reward=float(index % 4 == 0)) for index in range(rounds)]
    return natural(arm, thinks, thinking=True), natural(arm, direct, thinking=False)


def test_the_cost_is_the_difference_of_each_round() -> None:
    cost = thinking_of(*pair())
    assert cost is not None
    assert cost.tokens is not None
    assert (cost.tokens.median, cost.tokens.low, cost.tokens.high, cost.tokens.rounds) == (40.0, 40.0, 40.0, 8)
    assert cost.seconds is not None
    assert cost.seconds.median == pytest.approx(0.4, rel=0.02)
    assert cost.share is not None
    assert cost.share.median == pytest.approx(0.4 / 0.7)  # each round has its own speed, and the ratio none of it
    assert cost.first_answer_s == (pytest.approx(0.5, rel=0.02), pytest.approx(0.1, rel=0.02))
    assert cost.rewards == (0.5, 0.25)
    assert thinking_parts(cost) == [
        "57% of an answer's time, asked with and without the instruction",
        "reward 0.50, without it 0.25 (accuracy)",
        "40 of 61 tokens are thoughts",
        "40 tokens longer",
        "0.40 s (0.40 s to 0.41 s) longer",
        "first answer token after 0.51 s, without it 0.10 s",
    ]


def test_few_rounds_have_no_interval_and_an_interval_around_nothing_cannot_tell() -> None:
    few = thinking_of(*pair(rounds=3))
    assert few is not None
    assert thinking_parts(few)[0] == "57% (no interval) of an answer's time, asked with and without the instruction"
    lengths = [20, 60, 25, 55, 30, 50, 35, 45]
    mine = natural("export", [answered(n, 0, think=0) for n in lengths], thinking=True)
    theirs = natural("export", [answered(n, 0, think=0) for n in lengths[::-1]], thinking=False)
    swapped = thinking_of(*pair()[::-1])
    assert swapped is not None
    assert "40 tokens shorter" in thinking_parts(swapped)
    unsure = thinking_of(mine, theirs)
    assert unsure is not None
    assert thinking_parts(unsure)[0].startswith("cannot tell: -")


def test_without_an_instruction_the_thoughts_inside_the_answers_are_told() -> None:
    lines = [answered(61, index, think=40) for index in range(8)]
    cost = thinking_of(natural("export", lines, thinking=None))
    assert cost is not None
    assert thinking_parts(cost)[:2] == ["71% of an answer's time", "40 of 61 tokens are thoughts"]
    assert thinking_of(natural("export", [answered(9, 0, think=0)], thinking=None)) is None


def test_no_part_of_an_answer_is_longer_than_the_answer() -> None:
    """The interval of few rounds that differ much is widened: the share of a time stays one all the same."""
    thoughts = [6, 30, 57, 59, 58, 59]
    lines = [answered(61, index, think=think) for index, think in enumerate(thoughts)]
    shares = [line.first_answer_s / line.e2e_s for line in lines if line.first_answer_s is not None]
    wide = estimate(shares)
    assert wide is not None
    assert wide.high is not None
    assert wide.high > 1.0
    cost = thinking_of(natural("export", lines, thinking=None))
    assert cost is not None
    assert cost.before_answer is not None
    assert (cost.before_answer.median, cost.before_answer.high) == (wide.median, 1.0)


def test_the_newest_session_counts_and_the_export_is_the_subject(tmp_path: Path) -> None:
    thinks, direct = pair()
    old = natural("export", [answered(99, 0, think=90)], thinking=True, session="old")
    rows = [old, direct, *(natural(arm, thinks.timelines, thinking=True) for arm in ("base", "export"))]
    assert {cost.arm: cost.share is not None for cost in thinking_in(rows)} == {"base": False, "export": True}
    subject = subject_of(thinking_in(rows))
    assert subject is not None
    assert subject.arm == "export"
    review = Review(path=tmp_path, rows=rows)
    assert question_sentences(review)[0].startswith("Thinking: 57% of an answer's time")
    assert max(map(len, question_lines(rows))) <= 80
    figures = question_figures(rows)
    assert (figures["thinking_tokens"], figures["thinking_reward"], figures["direct_reward"]) == (40.0, 0.5, 0.25)
    # What was asked another way on the export alone does not stand for the natural answers of all arms.
    (visit,) = visits_of(Review(path=tmp_path, rows=[*rows[1:], row("base"), row("export")]))
    assert [(found.arm, found.workload.thinking) for found in visit.natural] == [("base", True), ("export", True)]


def test_both_ways_are_asked_in_turns_of_one_session(qwen: Path) -> None:
    asked = [Request(messages=[{"role": "system", "content": SYSTEM}, {"role": "user", "content": "What?"}])]
    thinking, direct = find_thinking(asked)
    turns: list[tuple[str, int]] = []

    def reward(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
        return [float(len(completions[0][0]["content"])) + float(answer[0])]

    judge = Judge(functions=[reward], rows=[{"prompt": asked[0].messages, "answer": "1000"}], weights=[2.0])
    plan = Plan(
        arms=[Arm(name="base", path=qwen), Arm(name="export", path=qwen)],
        traffic=traffic_of(thinking, kind="natural", max_new_tokens=4, thinking=None),
        rounds=2, warmup=0, roofline=False, precision=None, budget_s=None,
        progress=lambda arm, turn, _: turns.append((arm, turn)), judge=judge,
    )  # fmt: skip
    directly, thought = compare_thinking(plan, traffic_of(direct, kind="natural", max_new_tokens=4), only=["export"])
    assert [row.arm for row in thought.rows] == ["base", "export"]
    assert [row.arm for row in directly.rows] == ["export"]
    assert len({row.session for row in (*thought.rows, *directly.rows)}) == 1
    names = ["base", "export", "export, asked directly"]
    assert turns == [(name, 0) for name in names] + [(name, 1) for name in names[::-1]]
    shorter = [line.prompt_tokens for line in directly.rows[0].timelines]
    assert all(mine.prompt_tokens > theirs for mine, theirs in zip(thought.rows[1].timelines, shorter, strict=True))
    assert all((line.reward or 0) >= 2000 for found in (*thought.rows, *directly.rows) for line in found.timelines)
    assert thought.rows[0].judged_by == "reward"
