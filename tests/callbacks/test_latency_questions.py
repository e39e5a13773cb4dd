"""The two questions after a real training: what thinking costs the export, and which batch is worth its memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit import ExportCallback, LatencyCallback
from grpo_toolkit.latency.rows.review import load_review
from scripts.models.tiny_training import rows
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path

    import pytest

SYSTEM = "First think in <think> </think>, then answer in <answer> </answer>."
TEN = 10.0


def ten(completions: list[Any], answer: list[str], **_: Any) -> list[float]:
    """Pay ten for every answer, and a little for the row that was asked."""
    return [TEN + int(right) / 10 for _, right in zip(completions, answer, strict=True)]


def prompts(count: int = 2) -> list[dict[str, Any]]:
    found = [dict(row) for row in rows(count)]
    return [{**row, "prompt": [{"role": "system", "content": SYSTEM}, *row["prompt"]]} for row in found]


def test_after_a_training_thinking_and_batches_are_told(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = LatencyCallback(
        arms=["base", "export"], new_tokens=3, max_new_tokens=4, rounds=2, prompts=prompts(), reward_funcs=[ten],
        batch_sizes=(1, 2), strict=True,
    )  # fmt: skip
    export = ExportCallback(tmp_path / "export", strict=True)
    grpo_trainer(qwen, tmp_path / "run", [export, timing]).train()
    review = load_review(tmp_path / "run")
    assert [(row.workload.name, row.arm, row.workload.thinking) for row in review.rows] == [
        ("fixed", "base", None),
        ("fixed", "export", None),
        ("natural_direct", "export", False),
        ("natural", "base", True),
        ("natural", "export", True),
        ("fixed_batch_size_1", "export", None),
        ("fixed_batch_size_2", "export", None),
    ]
    direct, _, thinking = review.rows[2:5]
    assert [line.reward for line in thinking.timelines] == [line.reward for line in direct.timelines] == [TEN, 10.1]
    assert thinking.judged_by == "ten"
    assert thinking.workload.prompt_tokens > direct.workload.prompt_tokens
    one, two = (row.memory.kv_bytes or 0 for row in review.rows[5:])
    assert two == 2 * one > 0
    said = capsys.readouterr().err
    assert "reward 10.05, without it 10.05 (ten)" in " ".join(said.split())
    assert "\nbatches     batch 2: " in said
    page = (tmp_path / "run" / "latency" / "report.html").read_text()
    card = (tmp_path / "export" / "README.md").read_text()
    assert all("Thinking: " in text and "Batch 2: " in text for text in (page, card))
    assert "trained with [GRPO]" in card
    assert "tags:\n- grpo\n- trl\n" in card


def test_prompts_that_name_no_thoughts_are_asked_one_way_which_is_said_once(
    qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timing = LatencyCallback(arms=["base"], new_tokens=2, max_new_tokens=2, rounds=1, strict=True)
    grpo_trainer(qwen, tmp_path / "run", [timing]).train()
    assert [row.workload.name for row in load_review(tmp_path / "run").rows] == ["fixed", "natural"]
    assert capsys.readouterr().err.count("the prompts name no <think>") == 1
