"""The README's example of data and a reward of one's own is run as it stands, on a tiny model."""

from __future__ import annotations

import json
import os
import re
import shlex
from importlib import metadata
from pathlib import Path

import pytest
from packaging.version import Version

from tests.recipes.test_data import picture
from tests.support.warm import run_python

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "recipes" / "README.md").read_text()


def block(language: str) -> str:
    found = re.search(rf"```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_example_of_own_data_and_reward_runs(qwen: Path, tmp_path: Path) -> None:
    example = block("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= 20
    (tmp_path / "colours.py").write_text(example)
    (tmp_path / "photos").mkdir()
    for name in ("red-1", "red-2", "green-1", "green-2"):
        picture(60, 60).save(tmp_path / "photos" / f"{name}.png")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    run_python(["colours.py"], cwd=tmp_path, env=environment, check=True)

    launch = shlex.split(block("bash").replace("\\\n", " ").splitlines()[1])
    assert launch[:3] == ["accelerate", "launch", "recipes/grpo.py"]
    flags = launch[3:]
    config = flags.index("--config")
    assert (ROOT / flags[config + 1]).is_file()
    del flags[config : config + 2]  # the 3B model; everything else is run as written
    tiny = ["--model_name_or_path", str(qwen), "--max_steps", "1", "--per_device_train_batch_size", "2"]
    tiny += ["--num_generations", "2", "--max_completion_length", "8", "--latency_rounds", "0", "--use_cpu", "true"]
    tiny += ["--bf16", "false", "--report_to", "none", "--logging_steps", "1", "--save_strategy", "no"]
    done = run_python([ROOT / "recipes" / "grpo.py", *flags, *tiny], cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    settings = json.loads((tmp_path / "runs" / "colours" / "grpo_recipe.json").read_text())
    assert settings["recipe"]["reward_funcs"] == ["format", "accuracy", "colours.py:one_word"]
    assert settings["training"]["reward_weights"] == [1.0, 1.0, 0.2]
    summary = json.loads((tmp_path / "runs" / "colours" / "summary.json").read_text())
    assert summary["verified"] is True
    assert summary["step_floor_s"] > 0  # where a step's time goes is said by default
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "runs" / "colours" / "step_time.jsonl").open()]
    assert kinds == ["step", "step_explanation"]


def test_every_file_that_the_readme_names_is_there() -> None:
    for name in re.findall(r"recipes/[\w./]+\.(?:py|yaml|sh|sbatch)", README):
        assert (ROOT / name).is_file(), name
    for name in re.findall(r"`(qwen2_5_vl_\w+|with_\w+)`", README):
        assert (ROOT / "recipes" / "configs" / f"{name}.yaml").is_file(), name
