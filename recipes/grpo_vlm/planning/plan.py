"""The plan of a run, worked out before any weights load; `--dry_run` prints it and stops.

An *error* is certain to stop the run or to lose its result, and is raised. A *warning* is likely to cost time or
quality, and is printed. Each says what to change.
"""

from __future__ import annotations

import functools
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit import InputError
from grpo_vlm.data.columns import answer_types
from grpo_vlm.data.image_sizes import pixel_limits
from grpo_vlm.data.rows import named_layout
from grpo_vlm.planning.fast_rollouts import why_plain
from grpo_vlm.planning.memory import Estimate, Load, ModelSize, Sharing, estimate, measure_model
from grpo_vlm.planning.memory_lines import gib, memory_lines
from grpo_vlm.planning.preflight import missing_packages, server_warning, setting_errors, vllm_bytes, vllm_problem
from grpo_vlm.planning.sharing import find_sharing, reshards_after_forward, save_errors

if TYPE_CHECKING:
    from trl import GRPOConfig, ModelConfig

    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.data.rows import Splits

MANY_IMAGE_TOKENS = 2048
"""More for one image is rarely worth its time: a page of text is legible with fewer."""

NO_ROOM = "GPU memory has no room for a copy of the weights and a static cache"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run, in numbers. Memory and disk in bytes; `free_memory` is None without a GPU.

    `vllm_reserved` is what vLLM keeps of the GPU, None where that is not known or nothing; it needs `vllm_bytes`.
    `rollouts_plain` says why rollouts go the plain way, None where they go the fast one. Lengths are multiples of
    `padded_to`, where there is such a number.
    """

    processes: int
    sharing: Sharing
    prompts_per_step: float
    completions_per_step: int
    prompts_per_rollout: int
    steps: int
    rows: int
    prompt_tokens: int
    padded_to: int | None
    size: ModelSize
    memory: Estimate
    rollouts_plain: str | None
    free_memory: float | None
    vllm_bytes: float
    vllm_reserved: float | None
    disk: float
    free_disk: float
    errors: tuple[str, ...]
    warnings: tuple[str, ...]

    def lines(self) -> list[str]:
        """Return the plan for people, a line each."""
        trained = f"{self.size.trained / 1e6:,.1f} M of {self.size.parameters / 1e6:,.1f} M parameters"
        return [
            f"trains      {trained}{', as a LoRA adapter' if self.size.is_adapter else ''}",
            f"processes   {self.processes} ({self.sharing})",
            f"each step   {self.prompts_per_step:g} prompts, {self.completions_per_step} completions; "
            f"{self.steps} steps",
            f"rows        {self.rows}; longest prompt {self.prompt_tokens} tokens, its image included",
            f"rollouts    {self._rollouts}",
            *([f"lengths     padded to multiples of {self.padded_to} tokens"] if self.padded_to else []),
            *memory_lines(self.memory, free=self.free_memory, vllm_bytes=self.vllm_bytes),
            f"disk        {gib(self.disk):>9}  checkpoints and export ({gib(self.free_disk)} free)",
            *(f"warning     {text}" for text in self.warnings),
            *(f"error       {text}" for text in self.errors),
        ]

    @property
    def _rollouts(self) -> str:
        if self.rollouts_plain is not None:
            return f"the plain way: {self.rollouts_plain}"
        gathered = ", the weights gathered on each process once a step" if self.sharing in ("fsdp", "zero3") else ""
        return (
            f"the fast way, if the GPU has room{gathered}" if self.free_memory is None else f"the fast way{gathered}"
        )

    def short_lines(self) -> list[str]:
        """Return the plan in a line, a GPU's memory in another, and everything that it warns of."""
        trained = f"{self.size.trained:,.0f} weights{', as a LoRA adapter' if self.size.is_adapter else ''}"
        steps = f"{self.steps} steps of {self.prompts_per_step:g} prompts, {self.completions_per_step} completions"
        peak = gib(self.memory.allocated)
        memory = None if self.free_memory is None else f"{peak} at the peak ({gib(self.free_memory)} free)"
        return [
            f"plan        {steps}; {self.rows} rows{'; no GPU here' if memory is None else ''}",
            *([] if memory is None else [f"memory      {memory}; trains {trained}"]),
            *([f"processes   {self.processes} ({self.sharing})"] if self.processes > 1 else []),
            *(f"warning     {text}" for text in self.warnings),
            *(f"error       {text}" for text in self.errors),
        ]


def make_plan(
    recipe: RecipeArguments, training: GRPOConfig, model: ModelConfig, splits: Splits, *, processor: Any
) -> Plan:
    """Work the run out. Nothing is loaded or written.

    Raises:
        InputError: the adapter's targets name no module of the model.
    """
    from trl import get_peft_config

    size = measure_model(
        str(model.model_name_or_path), revision=model.model_revision, peft_config=get_peft_config(model)
    )
    sharing = find_sharing(training)
    assert splits.longest is not None, "a plan is of rows that were measured"
    prompt_tokens, image_tokens = splits.longest.prompt_tokens, splits.longest.image_tokens
    per_rollout = training.per_device_train_batch_size * (training.steps_per_generation or 1)
    padded_to = training.pad_to_multiple_of
    load = Load(
        prompt_tokens=_padded(prompt_tokens, padded_to),
        image_patches=image_tokens * (processor.image_processor.merge_size**2 if image_tokens else 0),
        completion_tokens=_padded(training.max_completion_length or 512, padded_to),
        training_batch=training.per_device_train_batch_size,
        rollout_batch=per_rollout,
        rollouts_elsewhere=training.use_vllm,
        # A group may be spread over processes: each then has its prompt.
        rollout_prompts=-(-training.generation_batch_size // training.num_generations),
    )
    total, free = gpu_memory()
    share = training.vllm_gpu_memory_utilization if training.use_vllm and training.vllm_mode == "colocate" else 0.0
    counted = functools.partial(
        estimate,
        size,
        load,
        weight_bytes=loaded_bytes(model, size),
        # A plan made where there is no GPU is for one that has bfloat16.
        mixed_precision=bool(training.bf16 or training.fp16 or (recipe.dry_run and training.use_cpu)),
        optimizer=str(getattr(training.optim, "value", training.optim)),
        sharing=sharing,
        processes=training.world_size,
        reshards=reshards_after_forward(training),
        reserved=share * total if total is not None else 0.0,
        share=share if total is None else 0.0,
        sleeps=share > 0 and training.vllm_enable_sleep_mode,
    )
    memory, rollouts_plain = counted(), why_plain(recipe, training, model, size)
    if rollouts_plain is None:
        faster = counted(fast_rollouts=True)
        if free is None or faster.needed <= free:
            memory = faster
        else:
            rollouts_plain = NO_ROOM
    completions = training.per_device_train_batch_size * training.gradient_accumulation_steps * training.world_size
    disk, free_disk = disk_needed(training, model, size), shutil.disk_usage(_existing(training.output_dir)).free
    plan = Plan(
        processes=training.world_size,
        sharing=sharing,
        prompts_per_step=completions / training.num_generations,
        completions_per_step=completions,
        prompts_per_rollout=training.generation_batch_size // training.num_generations,
        steps=training.max_steps if training.max_steps > 0 else _epoch_steps(training, len(splits.train)),
        rows=len(splits.train),
        prompt_tokens=prompt_tokens,
        padded_to=padded_to,
        size=size,
        memory=memory,
        rollouts_plain=rollouts_plain,
        free_memory=free,
        vllm_bytes=vllm_bytes(size, load, processes=training.vllm_tensor_parallel_size),
        vllm_reserved=share * total if share and total is not None else None,
        disk=disk,
        free_disk=free_disk,
        errors=(),
        warnings=(),
    )
    missing = missing_packages(training, model, formulas=has_formulas(splits))
    errors = [
        *setting_errors(training, rewards=reward_names(recipe)),
        *save_errors(training),
        *_size_errors(plan, training),
    ]
    warnings = _warnings(plan, recipe, training, processor, image_tokens=image_tokens)
    if splits.shared_images:
        warnings.append(
            f"{splits.shared_images} of {len(splits.held_out)} held-out rows show an image that is trained on: their "
            "accuracy measures memory, too; choose another --dataset_test_split, or take the images out of one of them"
        )
    if recipe.dry_run:  # which may plan for another machine
        return _with_findings(plan, errors, [*missing, *warnings])
    return _with_findings(plan, [*missing, *errors], warnings)


def check_plan(plan: Plan) -> None:
    """Raise what is certain to go wrong.

    Raises:
        InputError: every error of the plan, in one message.
    """
    if plan.errors:
        raise InputError("; ".join(plan.errors))


def gpu_memory() -> tuple[float | None, float | None]:
    """Return the bytes of this process's GPU, in all and free; None without one."""
    import torch

    if not torch.cuda.is_available():
        return None, None
    free, total = torch.cuda.mem_get_info(int(os.environ.get("LOCAL_RANK", "0")))
    return float(total), float(free)


def loaded_bytes(model: ModelConfig, size: ModelSize) -> float:
    """Return the bytes of a weight as it is loaded. Quantised weights bring scales along."""
    if model.load_in_4bit or model.load_in_8bit:
        return 0.6 if model.load_in_4bit else 1.1
    return {"auto": size.stored_bytes, "bfloat16": 2, "float16": 2}.get(str(model.dtype), 4)


def disk_needed(training: GRPOConfig, model: ModelConfig, size: ModelSize) -> float:
    """Return the bytes that the run will write: checkpoints kept (and the one being written), and the export twice."""
    weight_bytes = 4 if size.is_adapter else loaded_bytes(model, size)
    checkpoint = size.trained * weight_bytes
    if not training.save_only_model:
        checkpoint += size.trained * 2 * weight_bytes
    saves = 0
    if str(getattr(training.save_strategy, "value", training.save_strategy)) != "no":
        saves = 1 if training.save_total_limit is None else training.save_total_limit + 1
        if training.save_total_limit is None and training.max_steps > 0 and training.save_steps >= 1:
            saves = max(1, int(training.max_steps // training.save_steps))
    export = 2 * size.parameters  # bfloat16; while latency is measured a plain checkpoint lies beside it
    return float(saves * checkpoint + export + size.trained * weight_bytes)


def reward_names(recipe: RecipeArguments) -> list[str]:
    """Return the rewards asked for, or those that suit the dataset."""
    layout = named_layout(recipe)
    return recipe.reward_funcs or list(layout.reward_funcs if layout is not None else ("format", "accuracy"))


def has_formulas(splits: Splits) -> bool:
    """Return whether any answer is compared by math-verify, which `formulas.py` cannot do without."""
    return any("math" in answer_types(rows) for rows in (splits.train, splits.held_out))


def _size_errors(plan: Plan, training: GRPOConfig) -> list[str]:
    errors = []
    if plan.rows < plan.prompts_per_rollout:
        errors.append(
            f"{plan.rows} rows to train on, but each rollout takes {plan.prompts_per_rollout} prompts "
            f"({training.generation_batch_size} completions, {training.num_generations} of each): lower "
            "--per_device_train_batch_size or --steps_per_generation, or raise --num_generations"
        )
    standing = sum(plan.memory.parts.values())
    if plan.free_memory is not None and standing > plan.free_memory:
        errors.append(
            f"{', '.join(plan.memory.parts)} alone need {gib(standing)} of GPU memory, {gib(plan.free_memory)} are "
            "free: --use_peft, --optim adamw_8bit, or more GPUs with recipes/accelerate/fsdp2.yaml"
        )
    if plan.disk > plan.free_disk:
        errors.append(
            f"checkpoints and export need {gib(plan.disk)} of disk at {training.output_dir}, "
            f"{gib(plan.free_disk)} are free: lower --save_total_limit, or choose another --output_dir"
        )
    return errors


def _warnings(
    plan: Plan, recipe: RecipeArguments, training: GRPOConfig, processor: Any, *, image_tokens: int
) -> list[str]:
    warnings = [text for text in (vllm_problem(training) or server_warning(training),) if text is not None]
    if plan.free_memory is not None and plan.memory.needed > plan.free_memory:
        warnings.append(
            f"at its peak this needs about {gib(plan.memory.needed)} of GPU memory, {gib(plan.free_memory)} are "
            "free: lower --per_device_train_batch_size (and raise --gradient_accumulation_steps), "
            "--max_completion_length or --max_pixels; rollouts shrink with --steps_per_generation"
        )
    if plan.rollouts_plain == NO_ROOM:
        warnings.append(f"rollouts go the plain way: {NO_ROOM}")
    if plan.size.adapted_vision_modules:
        warnings.append(
            f"the adapter also hits {plan.size.adapted_vision_modules} modules of the vision tower, which servers "
            "ignore or refuse: anchor it, --lora_target_modules '.*language_model.*\\.(q_proj|v_proj)'"
        )
    if recipe.max_pixels is None and image_tokens > MANY_IMAGE_TOKENS:
        warnings.append(
            f"an image takes up to {image_tokens} tokens: --max_pixels {MANY_IMAGE_TOKENS * 784} would halve them at "
            "least, in training and in the export"
        )
    if training.use_vllm and recipe.max_pixels is None and pixel_limits(processor) is not None:
        warnings.append("vLLM reserves memory for the largest image that the model allows: set --max_pixels")
    if plan.vllm_reserved is not None and plan.vllm_reserved < plan.vllm_bytes:
        warnings.append(
            f"--vllm_gpu_memory_utilization is {gib(plan.vllm_reserved)} of this GPU, but vLLM's weights and the "
            f"cache of one answer need {gib(plan.vllm_bytes)}: raise it"
        )
    length = training.vllm_max_model_length
    if training.use_vllm and length and length < plan.prompt_tokens + (training.max_completion_length or 512):
        warnings.append(
            f"--vllm_max_model_length {length} is less than the longest prompt ({plan.prompt_tokens}) and completion "
            f"({training.max_completion_length}) together: vLLM would refuse or clip them"
        )
    return warnings


def _with_findings(plan: Plan, errors: list[str], warnings: list[str]) -> Plan:
    from dataclasses import replace

    return replace(plan, errors=tuple(errors), warnings=tuple(warnings))


def _epoch_steps(training: GRPOConfig, rows: int) -> int:
    prompts = training.generation_batch_size // training.num_generations
    accumulated = training.gradient_accumulation_steps / (training.steps_per_generation or 1)
    return int(rows / prompts / accumulated * training.num_train_epochs * training.num_iterations)


def _padded(tokens: int, multiple: int | None) -> int:
    return tokens if not multiple else -(-tokens // multiple) * multiple


def _existing(path: str | None) -> Path:
    """Return the folder itself, or the nearest one above it that is there."""
    folder = Path(path or ".").absolute()
    return next(parent for parent in (folder, *folder.parents) if parent.exists())
