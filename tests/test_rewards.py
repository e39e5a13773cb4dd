"""The rewards pay for one well-formed answer that is right, never raise, and never pay for a guess."""

from __future__ import annotations

import random

import pytest

from rewards import accuracy_reward, extract_answer, format_reward

GOOD = "<think>A loop and a tail.</think><answer>9</answer>"


@pytest.mark.parametrize(
    ("text", "well_formed", "answer"),
    [
        (GOOD, 1.0, "9"),
        ("  <think>a</think>\n<answer> 9 </answer>\n", 1.0, "9"),
        ("<think></think><answer>9</answer>", 0.0, "9"),
        ("<think>a</think><answer></answer>", 0.0, None),
        ("<think>a</think><answer>9</answer><answer>8</answer>", 0.0, None),
        ("<answer>9</answer><think>a</think>", 0.0, "9"),
        ("<think>a</think> so <answer>9</answer>", 0.0, "9"),
        ("<think>a<think>b</think><answer>9</answer>", 0.0, "9"),
        ("<answer>9", 0.0, None),
        ("</answer>9<answer>", 0.0, None),
        ("9", 0.0, None),
        ("", 0.0, None),
    ],
)
def test_form_and_content(text: str, well_formed: float, answer: str | None) -> None:
    assert format_reward([text]) == [well_formed]
    assert extract_answer(text) == answer
    assert accuracy_reward([text], ["9"]) == [float(answer == "9")]


def test_conversational_completions_are_read() -> None:
    parts = [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}]
    assert accuracy_reward([[{"role": "assistant", "content": GOOD}], parts], ["9", "8"]) == [1.0, 0.0]
    assert format_reward([[{"role": "assistant", "content": None}]]) == [0.0]


def test_any_string_gets_a_reward_between_0_and_1() -> None:
    pieces = ["<think>", "</think>", "<answer>", "</answer>", "9", " ", "\n", "é", "\x00", "<", "think"]
    draw = random.Random(0)
    for _ in range(2000):
        text = "".join(draw.choices(pieces, k=draw.randrange(12)))
        form, content = format_reward([text])[0], accuracy_reward([text], ["9"])[0]
        assert form in (0.0, 1.0)
        assert content in (0.0, 1.0)
        if text.count("<answer>") != 1 or text.count("</answer>") != 1:
            assert content == 0.0
