"""Chunks, as vLLM, SGLang and others send them, and the times that they tell."""

from __future__ import annotations

from dataclasses import replace
from itertools import chain
from typing import Any

import pytest

from grpo_toolkit.latency.bench.compare import compare_rows, ratios
from grpo_toolkit.latency.bench.pairs import _paces
from grpo_toolkit.latency.bench.statistics import summary
from grpo_toolkit.latency.engines.endpoint_stream import Stream, answer_of
from grpo_toolkit.latency.rows.row import LatencyRow, Timeline, Tokens
from grpo_toolkit.reporting.charts.arms import token_gaps
from grpo_toolkit.reporting.terminal.tables import ratio_lines
from tests.support.latency_rows import row

NOTHING = {"logprobs": None, "finish_reason": None, "matched_stop": None}


def closed(chunks: list[dict[str, Any]], *, step_s: float = 0.1, start_s: float = 0.0) -> Stream:
    """A stream whose chunks arrived one a step."""
    found = Stream()
    for number, chunk in enumerate(chunks, start=1):
        found.add(chunk, start_s + number * step_s)
    found.close()
    return found


def pieces(deltas: list[dict[str, Any]], usage: dict[str, int]) -> Stream:
    ends = [{"choices": [{"delta": {}, "finish_reason": "stop"}]}, {"choices": [], "usage": usage}]
    return closed([{"choices": [{"delta": delta}]} for delta in deltas] + ends)


def test_what_a_server_streams_becomes_a_timeline() -> None:
    """The pieces of vLLM with a reasoning parser, and of one that sends the markers as text."""
    usage = {"prompt_tokens": 7, "completion_tokens": 4}
    role = {"role": "assistant", "content": ""}
    thought = [{"reasoning_content": "a"}, {"reasoning_content": "b"}]
    parsed = answer_of([pieces([role, *thought, {"content": "4"}, {"content": "."}], usage)]).timeline
    assert (parsed.think_tokens, parsed.answer_tokens, parsed.first_answer_s) == (2, 2, 0.4)
    assert parsed.token_times_s == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert (parsed.prompt_tokens, parsed.output_tokens, parsed.is_capped) == (7, 4, False)
    texts = [{"content": piece} for piece in ("<think>", "</think>", "4", ".")]
    marked = answer_of([pieces(texts, usage)]).timeline
    assert (marked.think_tokens, marked.answer_tokens, marked.first_answer_s) == (2, 2, pytest.approx(0.3))
    # Fewer pieces than tokens: the time is known, the counts are not.
    merged = answer_of([pieces([{"content": "<think></think>"}, {"content": "4."}], usage)]).timeline
    assert (merged.think_tokens, merged.answer_tokens, merged.first_answer_s) == (None, None, 0.2)
    assert merged.tpot_s == pytest.approx(0.1 / 3)


def test_every_token_that_a_server_names_has_its_time() -> None:
    """With `return_token_ids`: half a character, several tokens at once, a marker that the parser took out."""

    def taken(pieces: list[tuple[dict[str, str], list[int]]]) -> Any:
        return answer_of([closed([{"choices": [{"delta": delta, "token_ids": ids}]} for delta, ids in pieces])])

    halves = taken([({"content": ""}, [100]), ({"content": "é"}, [8]), ({"content": " ab"}, [1, 2])])
    assert halves.tokens == [[100, 8, 1, 2]]
    assert halves.timeline.token_times_s == pytest.approx([0.1, 0.2, 0.3, 0.3])
    assert halves.timeline.output_lengths == [4]
    assert (halves.timeline.think_tokens, halves.texts) == (None, ["é ab"])
    parsed = taken([({}, [7]), ({"reasoning": "a"}, [1]), ({}, [9]), ({"content": "4"}, [2]), ({"content": "."}, [3])])
    assert (parsed.timeline.think_tokens, parsed.timeline.answer_tokens) == (3, 2)
    assert parsed.timeline.first_answer_s == 0.4


def sglang(parts: list[tuple[str, int]], tokens: list[int], *, reason: str, matched: int | None = None) -> Stream:
    """The chunks of SGLang 0.5.23: role, pieces with the tokens so far, reason, tokens, usage."""

    def usage(count: int) -> dict[str, Any]:
        return {"prompt_tokens": 59, "total_tokens": 59 + count, "completion_tokens": count, "reasoning_tokens": 0}

    role = {"reasoning_content": None, "role": "assistant", "content": ""}
    chunks: list[dict[str, Any]] = [{"choices": [{"index": 0, "delta": role, **NOTHING}]}]
    for text, count in parts:
        delta = {"reasoning_content": None, "content": text}
        chunks.append({"choices": [{"index": 0, "delta": delta, **NOTHING}], "usage": usage(count)})
    end = {"index": 0, "delta": {"reasoning_content": None}, "finish_reason": reason, "matched_stop": matched}
    chunks.append({"choices": [end]})
    chunks.append({"choices": [], "usage": None, "sglext": {"output_ids": [tokens]}})
    chunks.append({"choices": [], "usage": usage(len(tokens)) | {"prompt_tokens_details": None}})
    return closed(chunks)


def test_tokens_that_a_server_counts_have_the_time_of_their_piece() -> None:
    """SGLang: half a character comes with the next token, two tokens come at once, the end of sequence is no piece."""
    capped = answer_of([sglang([("c", 1), ("\ufffdp", 3), ("his!", 5)], [66, 252, 79, 262, 314], reason="length")])
    assert capped.tokens == [[66, 252, 79, 262, 314]]
    assert capped.texts == ["c\ufffdphis!"]
    assert capped.timeline.token_times_s == pytest.approx([0.2, 0.3, 0.3, 0.4, 0.4])
    assert capped.timeline.tpot_s == pytest.approx(0.2 / 4)
    assert (capped.timeline.prompt_tokens, capped.timeline.is_capped) == (59, True)
    ended = answer_of([sglang([("<think>", 1), ("</think>", 2), ("4", 3)], [7, 8, 9, 2], reason="stop", matched=2)])
    assert ended.timeline.token_times_s == pytest.approx([0.2, 0.3, 0.4, 0.5])
    assert (ended.timeline.think_tokens, ended.timeline.answer_tokens) == (2, 2)
    assert (ended.timeline.first_answer_s, ended.timeline.is_capped) == (pytest.approx(0.4), False)
    one = answer_of([sglang([("x", 1)], [7, 2], reason="stop", matched=2)])
    assert one.timeline.token_times_s == pytest.approx([0.2, 0.3])


def test_a_server_that_counts_once_tells_no_times() -> None:
    usage = {"completion_tokens": 9}
    texts: list[dict[str, Any]] = [{"choices": [{"delta": {"content": text}}]} for text in "abc"]
    late = answer_of([closed([*texts[:2], texts[2] | {"usage": usage}])])
    assert late.timeline.token_times_s == pytest.approx([0.1, 0.2, 0.3])
    assert (late.timeline.output_lengths, late.timeline.tpot_s) == ([9], pytest.approx(0.2 / 8))


def test_each_stream_of_a_batch_has_its_own_time_per_token() -> None:
    def stream(count: int, step_s: float, start_s: float) -> Stream:
        chunks: list[dict[str, Any]] = [{"choices": [{"delta": {"content": "x"}, "token_ids": [1]}]}] * count
        return closed(chunks, step_s=step_s, start_s=start_s)

    # One waits in the queue until the other has answered: both take 0.1 s a token, together twice as long.
    queued = answer_of([stream(5, 0.1, 0.0), stream(5, 0.1, 0.5)]).timeline
    assert (queued.ttft_s, queued.e2e_s) == (pytest.approx(0.1), pytest.approx(1.0))
    assert queued.tpot_s == pytest.approx(0.1)
    assert queued.streams_s == queued.sequence_times_s
    assert [len(times) for times in queued.sequence_times_s] == [5, 5]
    # The short one is as fast as the long one: the time of a token is not that of the longest answer alone.
    assert answer_of([stream(2, 0.1, 0.0), stream(9, 0.3, 0.0)]).timeline.tpot_s == pytest.approx(0.2)
    # One arrives at once: the other's counts.
    mixed = answer_of([stream(5, 0.0, 0.9), stream(5, 0.1, 0.0)]).timeline
    assert (mixed.tpot_s, mixed.is_at_once) == (pytest.approx(0.1), False)
    held = answer_of([stream(5, 0.0, 0.9), stream(5, 0.0, 0.9)]).timeline
    assert (held.tpot_s, held.is_at_once) == (None, True)


def test_streams_that_step_together_have_the_time_of_a_batch_that_does() -> None:
    steps = [0.5, 0.6, 0.8, 1.1]
    batch = Timeline(token_times_s=steps, prompt_tokens=4, output_tokens=8, output_lengths=[4, 4])
    streams = replace(batch, token_times_s=sorted(steps * 2), sequence_times_s=[steps, steps])
    assert batch.tpot_s == streams.tpot_s == pytest.approx(0.2)
    assert (batch.ttft_s, batch.e2e_s) == (streams.ttft_s, streams.e2e_s)
    assert batch.streams_s == [steps]


def test_a_gap_on_a_chart_is_one_of_a_stream() -> None:
    streams = [[0.1, 0.2, 0.4], [0.15, 0.25, 0.45]]
    merged = Timeline(
        token_times_s=sorted(chain.from_iterable(streams)), prompt_tokens=4, output_tokens=6, output_lengths=[3, 3],
        sequence_times_s=streams,
    )  # fmt: skip
    found = measured("server", [merged])
    assert token_gaps(found) == [[pytest.approx(0.1)] * 2, [pytest.approx(0.2)] * 2]


HELD_BACK = Timeline(token_times_s=[0.5, 0.50001, 0.50002], prompt_tokens=4, output_tokens=3)
STREAMED = Timeline(token_times_s=[0.1, 0.1003, 0.1006], prompt_tokens=4, output_tokens=3)


def test_an_answer_that_arrives_at_once_has_no_time_per_token() -> None:
    assert (HELD_BACK.tpot_s, HELD_BACK.is_at_once) == (None, True)
    assert HELD_BACK.e2e_s == 0.50002
    assert (STREAMED.tpot_s, STREAMED.is_at_once) == (pytest.approx(3e-4), False)
    single = Timeline(token_times_s=[0.5], prompt_tokens=4, output_tokens=1)
    assert (single.tpot_s, single.is_at_once) == (None, False)


def measured(arm: str, timelines: list[Timeline]) -> LatencyRow:
    late = sum(timeline.is_at_once for timeline in timelines)
    tokens = Tokens(output=summary([3.0]), at_once=late)
    return row(arm, timelines=timelines, rounds=len(timelines), tokens=tokens, ratios=[])


@pytest.mark.parametrize(
    ("held_back", "rounds", "metrics", "pairs", "left_out"),
    [
        (0, 3, ["tpot_s", "ttft_s", "e2e_s"], 3, 0),
        (1, 12, ["tpot_s", "ttft_s", "e2e_s"], 11, 1),
        (6, 12, ["tpot_s", "ttft_s", "e2e_s"], 6, 6),
        (7, 12, ["ttft_s", "e2e_s"], 12, 0),
        (1, 6, ["ttft_s", "e2e_s"], 6, 0),
    ],
)
def test_rounds_whose_answer_arrived_at_once_are_left_out_of_the_ratio(
    held_back: int, rounds: int, metrics: list[str], pairs: int, left_out: int
) -> None:
    one = measured("server", [HELD_BACK] * held_back + [STREAMED] * (rounds - held_back))
    found = ratios(one, measured("base", [STREAMED] * rounds))
    assert [ratio.metric for ratio in found] == metrics
    assert (found[0].pairs, found[0].left_out) == (pairs, left_out)
    assert (found[-1].pairs, found[-1].left_out) == (rounds, 0)
    if metrics[0] == "tpot_s":
        assert found[0].median == 1.0


AT_ONCE = "rounds the answer arrived at once; those have no TPOT, and their TTFT says nothing"


def test_it_is_said_whose_answers_arrived_at_once() -> None:
    base = measured("base", [STREAMED] * 12)
    seldom = measured("server", [HELD_BACK] * 2 + [STREAMED] * 10)
    lines = ratio_lines(compare_rows([base, seldom]).rows)
    assert lines[0] == "server / base, TPOT: 1.000 (1.000 to 1.000, 10 rounds, 2 left out): same"
    assert lines[3:] == [f"server: in 2 of 12 {AT_ONCE}"]
    often = compare_rows([base, measured("server", [HELD_BACK] * 12)]).rows
    assert ratio_lines(often)[2:] == [
        f"server: in 12 of 12 {AT_ONCE}",
        "no ratio of TPOTs for server: too few rounds have both",
    ]
    assert len(ratio_lines(compare_rows([base, replace(base, arm="other")]).rows)) == 3


def test_rounds_go_on_until_two_arms_are_known_well_in_the_same_unit() -> None:
    assert _paces([[STREAMED], [HELD_BACK]]) == [[(0.50002, 0.1006)]]
    assert _paces([[STREAMED], [STREAMED]]) == [[(pytest.approx(3e-4), pytest.approx(3e-4))]]
    # One answer of many that arrives at once is left out, and changes the unit of none.
    (pairs,) = _paces([[STREAMED] * 7, [HELD_BACK] + [STREAMED] * 6])
    assert pairs == [(pytest.approx(3e-4), pytest.approx(3e-4))] * 6
