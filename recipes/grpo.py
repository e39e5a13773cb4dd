"""GRPO for a vision-language model, from the base to an export that is verified and timed.

    accelerate launch recipes/grpo.py                                                  # tiny model, no download
    accelerate launch recipes/grpo.py --config recipes/configs/qwen2_5_vl_3b_lora.yaml
    accelerate launch recipes/grpo.py --use_peft                                       # tiny, with a LoRA adapter

Every setting of TRL's `GRPOConfig` and `ModelConfig`, and of `RecipeArguments` in grpo_vlm/arguments.py, is a flag or
a YAML key.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from trl import GRPOConfig, ModelConfig, get_peft_config, get_quantization_config

from grpo_toolkit import (
    ExportCallback,
    FastRolloutCallback,
    GrpoToolkitError,
    InputError,
    KVCacheCallback,
    LatencyCallback,
    PackedVisionCallback,
    ResumeGuardCallback,
    StepTimeCallback,
    last_whole_checkpoint,
    rows_once,
    write_report,
)
from grpo_vlm.arguments import RecipeArguments, parse
from grpo_vlm.data.image_sizes import load_processor
from grpo_vlm.data.rows import Splits, load_splits
from grpo_vlm.planning.plan import NO_ROOM, check_plan, make_plan, reward_names
from grpo_vlm.planning.preflight import MARKER, check_model, check_output, check_versions, check_vllm
from grpo_vlm.rewards.rewards import RewardFunction, find_format_reward, find_rewards
from grpo_vlm.training.baselines import AfterTraining, Baselines, conditions
from grpo_vlm.training.cost import CostCallback
from grpo_vlm.training.health import HealthCallback
from grpo_vlm.training.screen import BarCallback, quiet_libraries, without_own_bar
from grpo_vlm.training.sharded_rollouts import ShardedRolloutsCallback
from grpo_vlm.training.summary import note_in_wandb, print_summary, summarise
from grpo_vlm.training.trainer import AccuracyTrainer, with_group_health

TINY = "tiny"
TINY_BUILDER = "scripts.models.tiny_vlm"
ROOT = Path(__file__).resolve().parents[1]


def main(argv: list[str]) -> None:
    check_versions()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that TRL's own config sets
        recipe, training, model = parse(argv)
    if not recipe.verbose:
        quiet_libraries()
    check_output(training.output_dir)
    if not recipe.dry_run:  # which may plan for another machine, and warns
        check_vllm(training)
    checkpoint = find_checkpoint(training)
    if model.model_name_or_path == TINY:
        model.model_name_or_path = build_tiny()
    check_model(model.model_name_or_path)
    rewards = find_rewards(reward_names(recipe))
    processor = load_processor(
        str(model.model_name_or_path),
        revision=model.model_revision,
        min_pixels=recipe.min_pixels,
        max_pixels=recipe.max_pixels,
    )
    with training.main_process_first(desc="loading the dataset"):
        splits = load_splits(recipe, seed=training.seed, processor=processor)
    export_dir = Path(recipe.export_dir or Path(training.output_dir, "export"))
    exporting = ExportCallback(
        export_dir,
        prompts=splits.held_out,
        format_reward=find_format_reward(rewards),
        overwrite=recipe.export_dir is None,
    )
    plan = make_plan(recipe, training, model, splits, processor=processor)
    if training.process_index == 0:
        lines = plan.lines() if recipe.dry_run or recipe.verbose else plan.short_lines()
        print("\n".join(lines), file=sys.stdout if recipe.dry_run else sys.stderr, flush=True)
    check_plan(plan)
    if recipe.dry_run:
        return

    timing = LatencyCallback(
        prompts=splits.held_out,
        new_tokens=recipe.latency_new_tokens,
        rounds=max(recipe.latency_rounds, 1),
        max_new_tokens=training.max_completion_length,
        tells_verdict=recipe.verbose,  # without it, the story at the end has them
        reward_funcs=rewards,
    )
    cost = CostCallback(None if plan.memory.sleeps else plan.memory.allocated)
    finals = AfterTraining(splits.held_out, is_told=recipe.verbose)
    callbacks = [cost, finals, KVCacheCallback(), ResumeGuardCallback(), HealthCallback(), ShardedRolloutsCallback()]
    # What makes a step fast comes after what it must see whole: the cache's watch, weights put right at a resume.
    callbacks += [PackedVisionCallback()] if recipe.packed_vision else []
    callbacks += [FastRolloutCallback("plain" if plan.rollouts_plain == NO_ROOM else "auto")] * recipe.fast_rollouts
    callbacks += [exporting, *([timing] if recipe.latency_rounds else [])]
    steps = StepTimeCallback() if recipe.step_time else None

    # First of all, so that what the others do after a step counts as theirs and not as reading rows.
    callbacks = [*([] if steps is None else [steps]), *callbacks]
    if not recipe.verbose:
        callbacks = [BarCallback(), *callbacks]
    trainer = make_trainer(
        training, model, splits, callbacks, rewards=rewards, processor=processor, packed_vision=recipe.packed_vision
    )
    if not recipe.verbose:
        without_own_bar(trainer)
    if steps is not None:
        steps.trainer = trainer
    if trainer.is_world_process_zero():
        mark_output(training, recipe, model)
    baselines = Baselines(
        trainer,
        splits.held_out,
        direct=recipe.direct_baseline,
        measured_on=conditions(recipe, training, model, splits),
        checkpoint=checkpoint,
    )
    finals.trainer = trainer
    may_be_fast = recipe.fast_rollouts and plan.rollouts_plain is None
    if trainer.is_sharded or (may_be_fast and checkpoint is None):
        trainer.add_callback(baselines)
    else:
        baselines.take()
    trainer.train(resume_from_checkpoint=checkpoint)
    after = finals.figure()
    if trainer.is_world_process_zero():
        summary = summarise(
            trainer.state.log_history,
            (baselines.figures.accuracy, after),
            exporting.result,
            timing.rows,
            direct_accuracy=baselines.figures.direct_accuracy,
            begun_with=baselines.checkpoint_name,
            cost=cost.figures(),
            latency=Path(training.output_dir, "latency") if timing.rows else None,
            steps=None if steps is None else steps.explanation,
        )
        if timing.rows and not baselines.checkpoint_name:  # the page of the export says what was learnt, too
            write_report(training.output_dir, results={"held-out accuracy": (baselines.figures.accuracy, after)})
        Path(training.output_dir, "summary.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        note_in_wandb(baselines.figures.accuracy, after)
        print_summary(summary, verbose=recipe.verbose)


def make_trainer(
    training: GRPOConfig,
    model: ModelConfig,
    splits: Splits,
    callbacks: list[Any],
    *,
    rewards: list[RewardFunction],
    processor: Any,
    packed_vision: bool,
) -> AccuracyTrainer:
    """Return TRL's own trainer, with our callbacks plugged in.

    Raises:
        InputError: vLLM's server did not come up.
    """
    training.model_init_kwargs = {
        "revision": model.model_revision,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **(training.model_init_kwargs or {}),
    }
    quantization = get_quantization_config(model)
    if quantization is not None:
        training.model_init_kwargs["quantization_config"] = quantization
    rewards = [with_group_health(rewards[0], num_generations=training.num_generations), *rewards[1:]]
    try:
        return AccuracyTrainer(
            model=model.model_name_or_path,
            args=training,
            reward_funcs=rewards,
            processing_class=processor,
            train_dataset=rows_once(splits.train),
            eval_dataset=splits.held_out if training.eval_strategy != "no" else None,
            peft_config=get_peft_config(model),
            callbacks=callbacks,
            packed_vision=packed_vision,
        )
    except ConnectionError as error:  # nobody started the server while TRL waited
        if not training.use_vllm:
            raise
        raise InputError(f"{error} Or name its place: --vllm_server_host, --vllm_server_port") from error


def build_tiny() -> str:
    """Return the folder of the tiny base; build it at first use, in a process of its own, once for all ranks."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "recipes"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", TINY_BUILDER]
    environment = os.environ | {"PYTHONPATH": paths}
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False, env=environment)
    if done.returncode != 0:
        raise InputError(f"{TINY_BUILDER} could not build the tiny model (see above)")
    return done.stdout.strip().splitlines()[-1]


def find_checkpoint(training: GRPOConfig) -> str | None:
    """Return what to resume from: a folder as given, or for `true` the newest whole checkpoint in output_dir.

    `auto` is `true` where there is one, and a start from the beginning where there is none: for requeued jobs.
    """
    wanted = training.resume_from_checkpoint
    if wanted is None or str(wanted).lower() == "false":
        return None
    if str(wanted).lower() not in ("true", "auto"):
        if not Path(wanted, "trainer_state.json").is_file():
            raise InputError(f"--resume_from_checkpoint {wanted}: no trainer_state.json there")
        return str(wanted)
    checkpoint, skipped = last_whole_checkpoint(training.output_dir)
    for line in skipped:
        print(f"not resumed from {line}", file=sys.stderr)
    if checkpoint is None and str(wanted).lower() == "auto":
        return None
    if checkpoint is None:
        raise InputError(f"output_dir {training.output_dir}: no whole checkpoint in it to resume from")
    print(f"resuming from {checkpoint}", file=sys.stderr)
    return str(checkpoint)


def mark_output(training: GRPOConfig, recipe: RecipeArguments, model: ModelConfig) -> None:
    """Leave the settings in output_dir; the file also says that the folder is ours."""
    folder = Path(training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"recipe": vars(recipe), "model": vars(model), "training": training.to_dict()}
    (folder / MARKER).write_text(json.dumps(settings, indent=2, default=str) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except GrpoToolkitError as error:
        print(f"recipes/grpo.py: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
