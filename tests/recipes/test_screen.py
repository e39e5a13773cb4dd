"""The screen of a run: one bar, few lines of 80 columns, and a story at the end."""

from __future__ import annotations

import itertools
import logging
import sys
from importlib import metadata
from types import SimpleNamespace
from typing import Any

import pytest
from packaging.version import Version

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)

LOGS = {"reward": 1.68, "rewards/accuracy_reward/mean": 0.74, "step_time": 1.13, "loss": 0.1, "epoch": 0.2}


def train(callback: Any, steps: int, begun_at: int = 0) -> None:
    """Call a callback as a trainer does."""
    state = SimpleNamespace(is_world_process_zero=True, global_step=begun_at, max_steps=steps)
    callback.on_train_begin(None, state, None)
    for step in range(begun_at + 1, steps + 1):
        state.global_step = step
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, logs=LOGS)
    callback.on_log(None, state, None, logs={"train_runtime": 3.0})
    callback.on_train_end(None, state, None)


@pytest.mark.parametrize(
    ("step_s", "begun_at", "expected"),
    [(60.0, 0, 10), (60.0, 70, 5), (1.0, 0, 5), (0.0, 0, 1)],  # two hours, the rest of them, 140 s, no time
)
def test_without_a_terminal_there_are_ten_lines_or_one_in_half_a_minute(
    step_s: float, begun_at: int, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    from grpo_vlm.training.screen import BarCallback

    clock = itertools.count(0.0, step_s)  # asked once a step
    train(BarCallback(now=lambda: next(clock)), 140, begun_at=begun_at)
    said = capsys.readouterr().err.splitlines()
    assert len(said) == expected
    assert said[-1] == "step        140/140 · reward 1.68 · accuracy 0.74 · 1.1 s"


def test_on_a_terminal_no_line_breaks_the_bar_or_sticks_to_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from grpo_vlm.training.screen import BarCallback, above_bar

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    logger = logging.getLogger("grpo_toolkit")

    class Talking(BarCallback):
        def on_step_end(self, *given: Any, **kwargs: Any) -> None:
            super().on_step_end(*given, **kwargs)
            above_bar("health: a line")
            logger.warning("a warning")

    train(Talking(), 3)
    said = capsys.readouterr().err
    shown = [line.rpartition("\r")[2] for line in said.split("\n")]
    assert shown.count("health: a line") == 3
    assert shown.count("a warning") == 3
    assert [line for line in shown if line.strip() and "step" not in line and "line" not in line] == ["a warning"] * 3
    assert shown[-2].startswith("step        3/3, 0 s · reward 1.68")


def summary_of(**changes: Any) -> dict[str, Any]:
    ratio = {"median": 0.79, "low": 0.71, "high": 1.33, "pairs": 24, "verdict": "cannot tell"}
    return {
        "held_out_accuracy": [0.495, 0.92], "begun_with": None, "direct_accuracy": None, "accuracy_reward": (0.5, 0.9),
        "iou_reward": None, "format_reward": None, "faults": {"base": 0, "checkpoint": 5, "export": 0},
        "verified": True, "checks": 11, "tpot_ms": {"base": 2.65, "export": 2.4}, "tpot_ratios": {"export": ratio},
        "export": "runs/tiny/export", "report": "runs/tiny/latency/report.html",
    } | changes  # fmt: skip


def test_the_story_of_a_run() -> None:
    from grpo_vlm.training.summary import story_lines

    assert story_lines(summary_of()) == [
        "",
        "learnt      49.5% (the base) to 92.0% of the held-out rows right",
        "right       5 faults in the plain checkpoint, 0 in the export",
        "verified    11 checks passed in a fresh process",
        "speed       0.71 to 1.33 times the base's time per token: cannot tell here",
        "look next   runs/tiny/export/README.md",
        "            runs/tiny/latency/report.html",
    ]


@pytest.mark.parametrize(
    ("ratio", "expected"),
    [
        (None, "2.40 ms a token"),
        ({"low": None, "high": None, "pairs": 3}, "no verdict over 3 rounds: it takes six"),
        (
            {"median": 0.99, "low": 0.98, "high": 1.01, "verdict": "same"},
            "same: 0.99 times the base's time per token (0.98 to 1.01 times)",
        ),
    ],
)
def test_the_speed_is_one_verdict(ratio: Any, expected: str) -> None:
    from grpo_vlm.training.summary import told

    assert told(2.4, ratio) == expected


def test_what_was_not_published_is_said() -> None:
    from grpo_vlm.training.summary import story_lines

    lines = story_lines(summary_of(verified=False, export=None, report=None, faults={}, tpot_ms={}))
    assert lines[-1] == "verified    NO: not published, or not verified; see above"
