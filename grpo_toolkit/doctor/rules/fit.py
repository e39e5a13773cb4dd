"""The parts of a folder against each other: the config's class, its settings and the tensors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.tensor_names import is_vision, without_wrappers
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.installed_configs import installed_defaults
from grpo_toolkit.doctor.readers import SERVERS, TRANSFORMERS, installed_version
from grpo_toolkit.doctor.rules.settings import base_of_type, is_read
from grpo_toolkit.doctor.rules.tensors.tensor_facts import EMBEDDING, base_tensors, ends, new_names, weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

# Families whose text model has a class, and a `model_type`, of its own.
_TEXT_TYPES: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen2_moe"}
    | {"qwen3_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "granite", "cohere2"}
)


def _has_the_bases_names(folder: Folder) -> bool:
    """Return whether the tensors are the base's by name, whatever class the two configs name."""
    renames = new_names(folder)
    return {renames.get(name, name) for name in weights(folder)} == set(base_tensors(folder))


@rule(
    Severity.WRONG,
    "a text model's class over a multimodal model's weights",
    effect="no stored name fits the class: transformers starts every layer from random weights, with a warning, and "
    "vLLM refuses the names",
    evidence="https://github.com/unslothai/unsloth/issues/2086",
    mend="the base's config, where the tensors are the base's",
)
def class_does_not_fit(folder: Folder) -> Iterator[Fault]:
    name = ends(folder)[1]
    if folder.model_type not in _TEXT_TYPES or folder.is_multimodal or name is None:
        return
    bare = without_wrappers(name)
    if bare.startswith(("model.embed", "embed", "model.model.embed")) or not bare.endswith(EMBEDDING):
        return
    towers = sum(map(is_vision, weights(folder)))
    base = folder.base
    is_the_base = base is not None and _has_the_bases_names(folder)
    base_class = "" if base is None else f", such as the base's {base.model_type}"
    yield Fault(
        file=CONFIG,
        key="model_type",
        found=folder.model_type,
        expected=f"the class of {name}{base_class}"
        + (f"; {towers} of {len(folder.tensors)} tensors are a vision tower's" if towers else ""),
        remedies=(WholeFile(file=CONFIG, content=None),) if is_the_base else (),
    )


@rule(
    Severity.WRONG,
    "a multimodal model's class over a text model's weights",
    effect="nothing of the vision tower is stored: it starts from random weights, with a warning only",
    evidence="https://github.com/unslothai/unsloth/issues/2086",
)
def vision_tower_missing(folder: Folder) -> Iterator[Fault]:
    family = folder.family
    if family is None or not family.published or not folder.is_multimodal or not weights(folder):
        return
    if base_tensors(folder) or ends(folder)[1] is None or any(map(is_vision, weights(folder))):
        return  # beside the base `tensors-missing` counts them
    yield Fault(file=next(iter(folder.shards)), found="no tensor of a vision tower", expected="the tower's weights")


@rule(
    Severity.WRONG,
    "another model type than the base's",
    effect="the tensors are the base's by name, and the config is another class's: layers start from random weights, "
    "or nothing knows how to load it",
    evidence="https://github.com/unslothai/unsloth/issues/2086",
    mend="the base's config",
    needs_base=True,
)
def model_type_differs(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if base is None or folder.kind is not Kind.MODEL or base.kind is not Kind.MODEL or not weights(folder):
        return
    is_other = folder.model_type and base.model_type and folder.model_type != base.model_type
    if not is_other or folder.get(CONFIG, "auto_map") is not ABSENT or any(True for _ in class_does_not_fit(folder)):
        return
    if _has_the_bases_names(folder):
        yield Fault(
            file=CONFIG,
            key="model_type",
            found=folder.model_type,
            expected=f"{base.model_type}, as in the base",
            remedies=(WholeFile(file=CONFIG, content=None),),
        )


@rule(
    Severity.UNLOADABLE,
    "model type that the installed transformers does not know",
    effect="AutoConfig fails: the checkpoint is of a newer release, of a fork, or its name was changed",
    evidence="https://huggingface.co/docs/transformers/model_doc/auto",
    fails=TRANSFORMERS,
)
def model_type_unknown(folder: Folder) -> Iterator[Fault]:
    if folder.is_known is not False or folder.get(CONFIG, "auto_map") is not ABSENT:
        return
    base_type = "" if folder.base is None or folder.base.model_type == folder.model_type else folder.base.model_type
    version = ".".join(map(str, installed_version("transformers")))
    yield Fault(
        file=CONFIG,
        key="model_type",
        found=folder.model_type,
        expected=f"{base_type}, as in the base" if base_type else f"a type that transformers {version} knows",
        fails=f"transformers=={version}" if version else "",
    )


# What other rules judge, or what a release writes as it likes.
_OF_OTHER_RULES: Final = frozenset(
    {"model_type", "architectures", "transformers_version", "_name_or_path", "torch_dtype", "dtype", "use_cache"}
    | {"rope_scaling", "rope_theta", "rope_parameters", "tie_word_embeddings", "auto_map", "quantization_config"}
    | {"initializer_range", "initializer_factor", "max_window_layers", "sliding_window", "vision_end_token_id"}
    | {
        "attention_dropout",
        "hidden_dropout",
        "dropout",
        "embd_pdrop",
        "resid_pdrop",
        "attn_pdrop",
        "output_attentions",
    }
    | {"layer_types", "eos_token_id", "bos_token_id", "pad_token_id", "text_config", "vision_config"}
)


@rule(
    Severity.WRONG,
    "settings of the model lost from its config",
    effect="the class's own defaults take their place: other sizes than the tensors have, other layers, other numbers",
    evidence="https://huggingface.co/docs/transformers/main_classes/configuration",
    mend="the base's values",
    needs_base=True,
)
def settings_lost(folder: Folder) -> Iterator[Fault]:
    base = base_of_type(folder)
    if base is None or not folder.is_known:
        return
    lost = [
        (level, key, value)
        for level, node in base.levels()
        if level in ((), ("text_config",), ("vision_config",))
        for key, value in node.items()
        if key not in _OF_OTHER_RULES and value is not None and _is_lost(folder, level, key, value)
    ]
    lost.sort(key=lambda one: not is_read(base, (*one[0], one[1])))
    if lost:
        names = [".".join((*at, name)) for at, name, _ in lost]
        yield Fault(
            file=CONFIG,
            key=names[0],
            found=f"{', '.join(names[:6])} absent",
            expected=f"{lost[0][2]!r}, as in the base",
            remedies=tuple(_restored(folder, base, at, name, value) for at, name, value in lost),
            fails="" if is_read(base, (*lost[0][0], lost[0][1])) else SERVERS,
        )


def _restored(folder: Folder, base: Folder, level: tuple[str, ...], name: str, value: Any) -> Edit:
    """Return the edit that brings a setting back, or with it the whole level where that is lost."""
    at = level_in(folder, level)
    if level and (at or _has_no_level(folder, base)) and not isinstance(folder.get(CONFIG, *level), dict):
        return Edit(file=CONFIG, path=level, value=copy.deepcopy(base.get(CONFIG, *level)))
    return Edit(file=CONFIG, path=(*at, name), value=copy.deepcopy(value))


def _has_no_level(folder: Folder, base: Folder) -> bool:
    """Return whether a nested base's text model is nowhere in our config, neither nested nor flat."""
    sizes = (folder.get(CONFIG, key) for key in ("hidden_size", "num_hidden_layers"))
    return isinstance(base.get(CONFIG, "text_config"), dict) and all(size is ABSENT for size in sizes)


def level_in(folder: Folder, level: tuple[str, ...]) -> tuple[str, ...]:
    """Return where a level of the base's config is in ours: the text model's keys may lie flat or nested."""
    is_nested = isinstance(folder.get(CONFIG, "text_config"), dict)
    return () if level == ("text_config",) and not is_nested else level


def _is_nested_alike(folder: Folder) -> bool:
    """Return whether both configs tell the text model's settings from the others."""
    bases = [one for one in (folder, folder.base) if one is not None]
    return all(isinstance(one.get(CONFIG, "text_config"), dict) for one in bases)


def _is_lost(folder: Folder, level: tuple[str, ...], key: str, value: Any) -> bool:
    """Return whether a setting is nowhere in our config and no default of its class is the base's value.

    A release that saves a config leaves out what is the default: only another value is lost by it.
    """
    is_own = level == ("vision_config",) or (level == ("text_config",) and level_in(folder, level) == level)
    places = {(*level, key)} if is_own or _is_nested_alike(folder) else {(key,), ("text_config", key)}
    if any(folder.get(CONFIG, *place) is not ABSENT for place in places):
        return False
    if key == "projection_dim" and level and folder.get(CONFIG, *level, "model_type") == "clip_vision_model":
        return False  # of CLIP's own head
    base_type = None if folder.base is None else folder.base.get(CONFIG, *level, "model_type")
    model_type = base_type if level and isinstance(base_type, str) else folder.model_type
    defaults = installed_defaults(model_type, level, key)
    if key == "num_key_value_heads" and None in defaults:  # as many as heads, which only few models have
        return bool(folder.get(CONFIG, *level_in(folder, level), "num_attention_heads") != value)
    return bool(defaults) and None not in defaults and value not in defaults
