"""The last table tells times with what their measurement allows to say of them."""

from __future__ import annotations

from dataclasses import replace
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
from packaging.version import Version

from tests.support.latency_rows import row

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.latency.rows.row import LatencyRow, Ratio, Verdict

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)


def summary_of(rows: list[LatencyRow], **changes: Any) -> dict[str, Any]:
    from grpo_vlm.training.summary import summarise

    cost = {"step_s": 1.0, "peak_gib": None, "estimated_gib": None}
    return summarise([], (0.25, 0.5), None, rows, cost=cost, **changes)


def table_of(summary: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> str:
    from grpo_vlm.training.summary import print_summary

    print_summary(summary, verbose=True)
    return " ".join(capsys.readouterr().out.replace("\N{BOX DRAWINGS LIGHT VERTICAL}", " ").split())


def over_base(low: float, high: float, verdict: Verdict) -> Ratio:
    from grpo_toolkit.latency.rows.row import Ratio

    return Ratio(against="base", median=(low + high) / 2, low=low, high=high, pairs=12, verdict=verdict)


def test_times_stand_beside_their_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    export, without = over_base(0.96, 1.01, "same"), over_base(1.88, 2.17, "slower")
    rows = [row("base"), row("export", ratios=[export]), row("export_no_cache", ratios=[without])]
    summary = summary_of(rows)
    assert {arm: ratio["verdict"] for arm, ratio in summary["tpot_ratios"].items()} == {
        "export": "same",
        "export_no_cache": "slower",
    }
    printed, tpot = table_of(summary, capsys), summary["tpot_ms"]
    of_export = f"{tpot['export']:.2f} ms (same: 0.96 to 1.01 times the base)"
    assert f"time per output token {tpot['base']:.2f} ms {of_export}" in printed
    of_the_rest = f"{tpot['export_no_cache']:.2f} ms (slower: 1.88 to 2.17 times the base)"
    assert f"the same export, cache off {of_the_rest}" in printed


def test_a_batch_is_not_compared_with_the_base() -> None:
    batch = row("export", batch_size=16, ratios=[])
    batch = replace(batch, workload=replace(batch.workload, name="fixed_batch_size_16"))
    summary = summary_of([row("base"), row("export", ratios=[over_base(0.96, 1.01, "same")]), batch])
    assert summary["tpot_ms"] == summary_of([row("base"), row("export")])["tpot_ms"]
    assert summary["tpot_ratios"]["export"]["verdict"] == "same"


def test_a_noisy_machine_is_no_regression(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [row("base"), row("export", ratios=[over_base(0.99, 1.39, "cannot tell")])]
    assert "ms (cannot tell apart: 0.99 to 1.39 times the base)" in table_of(summary_of(rows), capsys)


def test_times_of_no_pairs_stand_alone(capsys: pytest.CaptureFixture[str]) -> None:
    summary = summary_of([row("base", timelines=[]), row("export", timelines=[], ratios=[])])
    assert summary["tpot_ratios"] == {}
    printed = table_of(summary, capsys)
    assert (
        f"time per output token {summary['tpot_ms']['base']:.2f} ms {summary['tpot_ms']['export']:.2f} ms" in printed
    )
    assert "times the base" not in printed
    assert "time per output token" not in table_of(summary_of([]), capsys)


def test_accuracies_before_that_are_a_checkpoints_are_called_so(capsys: pytest.CaptureFixture[str]) -> None:
    of_base = table_of(summary_of([], direct_accuracy=0.125), capsys)
    assert "held-out accuracy 25.0% 50.0%" in of_base
    assert "the base, asked for the answer alone 12.5%" in of_base
    of_checkpoint = table_of(summary_of([], direct_accuracy=0.125, begun_with="checkpoint-2"), capsys)
    assert "held-out accuracy (before: of checkpoint-2, not of the base) 25.0% 50.0%" in of_checkpoint
    assert "checkpoint-2, asked for the answer alone 12.5%" in of_checkpoint


def test_the_accuracies_are_in_the_summary_of_the_wandb_run(tmp_path: Path) -> None:
    import wandb

    from grpo_vlm.training.summary import note_in_wandb

    note_in_wandb(0.1, 0.2)  # no run is open
    run = wandb.init(mode="offline", dir=tmp_path, project="grpo")
    try:
        note_in_wandb(0.495, 0.92)
        assert run.summary["held_out_accuracy/before"] == 0.495
        assert run.summary["held_out_accuracy/after"] == 0.92
    finally:
        run.finish()


def test_the_cause_that_slows_a_step_down_most_stands_with_its_cure(capsys: pytest.CaptureFixture[str]) -> None:
    from tests.support.step_rows import explanation

    summary = summary_of([], steps=explanation())
    assert summary["step_floor_s"] == 1.5
    top = summary["step_causes"][0]
    assert top["cause"] == "attention-by-window"
    printed = table_of(summary, capsys)
    assert f"slowed down most by attention-by-window, {top['saving_s']:.2f} s of it" in printed
    assert "cure: PackedVisionCallback()" in printed
    assert "slowed down" not in table_of(summary_of([]), capsys)
