"""The parts of a folder against each other: ids and rows of the embedding, the config's class and the tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.model_folder import CONFIG, GENERATION_CONFIG, Kind
from grpo_toolkit.checkpoint.tensor_names import is_vision, without_wrappers
from grpo_toolkit.doctor.findings import Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import TOKENIZER, TOKENIZER_CONFIG
from grpo_toolkit.doctor.rules.tensor_facts import EMBEDDING, base_tensors, ends, new_names, weights

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

# Families whose text model has a class, and a `model_type`, of its own.
_TEXT_TYPES: Final = frozenset(
    {"llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "mixtral", "qwen2_moe"}
    | {"qwen3_moe", "qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text", "granite", "cohere2"}
)


def _rows(folder: Folder) -> tuple[str, int] | None:
    name = ends(folder)[1]
    shape = folder.tensors[name].shape if name else ()
    return (name, shape[0]) if name and len(shape) == 2 and shape[0] else None


def _named_ids(folder: Folder) -> Iterator[tuple[str, str, int]]:
    """Yield the ids that the files name, each with its file and the key or the token."""
    is_in_config = folder.get(TOKENIZER_CONFIG, "added_tokens_decoder") is not ABSENT
    for token, number in (folder.added_tokens or {}).items():
        yield TOKENIZER_CONFIG if is_in_config else TOKENIZER, token, number
    for file in (GENERATION_CONFIG, CONFIG):
        for level, node in folder.levels(file):
            if file == CONFIG and level not in ((), ("text_config",)):
                continue  # towers have tokens of their own
            for key, value in node.items():
                ids = value if isinstance(value, list) else [value]
                if key.endswith(("_token_id", "_token_index")) and all(type(one) is int for one in ids):
                    yield from ((file, ".".join((*level, key)), one) for one in ids)


def _has_the_bases_names(folder: Folder) -> bool:
    """Return whether the tensors are the base's by name, whatever class the two configs name."""
    renames = new_names(folder)
    return {renames.get(name, name) for name in weights(folder)} == set(base_tensors(folder))


@rule(
    Severity.WRONG,
    "token ids without a row in the embedding",
    effect="IndexError as soon as such a token comes, a device-side assert on a GPU: the tokenizer grew and the "
    "embedding did not",
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
    )


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
