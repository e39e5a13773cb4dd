"""An export's page: what it says, that its quick start runs, and that what was written around it stays."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from grpo_toolkit.checkpoint.folders.base_lookup import is_hub_name, public_name
from grpo_toolkit.checkpoint.manifest import compare_manifest
from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.latency.rows.review import Review
from grpo_toolkit.latency.rows.store import append_rows
from grpo_toolkit.reporting.report.card_facts import (
    CardFacts,
    Training,
    kept_facts,
    system_prompt_of,
    tags_of_folder,
    tags_of_training,
)
from grpo_toolkit.reporting.report.folder_findings import diagnose_arms, write_findings
from grpo_toolkit.reporting.report.model_card import write_model_card
from tests.support.latency_rows import row
from tests.support.models import BUILDERS

FACTS = CardFacts(
    training=Training(steps=10, values={"reward": (0.25, 0.75)}, settings={"learning_rate": 1e-6, "beta": 0.0}),
    results={"held-out accuracy": (0.495, 0.92)},
    system_prompt='Think "first".',
    tags=("trl", "grpo"),
)


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


def run_quick_start(folder: Path) -> str:
    """Run the page's first block of Python as a reader would: pasted into a file, started in the folder."""
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [sys.executable, "-c", code[1]], cwd=folder, capture_output=True, text=True, check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "deprecated" not in done.stderr
    return done.stdout


@pytest.mark.stack
def test_the_quick_start_runs_as_it_stands_with_a_picture(exported: Path) -> None:
    facts = replace(FACTS, training=replace(FACTS.training, settings={"max_completion_length": 5}))
    text = write_model_card(exported, facts=facts).read_text()
    assert '"text": "Think \\"first\\"."' in text
    assert "Image.new(" in text
    assert "max_new_tokens=5" in text
    assert run_quick_start(exported).strip("\n")


@pytest.mark.stack
def test_the_quick_start_of_a_text_model_runs_too(tmp_path: Path) -> None:
    base = BUILDERS["llama"](tmp_path / "base")
    assert main(["export", str(base), str(tmp_path / "export"), "--no-verify", "--quiet"]) == 0
    text = (tmp_path / "export" / "README.md").read_text()
    assert "AutoModelForCausalLM" in text
    assert "PIL" not in text
    assert metadata(tmp_path / "export" / "README.md") == {
        "library_name": "transformers", "pipeline_tag": "text-generation",
    }  # fmt: skip
    assert "\n# export\n" in text
    assert "A language model, fine-tuned.\n" in text  # nothing says how, or of what
    assert run_quick_start(tmp_path / "export").strip("\n")


def test_the_page_says_what_was_trained_verified_measured_and_put_right(exported: Path, review: Review) -> None:
    plain = shutil.copytree(exported, review.path / "plain")
    generation = json.loads((plain / "generation_config.json").read_text()) | {"use_cache": False}
    (plain / "generation_config.json").write_text(json.dumps(generation))
    write_findings(review.path, diagnose_arms({"checkpoint": plain, "export": exported}))
    text = write_model_card(exported, review, facts=FACTS).read_text()
    assert text.index("# qwen2_5_vl, trained with GRPO") < text.index("## Quick start")
    assert "`qwen2_5_vl` trained with [GRPO](https://arxiv.org/abs/2402.03300) for 10 steps" in text
    assert "| held-out accuracy | 49.5% | 92.0% |" in text
    assert "| reward, first and last logged | 0.25 | 0.75 |" in text
    assert "`learning_rate` 1e-06, `beta` 0.0." in text
    assert "| loads whole | ok | 102,176 parameters in float32" in text
    assert "**0.98\N{MULTIPLICATION SIGN}** (same): Export 19.6 ms per token" in text
    assert str(exported.parent) not in text
    assert "| base | 119.7 | 20.00 |" in text
    assert "48 new tokens after 256, batch 1, medians of 12 rounds in turns, a processor" in text
    assert "](latency.png)" in text
    assert (exported / "latency.png").is_file()
    assert "vllm serve .\npython -m sglang.launch_server --model-path ." in text
    assert "A plain save of the same training had 1 fault; this folder has none of them." in text
    assert "| generation-cache-off | generation_config.json: use_cache | every token recomputes the whole" in text
    assert re.search(r"## Versions\n\npython 3\S+, grpo-toolkit", text)
    assert "None" not in text
    assert "\n\n\n" not in text
    found = metadata(exported / "README.md")
    assert found == {
        "library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["grpo", "trl"],
    }  # fmt: skip


def test_a_page_that_is_written_again_without_the_trainer_keeps_what_it_said(exported: Path, review: Review) -> None:
    first = write_model_card(exported, review, facts=FACTS).read_text()
    assert main(["report", str(review.path), "--card"]) == 0
    assert (exported / "README.md").read_text() == first
    after = CardFacts(results={"format": (0.1, 0.2)}, repository="me/policy")
    text = write_model_card(exported, review, facts=after).read_text()
    assert "| held-out accuracy | 49.5% | 92.0% |\n| format | 10.0% | 20.0% |" in text
    assert 'path = "me/policy"\n' in text
    assert "vllm serve me/policy" in text


@pytest.mark.parametrize(
    "kept", [None, [], {"training": 3, "results": {"a": "b"}}, {"training": {"steps": "x"}, "system_prompt": 4}]
)
def test_facts_of_a_strangers_manifest_are_none(kept: Any) -> None:
    assert kept_facts({"card": kept}) == CardFacts()


@pytest.mark.parametrize(
    ("page", "tags"),
    [
        ("---\ntags:\n- base_model:adapter:/tmp/base\n- grpo\n- lora\n- transformers\n- trl\n---\n", ("grpo", "trl")),
        ("---\ntags: trl\n---\n", ("trl",)),
        ("---\ntags: [\n---\n", ()),
        ("no metadata", ()),
        (None, ()),
    ],
)
def test_the_tags_of_a_save_are_those_of_its_trainer(page: str | None, tags: tuple[str, ...], tmp_path: Path) -> None:
    if page is not None:
        (tmp_path / "README.md").write_text(page)
    assert tags_of_folder(tmp_path) == tags


def test_the_tags_of_a_training_are_those_of_its_model_or_of_its_arguments() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
    from trl import GRPOConfig, SFTConfig

    class Descendant(GRPOConfig):
        """The arguments of a trainer that is made of TRL's."""

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=8, **sizes))
    kinds = (Descendant, SFTConfig, TrainingArguments)
    found = [tags_of_training(model, object.__new__(kind)) for kind in kinds]
    assert found == [("trl", "grpo"), ("trl", "sft"), ()]
    model.model_tags = ["trl", "online-dpo"]
    assert tags_of_training(model, object.__new__(SFTConfig)) == ("trl", "online-dpo")


def test_training_is_read_from_what_trl_logs() -> None:
    history = [
        {"reward": 0.25, "rewards/format_reward/mean": 0.5}, {"loss": 1.0},
        {"reward": 0.75, "rewards/format_reward/mean": 1.0, "eval_accuracy": 0.5, "eval_runtime": 3.0},
    ]  # fmt: skip
    found = Training.of(3, history, type("Arguments", (), {"beta": 0.0, "learning_rate": None}))
    assert list(found.values) == ["reward", "rewards/format_reward/mean", "eval_accuracy", "loss"]
    assert found.values["rewards/format_reward/mean"] == (0.5, 1.0)
    assert found.settings == {"beta": 0.0}


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([{"role": "user", "content": "a"}], None),
        ([{"role": "system", "content": "think"}, {"role": "user", "content": "a"}], "think"),
        ([{"role": "system", "content": [{"type": "text", "text": "think"}]}], "think"),
    ],
)
def test_the_system_prompt_is_found(messages: Any, expected: str | None) -> None:
    assert system_prompt_of(messages) == expected


def test_the_metadata_pass_the_hubs_own_checks(exported: Path) -> None:
    from huggingface_hub import ModelCard
    from huggingface_hub.utils import validate_repo_id

    before = (exported / "grpo_toolkit.json").read_text()
    manifest = json.loads(before) | {"base": "Qwen/Qwen2.5-VL-3B-Instruct", "card": None}
    (exported / "README.md").unlink(missing_ok=True)
    (exported / "grpo_toolkit.json").write_text(json.dumps(manifest))
    try:
        text = write_model_card(exported).read_text()
        card = ModelCard.load(exported / "README.md", ignore_metadata_errors=False)
    finally:
        (exported / "grpo_toolkit.json").write_text(before)
        (exported / "README.md").unlink()
    validate_repo_id(card.data.base_model)
    assert text.startswith("---\nbase_model: Qwen/Qwen2.5-VL-3B-Instruct\nlibrary_name: transformers\n")
    assert "[Qwen/Qwen2.5-VL-3B-Instruct](https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct)" in text
    assert "# Qwen2.5-VL-3B-Instruct, fine-tuned" in text


def test_the_manifest_stays_true(exported: Path, review: Review) -> None:
    write_model_card(exported, review)
    checked, differing = compare_manifest(exported)
    assert differing == {}
    assert checked == len([path for path in exported.iterdir() if path.name != "grpo_toolkit.json"])


def test_what_was_written_around_it_stays(exported: Path, review: Review) -> None:
    (exported / "README.md").write_text("---\nlicense: mit\ntags:\n- mine\n---\n\n# My model\n\nBefore it.\n")
    card = write_model_card(exported, review)
    card.write_text(card.read_text() + "\nMine, after it.\n")
    write_model_card(exported, review, facts=FACTS)
    text = card.read_text()
    assert text.count("## Quick start") == 1
    assert "# My model\n\nBefore it.\n\n<!-- grpo_toolkit" in text
    assert text.endswith("\nMine, after it.\n")
    found = metadata(card)
    assert (found["license"], found["tags"]) == ("mit", ["mine", "trl", "grpo"])
    card.unlink()


def test_writing_it_twice_changes_nothing(exported: Path, review: Review) -> None:
    first = write_model_card(exported, review).read_text()
    assert write_model_card(exported, review).read_text() == first


def test_rows_of_another_folder_are_not_this_exports(exported: Path, tmp_path: Path) -> None:
    (exported / "README.md").unlink(missing_ok=True)
    other = Review(path=tmp_path, rows=[row("base"), row("export", path="/somewhere/else")])
    assert "## Latency" not in write_model_card(exported, other).read_text()


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
    ("path", "name", "is_of_the_hub"),
    [
        ("/h/hub/models--Qwen--Qwen2.5-VL-3B-Instruct/snapshots/66285546d2", "Qwen/Qwen2.5-VL-3B-Instruct", True),
        ("/data/Qwen2.5-VL-3B-Instruct", "Qwen2.5-VL-3B-Instruct", False),
    ],
)
def test_a_base_in_the_cache_has_a_hub_name(path: str, name: str, is_of_the_hub: bool) -> None:
    assert public_name(Path(path)) == name
    assert is_hub_name(name) is is_of_the_hub


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
