"""The base's accuracy is still the base's when a run is resumed from a checkpoint."""

from __future__ import annotations

import json
from importlib import metadata
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from packaging.version import Version

from tests.recipes.test_recipe import run_recipe

if TYPE_CHECKING:
    import subprocess
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)


def train(qwen: Path, geometry: Path, out: Path, *flags: object) -> subprocess.CompletedProcess[str]:
    done = run_recipe(
        *("--model_name_or_path", qwen, "--dataset_name", geometry, "--output_dir", out, "--report_to", "none"),
        *("--per_device_train_batch_size", 4, "--num_generations", 4, "--max_completion_length", 4),
        *("--latency_rounds", 0, "--use_cpu", "true", "--bf16", "false", "--held_out_size", 2, "--save_steps", 1),
        *("--direct_baseline", "true", *flags),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def test_a_run_that_goes_on_has_the_figures_of_its_base(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    began = train(qwen, geometry, out, "--max_steps", 1)
    assert "accuracy    0.0% of 2 held-out rows before training\n" in began.stdout
    stored = json.loads((out / "baselines.json").read_text())
    assert (stored["accuracy"], stored["direct_accuracy"], stored["measured_on"]["rows"]) == (0.0, 0.0, 2)

    # No figures that this model could have: whoever has them has read them.
    (out / "baselines.json").write_text(json.dumps(stored | {"accuracy": 0.5, "direct_accuracy": 1.0}))
    again = train(qwen, geometry, out, "--max_steps", 2, "--resume_from_checkpoint", "true")
    assert "accuracy    50.0% of 2 held-out rows before training, as measured when the run began\n" in again.stdout
    alone = "accuracy    100.0% of 2 held-out rows before training, asked for the answer alone"
    assert f"{alone}, as measured when the run began\n" in again.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["held_out_accuracy"], summary["direct_accuracy"]) == ([0.5, 0.0], 1.0)
    assert summary["begun_with"] is None
    assert sorted(path.name for path in out.glob("baselines*")) == ["baselines.json"]


ON = {"model": "m", "rows": 2, "questions": "ab"}


@pytest.mark.parametrize(
    ("content", "direct", "found"),
    [
        ({"accuracy": 0.5, "direct_accuracy": 0.25, "measured_on": ON}, True, (0.5, 0.25)),
        ({"accuracy": 0.5, "direct_accuracy": 0.25, "measured_on": ON}, False, (0.5, None)),
        ({"accuracy": 0.5, "direct_accuracy": None, "measured_on": ON}, False, (0.5, None)),
        ({"accuracy": 0.5, "direct_accuracy": None, "measured_on": ON}, True, None),
        ({"accuracy": 0.5, "direct_accuracy": None, "measured_on": ON | {"rows": 3}}, False, None),
        ({"accuracy": 0.5, "direct_accuracy": None}, False, None),
        ({"direct_accuracy": 0.25, "measured_on": ON}, False, None),
        ([1], False, None),
        ("no JSON", False, None),
        (None, False, None),
    ],
)
def test_figures_of_something_else_are_not_taken(
    tmp_path: Path, content: Any, direct: bool, found: tuple[float, float | None] | None
) -> None:
    from grpo_vlm.training.baselines import read_baselines

    if content is not None:
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "baselines.json").write_text(text)
    figures = read_baselines(tmp_path, measured_on=ON, direct=direct)
    assert (None if figures is None else (figures.accuracy, figures.direct_accuracy)) == found


def test_figures_come_back_as_they_were_written(tmp_path: Path) -> None:
    from grpo_vlm.training.baselines import Figures, read_baselines, write_baselines

    figures = Figures(accuracy=1 / 3, direct_accuracy=0.1)
    write_baselines(tmp_path, figures, measured_on=ON)
    assert read_baselines(tmp_path, measured_on=ON, direct=True) == figures


def test_other_rows_answers_or_settings_are_something_else(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    from grpo_vlm.arguments import parse
    from grpo_vlm.data.rows import load_splits
    from grpo_vlm.training.baselines import conditions

    def found(*flags: str) -> dict[str, Any]:
        given = ["--model_name_or_path", str(qwen), "--dataset_name", str(geometry), "--output_dir", str(tmp_path)]
        recipe, training, model = parse([*given, "--use_cpu", "true", "--bf16", "false", *flags])
        return conditions(recipe, training, model, load_splits(recipe, seed=0))

    usual = found()
    assert json.loads(json.dumps(usual)) == usual == found("--learning_rate", "1")
    for flags in (
        ("--held_out_size", "2"),
        ("--max_completion_length", "9"),
        ("--dtype", "bfloat16"),
        ("--model_revision", "other"),
        ("--model_name_or_path", str(tmp_path)),
        ("--load_in_4bit", "true"),
        ("--load_in_8bit", "true"),
        ("--min_pixels", "3137"),
        ("--max_pixels", "50000"),
    ):
        assert found(*flags) != usual, flags
    assert found("--held_out_size", "2")["content"] != usual["content"]


def test_other_pictures_are_something_else(qwen: Path, tmp_path: Path) -> None:
    from datasets import Dataset
    from PIL import Image

    from grpo_vlm.arguments import parse
    from grpo_vlm.data.rows import load_splits
    from grpo_vlm.training.baselines import conditions

    def found(colour: str) -> Any:
        pictures = [Image.new("RGB", (56, 56), colour)] * 2
        rows = Dataset.from_dict({"prompt": ["Which?"] * 2, "image": pictures, "answer": ["3"] * 2})
        rows.save_to_disk(tmp_path / colour)
        given = f"--model_name_or_path {qwen} --dataset_name {tmp_path / colour} --output_dir {tmp_path / 'out'}"
        recipe, training, model = parse(f"{given} --use_cpu true --bf16 false".split())
        return conditions(recipe, training, model, load_splits(recipe, seed=0))

    assert found("red") == found("red") != found("blue")


def test_a_run_without_the_direct_baseline_leaves_what_is_known_of_it(tmp_path: Path) -> None:
    from grpo_vlm.training.baselines import Baselines, Figures, read_baselines, write_baselines

    write_baselines(tmp_path, Figures(accuracy=0.5, direct_accuracy=0.25), measured_on=ON)
    trainer = SimpleNamespace(is_world_process_zero=lambda: True, args=SimpleNamespace(output_dir=str(tmp_path)))
    checkpoint = str(tmp_path / "checkpoint-1")
    goes_on = Baselines(trainer, [1, 2], direct=False, measured_on=ON, checkpoint=checkpoint)  # type: ignore[arg-type]
    goes_on.take()
    assert goes_on.figures == Figures(accuracy=0.5)
    assert read_baselines(tmp_path, measured_on=ON, direct=True) == Figures(accuracy=0.5, direct_accuracy=0.25)
