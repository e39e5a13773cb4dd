"""Tokenizers and processors for tiny models of many families, built offline, with pictures of a few patches."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from scripts.models.tiny_bases import LLAVA_TEMPLATE, byte_tokenizer

if TYPE_CHECKING:
    from pathlib import Path

_SQUARE: Final = {"height": 28, "width": 28}
_CUT: Final = {"size": {"shortest_edge": 28}, "crop_size": _SQUARE}
_CLIP: Final = {"patch_size": 14, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
_SPANS: Final = {"patch_size": 14, "size": {"shortest_edge": 28 * 28, "longest_edge": 56 * 56}}
_BETWEEN: Final = {"images": _SPANS, "marker": "<boi><image><eoi>"}
GRID: Final = [[28, 56], [56, 28], [56, 56]]

PICTURES: Final[dict[str, dict[str, Any]]] = {
    "gemma3": {"images": {"size": _SQUARE}, "processor": {"image_seq_length": 4}, "marker": "<boi>"},
    "paligemma": {"images": {"size": _SQUARE, "image_seq_length": 4}},
    "llava": {"images": _CUT, "processor": _CLIP},
    "llava_next": {"images": {**_CUT, "image_grid_pinpoints": GRID}, "processor": _CLIP},
    "llava_onevision": {
        "images": {"size": _SQUARE, "image_grid_pinpoints": GRID},
        "processor": {"num_image_tokens": 4, "vision_feature_select_strategy": "full"},
    },
    "vipllava": {"images": _CUT, "processor": _CLIP},
    "aya_vision": {
        "images": {"size": _SQUARE},
        "processor": {"patch_size": 14, "img_size": 28, "downsample_factor": 2, "img_patch_token": "<image>"},
    },
    "mistral3": {
        "images": {"size": {"longest_edge": 28}, "patch_size": 14},
        "processor": {
            "patch_size": 14, "image_token": "<image>", "image_break_token": "<boi>", "image_end_token": "<eoi>",
        },
    },
    "idefics3": {
        "images": {
            "size": {"longest_edge": 28}, "max_image_size": {"longest_edge": 28}, "do_image_splitting": False,
        },
        "processor": {"image_seq_len": 1},
    },
    "internvl": {"images": {"size": _SQUARE}, "processor": {"image_seq_length": 1}},
    "qwen2_vl": _BETWEEN,
    "qwen2_5_vl": _BETWEEN,
    "qwen3_vl": _BETWEEN,
    "qwen3_vl_moe": _BETWEEN,
    "qwen3_5": _BETWEEN,
    "qwen3_5_moe": _BETWEEN,
    "glm4v": _BETWEEN,
    "mllama": {"images": {"size": _SQUARE, "max_image_tiles": 1}},
}  # fmt: skip
"""Settings of each family's image processor and processor, and what stands for a picture in the template."""

# Attributes that processors look for on their tokenizer.
_PLACES: Final = {
    "image_token": "<image>", "video_token": "<video>", "boi_token": "<boi>", "eoi_token": "<eoi>",
    "vision_start_token": "<boi>", "vision_end_token": "<eoi>", "start_image_token": "<boi>",
    "end_image_token": "<eoi>", "context_image_token": "<image>", "audio_token": "<audio>", "boa_token": "<boa>",
    "eoa_token": "<eoa>",
}  # fmt: skip


def save_tokenizer(folder: Path) -> Any:
    """Save a byte tokenizer that knows what VLMs mark pictures with, and return it as it loads."""
    from transformers import AutoTokenizer

    byte_tokenizer(extra=sorted(set(_PLACES.values()))).save_pretrained(folder)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "extra_special_tokens": _PLACES}))
    return AutoTokenizer.from_pretrained(folder)


def build_processor(family: str, tokenizer: Any) -> Any:
    """Return a family's own processor with its own image processor."""
    import inspect

    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    processor_class: Any = getattr(transformers, PROCESSOR_MAPPING_NAMES[family])
    images = IMAGE_PROCESSOR_MAPPING_NAMES.get(_SEES_AS.get(family, family))
    videos = VIDEO_PROCESSOR_MAPPING_NAMES.get(_SEES_AS.get(family, family))
    settings = PICTURES.get(family, {})
    known: dict[str, Any] = {
        "image_processor": getattr(transformers, images["torchvision"])(**settings.get("images", {})),
        "video_processor": getattr(transformers, videos["torchvision"] if isinstance(videos, dict) else videos)()
        if videos
        else None,
        "tokenizer": tokenizer,
        "chat_template": LLAVA_TEMPLATE.replace("<image>", settings.get("marker", "<image>")),
        "patch_size": 14,
        **settings.get("processor", {}),
    }
    wanted = inspect.signature(processor_class.__init__).parameters
    return processor_class(**{name: value for name, value in known.items() if name in wanted and value is not None})


_SEES_AS: Final = {"qwen3_vl_moe": "qwen3_vl", "vipllava": "llava"}  # where the library has no row
