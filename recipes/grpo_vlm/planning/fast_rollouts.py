"""The memory that fast rollouts keep for the whole run, and where they are planned.

`FastRolloutCallback` decides for itself before training, from what is free then. What the training will take at its
peak is the plan's to say, so where there is no room for both it is told "plain".
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from packaging.version import Version

if TYPE_CHECKING:
    from trl import GRPOConfig, ModelConfig

    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.planning.memory import Load, ModelSize, Sharing

OLDEST = "5.24"
"""The first transformers that `FastRolloutCallback` takes."""

GRAPHS = 1e9
"""Bytes for what CUDA graphs and a compiled step's kernels keep."""

SHORTEST = 256
"""Tokens that the shortest static cache holds."""


def are_planned(recipe: RecipeArguments, training: GRPOConfig, model: ModelConfig, *, sharing: Sharing) -> bool:
    """Return whether rollouts would go the fast way on a GPU with room for them."""
    elsewhere = training.use_vllm or training.use_transformers_continuous_batching
    sharded = sharing not in ("none", "ddp") or getattr(training, "deepspeed_plugin", None) is not None
    quantised = model.load_in_4bit or model.load_in_8bit
    # A plan made where there is no GPU is for one.
    is_for_a_gpu = not training.use_cpu or recipe.dry_run
    known = Version(version("transformers")) >= Version(OLDEST)
    return recipe.fast_rollouts and is_for_a_gpu and known and not (elsewhere or sharded or quantised or training.fp16)


def kept_bytes(size: ModelSize, load: Load, *, weight_bytes: float, casts: bool) -> float:
    """Return the bytes of the weights' copy, the static KV cache and the graphs.

    Args:
        size, load: of the run.
        weight_bytes: of a weight as loaded.
        casts: whether forwards compute in bfloat16 what is loaded in float32.
    """
    copied = 0.0
    if casts:
        copied = 2.0 * size.parameters
    elif size.is_adapter:  # folded into the weights that have one, which are the layers' matrices at most
        copied = weight_bytes * size.layers * size.layer_parameters
    slots = load.rollout_batch * cache_length(load.prompt_tokens + load.completion_tokens)
    value_bytes = 2.0 if casts else weight_bytes
    return copied + size.kv_values_per_token * slots * value_bytes + GRAPHS


def cache_length(tokens: int) -> int:
    """Return how long the cache for so many tokens is: a power of two, or halfway between two."""
    length = SHORTEST
    while length < tokens:
        length = length * 3 // 2 if length & (length - 1) == 0 else length * 4 // 3
    return length
