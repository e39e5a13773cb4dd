"""The lines that callbacks print at the end of a training: few lines, aligned, in 80 columns."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.generation_defaults import Repair
from grpo_toolkit.export.export_result import ExportResult
from grpo_toolkit.export.verify import Check, VerificationResult
from grpo_toolkit.latency.rows.review import Review
from grpo_toolkit.latency.rows.row import Ratio
from grpo_toolkit.reporting.report.screen_lines import export_lines, latency_lines, verdict_lines
from grpo_toolkit.reporting.terminal.console import say, wandb_hint
from grpo_toolkit.reporting.terminal.step_time import step_lines
from grpo_toolkit.reporting.terminal.tables import export_table
from grpo_toolkit.step_time.explain import NO_CURE
from grpo_toolkit.step_time.store import load_step_review
from tests.support.latency_rows import arms, natural, row
from tests.support.step_rows import write_run

if TYPE_CHECKING:
    import pytest

TIMES = "\N{MULTIPLICATION SIGN}"
LONGER = Ratio(against="base", metric="e2e_s", median=1.6, low=1.5, high=1.7, pairs=12, verdict="slower")


def test_latency_is_a_table_of_80_columns() -> None:
    slower = Ratio(against="base", median=1.8, low=1.7, high=1.9, pairs=12, verdict="slower")
    unsure = Ratio(against="base", median=1.8, low=None, high=None, pairs=3, verdict="cannot tell")
    rows = [row("base"), row("checkpoint", ratios=[slower]), row("export"), row("export_no_cache", ratios=[unsure])]
    lines = latency_lines([*rows, *natural()])
    assert lines == [
        "latency, ms             TTFT    TPOT      E2E  TPOT over base's",
        "  base                 119.7   20.00     1060",
        "  plain checkpoint     119.7   36.00     1812  1.70 to 1.90  slower",
        "  export               119.7   19.60     1041  0.96 to 1.01  same",
        "  export, cache off    119.7   70.00     3409  no interval (3 rounds)",
        *lines[5:],
    ]
    assert len(lines) <= 8
    assert max(map(len, lines)) <= 80


def test_natural_answers_are_a_line_only_where_they_are_no_tie() -> None:
    base, export = natural()
    told = {
        verdict: latency_lines([base, replace(export, ratios=[replace(LONGER, verdict=verdict)])])
        for verdict in ("slower", "faster", "same", "cannot tell")
    }
    starts = {verdict: [line for line in lines if line.startswith("natural")] for verdict, lines in told.items()}
    took = f"a whole answer {export.e2e_s.median * 1e3:.0f} ms" if export.e2e_s else "-"
    assert starts == {
        "slower": [f"natural     {took}; over base's 1.50 to 1.70  slower"],
        "faster": [f"natural     {took}; over base's 1.50 to 1.70  faster"],
        "same": [],
        "cannot tell": [],
    }


def test_a_run_out_of_memory_is_a_line() -> None:
    failed = row("export", error="out of memory", ratios=[], ttft_s=None, tpot_s=None, e2e_s=None)
    assert latency_lines([row("base"), failed])[-1] == "  export              out of memory"


def test_the_verdict_and_the_faults_are_a_line_each(tmp_path: Path) -> None:
    found = {"severity": "slow"}, {"severity": "note"}
    findings = {"base": {"findings": []}, "checkpoint": {"findings": [*found]}, "export": {"findings": [found[1]]}}
    assert verdict_lines(Review(path=tmp_path, rows=arms()), findings) == [
        f"speed       0.98{TIMES} the base's time per token, the same within 3%",
        "faults      1 in a plain save, 0 in the export",
    ]
    unsure = Ratio(against="base", median=0.79, low=0.71, high=1.33, pairs=12, verdict="cannot tell")
    rows = [row("base"), row("export", ratios=[unsure])]
    assert verdict_lines(Review(path=tmp_path, rows=rows), {}) == [
        f"speed       0.71 to 1.33{TIMES} the base's time per token: cannot tell"
    ]
    rows = [row("base"), row("export", ratios=[])]
    assert verdict_lines(Review(path=tmp_path, rows=rows), {}) == ["speed       no interval"]


def test_an_export_is_a_line_or_two(tmp_path: Path) -> None:
    checks = (Check(name="a", passed=True, detail=""), Check(name="b", passed=True, detail="", skipped=True))
    result = ExportResult(
        path=Path("runs/tiny/export"), base=Path("base"), changes=(), made_portable=(), sources={"base": "NONE: x"},
        repairs=(Repair(file="config.json", key="use_cache", found=False, written=True),), bytes=500_000, seconds=6.5,
        verification=VerificationResult(checks=checks),
    )  # fmt: skip
    assert export_lines(result) == [
        "export      runs/tiny/export (0.50 MB in 6.5 s; 1 checks passed, 1 skipped)",
        "put right   1 value of the base, in config.json",
    ]
    assert export_lines(replace(result, verification=None, repairs=())) == [
        "export      runs/tiny/export (0.50 MB in 6.5 s; NOT verified)"
    ]


def test_a_base_that_was_not_named_is_not_called_clean(capsys: pytest.CaptureFixture[str]) -> None:
    result = ExportResult(
        path=Path("out"), base=Path("base"), changes=(), made_portable=(), sources={"source": "a", "base": "b"},
        repairs=(), bytes=1, seconds=1.0, verification=None,
    )  # fmt: skip
    say(export_table(result))
    assert "nothing: the base was clean" in capsys.readouterr().err
    say(export_table(replace(result, base=None)))
    said = capsys.readouterr().err
    assert "nothing" in said
    assert "clean" not in said


def test_a_steps_explanation_is_a_few_lines(tmp_path: Path) -> None:
    write_run(tmp_path)
    lines = step_lines(load_step_review(tmp_path).explanations[-1])
    assert lines[0].startswith("step time   11.0 s at step 6: ")
    cause = next(index for index, line in enumerate(lines) if "launched window by window" in line)
    assert " s of it: vision attention launched window by window" in lines[cause]
    assert lines[cause + 1] == "            -> PackedVisionCallback()"
    assert 1 < len(lines) <= 7
    assert all(line.startswith(" " * 12) for line in lines[1:])
    assert max(map(len, lines)) <= 80


def test_what_cannot_be_cured_here_is_not_among_the_lines(tmp_path: Path) -> None:
    write_run(tmp_path)
    row = load_step_review(tmp_path).explanations[-1]
    left = [replace(cause, cure=f"{NO_CURE}: it is in place", line="") for cause in row.causes]
    assert len(step_lines(replace(row, causes=left))) == 1


def test_lines_of_callbacks_do_not_stick_to_the_trainers_bar(capsys: pytest.CaptureFixture[str]) -> None:
    """The trainer's bar leaves the cursor behind it: what is printed then begins in the middle of a line."""
    from tqdm.auto import tqdm

    with tqdm(total=3, file=sys.stderr) as bar:
        bar.update(1)
        bar.refresh()
        say("step time   1.0 s")
    shown = [line.rpartition("\r")[2] for line in capsys.readouterr().err.split("\n")]
    assert "step time   1.0 s" in shown


def test_where_a_wandb_run_lies_can_be_pasted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my run" / "wandb" / "offline-run-1"
    folder.mkdir(parents=True)
    offline = {"mode": "offline", "folder": str(folder)}
    assert wandb_hint(offline) == "W&B         send: wandb sync 'my run/wandb/offline-run-1'"
    assert wandb_hint(offline | {"folder": "/else/where"}) == "W&B         send: wandb sync /else/where"
    online = {"mode": "online", "folder": "/else/where", "url": "https://a.b/run"}
    assert wandb_hint(online) == "W&B         https://a.b/run"
    assert wandb_hint(online | {"url": None}) == "W&B         look: wandb leet /else/where"
