"""The tokenizer and processor of an export: the base's own files, unless training changed them."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import Any

from grpo_toolkit.inference import has_processor, load_processor
from grpo_toolkit.portable import carried_files, copy_files, differing_files


def processor_of(folder: Path) -> Any:
    """The folder's processor or tokenizer, or None where it has none."""
    return load_processor(folder) if has_processor(folder) else None


def write_processor(processor: Any, base: Path, staging: Path) -> list[str]:
    """Carry the base's tokenizer and processor files, unless training changed the processor; returns what changed.

    Whether it did is found by saving both with this library and comparing the files.
    """
    original = processor_of(base)
    if processor is not None and original is not None:
        trained = _without_rollout_settings(processor, original)
        with tempfile.TemporaryDirectory(prefix="grpo-toolkit-processor-") as folder:
            left, right = Path(folder, "base"), Path(folder, "trained")
            original.save_pretrained(left)
            trained.save_pretrained(right)
            changed = differing_files(left, right)
            if changed:
                copy_files(sorted(path for path in right.rglob("*") if path.is_file()), right, staging)
                return changed
    elif processor is not None:
        processor.save_pretrained(staging)
        return ["(tokenizer and processor)"]
    copy_files(carried_files(base), base, staging)
    return []


def _without_rollout_settings(processor: Any, original: Any) -> Any:
    """A copy of the trained processor with the padding and truncation of the original.

    TRL pads and truncates on the left for its rollouts, and every padded batch leaves its settings in the tokenizer's
    backend, from where they would be saved into tokenizer.json.
    """
    copied = copy.deepcopy(processor)
    ours, theirs = (getattr(one, "tokenizer", one) for one in (copied, original))
    ours.padding_side, ours.truncation_side = theirs.padding_side, theirs.truncation_side
    for tokenizer in (ours, theirs):
        if hasattr(tokenizer, "backend_tokenizer"):
            tokenizer.backend_tokenizer.no_padding()
            tokenizer.backend_tokenizer.no_truncation()
    return copied
