"""Token ids against the rows of the embedding that readers look them up in."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.installed_configs import installed_defaults
from grpo_toolkit.doctor.parsed_folder import TOKENIZER, TOKENIZER_CONFIG
from grpo_toolkit.doctor.readers import ALL, TRANSFORMERS, without
from grpo_toolkit.doctor.rules.tensors.tensor_facts import ends

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder


def _padding_of_class(folder: Folder) -> Iterator[tuple[str, str, int]]:
    """Yield the padding id of the class that makes the embedding, where the config does not say one."""
    is_nested = isinstance(folder.get(CONFIG, "text_config"), dict)
    level = ("text_config",) if is_nested else ()
    own = folder.get(CONFIG, *level, "model_type")
    if isinstance(own, str) and folder.get(CONFIG, *level, _PADDING) is ABSENT:
        for number in installed_defaults(own, (), _PADDING):
            if type(number) is int:
                yield CONFIG, ".".join((*level, _PADDING)), number


def _rows(folder: Folder) -> tuple[str, int] | None:
    name = ends(folder)[1]
    shape = folder.tensors[name].shape if name else ()
    return (name, shape[0]) if name and len(shape) == 2 and shape[0] else None


def _named_ids(folder: Folder) -> Iterator[tuple[str, str, int]]:
    """Yield the ids that can come in a prompt or are waited for, each with its file and the key or the token.

    A placeholder that the config alone names (the class's own default, of a large vocabulary) comes in no prompt:
    models compare it with their ids, and look it up in no table. A padding id of the config is one where an embedding
    is made with it, and so it is the text model's; that of generation has a rule of its own.
    """
    is_nested = isinstance(folder.get(CONFIG, "text_config"), dict)
    is_in_config = folder.get(TOKENIZER_CONFIG, "added_tokens_decoder") is not ABSENT
    for token, number in (folder.added_tokens or {}).items():
        yield TOKENIZER_CONFIG if is_in_config else TOKENIZER, token, number
    for file in (GENERATION_CONFIG, CONFIG):
        for level, node in folder.levels(file):
            if file == CONFIG and level not in ((), ("text_config",)):
                continue  # towers have tokens of their own
            for key, value in node.items():
                if file == CONFIG and key.startswith("eos_") and folder.has(GENERATION_CONFIG):
                    continue  # that file says what ends an answer
                if key == _PADDING and (file == GENERATION_CONFIG or (is_nested and not level)):
                    continue
                ids = value if isinstance(value, list) else [value]
                if key.startswith("decoder_start_") and folder.get(CONFIG, "is_encoder_decoder") is not True:
                    continue
                is_placeholder = not key.startswith(("eos_", "pad_", "decoder_start_"))
                if is_placeholder and (folder.added_tokens is not None or key.startswith("bos_")):
                    continue  # a prompt begins with the tokenizer's own
                if key.endswith(("_token_id", "_token_index")) and all(type(one) is int for one in ids):
                    yield from ((file, ".".join((*level, key)), one) for one in ids)
    yield from _padding_of_class(folder)


_PADDING: Final = "pad_token_id"


@rule(
    Severity.WRONG,
    "a padding id of generation without a row in the embedding",
    effect="in transformers, a batch in which one answer ends before the others goes on with this id: an IndexError; "
    "one prompt at a time and servers never use it",
    evidence="https://huggingface.co/docs/transformers/main_classes/text_generation",
    mend="the base's id",
    fails=TRANSFORMERS,
)
def padding_beyond_rows(folder: Folder) -> Iterator[Fault]:
    rows, number = _rows(folder), folder.get(GENERATION_CONFIG, _PADDING)
    if rows is None or folder.kind is not Kind.MODEL or type(number) is not int or number < rows[1]:
        return
    right = ABSENT if folder.base is None else folder.base.get(GENERATION_CONFIG, _PADDING)
    if right != number:
        edit = Edit(file=GENERATION_CONFIG, path=(_PADDING,), value=right)  # without one, generate pads with the end
        yield Fault(
            file=GENERATION_CONFIG,
            key=_PADDING,
            found=number,
            expected=f"an id below {rows[1]}, the rows of {rows[0]}",
            remedies=() if folder.base is None else (edit,),
        )


@rule(
    Severity.WRONG,
    "token ids without a row in the embedding",
    effect="the tokenizer grew and the embedding did not: such a token ends in an IndexError, on a GPU in a "
    "device-side assert",
    evidence="https://github.com/hiyouga/LlamaFactory/pull/8823",
)
def ids_beyond_rows(folder: Folder) -> Iterator[Fault]:
    rows = _rows(folder)
    if rows is None or folder.kind is not Kind.MODEL:
        return
    name, count = rows
    beyond = [(file, key, number) for file, key, number in _named_ids(folder) if count <= number < 2**31]
    if folder.base is not None:
        theirs = {number for _, _, number in _named_ids(folder.base)}
        base_rows = _rows(folder.base)
        if base_rows is not None and base_rows[1] == count:
            beyond = [found for found in beyond if found[2] not in theirs]  # published that way
    # Gemma 3's text models share a tokenizer with the others, whose placeholder of an image has no row in them.
    ids = {number for _, key, number in beyond if not (number == count and "soft_token" in key)}
    if not ids:
        return
    file, key, _ = max(beyond, key=lambda found: found[2])
    yield Fault(
        file=file,
        key=key,
        found=f"{len(ids)} ids up to {max(ids)}",
        expected=f"ids below {count}, the rows of {name}",
        # transformers makes the embedding with the padding id; vLLM pads nothing (asked).
        fails=without(ALL, "vllm") if all(key.endswith(_PADDING) for _, key, _ in beyond) else "",
    )
