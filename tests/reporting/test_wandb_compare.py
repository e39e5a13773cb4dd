"""Two runs in W&B's table of runs: the same columns in config and summary, read back from offline files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.latency.rows.review import load_review
from grpo_toolkit.latency.rows.store import append_rows
from grpo_toolkit.reporting.report.folder_findings import write_findings
from grpo_toolkit.reporting.report.page import Pages
from grpo_toolkit.reporting.trackers.bounded_calls import Breaker, Budget
from grpo_toolkit.reporting.trackers.replay import offline_records
from grpo_toolkit.reporting.trackers.wandb_run import log_review
from tests.support.latency_rows import arms

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.latency.rows.row import LatencyRow


def logged(folder: Path, rows: list[LatencyRow], kind: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return config and summary of an offline run with these rows, as its file has them."""
    wandb = pytest.importorskip("wandb")
    append_rows(folder / "latency" / "latency.jsonl", rows)
    write_findings(
        folder / "latency",
        {
            "checkpoint": {"clean": False, "kind": kind, "facts": [], "findings": [{"severity": "slow"}]},
            "export": {"clean": True, "kind": "model", "facts": [], "findings": [{"severity": "note"}]},
        },
    )
    run = wandb.init(project="p", dir=str(folder), mode="offline")
    breaker = Breaker(Budget(600), call_s=300)
    log_review(run, load_review(folder), Pages(report=None, pictures={}), breaker, known=set(), known_in_table=set())
    run.finish()
    assert not breaker.problems
    (place,) = (folder / "wandb").glob("offline-run-*")
    records = offline_records(place)
    return _merged(records, "config"), _merged(records, "summary")


def _merged(records: list[dict[str, Any]], kind: str) -> dict[str, Any]:
    found = [record[kind] for record in records if record["type"] == kind]
    return {key: value for one in found for key, value in one.get("update", {}).items()}


def test_two_runs_have_the_columns_to_compare_them_by(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_DIR", raising=False)
    (config, summary), (other_config, other_summary) = (
        logged(tmp_path / kind, arms(session=kind), kind) for kind in ("adapter", "model")
    )
    assert config.keys() == other_config.keys()
    assert (config["grpo_toolkit/trained"], other_config["grpo_toolkit/trained"]) == ("adapter", "full")
    assert config["grpo_toolkit/hardware"] == "a processor"
    assert config["grpo_toolkit/workload"] == "48 new tokens after 256"
    wanted = {
        "latency/headline": "0.98\N{MULTIPLICATION SIGN}",
        "latency/verdict": "same",
        "latency/export/tpot_verdict": "same",
        "latency/export/ttft_verdict": "same",
        "latency/checkpoint/faults": 1,
        "latency/export/faults": 0,
    }
    for found in (summary, other_summary):
        assert {name: found[name] for name in wanted} == wanted
