"""The names of the files in a model folder, and the kinds of folders that they make."""

from __future__ import annotations

import enum
from typing import Final

CONFIG: Final = "config.json"
GENERATION_CONFIG: Final = "generation_config.json"
ADAPTER_CONFIG: Final = "adapter_config.json"
MANIFEST: Final = "grpo_toolkit.json"
WEIGHTS: Final = "model.safetensors"
WEIGHTS_INDEX: Final = "model.safetensors.index.json"
ADAPTER_WEIGHTS: Final = "adapter_model.safetensors"


class Kind(enum.Enum):
    """The content of a folder."""

    MODEL = "full model"
    ADAPTER = "adapter"
    FSDP = "sharded FSDP checkpoint"
    DEEPSPEED = "DeepSpeed ZeRO checkpoint"
    FOREIGN = "checkpoint of another trainer"
