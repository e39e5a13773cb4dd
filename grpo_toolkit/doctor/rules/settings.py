"""Settings beside the base's: a training changes weights, neither a model's sizes nor how pictures are made."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.installed_classes import reads_setting, takes_null
from grpo_toolkit.doctor.installed_configs import installed_takes, is_worked_out
from grpo_toolkit.doctor.readers import SERVERS, V4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.checkpoint.json_files import JsonObject
    from grpo_toolkit.doctor.parsed_folder import Folder

_LEVELS: Final = ((), ("text_config",), ("vision_config",))

# Of training, of what a call asks for, of labels, or of generation from before it had a file of its own: none of them
# changes what the model computes from its input.
# Source: the attributes of `PretrainedConfig` in transformers 4.49 and 5.24.
_WITHOUT_EFFECT: Final = frozenset(
    {"initializer_range", "initializer_factor", "attention_dropout", "hidden_dropout", "dropout", "classifier_dropout"}
    | {"embd_pdrop", "resid_pdrop", "attn_pdrop", "output_attentions", "output_hidden_states", "return_dict"}
    | {"router_aux_loss_coef", "vision_end_token_id", "router_jitter_noise", "use_return_dict", "torchscript"}
    | {"id2label", "label2id", "problem_type", "finetuning_task", "task_specific_params", "pruned_heads", "num_labels"}
    | {"remove_invalid_values", "exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens"}
    | {"do_sample", "temperature", "top_k", "top_p", "typical_p", "num_beams", "num_beam_groups", "diversity_penalty"}
    | {"max_length", "min_length", "length_penalty", "repetition_penalty", "no_repeat_ngram_size", "early_stopping"}
    | {"encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences", "return_dict_in_generate"}
    | {"output_scores", "forced_bos_token_id", "forced_eos_token_id", "prefix", "sep_token_id", "tokenizer_class"}
    | {"decoder_start_token_id", "cross_attention_hidden_size", "tie_encoder_decoder", "add_cross_attention"}
    | {"is_encoder_decoder", "chunk_size_feed_forward", "tf_legacy_loss", "use_bfloat16", "pretraining_tp"}
    | {"image_seq_length", "num_image_tokens", "cache_implementation", "reorder_and_upcast_attn"}
    | {"summary_type", "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout"}
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
            if ours is not ABSENT and not is_equal(ours, theirs) and not _is_said_otherwise(node, key, ours, theirs):
                yield (*at, key), ours, theirs


def _is_said_otherwise(node: JsonObject, key: str, ours: Any, theirs: Any) -> bool:
    """Return whether a value that differs says the same, or nothing at all."""
    if key == "projection_dim":
        return node.get("model_type") == "clip_vision_model"  # of CLIP's own head, which no language model has
    if ours in _GELU and theirs in _GELU:
        return True
    if key == "image_size" and node.get("model_type") == "pixtral" and type(ours) is int and type(theirs) is int:
        return ours > theirs  # the largest side that has positions
    if key == "vision_feature_layer":
        return bool(ours == [theirs] or theirs == [ours])
    hidden, heads = node.get("hidden_size"), node.get("num_attention_heads")
    if key != "head_dim" or ours is not None or not isinstance(hidden, int) or not isinstance(heads, int):
        return False
    return heads > 0 and hidden // heads == theirs and takes_null(str(node.get("model_type")), key)


_GELU: Final = ("gelu", "gelu_new", "gelu_fast", "gelu_python", "gelu_pytorch_tanh", "gelu_accurate")
"""One function, computed in several ways: they differ by less than a thousandth, as bfloat16 does by more."""


def base_of_type(folder: Folder) -> Folder | None:
    """Return the base of a model, where it is of the same type."""
    base = folder.base
    is_alike = base is not None and folder.kind is Kind.MODEL and folder.model_type == base.model_type
    return base if is_alike else None


def is_equal(one: Any, other: Any) -> bool:
    return isinstance(one, bool) == isinstance(other, bool) and bool(one == other)


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
        is_of_null_setting = ours is None and not installed_takes(folder.model_type, path[:-1], path[-1], None)
        if path[-1] in _WITHOUT_EFFECT or theirs is None or is_of_null_setting:
            continue
        if type(ours) is not type(theirs) or not is_worked_out(folder.model_type, path[:-1], path[-1]):
            # 4.x then computes an auxiliary loss at every step, and fails.
            fails = V4 if path[-1] == "output_router_logits" else "" if is_read(folder, path) else SERVERS
            yield as_in_base(CONFIG, path, ours, theirs, fails=fails)


def is_read(folder: Folder, path: tuple[str, ...]) -> bool:
    """Return whether the installed transformers asks for a setting; where it does not, servers still may."""
    level, key = path[:-1], path[-1]
    if reads_setting(folder.model_type, level, key):
        return True
    own = folder.get(CONFIG, *level, "model_type")
    return key != "model_type" and bool(level) and isinstance(own, str) and reads_setting(own, level, key)


def as_in_base(file: str, path: tuple[str, ...], ours: Any, theirs: Any, *, fails: str = "") -> Fault:
    """Return the fault of a value that should be the base's, with the edit that makes it so."""
    return Fault(
        file=file,
        key=".".join(path),
        found=ours,
        expected=f"{theirs!r}, as in the base",
        remedies=(Edit(file=file, path=path, value=copy.deepcopy(theirs)),),
        fails=fails,
    )


@rule(
    Severity.UNLOADABLE,
    "a model or a tower that answers with tuples",
    effect="4.x hands on what a part answers by its name: at the first token or picture a tuple has no such attribute",
    evidence="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/configuration_utils.py",
    mend="the key deleted",
    fails=V4,
)
def answers_with_tuples(folder: Folder) -> Iterator[Fault]:
    for level in _LEVELS:
        for key, is_so in (("return_dict", _is_false), ("torchscript", bool)):
            value = folder.get(CONFIG, *level, key)
            if value in (ABSENT, None) or not is_so(value) or (key == "torchscript" and level != ("vision_config",)):
                continue
            edit = Edit(file=CONFIG, path=(*level, key), value=ABSENT)
            fails = "" if key == "return_dict" else "transformers<4.56"
            fails = _SINCE_4_50 if level == ("text_config",) else fails
            yield Fault(
                file=CONFIG,
                key=".".join(edit.path),
                found=value,
                expected="absent",
                remedies=(edit,),
                fails=fails,
            )


_SINCE_4_50: Final = "transformers>=4.50; vllm@>=4.50; sglang@>=4.50"
"""The releases that were asked and fail (4.57, 5.24), beside one that does not (4.49)."""


def _is_false(value: Any) -> bool:
    return not value


@rule(
    Severity.UNLOADABLE,
    "kinds of layers for another number of layers",
    effect="the mask of each layer is looked up by its kind: an IndexError or KeyError as the model is made",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/configuration_utils.py",
    mend="the base's kinds",
    fails="transformers>=4.53; vllm@>=4.53; sglang@>=4.53",
)
def layer_types_too_few(folder: Folder) -> Iterator[Fault]:
    for level, node in folder.levels():
        kinds, count = node.get("layer_types"), node.get("num_hidden_layers")
        if not isinstance(kinds, list) or type(count) is not int or len(kinds) == count or level not in _LEVELS:
            continue
        right = ABSENT if folder.base is None else folder.base.get(CONFIG, *level, "layer_types")
        edit = Edit(file=CONFIG, path=(*level, "layer_types"), value=copy.deepcopy(right))
        yield Fault(
            file=CONFIG,
            key=".".join(edit.path),
            found=f"{len(kinds)} kinds",
            expected=f"{count}, as num_hidden_layers says",
            remedies=() if right is ABSENT else (edit,),
        )


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
