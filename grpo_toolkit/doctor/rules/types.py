"""Values of a type that no reader takes: of the keys that libraries read, and by what the installed classes say."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import (
    ADAPTER_CONFIG,
    CONFIG,
    GENERATION_CONFIG,
    WEIGHTS_INDEX,
)
from grpo_toolkit.checkpoint.json_files import ABSENT, is_number
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.installed_classes import makes_dropout, reads_setting
from grpo_toolkit.doctor.installed_configs import installed_takes
from grpo_toolkit.doctor.parsed_folder import PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG
from grpo_toolkit.doctor.readers import ALL, SERVERS, SINCE_5, TRANSFORMERS, V4
from grpo_toolkit.doctor.rules.tensors.tensor_facts import weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

DTYPES: Final = ("torch_dtype", "dtype")
_TYPES: Final[tuple[tuple[str, tuple[str, ...], tuple[type, ...]], ...]] = (
    (CONFIG, ("architectures",), (list,)),
    (CONFIG, ("model_type",), (str,)),
    (CONFIG, ("text_config",), (dict,)),
    (CONFIG, ("vision_config",), (dict,)),
    (CONFIG, ("vocab_size",), (int,)),
    (CONFIG, ("num_hidden_layers",), (int,)),
    (CONFIG, ("hidden_size",), (int,)),
    (CONFIG, ("tie_word_embeddings",), (bool,)),
    (CONFIG, ("rope_scaling",), (dict,)),
    (CONFIG, ("rope_parameters",), (dict,)),
    (CONFIG, ("rope_theta",), (int, float)),
    (CONFIG, ("quantization_config",), (dict,)),
    (CONFIG, ("eos_token_id",), (int, list)),
    *((CONFIG, (*level, key), (str,)) for level in ((), ("text_config",), ("vision_config",)) for key in DTYPES),
    (GENERATION_CONFIG, ("do_sample",), (bool,)),
    (GENERATION_CONFIG, ("eos_token_id",), (int, list)),
    (GENERATION_CONFIG, ("pad_token_id",), (int,)),
    (GENERATION_CONFIG, ("bos_token_id",), (int, list)),
    (GENERATION_CONFIG, ("output_hidden_states",), (bool,)),
    (GENERATION_CONFIG, ("temperature",), (int, float)),
    (GENERATION_CONFIG, ("top_p",), (int, float)),
    (GENERATION_CONFIG, ("top_k",), (int,)),
    (ADAPTER_CONFIG, ("base_model_name_or_path",), (str,)),
    (ADAPTER_CONFIG, ("lora_alpha",), (int, float)),
    (ADAPTER_CONFIG, ("r",), (int,)),
    (ADAPTER_CONFIG, ("target_modules",), (str, list)),
    (TOKENIZER_CONFIG, ("tokenizer_class",), (str,)),
    (TOKENIZER_CONFIG, ("model_max_length",), (int, float)),
    (TOKENIZER_CONFIG, ("chat_template",), (str, list, dict)),
    (TOKENIZER_CONFIG, ("eos_token",), (str, dict)),
    (TOKENIZER_CONFIG, ("added_tokens_decoder",), (dict,)),
    (PREPROCESSOR, ("image_processor_type",), (str,)),
    (PREPROCESSOR, ("size",), (dict, int)),
    (PROCESSOR, ("image_processor",), (dict,)),
    (PROCESSOR, ("video_processor",), (dict,)),
    *((CONFIG, (*level, "pruned_heads"), (dict,)) for level in ((), ("text_config",), ("vision_config",))),
    (WEIGHTS_INDEX, ("weight_map",), (dict,)),
)
"""The types that the libraries take at the keys that they read.

Null is taken everywhere but in an index and for a list of added tokens.
"""

_FAIL: Final = {
    (CONFIG, "architectures"): SERVERS,  # transformers finds the class by the model type
    (CONFIG, "pruned_heads"): V4,  # 5 prunes nothing
    (CONFIG, "eos_token_id"): SINCE_5,  # generation asks a file of its own
}
"""Whom a value of another type concerns, where some reader does not mind."""

_JSON_NAMES: Final = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
}


@rule(
    Severity.UNLOADABLE,
    "value of the wrong type",
    effect="the library that reads it fails, or takes it for something else",
    evidence="https://huggingface.co/docs/transformers/main_classes/configuration",
)
def wrong_type(folder: Folder) -> Iterator[Fault]:
    for file, path, types in _TYPES:
        value = folder.get(file, *path)
        if value is ABSENT or (value is None and file != WEIGHTS_INDEX and path != ("added_tokens_decoder",)):
            continue
        is_right = isinstance(value, types) and not (isinstance(value, bool) and bool not in types)
        if not is_right:
            wanted = " or ".join(_JSON_NAMES[kind] for kind in types)
            fails = _FAIL.get((file, path[-1]), "")
            yield Fault(file=file, key=".".join(path), found=value, expected=wanted, fails=fails)


_SIZES: Final = frozenset(
    {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps"}
    | {
        "head_dim",
        "num_key_value_heads",
        "max_position_embeddings",
        "layer_norm_eps",
        "patch_size",
        "image_size",
        "depth",
        "num_heads",
        "vision_feature_layer",
    }
)


@rule(
    Severity.UNLOADABLE,
    "a value that the model's class does not take",
    effect="transformers 5 checks the types of a config as it loads: StrictDataclassFieldValidationError",
    evidence="https://huggingface.co/docs/transformers/main_classes/configuration",
    mend="the base's value; of a null, the key deleted, so that the class's own default counts",
    fails=SINCE_5,
)
def setting_not_taken(folder: Folder) -> Iterator[Fault]:
    if not folder.is_known or folder.get(CONFIG, "auto_map") is not ABSENT:
        return
    for level, node in folder.levels():
        if level not in ((), ("text_config",), ("vision_config",)):
            continue
        own = node.get("model_type")
        model_type = own if level and isinstance(own, str) else folder.model_type
        for key, value in node.items():
            if key not in _CHECKED and not key.startswith("_") and not installed_takes(model_type, level, key, value):
                yield _not_taken(folder, (*level, key), value)


_CHECKED: Final = frozenset({"model_type", "text_config", "vision_config", "architectures", "transformers_version"})
"""Keys of which other rules say more."""


def _not_taken(folder: Folder, path: tuple[str, ...], value: Any) -> Fault:
    right = ABSENT if folder.base is None else folder.base.get(CONFIG, *path)
    right = ABSENT if right is None else copy.deepcopy(right)
    is_mended = right is not ABSENT or value is None
    # Older releases fail as they compute with it, or look a function up by its name.
    is_of_all = not is_number(value) and path[-1] in _SIZES and (path[-1], value) != ("max_position_embeddings", None)
    is_of_all = is_of_all or (path[-1] == "hidden_act" and reads_setting(folder.model_type, path[:-1], path[-1]))
    is_of_all = is_of_all or path[-1] in ("id2label", "label2id")
    is_of_all = is_of_all or (path[-1] == "pad_token_id" and isinstance(value, list))  # of the embedding's row
    return Fault(
        file=CONFIG,
        key=".".join(path),
        found=value,
        expected="a value of its type" if right is ABSENT else f"{right!r}, as in the base",
        remedies=(Edit(file=CONFIG, path=path, value=right),) if is_mended else (),
        fails=ALL if is_of_all else "",
    )


@rule(
    Severity.UNLOADABLE,
    "a number below what it can be",
    effect="a window of no position hides every token; a negative padding id has no row: both raise as the model is "
    "made or asked",
    evidence="https://huggingface.co/docs/transformers/main_classes/configuration",
    mend="the base's value",
)
def number_too_small(folder: Folder) -> Iterator[Fault]:
    places = [(CONFIG, (*level, "sliding_window"), 1, "") for level in ((), ("text_config",))]
    for file, path, least, fails in (*places, (GENERATION_CONFIG, ("pad_token_id",), 0, V4)):
        value = folder.get(file, *path)
        if (type(value) is int and value < least) or (value is None and _needs_a_window(folder, path)):
            right = ABSENT if folder.base is None else folder.base.get(file, *path)
            edit = Edit(file=file, path=path, value=right)
            expected = f"{least} or more" if right is ABSENT else f"{right!r}, as in the base"
            remedies = () if right is ABSENT or right == value else (edit,)
            yield Fault(file=file, key=".".join(path), found=value, expected=expected, remedies=remedies, fails=fails)


@rule(
    Severity.UNLOADABLE,
    "a share of dropped values that is no share",
    effect="torch.nn.Dropout takes a probability from 0 to 1: a ValueError as the model is made",
    evidence="https://docs.pytorch.org/docs/stable/generated/torch.nn.Dropout.html",
    mend="the base's value",
    fails=TRANSFORMERS,
)
def dropout_no_share(folder: Folder) -> Iterator[Fault]:
    for level, node in folder.levels():
        for key, value in node.items():
            is_of_model = key.endswith(("dropout", "_pdrop")) and not key.startswith(("classifier", "summary"))
            if not is_of_model or not is_number(value) or 0 <= value <= 1:
                continue
            right = ABSENT if folder.base is None else folder.base.get(CONFIG, *level, key)
            edit = Edit(file=CONFIG, path=(*level, key), value=right)
            if makes_dropout(folder.model_type, key):
                yield Fault(
                    file=CONFIG,
                    key=".".join(edit.path),
                    found=value,
                    expected="0 to 1",
                    remedies=() if right is ABSENT else (edit,),
                )


def _needs_a_window(folder: Folder, path: tuple[str, ...]) -> bool:
    """Return whether a null is the size of a window that some layers have."""
    kinds = folder.get(CONFIG, *path[:-1], "layer_types")
    base = ABSENT if folder.base is None else folder.base.get(CONFIG, *path)
    is_mixed = folder.model_type in ("gemma2", "gemma3", "gemma3_text", "cohere2")  # in releases without that key
    has_such = is_mixed or (isinstance(kinds, list) and "sliding_attention" in kinds)
    return path[-1] == "sliding_window" and type(base) is int and has_such


@rule(
    Severity.UNLOADABLE,
    "no model type",
    effect="AutoConfig fails: config.json should have a model_type key",
    evidence="https://huggingface.co/docs/transformers/model_doc/auto",
    mend="the base's model_type",
)
def model_type_missing(folder: Folder) -> Iterator[Fault]:
    value = folder.get(CONFIG, "model_type")
    is_absent = value is ABSENT or value in (None, "")
    if is_absent and CONFIG in folder.objects and weights(folder) and folder.get(CONFIG, "auto_map") is ABSENT:
        right = "" if folder.base is None else folder.base.model_type
        remedies = (Edit(file=CONFIG, path=("model_type",), value=right),) if right else ()
        yield Fault(file=CONFIG, key="model_type", found=value, expected=right or "a model type", remedies=remedies)
