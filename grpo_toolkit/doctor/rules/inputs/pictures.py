"""The settings with which pictures are prepared, beside the base's: a training chooses limits of size, no more."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import Kind
from grpo_toolkit.checkpoint.json_files import ABSENT, is_number
from grpo_toolkit.doctor.findings import Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.installed_classes import class_source, default_in
from grpo_toolkit.doctor.parsed_folder import PREPROCESSOR, PROCESSOR, VIDEO_PREPROCESSOR
from grpo_toolkit.doctor.readers import SINCE_5
from grpo_toolkit.doctor.rules.settings import as_in_base

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

# Names of classes, limits that a training may choose, and what belongs to a call.
_NOT_OF_PICTURES: Final = frozenset(
    {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "size", "min_pixels"}
    | {"max_pixels", "device", "return_tensors", "data_format", "input_data_format", "disable_grouping"}
    | {"default_to_square", "do_convert_rgb", "do_pad"}
)


def _has_base(folder: Folder) -> bool:
    base = folder.base
    return base is not None and folder.kind is Kind.MODEL and folder.model_type == base.model_type


def _equal(one: Any, other: Any) -> bool:
    """Return whether two settings are the same to a reader, who asks of a flag only whether it is true."""
    if isinstance(other, bool) and isinstance(one, (bool, int, str)):
        return bool(one) == other
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _image_settings(folder: Folder) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    """Return the file with the settings for pictures, the path to them there, and them.

    Where a base is nested as transformers 5 writes it, its readers ask the nested ones first.
    """
    inner = folder.get(PROCESSOR, "image_processor")
    is_nested = isinstance(inner, dict) and folder.base is not None and PREPROCESSOR not in folder.base.objects
    if PREPROCESSOR in folder.objects and not is_nested:
        return PREPROCESSOR, (), dict(folder.objects[PREPROCESSOR])
    return PROCESSOR, ("image_processor",), dict(inner) if isinstance(inner, dict) else {}


@rule(
    Severity.WRONG,
    "pictures are prepared otherwise than for the base",
    effect="the tower sees pictures of another scale, mean or patch than it was trained with, or the processor raises "
    "at the first of them",
    evidence="https://huggingface.co/docs/transformers/main_classes/image_processor",
    mend="the base's values",
    needs_base=True,
)
def image_settings_differ(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if base is None or not _has_base(folder):
        return
    file, path, ours = _image_settings(folder)
    theirs = _image_settings(base)[2]
    if file in folder.refused:
        return  # `unreadable_file` says so
    source = ""
    for key, value in theirs.items():
        found = ours.get(key, ABSENT)
        if key in _NOT_OF_PICTURES or key.startswith("_") or value is None or _equal(found, value):
            continue
        if key in ("do_resize", "do_center_crop") and bool(found) == value and found is not ABSENT:
            continue  # asked whether it is true, and not checked
        if key == "crop_size" and (is_number(found) and isinstance(value, dict)):
            continue  # one number is a square
        if key == "patch_size" and base.get(PROCESSOR, key) not in (ABSENT, None) and not isinstance(found, dict):
            continue  # the processor's own is handed to it
        fails = ""
        if found is ABSENT or (found is None and key in _OF_CLASS_IN_V4):
            source = source or class_source(str(theirs.get("image_processor_type")).removesuffix("Fast"), _IMAGES)
            default = default_in(source, key)
            if found is ABSENT and default in (None, value) and not (default is None and _is_asked(base, key)):
                continue
            fails = SINCE_5 if default == value else ""
        yield as_in_base(file, (*path, key), found, value, fails=fails)


def _is_asked(base: Folder, key: str) -> bool:
    """Return whether the installed processor's class asks the one for pictures for a setting, as it is made."""
    source = class_source(base.processor_class, "processing")
    return re.search(rf'image_processor(?:\.|, "){re.escape(key)}\b', source) is not None


_IMAGES: Final = "image_processing"
_OF_CLASS_IN_V4: Final = ("image_mean", "image_std")
"""Settings of which 4.x takes a null for the class's own value."""


@rule(
    Severity.UNLOADABLE,
    "no size for pictures that the processor can take",
    effect="the processor does not load, raises at the first picture (size must have one of the following set of "
    "keys), or scales to its class's own size",
    evidence="https://huggingface.co/docs/transformers/main_classes/image_processor",
    mend="the base's size",
    needs_base=True,
)
def image_size_unusable(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if base is None or not _has_base(folder):
        return
    file, path, ours = _image_settings(folder)
    theirs, size = _image_settings(base)[2].get("size"), ours.get("size", ABSENT)
    is_here = file in folder.objects and (not path or isinstance(folder.get(file, *path), dict))
    if not isinstance(theirs, dict) or not theirs or not is_here or (is_number(size) and size > 0):
        return
    has_limits = {"min_pixels", "max_pixels"} & ours.keys()
    if has_limits and size in (ABSENT, None):
        return
    if not isinstance(size, dict) or not size:
        yield as_in_base(file, (*path, "size"), size, theirs)
        return
    if set(theirs) in _SIZES and set(size) not in _SIZES and set(theirs) < set(size):
        yield as_in_base(file, (*path, "size"), size, theirs)
        return
    for key in theirs:
        value = size.get(key, ABSENT)
        is_other_form = value is ABSENT and len(size) >= len(theirs) and not size.keys() <= theirs.keys()
        if not (is_number(value) and value > 0) and not is_other_form:
            yield as_in_base(file, (*path, "size", key), value, theirs[key])


_SIZES: Final = (
    {"height", "width"}, {"shortest_edge"}, {"shortest_edge", "longest_edge"}, {"longest_edge"},
    {"max_height", "max_width"}, {"min_pixels", "max_pixels"},
)  # fmt: skip
"""The keys that a size may have. Source: `VALID_SIZE_DICT_KEYS` of transformers' image_processing_utils.py."""


@rule(
    Severity.UNLOADABLE,
    "no size for videos that the processor can take",
    effect="the processor for videos checks the names in its size as it loads (size must have one of the following "
    "set of keys), and with it the whole processor fails",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/video_processing_utils.py",
    mend="the base's size",
    fails="transformers>=4.52; vllm@>=4.52; sglang@>=4.52",
)
def video_size_unusable(folder: Folder) -> Iterator[Fault]:
    for file, path in _VIDEOS:
        size = folder.get(file, *path, "size")
        if isinstance(size, str) or (isinstance(size, dict) and set(size) not in _SIZES):
            at = (*path, "size")
            theirs = ABSENT if folder.base is None else folder.base.get(file, *at)
            if theirs is not ABSENT:
                yield as_in_base(file, at, size, theirs)
            else:
                yield Fault(file=file, key=".".join(at), found=size, expected="one of the names that a size may have")


_VIDEOS: Final[tuple[tuple[str, tuple[str, ...]], ...]] = ((PROCESSOR, ("video_processor",)), (VIDEO_PREPROCESSOR, ()))
"""The places for the settings of videos: a file, and the path in it."""


@rule(
    Severity.WRONG,
    "another class for pictures than the base's",
    effect="the processor does not load, or prepares pictures and prompts as another model's",
    evidence="https://huggingface.co/docs/transformers/model_doc/auto#transformers.AutoImageProcessor",
    mend="the base's class",
    needs_base=True,
)
def picture_class_differs(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if base is None or not _has_base(folder):
        return
    file, path, ours = _image_settings(folder)
    theirs = _image_settings(base)[2]
    for where, at, found, wanted in (
        (file, (*path, _TYPE), ours.get(_TYPE), theirs.get(_TYPE)),
        (PROCESSOR, (_CLASS,), folder.get(PROCESSOR, _CLASS), base.get(PROCESSOR, _CLASS)),
        *_video_classes(folder, base),
        *([(PREPROCESSOR, (_CLASS,), *_classes_beside(folder, base))] if PREPROCESSOR in folder.objects else []),
    ):
        if found in (ABSENT, None) or not isinstance(wanted, str):
            continue
        if not isinstance(found, str) or found.removesuffix("Fast") != wanted.removesuffix("Fast"):
            yield as_in_base(where, at, found, wanted)


def _video_classes(folder: Folder, base: Folder) -> Iterator[tuple[str, tuple[str, ...], Any, Any]]:
    """Yield the class for videos, which a processor makes as it loads, and the base's."""
    for file, path in _VIDEOS:
        yield file, (*path, _VIDEO_TYPE), folder.get(file, *path, _VIDEO_TYPE), base.get(file, *path, _VIDEO_TYPE)


_VIDEO_TYPE: Final = "video_processor_type"


def _classes_beside(folder: Folder, base: Folder) -> tuple[Any, Any]:
    """Return the processor's class in the settings for pictures and the base's, where the processor says none."""
    if folder.get(PROCESSOR, _CLASS) not in (ABSENT, None):
        return None, None
    return folder.get(PREPROCESSOR, _CLASS), base.get(PREPROCESSOR, _CLASS)


_TYPE: Final = "image_processor_type"
_CLASS: Final = "processor_class"

_OF_PROCESSOR: Final = (
    "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_seq_length",
)  # fmt: skip
"""The settings of a processor without a default that could stand in: how many places a picture has in the prompt."""
_NOT_OF_PROCESSOR: Final = frozenset(
    {"auto_map", "processor_class", "chat_template", "image_processor", "video_processor", "feature_extractor"}
    | {"tokenizer", "audio_tokenizer", "processor_type"}
)


@rule(
    Severity.WRONG,
    "the processor's settings are lost, or differ from the base's",
    effect="a picture gets another number of places in the prompt than the tower has features, or the processor "
    "raises",
    evidence="https://huggingface.co/docs/transformers/model_doc/llava",
    mend="the base's values",
    needs_base=True,
)
def processor_settings_differ(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if base is None or not _has_base(folder):
        return
    source = ""
    is_here = PROCESSOR in folder.objects
    for key, theirs in base.objects.get(PROCESSOR, {}).items():
        ours = folder.get(PROCESSOR, key)
        if key in _NOT_OF_PROCESSOR or key.startswith("_") or theirs is None or _equal(ours, theirs):
            continue
        if ours is ABSENT and key not in _OF_PROCESSOR:
            source = source or class_source(str(base.get(PROCESSOR, "processor_class")), "processing")
            if default_in(source, key) in (None, theirs):
                continue
        if is_here:
            yield as_in_base(PROCESSOR, (key,), ours, theirs)
        else:
            remedies = (WholeFile(file=PROCESSOR, content=None),)
            yield Fault(file=PROCESSOR, key=key, expected=f"{theirs!r}, as in the base", remedies=remedies)
            return
