"""Forms that one library version writes and another cannot read."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT, JsonObject, is_number
from grpo_toolkit.checkpoint.model_families import THETAS_OF_V4, is_read_otherwise, older_rotary
from grpo_toolkit.checkpoint.pixel_limits import PIXEL_LIMITS, pixel_limits
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import PREPROCESSOR, PROCESSOR, TOKENIZER, TOKENIZER_CONFIG, VIDEO_PREPROCESSOR
from grpo_toolkit.doctor.readers import V4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_BEFORE_TWO: Final = "transformers<4.56; vllm@<4.56; sglang@<4.56"
"""Those that cannot load an image processor which two files hold: "got multiple values for argument"."""

# What a nested text config says of itself rather than of the model.
_OF_THE_NESTING: Final = frozenset(
    {"model_type", "architectures", "_name_or_path", "dtype", "torch_dtype", "layer_types"}
)


@rule(
    Severity.UNLOADABLE,
    "text settings nested where the family is published flat",
    effect="transformers before 4.52 cannot load it: 'dict' object has no attribute 'to_dict'",
    evidence="https://github.com/hiyouga/EasyR1/issues/326",
    mend="the text model's keys moved to the top, as published",
    fails="transformers<4.52; vllm@<4.52; sglang@<4.52",
)
def nested_text_config(folder: Folder) -> Iterator[Fault]:
    text = folder.get(CONFIG, "text_config")
    if not isinstance(text, dict) or folder.family is None or not folder.family.is_flat:
        return
    if folder.base is not None and isinstance(folder.base.get(CONFIG, "text_config"), dict):
        return
    top = folder.objects[CONFIG]
    moved = [
        (key, value) for key, value in text.items() if key not in _OF_THE_NESTING and (key not in top or key in _INNER)
    ]
    yield Fault(
        file=CONFIG,
        key="text_config",
        found=f"an object of {len(text)} keys",
        expected="absent, its keys at the top",
        remedies=(
            *(Edit(file=CONFIG, path=(key,), value=value) for key, value in moved),
            Edit(file=CONFIG, path=("text_config",), value=ABSENT),
        ),
    )


# Where both levels have the key, the text model's own value counts.
_INNER: Final = frozenset({"use_cache", "rope_parameters", "rope_scaling", "rope_theta", "vocab_size"})


@rule(
    Severity.UNLOADABLE,
    "rotary settings in the form of transformers 5 alone",
    effect="transformers 4 fails ('NoneType' object is not subscriptable) or, worse, uses its default rope_theta and "
    "answers differently; servers on it do the same",
    evidence="https://github.com/vllm-project/vllm/pull/42624",
    mend="rope_scaling and rope_theta written beside it",
    fails=V4,
)
def rope_parameters_alone(folder: Folder) -> Iterator[Fault]:
    if _has_rope_parameters_alone(folder.base):
        return
    for level, node in folder.levels():
        rope = node.get("rope_parameters")
        is_above = not level and isinstance(node.get("text_config"), dict)  # where nobody reads it
        if not isinstance(rope, dict) or "vision" in ".".join(level) or is_above:
            continue
        model_type = str(node.get("model_type", folder.model_type))
        older = older_rotary({key: value for key, value in rope.items() if value is not None}, model_type)
        missing = {key: value for key, value in older.items() if key not in node}
        # One set of settings a layer type (Gemma 3) or a type without a row: its defaults are in the class, too.
        is_told = folder.family is not None and "rope_theta" in rope
        if not missing or not (is_told or is_read_otherwise(rope, model_type)):
            continue
        # A null is what 4.x takes anyway; so is a theta that its class has, where the other key is here.
        if missing.get("rope_scaling", ABSENT) in (ABSENT, None) and set(missing) <= {"rope_scaling"}:
            continue
        if set(missing) == {"rope_theta"} and missing["rope_theta"] == THETAS_OF_V4.get(model_type):
            continue
        yield Fault(
            file=CONFIG,
            key=".".join((*level, "rope_parameters")),
            found=rope,
            expected=f"{' and '.join(missing)} beside it",
            remedies=tuple(Edit(file=CONFIG, path=(*level, key), value=value) for key, value in missing.items()),
        )


def _has_rope_parameters_alone(base: Folder | None) -> bool:
    """Return whether the base is published in this form: then so may be what was trained from it."""
    levels = () if base is None else base.levels()
    return any("rope_parameters" in node and "rope_theta" not in node for _, node in levels)


def _is_in_v4(folder: Folder) -> bool:
    """Return whether transformers 4 knows this model type, or its text model's."""
    return folder.family is not None or any(str(node.get("model_type")) in THETAS_OF_V4 for _, node in folder.levels())


@rule(
    Severity.WRONG,
    "rope_theta inside rope_scaling alone",
    effect="transformers 5 takes it from there; transformers 4 ignores it and uses the default of its class: answers "
    "differ, without a warning",
    evidence="https://github.com/sgl-project/sglang/pull/14772",
    mend="rope_theta written beside it",
    fails=V4,
)
def theta_in_rope_scaling(folder: Folder) -> Iterator[Fault]:
    if not _is_in_v4(folder):
        return
    for level, node in folder.levels():
        scaling = node.get("rope_scaling")
        theta = scaling.get("rope_theta") if isinstance(scaling, dict) else None
        if is_number(theta) and "rope_theta" not in node and "vision" not in ".".join(level):
            yield Fault(
                file=CONFIG,
                key=".".join((*level, "rope_scaling")),
                found=scaling,
                expected=f"rope_theta {theta} beside it",
                remedies=(Edit(file=CONFIG, path=(*level, "rope_theta"), value=theta),),
            )


# What TokenizersBackend makes: https://github.com/huggingface/transformers/blob/v5.23.0/src/transformers/
# tokenization_utils_base.py (model_input_names)
_INPUT_NAMES: Final = ("input_ids", "attention_mask")


@rule(
    Severity.UNLOADABLE,
    "tokenizer class that 4.x does not know",
    effect="AutoTokenizer of transformers 4, servers on it, llama.cpp and mlx-lm stop: Tokenizer class "
    "TokenizersBackend does not exist",
    evidence="https://github.com/unslothai/unsloth/issues/8444",
    mend="the base's class, else PreTrainedTokenizerFast",
    fails=V4,
)
def tokenizers_backend(folder: Folder) -> Iterator[Fault]:
    value = folder.get(TOKENIZER_CONFIG, "tokenizer_class")
    if value not in ("TokenizersBackend", "PythonBackend") or not folder.has(TOKENIZER):
        return
    base = None if folder.base is None else folder.base.get(TOKENIZER_CONFIG, "tokenizer_class")
    if base == value:
        return
    # The generic class reads any tokenizer.json; a family's own would rebuild what that file already says.
    written = base if isinstance(base, str) else "PreTrainedTokenizerFast"
    edits: dict[str, Any] = {"tokenizer_class": written}
    if written == "PreTrainedTokenizerFast" and folder.get(TOKENIZER_CONFIG, "model_input_names") is ABSENT:
        # In 4.x it makes token_type_ids unless told otherwise, which `generate` of most models refuses.
        edits["model_input_names"] = list(_INPUT_NAMES)
    yield Fault(
        file=TOKENIZER_CONFIG,
        key="tokenizer_class",
        found=value,
        expected=written,
        remedies=tuple(Edit(file=TOKENIZER_CONFIG, path=(key,), value=new) for key, new in edits.items()),
    )


@rule(
    Severity.UNLOADABLE,
    "extra_special_tokens is a list",
    effect="transformers 4 cannot load the tokenizer: 'list' object has no attribute 'keys'",
    evidence="https://github.com/huggingface/transformers/pull/44781",
    mend="moved to additional_special_tokens, which all versions read",
    fails=V4,
)
def extra_special_tokens_list(folder: Folder) -> Iterator[Fault]:
    value = folder.get(TOKENIZER_CONFIG, "extra_special_tokens")
    if not isinstance(value, list):
        return
    if folder.base is not None and isinstance(folder.base.get(TOKENIZER_CONFIG, "extra_special_tokens"), list):
        return
    edits = [Edit(file=TOKENIZER_CONFIG, path=("extra_special_tokens",), value=ABSENT)]
    if value and folder.get(TOKENIZER_CONFIG, "additional_special_tokens") in (ABSENT, None, []):
        edits.append(Edit(file=TOKENIZER_CONFIG, path=("additional_special_tokens",), value=value))
    yield Fault(
        file=TOKENIZER_CONFIG,
        key="extra_special_tokens",
        found=value,
        expected="absent, the tokens in additional_special_tokens",
        remedies=tuple(edits),
    )


@rule(
    Severity.UNLOADABLE,
    "image processor inside processor_config.json",
    effect="transformers 4 looks for preprocessor_config.json: where there is none it loads no image processor; where "
    "both files hold one, versions before 4.56 hand the processor's class two and stop",
    evidence="https://github.com/2U1/Qwen-VL-Series-Finetune/issues/34",
    mend="the nested processors moved into files of their own",
    fails=V4,
)
def preprocessor_config_missing(folder: Folder) -> Iterator[Fault]:
    outer = folder.objects.get(PROCESSOR)
    image = folder.get(PROCESSOR, "image_processor")
    if not _is_in_v4(folder) or outer is None or not isinstance(image, dict):
        return
    if folder.base is not None and isinstance(folder.base.get(PROCESSOR, "image_processor"), dict):
        return
    remedies: list[Edit | WholeFile] = []
    files = {"image_processor": PREPROCESSOR, "video_processor": VIDEO_PREPROCESSOR}
    for key, file in files.items():
        nested = outer.get(key)
        if isinstance(nested, dict):
            if not folder.has(file):
                remedies.append(WholeFile(file=file, content=_stand_alone(nested, outer)))
            remedies.append(Edit(file=PROCESSOR, path=(key,), value=ABSENT))
    has_base_file = folder.base is not None and not folder.base.has(PROCESSOR)
    if has_base_file and set(outer) <= {*files, "processor_class"}:  # nothing else is in it
        remedies = [remedy for remedy in remedies if remedy.file != PROCESSOR]
        remedies.append(WholeFile(file=PROCESSOR, content=ABSENT))
    yield Fault(
        file=PROCESSOR,
        key="image_processor",
        found=image,
        expected=f"in {PREPROCESSOR}{' alone' if folder.has(PREPROCESSOR) else ''}",
        remedies=tuple(remedies),
        fails=_BEFORE_TWO if folder.has(PREPROCESSOR) else V4,
    )


def _stand_alone(nested: JsonObject, outer: JsonObject) -> JsonObject:
    """Return a nested processor as a file of its own, with both spellings of pixel limits: 4.49 reads only one."""
    content = copy.deepcopy(nested)
    size = content.get("size")
    if isinstance(size, dict) and {"shortest_edge", "longest_edge"} <= set(size) and "merge_size" in content:
        content.setdefault("min_pixels", size["shortest_edge"])
        content.setdefault("max_pixels", size["longest_edge"])
    if "processor_class" in outer:
        content.setdefault("processor_class", outer["processor_class"])
    return content


@rule(
    Severity.UNLOADABLE,
    "image processor class that no release has",
    effect="loading stops (Unrecognized image processor): the class existed only between two releases",
    evidence="https://github.com/QwenLM/Qwen3-VL/issues/777",
    mend="Qwen2VLImageProcessor, as the maker corrected it",
)
def unknown_image_processor(folder: Folder) -> Iterator[Fault]:
    places = ((PREPROCESSOR, ("image_processor_type",)), (PROCESSOR, ("image_processor", "image_processor_type")))
    for file, path in places:
        value = folder.get(file, *path)
        if value == "Qwen2_5_VLImageProcessor":
            yield Fault(
                file=file,
                key=".".join(path),
                found=value,
                expected="Qwen2VLImageProcessor",
                remedies=(Edit(file=file, path=path, value="Qwen2VLImageProcessor"),),
            )


# Image and video processors that resize to a number of pixels between two limits: every release since 4.50 asks for
# both edges in `size`, at loading or at the first picture. Source: `resize` of image_processing_qwen2_vl.py and of the
# classes that were made from it.
_BETWEEN_LIMITS: Final = (
    "Qwen2VL", "Qwen2_5_VL", "Qwen3VL", "Glm4v", "Glm46V", "GlmImage", "Ernie4_5_VL", "PaddleOCRVL", "VideoLlama3",
    "HunYuanVL", "MiniMaxM3VL",
)  # fmt: skip
_EDGES: Final = ("shortest_edge", "longest_edge")
_PROCESSORS: Final = (
    (PREPROCESSOR, (), "image_processor_type"),
    (PROCESSOR, ("image_processor",), "image_processor_type"),
    (VIDEO_PREPROCESSOR, (), "video_processor_type"),
    (PROCESSOR, ("video_processor",), "video_processor_type"),
)


@rule(
    Severity.UNLOADABLE,
    "pixel limits in a form that no reader takes",
    effect="4.50 to 4.57 refuse the processor (size must contain 'shortest_edge' and 'longest_edge' keys), 5.x raises "
    "at the first image, and 4.49 passes over the limits",
    evidence="https://github.com/huggingface/transformers/issues/37811",
    mend="size as shortest_edge and longest_edge, and min_pixels and max_pixels beside it",
)
def pixel_limits_unread(folder: Folder) -> Iterator[Fault]:
    for file, path, kind in _PROCESSORS:
        settings, size = folder.get(file, *path), folder.get(file, *path, "size")
        name = folder.get(file, *path, kind)
        if not isinstance(size, dict) or not isinstance(name, str) or not name.startswith(_BETWEEN_LIMITS):
            continue
        if all(is_number(size.get(edge)) for edge in _EDGES):
            continue
        limits = _limits(settings, folder.base.get(file, *path) if folder.base else ABSENT)
        outer_alone = all(is_number(settings.get(name)) for name in PIXEL_LIMITS)
        yield Fault(
            file=file,
            key=".".join((*path, "size")),
            found=size,
            expected="shortest_edge and longest_edge",
            remedies=() if limits is None else tuple(_limit_edits(file, path, limits, settings)),
            # The limits beside `size` fill it in 5.x, and are all that 4.49 reads.
            fails=_REFUSE_LIMITS if outer_alone else "",
        )


def _limit_edits(file: str, path: tuple[str, ...], limits: JsonObject, settings: JsonObject) -> Iterator[Edit]:
    yield Edit(file=file, path=(*path, "size"), value=limits)
    if "image_processor_type" in settings:  # 4.49 reads the limits of an image here, and nowhere else
        for name, edge in PIXEL_LIMITS.items():
            if not is_number(settings.get(name)):
                yield Edit(file=file, path=(*path, name), value=limits[edge])


_REFUSE_LIMITS: Final = "transformers>=4.50<5; vllm@>=4.50<5; sglang@>=4.50<5"


def _limits(settings: JsonObject, base: Any) -> JsonObject | None:
    """Return `size` in the form that is read, from the limits in another form or else from the base's."""
    for node in (settings, base):
        low, high = pixel_limits(node) if isinstance(node, dict) else (ABSENT, ABSENT)
        if is_number(low) and is_number(high):
            return {"shortest_edge": low, "longest_edge": high}
    return None
