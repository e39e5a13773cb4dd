"""The section in an export's README.md: from manifest and rows, around it what was there before."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.checkpoint.manifest import compare_manifest
from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.latency.rows.review import Review
from grpo_toolkit.latency.rows.store import append_rows
from grpo_toolkit.reporting.report.model_card import Training, hub_name, write_model_card
from tests.support.latency_rows import row

if TYPE_CHECKING:
    from pathlib import Path

TRL_CARD = """---
base_model: Qwen/Qwen2.5-VL-3B-Instruct
library_name: transformers
model_name: out
tags:
- generated_from_trainer
- trl
licence: license
---

# Model Card for out

This model is a fine-tuned version of [Qwen/Qwen2.5-VL-3B-Instruct](https://huggingface.co/Qwen).
"""


@pytest.fixture(scope="module")
def exported(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = export_model(qwen, tmp_path_factory.mktemp("card") / "export", base=qwen)
    assert result is not None
    return result.path


@pytest.fixture
def review(exported: Path, tmp_path: Path) -> Review:
    rows = [row("base"), row("export", path=str(exported))]
    append_rows(tmp_path / "latency" / "latency.jsonl", rows)
    return Review(path=tmp_path / "latency", rows=rows)


def metadata(card: Path) -> dict[str, Any]:
    from huggingface_hub import ModelCard

    return dict(ModelCard.load(card).data.to_dict())


def test_the_section_says_what_was_verified_measured_and_how_to_load_it(exported: Path, review: Review) -> None:
    training = Training.of(10, [{"reward": 0.25}, {"loss": 1.0}, {"reward": 0.75}])
    text = write_model_card(exported, review, training=training).read_text()
    assert "| steps | | 10 |" in text
    assert "| reward | 0.25 | 0.75 |" in text
    assert "from a model that was trained from `qwen2_5_vl`" in text
    assert "| loads whole | ok | 102,176 parameters in float32" in text
    assert "Export 19.6 ms per token, base 20.0 ms. 95% interval 0.96 to 1.01 over 12 rounds" in text
    assert str(exported.parent) not in text
    assert "| base | 119.7 | 20.00 |" in text
    assert "48 new tokens after 256, batch 1, medians of 12 rounds in turns, a processor" in text
    assert "](latency.png)" in text
    assert (exported / "latency.png").is_file()
    assert "AutoModelForImageTextToText.from_pretrained(path" in text
    assert "vllm serve ." in text
    found = metadata(exported / "README.md")
    assert found == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["grpo", "trl"],
    }  # fmt: skip


def test_the_manifest_stays_true(exported: Path, review: Review) -> None:
    write_model_card(exported, review)
    checked, differing = compare_manifest(exported)
    assert differing == {}
    assert checked == len([path for path in exported.iterdir() if path.name != "grpo_toolkit.json"])


def test_what_was_written_around_it_stays(exported: Path, review: Review, tmp_path: Path) -> None:
    (exported / "README.md").unlink(missing_ok=True)
    (tmp_path / "README.md").write_text(TRL_CARD)
    card = write_model_card(exported, review, around=tmp_path / "README.md")
    first = card.read_text()
    body = TRL_CARD.partition("---\n\n")[2]
    assert body in first
    card.write_text(first + "\nMine, after it.\n")
    write_model_card(exported, review, base="/cache/models--org--other/snapshots/abc")
    second = card.read_text()
    assert second.count("## Inference") == 1
    assert body in second
    assert second.endswith("\nMine, after it.\n")
    found = metadata(card)
    assert found["base_model"] == "Qwen/Qwen2.5-VL-3B-Instruct"
    assert found["tags"] == ["generated_from_trainer", "trl", "grpo"]
    assert found["licence"] == "license"


def test_writing_it_twice_changes_nothing(exported: Path, review: Review) -> None:
    first = write_model_card(exported, review).read_text()
    assert write_model_card(exported, review).read_text() == first


def test_rows_of_another_folder_are_not_this_exports(exported: Path, tmp_path: Path) -> None:
    (exported / "README.md").unlink(missing_ok=True)
    other = Review(path=tmp_path, rows=[row("base"), row("export", path="/somewhere/else")])
    assert "### Latency" not in write_model_card(exported, other).read_text()


def test_a_value_of_a_stranger_breaks_no_table(exported: Path, tmp_path: Path) -> None:
    path = exported / "grpo_toolkit.json"
    before = path.read_text()
    manifest = json.loads(before)
    manifest["put_right"] = [{"file": "a|b", "key": "<img src=x>", "found": "x\ny", "written": None}]
    path.write_text(json.dumps(manifest))
    try:
        text = write_model_card(exported).read_text()
    finally:
        path.write_text(before)
    assert "| a\\|b | &lt;img src=x> | x y | None |" in text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("/h/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/66285546d2", "Qwen/Qwen2.5-VL-3B-Instruct"),
        ("/data/Qwen2.5-VL-3B-Instruct", None),
        (None, None),
    ],
)
def test_a_base_in_the_cache_has_a_hub_name(path: str | None, name: str | None) -> None:
    assert hub_name(path) == name


def test_metadata_that_is_no_yaml_is_one_error(exported: Path) -> None:
    (exported / "README.md").write_text("---\na: [\n---\n\ntext\n")
    with pytest.raises(InputError, match=r"README\.md: its metadata cannot be read"):
        write_model_card(exported)
    (exported / "README.md").unlink()


def test_the_command_writes_it(exported: Path, review: Review, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(review.path), "--card", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["card"] == str(exported / "README.md")


def test_a_folder_that_is_no_export_gets_none(qwen: Path) -> None:
    with pytest.raises(InputError, match="so it is not an export of this package"):
        write_model_card(qwen)
    assert not (qwen / "README.md").exists()
