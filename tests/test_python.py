"""Python's side of what the command line does: what functions take, and how results look at a prompt."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest

import grpo_toolkit
from grpo_toolkit import (
    InputError,
    Request,
    RunDiagnosis,
    compare_latency,
    diagnose_checkpoint,
    measure_latency,
    repair_checkpoint,
    write_report,
)
from grpo_toolkit.checkpoint.short_repr import HtmlTable
from grpo_toolkit.export.verify import Check, VerificationResult
from grpo_toolkit.latency.bench.compare import Comparison
from grpo_toolkit.latency.rows.store import append_rows
from grpo_toolkit.model.generation.request_forms import requests_of
from tests.support.latency_rows import arms, explanations, row

if TYPE_CHECKING:
    from pathlib import Path

TEXT = [{"role": "user", "content": "What is it?"}]


@pytest.mark.parametrize(
    "given",
    [
        "What is it?",
        ["What is it?"],
        TEXT,
        [{"prompt": TEXT}],
        {"prompt": TEXT},
        [{"prompt": "What is it?", "answer": "no"}],
        Request(messages=TEXT),
        (Request(messages=TEXT),),
    ],
    ids=["a text", "texts", "messages", "rows", "a row", "a row with a text", "a request", "requests"],
)
def test_requests_may_have_the_form_that_one_has(given: Any) -> None:
    assert [request.messages for request in requests_of(given)] == [TEXT]


@pytest.mark.parametrize("form", [str, lambda path: path], ids=["text", "path"])
def test_requests_may_be_a_file(form: Any, tmp_path: Path) -> None:
    from PIL import Image

    Image.new("L", (30, 20)).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "What is it?", "image": "a.png"}) + "\n")
    (found,) = requests_of(form(tmp_path / "rows.jsonl"))
    assert (found.messages, found.images[0].size) == (TEXT, (30, 20))
    with pytest.raises(InputError, match=r"gone\.jsonl: cannot be read"):
        requests_of(form(tmp_path / "gone.jsonl"))


@pytest.mark.parametrize("given", [3, [], [3], [{"question": "a"}], {"question": "a"}])
def test_what_asks_for_nothing_is_refused(given: Any) -> None:
    with pytest.raises(InputError, match="expected a text, a file of JSON lines"):
        requests_of(given)


def test_two_folders_are_compared_with_the_command_lines_defaults(qwen: Path) -> None:
    found = compare_latency(qwen, qwen, device="cpu", new_tokens=2, rounds=1, warmup=1, control=False)
    assert [row.arm for row in found.rows] == ["base", "export"]
    assert all(row.settings.device == "cpu" for row in found.rows)
    work = found.rows[0].workload
    assert (work.prompt_tokens, work.image_tokens) == (512, 256)
    assert found.ratio("export").low is None
    with pytest.raises(InputError, match="takes two folders"):
        compare_latency(qwen)


def test_one_folder_is_measured_on_a_question(qwen: Path) -> None:
    (found,) = measure_latency({"mine": qwen}, "What is it?", new_tokens=2, rounds=1, warmup=1)
    assert (found.arm, found.workload.image_tokens or 0) == ("mine", 0)
    assert found.workload.prompt_tokens < 200


def test_a_runs_folder_is_diagnosed_as_on_the_command_line(qwen: Path, tmp_path: Path) -> None:
    for step in (2, 10):
        shutil.copytree(qwen, tmp_path / f"checkpoint-{step}")
    (tmp_path / "checkpoint-12").mkdir()
    generation = tmp_path / "checkpoint-10" / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"use_cache": False}))
    found = diagnose_checkpoint(tmp_path)
    assert isinstance(found, RunDiagnosis)
    assert [diagnosis.path.name for diagnosis in found.diagnoses] == ["checkpoint-2", "checkpoint-10"]
    assert not found.is_clean
    assert [finding["checkpoint"] for finding in found.to_json()["findings"]] == ["checkpoint-10"]
    assert "<td>checkpoint-10</td><td>slow</td><td>generation-cache-off</td>" in found._repr_html_()
    assert len(found.empty) == 1


def test_a_repair_is_a_line_and_a_table(qwen: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(qwen, tmp_path / "x")
    generation = folder / "generation_config.json"
    generation.write_text(json.dumps(json.loads(generation.read_text()) | {"use_cache": False}))
    result = repair_checkpoint(folder, dry_run=True)
    assert repr(result).startswith("RepairResult(plan=RepairPlan(path='")
    assert len(repr(result)) < 400
    assert "<td>generation-cache-off</td><td>generation_config.json</td>" in result._repr_html_()


def test_results_are_one_short_line_at_a_prompt() -> None:
    rows = arms()
    results = [*rows, *explanations(), Comparison(rows=tuple(rows)), rows[0].timelines[0]]
    for result in results:
        assert len(repr(result)) < 1500
        assert "\n" not in repr(result)
    assert repr(Comparison(rows=tuple(rows))) == "Comparison(rows=<4 items>)"


def test_tables_are_escaped_and_may_be_empty() -> None:
    checks = (Check(name="<b>", passed=False, detail="a & b"),)
    assert "<td>&lt;b&gt;</td><td>FAILED</td><td>a &amp; b</td>" in VerificationResult(checks=checks)._repr_html_()
    assert VerificationResult(checks=())._repr_html_().endswith("<p>nothing</p>")
    compared = Comparison(rows=(row("base"), row("export")))._repr_html_()
    assert "<td>export</td>" in compared
    assert "0.980 (0.960 to 1.010): same" in compared


def test_every_result_that_is_public_and_a_table_has_rows() -> None:
    tables = [getattr(grpo_toolkit, name) for name in grpo_toolkit.__all__]
    tables = [table for table in tables if isinstance(table, type) and issubclass(table, HtmlTable)]
    assert len(tables) >= 5
    assert all(table.table_rows is not HtmlTable.table_rows for table in tables)


def test_a_report_is_written_of_a_folder(tmp_path: Path) -> None:
    append_rows(tmp_path / "latency" / "latency.jsonl", [row("base"), row("export")])
    assert write_report(tmp_path) == tmp_path / "latency" / "report.html"
    assert write_report(str(tmp_path), tmp_path / "page.html") == tmp_path / "page.html"
    append_rows(tmp_path / "other" / "latency.jsonl", [row("base")])
    with pytest.raises(InputError, match="no arm named export was measured"):
        write_report(tmp_path / "other", results={"held-out accuracy": (0.1, 0.2)})
