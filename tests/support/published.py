"""Published folders made whole: the JSON of `tests/data/published`, real headers over sparse files, a tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from scripts.models.published_shapes import SHAPES, write_weights

PUBLISHED = Path(__file__).parents[1] / "data" / "published"
NAMES = sorted(path.name for path in PUBLISHED.iterdir())
_SHARDS = {"qwen2_5_vl_72b": 31, "qwen2_5_vl_3b": 2, "llava_1_5_7b": 3, "gemma_3_4b": 2, "gemma_2_2b": 2}


def build_published(name: str, target: Path) -> Path:
    """Write one published folder."""
    shutil.copytree(PUBLISHED / name, target)
    config = json.loads((target / "config.json").read_text(encoding="utf-8"))
    dtype = {"bfloat16": "BF16", "float16": "F16"}[config.get("torch_dtype") or config["text_config"]["dtype"]]
    write_weights(target, SHAPES[config["model_type"]](config), dtype=dtype, shards=_SHARDS.get(name, 1))
    (target / "tokenizer.json").write_text('{"version": "1.0", "added_tokens": [], "model": {"vocab": {}}}\n')
    return target
