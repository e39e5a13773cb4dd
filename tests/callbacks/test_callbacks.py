"""The callbacks on real trainings: training is not changed by a bit, failures are logged and survived."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit import ExportCallback, KVCacheCallback, LatencyCallback
from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.errors import OutputExistsError, VerificationError
from grpo_toolkit.latency.rows.store import read_measurements
from grpo_toolkit.reporting.terminal.console import say
from tests.support.training import LANGUAGE_Q, LANGUAGE_QV, grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path


def all_callbacks(folder: Path) -> list[Any]:
    return [
        KVCacheCallback(strict=True),
        ExportCallback(folder / "export", num_prompts=2, strict=True),
        LatencyCallback(rounds=1, new_tokens=4, max_new_tokens=6, batch_sizes=(), strict=True),
    ]


@pytest.mark.parametrize("peft", [False, True])
def test_training_is_bit_identical_with_and_without_callbacks(qwen: Path, tmp_path: Path, peft: bool) -> None:
    from peft import LoraConfig

    options: dict[str, Any] = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    logs, weights = {}, {}
    # TRL 1.0's first PEFT training in a process differs from its second, with or without us: so one to warm up.
    for name in ("first", "with", "without"):
        config = LoraConfig(r=4, lora_dropout=0.1, target_modules=LANGUAGE_QV) if peft else None
        callbacks = all_callbacks(tmp_path) if name == "with" else []
        trainer = grpo_trainer(qwen, tmp_path / name, callbacks, peft_config=config, **options)
        trainer.train()
        keys = ("loss", "grad_norm", "reward", "entropy")
        logs[name] = [{key: row[key] for key in keys} for row in trainer.state.log_history if "grad_norm" in row]
        weights[name] = trainer.model.state_dict()
    assert len(logs["with"]) == 3
    assert any(row["grad_norm"] > 0 for row in logs["with"])
    assert logs["with"] == logs["without"]
    assert all(torch.equal(weights["with"][key], weights["without"][key]) for key in weights["without"])


def test_three_callbacks_leave_a_verified_export_and_its_latency(any_base: Path, tmp_path: Path) -> None:
    callbacks = all_callbacks(tmp_path)
    trainer = grpo_trainer(any_base, tmp_path / "out", callbacks, with_images="llama" not in any_base.name)
    trainer.train()
    result = callbacks[1].result
    assert result.verification.passed
    assert open_checkpoint(tmp_path / "export").tensors()
    rows = read_measurements(tmp_path / "out" / "latency" / "latency.jsonl")
    arms = ["base", "checkpoint", "export"]
    assert [row.arm for row in rows] == [*arms, "export_no_cache", *arms]
    assert [row.proof.is_cached for row in rows[:4]] == [True, True, True, False]
    assert [row.workload.kind for row in rows] == ["fixed"] * 4 + ["natural"] * 3
    assert all(timeline.output_tokens <= 6 for row in rows[4:] for timeline in row.timelines)
    assert {row.step for row in rows} == {2}
    assert {row.schema_version for row in rows} == {2}
    assert sorted(path.name for path in (tmp_path / "out" / "latency").iterdir()) == [
        "findings.json", "latency.jsonl", "pictures", "report.html",
    ]  # fmt: skip


def test_a_plain_checkpoint_of_lora_is_timed_as_it_is_an_unmerged_adapter(qwen: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    latency = LatencyCallback(arms=["checkpoint"], rounds=1, new_tokens=4, max_new_tokens=None, strict=True)
    config = LoraConfig(r=4, target_modules=LANGUAGE_Q)
    trainer = grpo_trainer(qwen, tmp_path, [latency], peft_config=config)
    trainer.train()
    assert [row.arm for row in latency.rows] == ["checkpoint"]
    assert latency.rows[0].proof.is_cached


def test_a_failing_export_is_said_once_and_training_goes_on(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def disk_full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo_toolkit.export.export.write_report", disk_full)
    callback = ExportCallback(tmp_path / "export")
    trainer = grpo_trainer(qwen, tmp_path / "out", [callback])
    trainer.train()
    assert trainer.state.global_step == 2
    said = f"the export failed: OSError: [Errno 28] No space left on device: '{tmp_path / 'export'}'"
    assert callback.failures == [said]
    assert sum("No space left" in record.getMessage() for record in caplog.records) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_strict_turns_a_broken_promise_into_an_error_at_the_end(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failed(*args: object, **kwargs: object) -> None:
        raise VerificationError("tokens differ")

    monkeypatch.setattr("grpo_toolkit.export.export._verify", failed)
    trainer = grpo_trainer(qwen, tmp_path / "out", [ExportCallback(tmp_path / "export", strict=True)])
    with pytest.raises(VerificationError, match="tokens differ"):
        trainer.train()
    assert trainer.state.global_step == 2


def test_a_wrong_output_folder_is_refused_when_the_callback_is_made(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("1")
    with pytest.raises(OutputExistsError, match="not an export of ours"):
        ExportCallback(tmp_path)


def test_the_policy_between_steps_changes_no_bit_of_the_training(qwen: Path, tmp_path: Path) -> None:
    weights = {}
    for name in ("with", "without"):
        latency = LatencyCallback(arms=[], every_steps=1, new_tokens=4, strict=True)
        trainer = grpo_trainer(qwen, tmp_path / name, [latency] if name == "with" else [])
        trainer.train()
        weights[name] = trainer.model.state_dict()
        if name == "with":
            assert [(row.arm, row.step, row.rounds, row.path) for row in latency.live_rows] == [
                ("live", 1, 2, "live"),
                ("live", 2, 2, "live"),
            ]
            assert all(row.proof.is_cached for row in latency.live_rows)
            assert trainer.model.training
    assert all(torch.equal(weights["with"][key], weights["without"][key]) for key in weights["without"])


def test_a_step_count_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="every_steps is 0"):
        LatencyCallback(every_steps=0)


def test_unknown_arms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"unknown arms \['exports'\]"):
        LatencyCallback(arms=["exports"])


def test_latency_without_an_export_measures_what_there_is(
    qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    latency = LatencyCallback(rounds=1, new_tokens=2, max_new_tokens=None, strict=True)
    grpo_trainer(qwen, tmp_path, [latency]).train()
    assert [row.arm for row in latency.rows] == ["base", "checkpoint"]
    assert any("nothing to measure for export, export_no_cache" in record.getMessage() for record in caplog.records)


def test_a_second_training_does_not_time_the_first_ones_export(qwen: Path, tmp_path: Path) -> None:
    exporting = ExportCallback(tmp_path / "export")
    timing = LatencyCallback(rounds=1, new_tokens=2, max_new_tokens=None, batch_sizes=())
    trainer = grpo_trainer(qwen, tmp_path / "out", [exporting, timing], max_steps=1)
    trainer.train()
    assert [row.arm for row in timing.rows][-1] == "export_no_cache"
    trainer.train()  # the folder is there now, and replacing it was not asked for
    assert exporting.result is None
    assert len(exporting.failures) == 1
    assert [row.arm for row in timing.rows] == ["base", "checkpoint"]


def test_a_resumed_run_still_saves_clean_files(qwen: Path, tmp_path: Path) -> None:
    grpo_trainer(qwen, tmp_path, [KVCacheCallback()], save_strategy="steps", save_steps=1, max_steps=1).train()
    trainer = grpo_trainer(qwen, tmp_path, [KVCacheCallback(strict=True)], save_strategy="steps", save_steps=1)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    config = open_checkpoint(tmp_path / "checkpoint-2").json("config.json")
    assert isinstance(config, dict)
    assert "use_cache" not in config


def test_what_is_said_is_said_line_by_line(capsys: pytest.CaptureFixture[str]) -> None:
    say("export / base, TPOT: 1.000", "export / base, TTFT: 1.000", "/a/path/of[brackets]")
    assert capsys.readouterr().err.splitlines() == [
        "export / base, TPOT: 1.000",
        "export / base, TTFT: 1.000",
        "/a/path/of[brackets]",
    ]
