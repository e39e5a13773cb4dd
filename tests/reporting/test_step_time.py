"""The places where a step's time is seen: terminal, page, comparison, trackers, all from `step_time.jsonl`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from grpo_toolkit.cli.main import main
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.rows.review import Review
from grpo_toolkit.reporting.charts.steps import draw_phases, draw_ranks, draw_spread, draw_step_waterfall, waterfall_of
from grpo_toolkit.reporting.charts.style import styled
from grpo_toolkit.reporting.report.page import write_report
from grpo_toolkit.reporting.report.step_section import compared_steps
from grpo_toolkit.reporting.trackers.bounded_calls import Breaker, Budget
from grpo_toolkit.reporting.trackers.replay import offline_records
from grpo_toolkit.reporting.trackers.step_time import StepMirror, replay_steps, step_scalars
from grpo_toolkit.step_time.store import StepReview, append_step_rows, file_of, load_step_review
from tests.support.latency_rows import arms
from tests.support.step_rows import step_row, write_run


def test_explain_prints_phases_causes_and_cures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path)
    assert main(["explain", "--steps", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert "Where a step's time goes: 11.0 s, mean of 4 to step 6" in shown
    for word in ("reading rows", "rollout", "decode", "vision attention launched window by window", "100 a layer"):
        assert word in shown
    assert "→ PackedVisionCallback()" in shown
    assert "what physics asks for: 1.500 s" in shown

    assert main(["explain", "--steps", str(tmp_path / "step_time.jsonl"), "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["top_cause"] == "attention-by-window"
    assert found["wall_s"] == pytest.approx(sum(found["phases_s"].values()))
    saved = sum(cause["saving_s"] for cause in found["causes"])
    assert found["wall_s"] == pytest.approx(found["floor_s"] + saved + found["unexplained_s"])


def test_explain_of_a_training_that_was_killed_early(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_step_rows(file_of(tmp_path), [step_row(1)])
    with file_of(tmp_path).open("a") as file:
        file.write('{"step": 2, "phases_')
    assert main(["explain", "--steps", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["steps"] == 1


def test_explain_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--steps", str(tmp_path)]) == 2
    assert "no step_time.jsonl there" in capsys.readouterr().err
    with pytest.raises(SystemExit) as refused:
        main(["explain"])
    assert refused.value.code == 2
    assert "--steps" in capsys.readouterr().err
    append_step_rows(file_of(tmp_path), [step_row(1, phases_s={})])
    file_of(tmp_path).write_text(file_of(tmp_path).read_text().replace('"schema_version": 1', '"schema_version": 9'))
    assert main(["explain", "--steps", str(tmp_path)]) == 2
    assert "schema_version is 9" in capsys.readouterr().err


def test_a_step_that_was_trained_again_counts_once(tmp_path: Path) -> None:
    write_run(tmp_path, steps=4)
    append_step_rows(file_of(tmp_path), [step_row(3, session="t", mfu=0.5), step_row(4, session="t", mfu=0.6)])
    review = load_step_review(tmp_path)
    assert [(row.step, row.mfu) for row in review.steps] == [(1, 0.04), (2, 0.04), (3, 0.5), (4, 0.6)]


def test_the_page_of_a_run_with_steps_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, ranks=3)
    assert main(["report", str(tmp_path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert set(facts["pictures"]) == {"step_phases", "step_waterfall", "step_spread", "step_ranks"}
    page = Path(facts["report"]).read_text()
    assert "<h1>Step time" in page
    for name in facts["pictures"]:
        assert f'<figure id="{name}">' in page
    assert "<td>rollout</td><td>4.000</td><td>36%</td>" in page
    assert "vision attention launched window by window" in page
    assert "processes wait for the slowest" in page


def test_the_report_of_a_run_with_latency_has_its_steps_too(tmp_path: Path) -> None:
    write_run(tmp_path)
    (tmp_path / "latency").mkdir()
    page = write_report(Review(path=tmp_path / "latency", rows=arms())).read_text()
    assert "<h1>Inference latency" in page
    assert "Where a training step" in page
    assert '<figure id="step_phases">' in page


def test_a_comparison_says_which_phase_got_slower(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path / "one")
    write_run(tmp_path / "two", phases_s={"rollout": 9.0, "forward": 1.0})
    assert main(["report", "--compare", str(tmp_path / "one"), str(tmp_path / "two")]) == 0
    page = Path(capsys.readouterr().out.strip()).read_text()
    assert "<th>one s</th><th>two s</th>" in page
    lines = compared_steps(load_step_review(tmp_path / "one"), load_step_review(tmp_path / "two"))
    assert [line["name"] for line in lines[:1]] == ["rollout"]
    assert lines[0]["difference"] == pytest.approx(5.0)
    assert lines[-2]["name"] == "forward"
    assert lines[-1]["ratio"] == pytest.approx(15 / 11)
    with pytest.raises(InputError, match="no step in it has phases"):
        compared_steps(StepReview(path=tmp_path), load_step_review(tmp_path / "two"))


def test_charts_draw_what_is_there(tmp_path: Path) -> None:
    write_run(tmp_path)
    review = load_step_review(tmp_path)
    bars = waterfall_of(review)
    assert bars[0] == ("step", pytest.approx(11.0))
    assert bars[-1] == ("floor", pytest.approx(1.5))
    assert bars[0][1] + sum(seconds for _, seconds in bars[1:-1]) == pytest.approx(bars[-1][1])
    with styled():
        figure = draw_phases(review)
        assert figure is not None
        tops = [max(bar.get_y() + bar.get_height() for bar in group) for group in figure.axes[0].containers]
        assert max(tops) == pytest.approx(11.0)
        assert draw_ranks(review) is None
        empty = StepReview(path=tmp_path)
        assert [draw(empty) for draw in (draw_phases, draw_step_waterfall, draw_spread, draw_ranks)] == [None] * 4


def arguments(folder: Path, *report_to: str) -> Any:
    return SimpleNamespace(report_to=list(report_to), logging_dir=str(folder / "runs"), output_dir=str(folder))


def _is_hidden(metric: dict[str, Any]) -> bool:
    return bool(metric.get("options", {}).get("hidden", False))


def test_wandb_gets_each_step_and_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    rows = write_run(tmp_path)
    run = wandb.init(project="p", dir=str(tmp_path), mode="offline")
    mirror = StepMirror()
    mirror.breakers = {
        name: Breaker(Budget(600), call_s=300) for name in mirror.breakers
    }  # a slow machine is no fault
    mirror.begin(tmp_path, "s")
    for row in rows:
        mirror.log(row)
    assert mirror.end(load_step_review(tmp_path), tmp_path / "charts", arguments(tmp_path, "wandb")) == []
    run.finish()
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    records = list(offline_records(folder))
    history = [r["history"]["item"] for r in records if r.get("type") == "history"]
    shown = [r["metric"]["name"] for r in records if r.get("type") == "metric" and not _is_hidden(r["metric"])]
    assert {name for name in shown if name.startswith("step_time/")} == {"step_time/step_s"}
    logged = [item for item in history if "step_time/rollout_s" in item]
    assert [item["train/global_step"] for item in logged] == [1, 2, 3, 4, 5, 6]
    for item, row in zip(logged, rows, strict=True):
        assert {name: item[name] for name in step_scalars(row)} == step_scalars(row)
    keys = {key.partition("._")[0].partition(".")[0] for item in history for key in item}
    assert {"step_time/causes", "step_time/charts/step_phases", "step_time/charts/step_waterfall"} <= keys
    assert not any("." in key for row in rows for key in step_scalars(row))

    append_step_rows(file_of(tmp_path), [step_row(7)])  # after an outage
    assert json.loads((tmp_path / "trackers.json").read_text())["wandb"][0]["sessions"] == ["s"]
    monkeypatch.setenv("WANDB_MODE", "offline")
    first, again = (replay_steps(load_step_review(tmp_path), "wandb") for _ in range(2))
    assert (first[0].run, first[0].logged) == (run.id, 7)
    assert (again[0].logged, again[0].there) == (0, 7)


def test_trackio_gets_what_it_does_not_have(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("trackio", reason="an extra")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    write_run(tmp_path)
    # In a process of its own: Trackio reads its folder's name when it is imported.
    code = (
        "import sys, json; from pathlib import Path\n"
        "from grpo_toolkit.reporting.trackers.step_time import replay_steps\n"
        "from grpo_toolkit.step_time.store import load_step_review\n"
        "counts = [replay_steps(load_step_review(Path(sys.argv[1])), 'trackio')[0].logged for _ in range(2)]\n"
        "from trackio.sqlite_storage import SQLiteStorage\n"
        "(run,) = SQLiteStorage.get_runs('huggingface')\n"
        "lines = SQLiteStorage.get_logs('huggingface', run)\n"
        "print(json.dumps([counts, [l['train/global_step'] for l in lines if 'step_time/rollout_s' in l]]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, env=os.environ
    )
    assert json.loads(done.stdout.splitlines()[-1]) == [[6, 0], [1, 2, 3, 4, 5, 6]]


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    rows = write_run(tmp_path)
    with SummaryWriter(log_dir=str(tmp_path / "runs")) as writer:
        writer.add_scalar("train/loss", 1.0, 1)
    mirror = StepMirror()
    mirror.begin(tmp_path, "s")
    assert mirror.end(load_step_review(tmp_path), tmp_path / "charts", arguments(tmp_path, "tensorboard")) == []
    events = EventAccumulator(str(tmp_path / "runs"))
    events.Reload()
    found = events.Scalars("step_time/backward_s")
    assert [(point.step, point.value) for point in found] == [(row.step, row.phases_s["backward"]) for row in rows]
    assert {"step_time/floor_s", "step_time/mfu", "step_time/step_s"} <= set(events.Tags()["scalars"])
