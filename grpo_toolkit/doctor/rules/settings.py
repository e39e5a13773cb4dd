"""Settings beside the base's: a training changes weights, neither a model's sizes nor how pictures are made."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import PREPROCESSOR, PROCESSOR
from grpo_toolkit.doctor.readers import V4, installed_allows_null

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_LEVELS: Final = ((), ("text_config",), ("vision_config",))

# Of training, of what a call asks for, of labels, or of generation from before it had a file of its own: none of them
# changes what the model computes from its input.
# Source: the attributes of `PretrainedConfig` in transformers 4.49 and 5.24.
_WITHOUT_EFFECT: Final = frozenset(
    {"initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "dropout", "classifier_dropout"}
    | {"embd_pdrop", "resid_pdrop", "attn_pdrop", "output_attentions", "output_hidden_states", "return_dict"}
    | {"output_router_logits", "router_aux_loss_coef", "router_jitter_noise", "use_return_dict", "torchscript"}
    | {"id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "pruned_heads", "num_labels"}
    | {"remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"}
    | {"do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups", "diversity_penalty"}
    | {"max_length", "min_length", "length_penalty", "repetition_penalty", "no_repeat_ngram_size", "early_stopping"}
    | {"encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "return_dict_in_generate"}
    | {"output_scores", "forced_bos_token_id", "forced_eos_token_id", "prefix", "sep_token_id", "tokenizer_class"}
    | {"decoder_start_token_id", "cross_attention_hidden_size", "tie_encoder_decoder", "add_cross_attention"}
    | {"is_encoder_decoder", "chunk_size_feed_forward", "tf_legacy_loss", "use_bfloat16", "pretraining_tp"}
)

# What other rules judge, or what a release line writes in its own way.
_ELSEWHERE: Final = frozenset(
    {"architectures", "transformers_version", "torch_dtype", "dtype", "use_cache", "auto_map", "quantization_config"}
    | {"rope_scaling", "rope_theta", "rope_parameters", "rope_local_base_freq", "tie_word_embeddings", "vocab_size"}
    | {"bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings", "max_window_layers"}
    | {"sliding_window", "use_sliding_window", "sliding_window_pattern", "layer_types", "is_decoder"}
)


def _pairs(folder: Folder) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    """Yield a setting's path in our config, our value, and the base's, where both have one and they differ."""
    base = folder.base
    if base is None or folder.kind is not Kind.MODEL or base.kind is not Kind.MODEL:
        return
    if not folder.model_type or folder.model_type != base.model_type:
        return
    is_nested = isinstance(folder.get(CONFIG, "text_config"), dict)
    for level, node in base.levels():
        if level not in _LEVELS:
            continue
        at = () if level == ("text_config",) and not is_nested else level
        for key, theirs in node.items():
            if (
                key.startswith("_")
                or key in _ELSEWHERE
                or isinstance(theirs, dict)
                or (key == "model_type" and not at)
            ):
                continue
            ours = folder.get(CONFIG, *at, key)
            if ours is not ABSENT and not _equal(ours, theirs):
                yield (*at, key), ours, theirs


def _equal(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


def _kind(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return "number" if is_number else type(value).__name__


def _is_retyped(ours: Any, theirs: Any) -> bool:
    return None not in (ours, theirs) and _kind(ours) != _kind(theirs)


@rule(
    Severity.WRONG,
    "settings of the model differ from the base's",
    effect="the weights were trained with other sizes, functions or placeholders than the config now says: the model "
    "does not load, or computes something else",
    evidence="https://huggingface.co/docs/transformers/main_classes/configuration",
    mend="the base's values",
    needs_base=True,
)
def settings_differ(folder: Folder) -> Iterator[Fault]:
    for path, ours, theirs in _pairs(folder):
        is_of_null_setting = ours is None and not installed_allows_null(folder.model_type, path[:-1], path[-1])
        if path[-1] not in _WITHOUT_EFFECT and theirs is not None and not is_of_null_setting:
            yield _fault(path, ours, theirs)


@rule(
    Severity.UNLOADABLE,
    "settings without effect, of another type than the base's",
    effect="transformers 5 checks the types of a config as it loads: StrictDataclassFieldValidationError",
    evidence="https://huggingface.co/docs/transformers/main_classes/configuration",
    mend="the base's values",
    needs_base=True,
    fails="transformers>=5",
)
def setting_of_another_type(folder: Folder) -> Iterator[Fault]:
    yield from (
        _fault(path, ours, theirs)
        for path, ours, theirs in _pairs(folder)
        if path[-1] in _WITHOUT_EFFECT and _is_retyped(ours, theirs)
    )


def _fault(path: tuple[str, ...], ours: Any, theirs: Any) -> Fault:
    return Fault(
        file=CONFIG,
        key=".".join(path),
        found=ours,
        expected=f"{theirs!r}, as in the base",
        remedies=(Edit(file=CONFIG, path=path, value=copy.deepcopy(theirs)),),
    )


_ROPE: Final = ("rope_scaling", "rope_parameters")
_NEED_FACTOR: Final = ("linear", "dynamic", "yarn", "longrope", "llama3")


def _thetas(folder: Folder) -> dict[str, tuple[tuple[str, ...], Any]]:
    """Return every rotary base frequency by the layers that have it, with its path, wherever a release writes it."""
    found = {}
    for level in ((), ("text_config",)):
        for place in ((), *((name,) for name in _ROPE)):
            node = folder.get(CONFIG, *level, *place)
            if isinstance(node, dict):
                inner = {("", *place): node, **{(name, *place, name): one for name, one in node.items() if place}}
                for (layers, *path), one in inner.items():
                    if isinstance(one, dict) and "rope_theta" in one:
                        found[layers] = ((*level, *path, "rope_theta"), one["rope_theta"])
    return found


@rule(
    Severity.WRONG,
    "another rotary base frequency than the base's",
    effect="positions are rotated otherwise than in training: short texts come out right, and long ones get worse "
    "and worse",
    evidence="https://github.com/vllm-project/vllm/pull/42624",
    mend="the base's value",
    needs_base=True,
)
def rope_theta_differs(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if base is None or folder.kind is not Kind.MODEL or folder.model_type != base.model_type:
        return
    wanted = _thetas(base)
    for layers, (path, ours) in _thetas(folder).items():
        if layers in wanted and not _equal(ours, wanted[layers][1]):
            yield _fault(path, ours, wanted[layers][1])


@rule(
    Severity.UNLOADABLE,
    "rotary scaling without its factor",
    effect="positions cannot be computed without the factor: loading ends with a KeyError, or with a warning and NaN",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py",
)
def rope_incomplete(folder: Folder) -> Iterator[Fault]:
    for level in ((), ("text_config",)):
        for name in _ROPE:
            node = folder.get(CONFIG, *level, name)
            kind = (node.get("rope_type") or node.get("type")) if isinstance(node, dict) else None
            if isinstance(node, dict) and kind in _NEED_FACTOR and node.get("factor") is None:
                yield Fault(file=CONFIG, key=".".join((*level, name, "rope_type")), found=kind, expected="a factor")


# Names of classes, limits that a training may choose, and what belongs to a call.
_NOT_OF_PICTURES: Final = frozenset(
    {"image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "size", "min_pixels"}
    | {"max_pixels", "device", "return_tensors", "data_format", "input_data_format", "disable_grouping"}
    | {"default_to_square", "do_convert_rgb", "do_pad"}
)


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
    if folder.base is None or folder.kind is not Kind.MODEL or folder.model_type != folder.base.model_type:
        return
    file, path, ours = _image_settings(folder)
    theirs = _image_settings(folder.base)[2]
    for key, value in theirs.items():
        found = ours.get(key, ABSENT)
        if key in _NOT_OF_PICTURES or key.startswith("_") or found is ABSENT or value is None or _equal(found, value):
            continue
        if key == "crop_size" and {_kind(found), _kind(value)} == {"number", "dict"}:
            continue  # one number is a square
        yield Fault(
            file=file,
            key=".".join((*path, key)),
            found=found,
            expected=f"{value!r}, as in the base",
            remedies=(Edit(file=file, path=(*path, key), value=copy.deepcopy(value)),),
        )


def _image_settings(folder: Folder) -> tuple[str, tuple[str, ...], dict[str, Any]]:
    if PREPROCESSOR in folder.objects:
        return PREPROCESSOR, (), dict(folder.objects[PREPROCESSOR])
    inner = folder.get(PROCESSOR, "image_processor")
    return PROCESSOR, ("image_processor",), dict(inner) if isinstance(inner, dict) else {}


_OF_PROCESSOR: Final = (
    "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_seq_length",
)  # fmt: skip
"""The settings of a processor itself, beside its image processor: how many places a picture has in the prompt."""


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
    if base is None or folder.kind is not Kind.MODEL or folder.model_type != base.model_type:
        return
    for key in _OF_PROCESSOR:
        theirs, ours = base.get(PROCESSOR, key), folder.get(PROCESSOR, key)
        if theirs in (ABSENT, None) or (ours is not ABSENT and _equal(ours, theirs)):
            continue
        is_here = PROCESSOR in folder.objects
        edit = Edit(file=PROCESSOR, path=(key,), value=theirs)
        yield Fault(
            file=PROCESSOR,
            key=key,
            found=ours,
            expected=f"{theirs!r}, as in the base",
            remedies=(edit if is_here else WholeFile(file=PROCESSOR, content=None),),
        )
        if not is_here:
            return


# Source: https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/granitemoehybrid/
# configuration_granitemoehybrid.py
_LAYER_TYPES_OF_V4: Final = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}


@rule(
    Severity.UNLOADABLE,
    "kinds of layers under the names of transformers 5",
    effect="4.x knows other names and fails: layer_types must be a list of mamba and attention",
    evidence="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/granitemoehybrid/"
    "configuration_granitemoehybrid.py",
    mend="the older names, which every release reads",
    fails=V4,
)
def layer_types_renamed(folder: Folder) -> Iterator[Fault]:
    names, kinds = _LAYER_TYPES_OF_V4.get(folder.model_type, {}), folder.get(CONFIG, "layer_types")
    if not isinstance(kinds, list) or not any(kind in names for kind in kinds if isinstance(kind, str)):
        return
    if folder.base is not None and folder.base.get(CONFIG, "layer_types") == kinds:
        return
    older = [names.get(kind, kind) if isinstance(kind, str) else kind for kind in kinds]
    edit = Edit(file=CONFIG, path=("layer_types",), value=older)
    yield Fault(file=CONFIG, key="layer_types", found=kinds, expected=str(older), remedies=(edit,))
