"""The base that a checkpoint names, and folders given twice or in the wrong order."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.checkpoint.folders.lineage import BASE_RECORD, order_notice, record_base, recorded_base
from grpo_toolkit.cli import main
from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.doctor.findings import Diagnosis

if TYPE_CHECKING:
    from pathlib import Path


def model(folder: Path, **files: dict[str, str]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_record_leads_to_the_base(tmp_path: Path) -> None:
    base, trained = model(tmp_path / "base"), model(tmp_path / "trained")
    assert recorded_base(trained) is None
    record_base(trained, str(base))
    assert recorded_base(trained) == base
    record_base(trained, str(tmp_path / "gone"))
    assert recorded_base(trained) is None
    record_base(trained, str(trained))  # a resume from itself
    assert recorded_base(trained) is None


WANDB_CONFIG = """_name_or_path:
    value: {name}
learning_rate:
    desc: null
    value: 0.001
"""


def wandb_run(run: Path, number: int, name: str) -> None:
    files = run / "wandb" / f"run-20260101_00000{number}-abc" / "files"
    files.mkdir(parents=True)
    (files / "config.yaml").write_text(WANDB_CONFIG.format(name=name))


def test_a_runs_own_records_lead_to_the_base_of_its_checkpoints(tmp_path: Path) -> None:
    bases = [model(tmp_path / name) for name in ("one", "other")]
    run = tmp_path / "run"
    run.mkdir()
    checkpoint = model(run / "checkpoint-2")
    assert recorded_base(checkpoint) is None
    wandb_run(run, 1, f"'{bases[0]}'")
    assert recorded_base(checkpoint) == recorded_base(run) == bases[0]
    wandb_run(run, 2, str(bases[1]))  # two trainings in one folder: nobody knows whose the checkpoint is
    assert recorded_base(checkpoint) is None
    (run / "grpo_recipe.json").write_text(json.dumps({"model": {"model_name_or_path": str(bases[1])}}))
    assert recorded_base(checkpoint) == bases[1]
    record_base(checkpoint, str(bases[0]))  # the checkpoint's own word goes first
    assert recorded_base(checkpoint) == bases[0]


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "tiny"}', '{"model": {"model_name_or_path": 3}}'])
def test_a_strangers_run_record_is_none(text: str, tmp_path: Path) -> None:
    trained = model(tmp_path / "trained")
    (tmp_path / "grpo_recipe.json").write_text(text)
    (tmp_path / "wandb" / "run-1" / "files").mkdir(parents=True)
    (tmp_path / "wandb" / "run-1" / "files" / "config.yaml").write_bytes(b"_name_or_path:\n    value: \xff\n")
    assert recorded_base(trained) is None


def test_the_doctor_compares_with_the_base_of_the_run(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    (tmp_path / "run").mkdir()
    checkpoint = model(tmp_path / "run" / "checkpoint-2")
    wandb_run(tmp_path / "run", 1, str(base))
    found = diagnose_checkpoint(checkpoint)
    assert isinstance(found, Diagnosis)
    assert found.base == base


@pytest.mark.parametrize("text", ["{", "[]", '{"base": 3}', '{"base": "../../etc"}', '{"base": "a\\u0000b"}'])
def test_a_strangers_record_is_none(text: str, tmp_path: Path) -> None:
    trained = model(tmp_path / "trained")
    (trained / BASE_RECORD).write_text(text)
    assert recorded_base(trained) is None


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are of POSIX")
def test_a_pipe_among_the_records_of_a_run_is_not_waited_for(tmp_path: Path) -> None:
    trained = model(tmp_path / "trained")
    (tmp_path / "wandb" / "run-1" / "files").mkdir(parents=True)
    os.mkfifo(tmp_path / "wandb" / "run-1" / "files" / "config.yaml")
    assert recorded_base(trained) is None


def test_the_base_in_an_exports_manifest_is_looked_for_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export = model(tmp_path / "export", grpo_toolkit={"base": "maker/model"})
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    main(["doctor", str(export)])
    assert "the base that is named here, maker/model, is not on this machine" in capsys.readouterr().out
    snapshot = tmp_path / "hub" / "models--maker--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "llama"}')
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    found = diagnose_checkpoint(export)
    assert isinstance(found, Diagnosis)
    assert (found.base, found.base_name) == (snapshot, "")
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "local")
    (export / "grpo_toolkit.json").write_text('{"base": "local"}')  # a folder's own name, wherever it lay
    found = diagnose_checkpoint(export)
    assert isinstance(found, Diagnosis)
    assert (found.base, found.base_name) == (None, "local")


def test_one_folder_twice_is_noticed(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    assert order_notice(base, tmp_path / "link") == (
        f"{base} is given twice: every difference below is this machine's noise"
    )


def test_a_base_and_its_model_in_the_wrong_order_are_noticed(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    recorded = model(tmp_path / "checkpoint-2")
    record_base(recorded, str(base))
    adapter = model(tmp_path / "adapter", adapter_config={"base_model_name_or_path": str(base)})
    export = model(tmp_path / "export", grpo_toolkit={"base": "base"})
    for trained in (recorded, adapter, export):
        assert order_notice(base, trained) is None
        notice = order_notice(trained, base)
        assert notice is not None
        assert f"{trained} was trained from {base}" in notice
    assert order_notice(export, recorded) is None  # two that were trained from one base
    assert order_notice("http://here:8000/v1", base) is None
