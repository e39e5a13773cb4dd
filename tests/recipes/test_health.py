"""While it trains: held-out accuracy picks the model that is exported, and curves that teach nothing are named."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.version import Version

from tests.recipes.test_data import picture, write_parquet
from tests.support.warm import python, run_python

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)

ROOT = Path(__file__).resolve().parents[2]


def watch(*logs: dict[str, float], **sampling: float) -> list[str]:
    from transformers import TrainerControl, TrainerState
    from trl import GRPOConfig

    from grpo_vlm.training.health import HealthCallback

    callback, state, control = HealthCallback(), TrainerState(is_world_process_zero=True), TrainerControl()
    arguments = GRPOConfig(output_dir="unused", use_cpu=True, bf16=False, **sampling)
    for step, entry in enumerate(logs):
        state.global_step = step
        callback.on_log(arguments, state, control, logs=entry)
    return callback.warnings


HEALTHY = {
    "frac_reward_zero_std": 0.4,
    "unique_in_group": 0.9,
    "completions/clipped_ratio": 0.1,
    "entropy": 0.4,
    "rewards/format_reward/mean": 0.9,
}


@pytest.mark.parametrize(
    ("metric", "value", "words"),
    [
        ("frac_reward_zero_std", 0.9, "90% of the groups have the same reward"),
        ("completions/clipped_ratio", 0.5, "50% of the completions end at --max_completion_length"),
        ("entropy", 0.004, "0.004 nats a token: the policy has become nearly deterministic"),
        ("rewards/format_reward/mean", 0.0, "0% of the completions have the form <think>"),
    ],
)
def test_a_curve_that_stays_bad_is_named_once_in_a_while(metric: str, value: float, words: str) -> None:
    assert watch(*[HEALTHY] * 80) == []
    assert watch(*[{**HEALTHY, metric: value}] * 9) == []
    warnings = watch(*[{**HEALTHY, metric: value}] * 59)
    assert len(warnings) == 1
    assert warnings[0].startswith("step 9: ")
    assert words in warnings[0]
    assert len(watch(*[{**HEALTHY, metric: value}] * 60)) == 2


NARROW = {**HEALTHY, "unique_in_group": 0.125, "frac_reward_zero_std": 0.85}


@pytest.mark.parametrize(
    ("sampling", "advice"),
    [
        ({"temperature": 1.0}, "sampling is too narrow; if it fell during training, lower --learning_rate."),
        ({"temperature": 0.6}, "sampling is too narrow; raise --temperature towards 1; if it fell"),
        ({"top_p": 0.8, "top_k": 20}, "sampling is too narrow; raise --top_p to 1; leave --top_k out; if it fell"),
    ],
)
def test_narrow_sampling_is_named_with_what_is_not_set_yet(sampling: dict[str, Any], advice: str) -> None:
    warnings = [text for text in watch(*[NARROW] * 10, **sampling) if "unique_in_group" in text]
    assert len(warnings) == 1
    assert "12% of a group's completions differ, and most groups have one reward: " + advice in warnings[0]


def test_short_answers_that_are_alike_are_no_news_while_rewards_differ() -> None:
    assert watch(*[{**NARROW, "frac_reward_zero_std": 0.5}] * 80) == []


def test_one_bad_step_is_no_news() -> None:
    assert watch(*[HEALTHY] * 20, {**HEALTHY, "completions/clipped_ratio": 1.0}, *[HEALTHY] * 20) == []


def test_accuracy_that_falls_is_named() -> None:
    warnings = watch({"eval_accuracy": 0.5}, {"eval_accuracy": 0.45}, {"eval_accuracy": 0.35})
    assert len(warnings) == 1
    assert warnings[0].startswith("step 2: eval_accuracy is 35.0%, after 50.0%")


def test_unique_completions_are_counted_within_groups() -> None:
    from grpo_vlm.training.trainer import unique_in_group, with_group_health

    texts: list[Any] = ["a", "a", "a", "a", "a", "b", "c", "d"]
    assert unique_in_group(texts, num_generations=4) == (0.25 + 1.0) / 2

    def reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [1.0] * len(completions)

    logged: list[tuple[str, float]] = []
    watched = with_group_health(reward, num_generations=4)
    assert watched.__name__ == "reward"  # TRL logs it under this name
    assert watched(completions=texts, log_metric=lambda *pair: logged.append(pair)) == [1.0] * 8
    assert watched(completions=texts[:3], log_metric=lambda *pair: logged.append(pair)) == [1.0] * 3
    assert logged == [("unique_in_group", 0.625)]


def test_the_best_checkpoint_is_exported_and_the_base_is_asked_both_ways(qwen: Path, tmp_path: Path) -> None:
    """Two steps, each evaluated: both are right about nothing, so the first stays the best, and is exported."""
    import torch
    from safetensors.torch import load_file

    for split in ("train", "test"):
        columns = {"images": [[picture()]] * 6, "problem": ["<image>Find x."] * 6, "answer": ["3"] * 6}
        write_parquet(tmp_path / "geometry3k", columns, split=split, several=True)
    out = tmp_path / "out"
    flags: list[object] = [
        "--model_name_or_path",
        qwen,
        "--dataset_name",
        tmp_path / "geometry3k",
        "--output_dir",
        out,
    ]
    flags += ["--report_to", "none", "--max_steps", 2, "--per_device_train_batch_size", 4, "--num_generations", 4]
    flags += ["--max_completion_length", 8, "--latency_rounds", 0, "--use_cpu", "true", "--bf16", "false"]
    flags += ["--eval_strategy", "steps", "--eval_steps", 1, "--save_steps", 1, "--load_best_model_at_end", "true"]
    flags += ["--metric_for_best_model", "eval_accuracy", "--direct_baseline", "true", "--max_pixels", 50176]
    flags += ["--logging_steps", 1, "--learning_rate", 1e-3, "--held_out_size", 2, "--per_device_eval_batch_size", 4]
    flags += ["--reward_funcs", "format", "accuracy", f"{ROOT}/scripts/models/tiny_training.py:length_reward"]
    done = run_python([ROOT / "recipes" / "grpo.py", *flags])
    assert done.returncode == 0, done.stderr[-3000:]

    state = json.loads((out / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"].endswith("checkpoint-1")
    assert [entry["eval_accuracy"] for entry in state["log_history"] if "eval_accuracy" in entry] == [0.0, 0.0]
    steps = [entry for entry in state["log_history"] if "frac_reward_zero_std" in entry]
    assert len(steps) == 2  # evaluating clears no training metric
    assert all(0 < entry["unique_in_group"] <= 1 for entry in steps)
    assert {"rewards/format_reward/mean", "rewards/length_reward/mean"} <= steps[0].keys()

    def weights(folder: Path) -> torch.Tensor:
        return load_file(folder / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]

    assert not torch.equal(weights(out / "checkpoint-1"), weights(out / "checkpoint-2"))
    assert torch.equal(weights(out / "export"), weights(out / "checkpoint-1"))
    summary = json.loads((out / "summary.json").read_text())
    assert summary["direct_accuracy"] == 0.0
    assert "accuracy    0.0% of 2 held-out rows before training, asked for the answer alone" in done.stdout
    assert "the base, asked for the answer alone" in done.stdout


def test_two_processes_train_evaluate_and_export(qwen: Path, tmp_path: Path) -> None:
    """DDP on a CPU, for real: each process answers its own share of the held-out rows."""
    for split, count in (("train", 4), ("test", 3)):
        columns = {"images": [[picture(56, 56)]] * count, "problem": ["<image>x?"] * count, "answer": ["3"] * count}
        write_parquet(tmp_path / "geometry3k", columns, split=split, several=True)
    out = tmp_path / "out"
    flags: list[object] = ["--model_name_or_path", qwen, "--dataset_name", tmp_path / "geometry3k"]
    flags += ["--output_dir", out, "--report_to", "none", "--max_steps", 1, "--per_device_train_batch_size", 2]
    flags += ["--num_generations", 4, "--max_completion_length", 4, "--latency_rounds", 0, "--use_cpu", "true"]
    flags += ["--bf16", "false", "--eval_strategy", "steps", "--eval_steps", 1, "--per_device_eval_batch_size", 2]
    flags += ["--logging_steps", 1, "--save_strategy", "no"]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29571", *python()[1:]]
    done = run_python([*launch, ROOT / "recipes" / "grpo.py", *flags])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes   2 (ddp)" in done.stderr
    assert "plan        1 steps of 1 prompts, 4 completions; " in done.stderr
    assert done.stdout.count("learnt      0.0% (the base) to 0.0% of the held-out rows right") == 1
    assert json.loads((out / "summary.json").read_text())["verified"] is True


def test_a_direct_question_has_no_word_of_thinking() -> None:
    from grpo_vlm.training.evaluation import DIRECT_PROMPT, direct_prompt

    turns = [{"role": "system", "content": "Think."}, {"role": "user", "content": "How many?"}]
    assert direct_prompt(turns) == [{"role": "system", "content": DIRECT_PROMPT}, turns[1]]


def test_vllm_gets_one_token_for_each_image() -> None:
    from grpo_vlm.training.trainer import one_token_an_image

    assert one_token_an_image([1, 7, 7, 7, 2, 2, 7, 3, 7, 7], 7) == [1, 7, 2, 2, 7, 3, 7]
    assert one_token_an_image([7, 7], 7) == [7]
    assert one_token_an_image([1, 1], 7) == [1, 1]
