"""The tokenizer and processor of an export: the base's own files, unless training changed them."""

from __future__ import annotations

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.base_files import carried_files, copy_files, differing_files
from grpo_toolkit.checkpoint.json_files import ABSENT, JsonObject, dump_json, read_json
from grpo_toolkit.checkpoint.pixel_limits import PIXEL_LIMITS, pixel_limits
from grpo_toolkit.model.load import has_processor, joined, load_processor

if TYPE_CHECKING:
    from collections.abc import Iterator

PREPROCESSOR: Final = "preprocessor_config.json"
TOKENIZER_CONFIG: Final = "tokenizer_config.json"


def processor_of(folder: Path) -> Any:
    """Load the folder's processor or tokenizer, or return None where it has none."""
    return load_processor(folder) if has_processor(folder) else None


def whole_processor(processor: Any, base: Path) -> Any:
    """Return the base's processor with what a training holds of it in place of its own: most often the tokenizer.

    Text-only trainings of a vision-language model are given its tokenizer alone, and its export needs the rest, too.
    """
    original = processor_of(base)
    return original if processor is None else joined(processor, original)


def part_names(processor: Any) -> frozenset[str]:
    """Return the names of a processor's parts; a tokenizer or image processor by itself is one."""
    own = "tokenizer" if hasattr(processor, "convert_tokens_to_ids") else "image_processor"
    return frozenset(place[0] for place, _ in _parts(processor) if place) or frozenset({own})


def save_plainly(processor: Any, folder: Path) -> None:
    """Save a processor or tokenizer as its library does, past a save hook on it (`processor_hook.py`)."""
    type(processor).save_pretrained(processor, folder)


def write_processor(processor: Any, base: Path, staging: Path) -> list[str]:
    """Copy the base's tokenizer and processor files, but for the part that training changed; returns what changed.

    Whether it did is found by saving both with this library and comparing the files.
    """
    original = _like(processor, processor_of(base))
    if processor is not None and original is not None:
        trained = _without_rollout_settings(processor, original)
        with tempfile.TemporaryDirectory(prefix="grpo-toolkit-processor-") as folder:
            left, right = Path(folder, "base"), Path(folder, "trained")
            save_plainly(original, left)
            save_plainly(trained, right)
            changed = differing_files(left, right)
            limits = _pixel_limits(left, right, changed) if (base / PREPROCESSOR).is_file() else {}
            if limits:  # the base's own file says it in a form that every version reads
                copy_files(carried_files(base), base, staging)
                _write_pixel_limits(staging / PREPROCESSOR, limits)
                return [PREPROCESSOR]
            if changed:
                _copy_changed_parts(base, right, {_part_of(name) for name in changed}, staging)
                return changed
    elif processor is not None:
        save_plainly(processor, staging)
        return ["(tokenizer and processor)"]
    copy_files(carried_files(base), base, staging)
    return []


def _part_of(name: str) -> str:
    """Return what a file of a processor describes; the files of one part are taken from one folder."""
    if name.endswith("processor_config.json"):
        return "processor"
    if name.endswith(".jinja") or name == "chat_template.json":
        return "template"
    return "license" if name.startswith(("LICENSE", "NOTICE", "USE_POLICY")) else "tokenizer"


def _copy_changed_parts(base: Path, trained: Path, changed: set[str], staging: Path) -> None:
    """Copy the files of the changed parts as the trained processor has them, and the base's own of all others."""
    ours = [path for path in trained.rglob("*") if path.is_file()]
    theirs = carried_files(base)
    # A template may lie in the tokenizer's own file.
    inside = _tokenizer_config(base).get("chat_template")
    if "template" in changed and inside is not None:
        changed = changed | {"tokenizer"}
    if "tokenizer" in changed and not any(_part_of(path.name) == "template" for path in theirs):
        changed = changed | {"template"}
    copy_files([path for path in theirs if _part_of(path.name) not in changed], base, staging)
    copy_files([path for path in ours if _part_of(path.name) in changed], trained, staging)
    if "template" not in changed and inside is not None:  # transformers 5 writes it in a file that stayed behind
        config = _tokenizer_config(staging)
        if "chat_template" not in config:
            (staging / TOKENIZER_CONFIG).write_text(dump_json({**config, "chat_template": inside}), encoding="utf-8")


def _tokenizer_config(folder: Path) -> JsonObject:
    path = folder / TOKENIZER_CONFIG
    return read_json(path) if path.is_file() else {}


def _like(processor: Any, original: Any) -> Any:
    """Return the base's tokenizer where a text trainer has nothing but that of a base with images."""
    is_tokenizer = hasattr(processor, "convert_tokens_to_ids") and not hasattr(processor, "tokenizer")
    return getattr(original, "tokenizer", original) if is_tokenizer else original


def _pixel_limits(left: Path, right: Path, changed: list[str]) -> dict[str, int]:
    """Return the image processor's limits in the right folder, if the two differ in nothing else; else {}.

    Both were saved by the same library: nested in `processor_config.json` by transformers 5, before that flat in
    `preprocessor_config.json`; as `size`, or as `min_pixels` and `max_pixels`.
    """
    limits: dict[str, int] = {}
    for name in changed:
        if name not in (PREPROCESSOR, "processor_config.json"):
            return {}
        ours, theirs = (_split_limits(read_json(folder / name)) for folder in (left, right))
        if ours[0] != theirs[0]:
            return {}
        limits |= theirs[1]
    return limits


def _split_limits(content: JsonObject) -> tuple[JsonObject, dict[str, int]]:
    """Split a saved processor's settings from its pixel limits."""
    found = zip(PIXEL_LIMITS, pixel_limits(content), strict=True)
    inner = {key: value for key, value in content.get("image_processor", content).items() if key not in PIXEL_LIMITS}
    size = inner.pop("size", None) or {}
    others = {key: value for key, value in size.items() if key not in PIXEL_LIMITS.values()}
    rest = {**content, "image_processor": inner} if "image_processor" in content else inner
    return {**rest, "size": others}, {key: int(value) for key, value in found if value is not ABSENT}


def _write_pixel_limits(path: Path, limits: dict[str, int]) -> None:
    """Set the limits in the base's own file: under the keys that 4.49 reads, and in `size` if it has them there."""
    content = read_json(path)
    size = content.get("size", {})
    for key, value in limits.items():
        content[key] = value
        if PIXEL_LIMITS[key] in size:
            size[PIXEL_LIMITS[key]] = value
    path.write_text(dump_json(content), encoding="utf-8")


def _without_rollout_settings(processor: Any, original: Any) -> Any:
    """Return a copy of the trained processor with the padding and truncation of the original, in all of its parts.

    TRL pads and truncates on the left for its rollouts: a processor that it loads so gives that to each part that pads
    (Gemma 4's feature extractor, too), and every padded batch leaves its settings in the tokenizer's backend, from
    where they would be saved into tokenizer.json.
    """
    copied = copy.deepcopy(processor)
    theirs = dict(_parts(original))
    for place, ours in _parts(copied):
        for setting in ("padding_side", "truncation_side"):
            if hasattr(theirs.get(place), setting) and hasattr(ours, setting):
                setattr(ours, setting, getattr(theirs[place], setting))
    for part in (*theirs.values(), *dict(_parts(copied)).values()):
        if hasattr(part, "backend_tokenizer"):
            part.backend_tokenizer.no_padding()
            part.backend_tokenizer.no_truncation()
    return copied


def _parts(processor: Any, here: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield a processor and everything in it that is saved: tokenizer, image processor, feature extractor."""
    yield here, processor
    for name, part in vars(processor).items():
        if hasattr(part, "save_pretrained"):
            yield from _parts(part, (*here, name))
