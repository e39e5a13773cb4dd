"""The way in which a run's processes share out the model, and whether what they save has weights in it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trl import GRPOConfig

    from grpo_vlm.planning.memory import Sharing

_OFFLOADED = "the weights lie on the CPU between two steps"


def find_sharing(training: GRPOConfig) -> Sharing:
    """Return how `accelerate launch` or the training arguments spread the model over the processes."""
    plugin = getattr(training, "deepspeed_plugin", None)
    if plugin is not None:
        stages: dict[int, Sharing] = {2: "zero2", 3: "zero3"}
        return stages.get(plugin.zero_stage, "ddp")
    if _is_on("ACCELERATE_USE_FSDP") or getattr(training, "fsdp", None):
        return "fsdp"
    return "ddp" if training.world_size > 1 else "none"


def reshards_after_forward(training: GRPOConfig) -> bool:
    """Return whether FSDP gives the weights of a layer back after its forward, its default."""
    setting = _fsdp_setting(training, "reshard_after_forward")
    return str(setting).lower() not in ("false", "shard_grad_op", "2")  # FSDP2's word, FSDP1's, and its number


def keeps_weights_elsewhere(training: GRPOConfig) -> str | None:
    """Return why no process can gather the weights for rollouts of its own, in a few words; None where it can."""
    if find_sharing(training) == "fsdp":
        # `accelerate launch` takes the first one unless told; the training arguments the second.
        version = _fsdp_setting(training, "version") or (1 if _is_on("ACCELERATE_USE_FSDP") else 2)
        if int(version) == 1:
            return "the first FSDP keeps the weights"
        offloads = (str(_fsdp_setting(training, name)).lower() for name in ("offload_params", "cpu_offload"))
        return _OFFLOADED if any(value in ("true", "1") for value in offloads) else None
    plugin = getattr(training, "deepspeed_plugin", None)
    stage = {} if plugin is None else plugin.deepspeed_config.get("zero_optimization", {})
    return _OFFLOADED if (stage.get("offload_param") or {}).get("device", "none") != "none" else None


def save_errors(training: GRPOConfig) -> list[str]:
    """Return settings under which a save has no weights in it (`save_model` then writes nothing, or a stub)."""
    errors = []
    state_dict = _fsdp_setting(training, "state_dict_type")
    if find_sharing(training) == "fsdp" and str(state_dict) in ("SHARDED_STATE_DICT", "LOCAL_STATE_DICT"):
        errors.append(
            f"fsdp_state_dict_type {state_dict}: checkpoints get no config, tokenizer or safetensors, and save_model "
            "writes nothing; set fsdp_state_dict_type: FULL_STATE_DICT (recipes/accelerate/fsdp2.yaml)"
        )
    plugin = getattr(training, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3 and not plugin.zero3_save_16bit_model:
        errors.append(
            "ZeRO-3 without zero3_save_16bit_model: checkpoints get no weights; set it to true "
            "(recipes/accelerate/zero3.yaml)"
        )
    return errors


def _fsdp_setting(training: GRPOConfig, name: str) -> Any:
    """Read a setting from the environment, where `accelerate launch` puts it, or from the training arguments."""
    given = os.environ.get(f"FSDP_{name.upper()}")
    return given if given is not None else (training.fsdp_config or {}).get(name)


def _is_on(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true", "yes")
