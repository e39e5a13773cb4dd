"""The choice of how rollouts are made, as far as settings and the model's class tell before training.

`FastRolloutCallback` decides for itself when training begins, from what is free then. What the training will take at
its peak is the plan's to say, so where there is no room for both the callback is told "plain".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_vlm.planning.sharing import keeps_weights_elsewhere

if TYPE_CHECKING:
    from trl import GRPOConfig, ModelConfig

    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.planning.memory import ModelSize


def why_plain(recipe: RecipeArguments, training: GRPOConfig, model: ModelConfig, size: ModelSize) -> str | None:
    """Return why rollouts would not go the fast way on a GPU with room for them; None where they would."""
    if not recipe.fast_rollouts:
        return "--fast_rollouts false"
    if training.use_vllm:
        return "vLLM makes them"
    if training.use_transformers_continuous_batching:
        return "continuous batching makes them"
    if training.use_cpu and not recipe.dry_run:  # a plan made where there is no GPU is for one
        return "decode steps are compiled for CUDA alone"
    if training.fp16:
        return "float16 has no range for what layers pass on, outside of autocast"
    if model.load_in_4bit or model.load_in_8bit:
        return "the base is quantised"
    return keeps_weights_elsewhere(training) or size.rollouts.why_plain
