"""The instruction to think, found in prompts and left out; and the reward functions that pay an answer."""

from __future__ import annotations

from typing import Any

import pytest

from grpo_toolkit.model.generation.judge import Judge
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.generation.thinking_instruction import find_thinking

SYSTEM = {"role": "system", "content": "Put the reasoning between <think> and </think>."}
VLM_R1 = (
    "Where is the dog? First output the thinking process in <think> </think> tags and then output the final answer in "
    "<answer> </answer> tags. Output the final answer in JSON format."
)
DIRECT = "Where is the dog? Output the final answer in JSON format."


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


@pytest.mark.parametrize(
    ("messages", "instruction", "thinking", "direct"),
    [
        ([SYSTEM, user("What?")], None, [SYSTEM, user("What?")], [user("What?")]),
        (
            [user(VLM_R1)],
            None,
            [user(VLM_R1)],
            [user(DIRECT)],
        ),
        (
            [user([{"type": "image"}, {"type": "text", "text": VLM_R1}])],
            None,
            [user([{"type": "image"}, {"type": "text", "text": VLM_R1}])],
            [user([{"type": "image"}, {"type": "text", "text": DIRECT}])],
        ),
        ([user("What? Think hard.")], "Think hard.", [user("What? Think hard.")], [user("What?")]),
        ([user("What?")], "Think!", [{"role": "system", "content": "Think!"}, user("What?")], [user("What?")]),
        (
            [{"role": "system", "content": "You see."}, user("What?")],
            "Think hard.",
            [{"role": "system", "content": "You see.\nThink hard."}, user("What?")],
            [{"role": "system", "content": "You see."}, user("What?")],
        ),
    ],
)  # fmt: skip
def test_prompts_with_and_without_their_instruction(
    messages: list[Any], instruction: str | None, thinking: list[Any], direct: list[Any]
) -> None:
    found = find_thinking([Request(messages=messages)], instruction)
    assert [[request.messages for request in requests] for requests in found] == [[thinking], [direct]]


def test_prompts_that_do_not_say_are_not_asked_another_way() -> None:
    assert find_thinking([Request(messages=[user("What?")])]) == ([], [])


def paid(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    return [float(completion[0]["content"] == right) for completion, right in zip(completions, answer, strict=True)]


def silent(**_: Any) -> list[float | None]:
    return [None]


def broken(**_: Any) -> list[float]:
    raise KeyError("solution")


class RewardModel:
    def parameters(self) -> list[Any]:
        return []

    def __call__(self, **_: Any) -> list[float]:
        raise AssertionError("a model takes tokens, not texts")


def test_rewards_are_paid_as_the_trainer_pays_them(caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"prompt": [user("1?")], "answer": "one"}, {"prompt": [user("2?")], "answer": "two"}]
    judge = Judge(functions=[paid, RewardModel(), silent, broken], rows=rows, weights=[3.0, 1.0, 1.0, 1.0])
    assert [judge.reward(number, "two", [1]) for number in range(4)] == [0.0, 3.0, 0.0, 3.0]
    assert judge.name == "paid, silent, broken"
    assert [record.message for record in caplog.records] == [
        "grpo_toolkit: the reward broken cannot be asked (KeyError: 'solution')"
    ]
    assert Judge(functions=[paid], rows=[]).reward(0, "two", []) is None
    plain = Judge(functions=[lambda completions, **_: [float(len(completions[0]))]], rows=[{"prompt": "1?"}])
    assert plain.reward(5, "four", []) == 4.0
