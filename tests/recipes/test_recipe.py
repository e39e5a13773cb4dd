"""The recipe: wrong input is one line before anything happens, and the default run really learns."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from grpo_toolkit import InputError
from tests.support.training import rows
from tests.support.warm import run_python

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)

ROOT = Path(__file__).resolve().parents[2]


def run_recipe(*arguments: object) -> subprocess.CompletedProcess[str]:
    return run_python([ROOT / "recipes" / "grpo.py", *arguments])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    from datasets import DatasetDict

    folder = tmp_path / "dataset"
    DatasetDict({"train": rows(8)}).save_to_disk(str(folder))
    return folder


def test_wrong_input_is_exit_code_2_and_one_line(qwen: Path, tmp_path: Path) -> None:
    from datasets import DatasetDict

    folder = tmp_path / "dataset"
    DatasetDict({"train": rows(8, with_images=False)}).save_to_disk(str(folder))
    where = ("--model_name_or_path", qwen, "--dataset_name", folder, "--output_dir", tmp_path / "out")
    done = run_recipe(*where, "--use_cpu", "true")
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    line = done.stderr.strip().splitlines()[-1]  # library warnings may come before it
    assert line == (
        f"recipes/grpo.py: dataset {folder}: no image column (looked for image, images); it has prompt, answer; "
        "name the right one with --image_column"
    )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--answer_column", "solution"], "no column 'solution' (--answer_column); it has prompt, answer, image"),
        (["--dataset_train_split", "training"], "no split 'training'; it has train"),
        (["--dataset_name", "no-such/dataset"], "dataset no-such/dataset: cannot be loaded"),
        (["--model_name_or_path", "/no/such/model"], "model /no/such/model: no such folder"),
        (["--model_name_or_path", "{tmp}"], "no config.json there, so it is no model folder"),
        (
            ["--model_name_or_path", "no-such/model"],
            "no-such/model: neither a folder nor to be had",
        ),
        (["--held_out_size", "0"], "--held_out_size 0: at least one row"),
        (["--config", "{tmp}/thesis/bad.yaml"], "--config: not valid YAML"),
        (
            ["--num_generations", "3"],
            "--num_generations 2 or 4, or 3 times the --gradient_accumulation_steps (then 24",
        ),
        (["--use_cpu", "false"], "On a machine without a GPU: --use_cpu true"),
        (["--resume_from_checkpoint", "true"], "no whole checkpoint in it to resume from"),
        (["--resume_from_checkpoint", "{tmp}"], "no trainer_state.json there"),
        (["--config", "no.yaml"], "--config no.yaml: no such file"),
        (
            ["--config", "{tmp}/thesis/typo.yaml"],
            "typo.yaml: there is no setting 'learnin_rate'; did you mean learning_rate?",
        ),
        (["--learnin_rate", "1"], "there is no flag --learnin_rate; did you mean --learning_rate?"),
        (["--learning_rat", "1"], "there is no flag --learning_rat; did you mean --learning_rate?"),  # no abbreviation
        (["--lr", "1"], "there is no flag --lr; did you mean --learning_rate?"),
        (["-lr", "1"], "there is no flag -lr; did you mean --learning_rate?"),
        (["--batch-size", "8"], "there is no flag --batch-size; did you mean --per_device_train_batch_size?"),
        (["--gpus", "2"], "there is no flag --gpus; how many processes is for accelerate: accelerate launch"),
        (["--zzz", "2"], "there is no flag --zzz; --help lists every setting"),
        (["--config", "{tmp}/thesis/usual.yaml"], "there is no setting 'epochs'; did you mean num_train_epochs?"),
        (["--max_steps", "many"], "invalid int value: 'many'; --help lists every setting"),
        (["--export_dir", "{tmp}/thesis"], "thesis: exists and is not an export of ours"),
        (["--output_dir", "{tmp}/thesis"], "exists and was not made by this recipe"),
        (["--output_dir", "{tmp}/thesis/chapter.tex"], "is a file"),
    ],
)
def test_wrong_input_is_one_line_and_touches_nothing(
    qwen: Path, dataset: Path, tmp_path: Path, arguments: list[str], message: str
) -> None:
    from grpo import main

    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("x")
    (tmp_path / "thesis" / "bad.yaml").write_text("a: [1")
    (tmp_path / "thesis" / "typo.yaml").write_text("learnin_rate: 1.0e-5\n")
    (tmp_path / "thesis" / "usual.yaml").write_text("epochs: 2\n")
    base = {"--model_name_or_path": qwen, "--dataset_name": dataset, "--output_dir": tmp_path / "out"}
    base |= {"--use_cpu": "true"}
    given = dict(zip(arguments[::2], [a.format(tmp=tmp_path) for a in arguments[1::2]], strict=True))
    flags = [part for pair in {**base, **given}.items() for part in pair]
    with pytest.raises(InputError, match=re.escape(message)):
        main([str(flag) for flag in flags])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dataset", "thesis"]
    names = {path.name for path in (tmp_path / "thesis").iterdir()}
    assert names == {"bad.yaml", "chapter.tex", "typo.yaml", "usual.yaml"}


def test_what_people_type_points_to_settings_and_is_none_itself() -> None:
    from grpo_vlm.arguments import TYPED_FOR, TYPED_FOR_ACCELERATE, _names

    assert TYPED_FOR.keys() <= set(_names())
    typed = " ".join((*TYPED_FOR.values(), TYPED_FOR_ACCELERATE)).split()
    assert len(set(typed)) == len(typed)
    assert not set(typed) & set(_names())


def test_a_requeued_job_goes_on_or_begins_again(tmp_path: Path) -> None:
    from grpo import find_checkpoint
    from grpo_vlm.arguments import parse

    def found(wanted: str) -> str | None:
        given = ["--model_name_or_path", "m", "--output_dir", str(tmp_path), "--use_cpu", "true", "--bf16", "false"]
        return find_checkpoint(parse([*given, "--resume_from_checkpoint", wanted])[1])

    assert found("auto") is None
    with pytest.raises(InputError, match="no whole checkpoint in it"):
        found("true")


def test_usual_column_names_are_found_and_rows_reshaped(dataset: Path) -> None:
    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.data.rows import load_splits

    splits = load_splits(RecipeArguments(dataset_name=str(dataset), held_out_size=2), seed=0)
    assert (len(splits.train), len(splits.held_out)) == (7, 1)
    assert set(splits.train.column_names) == {"prompt", "image", "answer"}
    assert splits.train[0]["image"].mode == "RGB"


def test_plain_questions_become_conversations_that_ask_for_the_format(tmp_path: Path) -> None:
    from datasets import DatasetDict

    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.data.columns import SYSTEM_PROMPT
    from grpo_vlm.data.rows import load_splits

    original = rows(4).remove_columns(["prompt"]).add_column("problem", ["<image>How many?"] * 4)
    original = original.map(lambda row: {"answer": 3})
    DatasetDict({"train": original, "test": original}).save_to_disk(str(tmp_path / "d"))
    splits = load_splits(RecipeArguments(dataset_name=str(tmp_path / "d"), held_out_size=3), seed=0)
    assert splits.train[0]["prompt"] == [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": "How many?"},
    ]
    assert splits.train[0]["answer"] == "3"
    assert len(splits.held_out) == 3


def test_rows_without_an_image_or_answer_are_left_out_and_columns_may_be_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from datasets import Dataset, DatasetDict
    from PIL import Image

    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.data.rows import load_splits

    Image.new("L", (30, 30)).save(tmp_path / "picture.png")
    table = {
        "prompt": ["not this one"] * 4,
        "problem": ["How many?"] * 4,
        "picture": [str(tmp_path / "picture.png"), None, str(tmp_path / "picture.png"), str(tmp_path / "picture.png")],
        "answer": ["1", "2", None, "3"],
    }
    DatasetDict({"train": Dataset.from_dict(table)}).save_to_disk(str(tmp_path / "d"))
    arguments = RecipeArguments(
        dataset_name=str(tmp_path / "d"), prompt_column="problem", image_column="picture", held_out_size=1
    )
    splits = load_splits(arguments, seed=0)
    assert "2 of 4 rows of 'train' lack a question, an image or an answer; left out" in capsys.readouterr().out
    assert sorted([splits.train[0]["answer"], splits.held_out[0]["answer"]]) == ["1", "3"]
    assert splits.train[0]["image"].mode == "RGB"
    assert splits.train[0]["prompt"][1]["content"] == "How many?"


def test_a_local_model_and_dataset_run_from_start_to_end(qwen: Path, dataset: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = run_recipe(
        *("--model_name_or_path", qwen, "--dataset_name", dataset, "--output_dir", out, "--report_to", "none"),
        *("--max_steps", 1, "--per_device_train_batch_size", 4, "--num_generations", 4, "--use_peft", "true"),
        *("--max_completion_length", 8, "--latency_rounds", 1, "--latency_new_tokens", 4, "--use_cpu", "true"),
        *("--bf16", "false", "--lora_target_modules", "q_proj", "v_proj"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "export" / "grpo_toolkit.json").is_file(), done.stderr[-3000:]
    manifest = json.loads((out / "export" / "grpo_toolkit.json").read_text())
    details = {check["name"]: check["detail"] for check in manifest["verification"]["checks"]}
    assert details["same format reward on the same prompts"] == "policy 0, export 0 on average over 1 prompts"
    assert done.stdout.startswith("accuracy    0.0% of ")
    assert "verified" in done.stdout
    shown = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    assert len(shown) <= 25, "\n".join(shown)
    assert not [line for line in shown if len(line) > 80 and str(tmp_path) not in line]
    assert not [line for line in shown if "{'" in line or "Warning" in line or "it/s]" in line]
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["peak_gib"], summary["estimated_gib"]) == (None, None)  # there is no GPU
    assert json.loads((out / "grpo_recipe.json").read_text())["model"]["use_peft"] is True


@pytest.mark.slow
@pytest.mark.timeout(1800)  # about four minutes alone, several times that beside other tests on two slow cores
def test_the_default_run_learns(tmp_path: Path) -> None:
    """The main job as a user starts it: accuracy rises clearly, the export is verified, W&B is there, offline."""
    for name in ("WANDB_MODE", "WANDB_SILENT"):
        os.environ.pop(name, None)
    # In a process from nothing, and with one thread as everywhere here: two beside another test process only wait
    # for each other.
    command = [sys.executable, str(ROOT / "recipes" / "grpo.py"), "--output_dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    log = json.loads((tmp_path / "out" / "summary.json").read_text())
    before, after = log["held_out_accuracy"]
    assert 0.3 <= before <= 0.7
    assert after >= before + 0.15
    first, last = log["accuracy_reward"]
    assert last >= first + 0.15
    manifest = json.loads((tmp_path / "out" / "export" / "grpo_toolkit.json").read_text())
    assert manifest["verification"]["passed"] is True
    assert "wandb sync" in done.stderr.replace("\n", "")
