"""The tokenizer: its file, its special tokens, and what else of its config a reader cannot do without."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.installed_classes import class_source, makes_its_steps
from grpo_toolkit.doctor.parsed_folder import PROCESSOR, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_PARTS
from grpo_toolkit.doctor.readers import ALL, TRAINER, V4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_STANDARD: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer has a place for (`SPECIAL_TOKENS_ATTRIBUTES`); others are named freely."""


def _copy_of_base(folder: Folder) -> tuple[WholeFile, ...]:
    """Return a copy of the base's file, where no token was added to it."""
    base = folder.base
    is_good = base is not None and base.tokenizer is not None and base.tokenizer.fault == ""
    is_alike = base is not None and folder.added_tokens == base.added_tokens
    return (WholeFile(file=TOKENIZER, content=None),) if is_good and is_alike else ()


@rule(
    Severity.UNLOADABLE,
    "a tokenizer.json that the tokenizers library cannot read",
    effect="AutoTokenizer fails, or falls back on a class that has no vocabulary here",
    evidence="https://huggingface.co/docs/tokenizers/api/tokenizer",
    mend="the base's file, where no token was added",
)
def tokenizer_broken(folder: Folder) -> Iterator[Fault]:
    if folder.tokenizer is not None and folder.tokenizer.fault:
        yield Fault(
            file=TOKENIZER,
            key=folder.tokenizer.key,
            found=folder.tokenizer.fault,
            expected="a tokenizer as the library writes it",
            remedies=_copy_of_base(folder),
        )


@rule(
    Severity.WRONG,
    "the tokenizer cuts text otherwise than the base's",
    effect="the same text becomes other ids, or ids become other text, than in training",
    evidence="https://huggingface.co/docs/tokenizers/components",
    mend="the base's file, where no token was added",
    needs_base=True,
)
def tokenizer_differs(folder: Folder) -> Iterator[Fault]:
    ours, base = folder.tokenizer, folder.base
    if ours is None or ours.fault or base is None or base.tokenizer is None or base.tokenizer.fault:
        return
    if _class_of(folder) != _class_of(base):
        return  # a class of transformers 5 makes the steps itself, in training as in every reader since
    for part in TOKENIZER_PARTS:
        if part == "post_processor" and None in (ours.parts.get(part), base.tokenizer.parts.get(part)):
            continue  # the classes of transformers make it anew
        where = _first_difference(ours.parts.get(part), base.tokenizer.parts.get(part), part)
        if where:
            yield Fault(
                file=TOKENIZER,
                key=where,
                found="another value than the base's",
                expected="the base's",
                remedies=_copy_of_base(folder),
                fails=V4 if part != "post_processor" and _makes_its_steps(folder) else "",
            )


def _class_of(folder: Folder) -> str:
    return str(folder.get(TOKENIZER_CONFIG, "tokenizer_class")).removesuffix("Fast")


def _makes_its_steps(folder: Folder) -> bool:
    return makes_its_steps(folder.model_type, str(folder.get(TOKENIZER_CONFIG, "tokenizer_class")))


def _first_difference(ours: Any, theirs: Any, where: str) -> str:
    """Return the path of the first value that both have and that differs; releases leave out and add defaults."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        shared = (key for key in theirs if key in ours and key not in _WITHOUT_SAY.get(where, ("trim_offsets",)))
        return next(filter(None, (_first_difference(ours[key], theirs[key], f"{where}.{key}") for key in shared)), "")
    return "" if ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool) else where


_WITHOUT_SAY: Final = {
    "decoder": ("add_prefix_space", "trim_offsets", "use_regex"),
    "post_processor": ("type", "pair", "trim_offsets"),
}
"""Settings that a part does not use, or that only pairs of texts do: https://docs.rs/tokenizers/latest/tokenizers/"""


@rule(
    Severity.UNLOADABLE,
    "a special token that is no text",
    effect="AutoTokenizer fails: a special token has to be a text or an AddedToken",
    evidence="https://huggingface.co/docs/transformers/main_classes/tokenizer",
)
def special_token_no_text(folder: Folder) -> Iterator[Fault]:
    content = folder.objects.get(TOKENIZER_CONFIG, {})
    named = {key: content[key] for key in _STANDARD if content.get(key) is not None}
    for group in ("extra_special_tokens", "additional_special_tokens"):
        extra = content.get(group)
        if isinstance(extra, dict) and group != "additional_special_tokens":
            named |= {f"{group}.{key}": value for key, value in extra.items()}
        elif isinstance(extra, list):
            named |= {f"{group}.{number}": value for number, value in enumerate(extra)}
        elif extra is not None:
            named[group] = extra
    for path, value in named.items():
        is_token = isinstance(value, dict) and isinstance(value.get("content"), str)
        is_text = isinstance(value, str) or (is_token and (value.get("__type") == "AddedToken" or "." in path))
        if not is_text or path in ("extra_special_tokens", "additional_special_tokens"):
            yield Fault(file=TOKENIZER_CONFIG, key=path, found=value, expected="a text")


@rule(
    Severity.WRONG,
    "a special token that the tokenizer does not have",
    effect="it is added as a new id when the tokenizer loads: no row of the embedding is its own, and an IndexError "
    "comes with the first batch that has it",
    evidence="https://github.com/hiyouga/LlamaFactory/pull/8823",
)
def special_token_unknown(folder: Folder) -> Iterator[Fault]:
    if folder.tokenizer is None or folder.tokenizer.fault or folder.kind not in (Kind.MODEL, Kind.ADAPTER):
        return
    base = None if folder.base is None else folder.base.tokenizer
    for key in ("eos_token", "pad_token", "unk_token"):
        value = folder.get(TOKENIZER_CONFIG, key)
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or text not in folder.tokenizer.unknown:
            continue
        is_published_so = base is not None and text in base.unknown
        if text and not is_published_so:
            yield Fault(
                file=TOKENIZER_CONFIG,
                key=key,
                found=text,
                expected="a token of the vocabulary",
                # generate() takes its ids from generation_config.json.
                fails=ALL if key == "pad_token" else f"vllm; sglang; {TRAINER}",
            )


@rule(
    Severity.UNLOADABLE,
    "input names without the attention mask",
    effect="the tokenizer makes no attention mask: padded batches, processors and whoever asks for it end in a "
    "TypeError or KeyError",
    evidence="https://huggingface.co/docs/transformers/main_classes/tokenizer",
    mend="the key deleted: the class's own names count",
)
def input_names_wrong(folder: Folder) -> Iterator[Fault]:
    names = folder.get(TOKENIZER_CONFIG, "model_input_names")
    if names is not ABSENT and not (isinstance(names, list) and "attention_mask" in names):
        yield Fault(
            file=TOKENIZER_CONFIG,
            key="model_input_names",
            found=names,
            expected="a list with attention_mask, or nothing",
            remedies=(Edit(file=TOKENIZER_CONFIG, path=("model_input_names",), value=ABSENT),),
        )


@rule(
    Severity.UNLOADABLE,
    "a tokenizer class that no release has",
    effect="4.x stops (Tokenizer class ... does not exist or is not currently imported); 5 takes a general one",
    evidence="https://github.com/huggingface/transformers/issues/41553",
    mend="the base's class",
    needs_base=True,
    fails=V4,
)
def tokenizer_class_unknown(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    ours = folder.get(TOKENIZER_CONFIG, "tokenizer_class")
    theirs = ABSENT if base is None else base.get(TOKENIZER_CONFIG, "tokenizer_class")
    if (
        not isinstance(ours, str)
        or not isinstance(theirs, str)
        or folder.get(TOKENIZER_CONFIG, "auto_map") is not ABSENT
    ):
        return
    name = ours.removesuffix("Fast")
    if name == theirs.removesuffix("Fast") or name in _GENERAL or class_source(name, "tokenization"):
        return
    yield Fault(
        file=TOKENIZER_CONFIG,
        key="tokenizer_class",
        found=ours,
        expected=f"{theirs}, as in the base",
        remedies=(Edit(file=TOKENIZER_CONFIG, path=("tokenizer_class",), value=theirs),),
    )


_GENERAL: Final = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", "SentencePieceBackend")


@rule(
    Severity.WRONG,
    "special tokens of the base lost",
    effect="without a padding token a batch raises (Asking to pad but the tokenizer does not have a padding token), "
    "or is padded with the end; without the token of a picture the processor finds no place for one",
    evidence="https://github.com/huggingface/trl/issues/1311",
    mend="the base's tokens",
    needs_base=True,
)
def special_tokens_lost(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if base is None or TOKENIZER_CONFIG not in folder.objects or folder.kind not in (Kind.MODEL, Kind.ADAPTER):
        return
    for key in ("pad_token", *_tokens_of_pictures(base)):
        if folder.kind is Kind.ADAPTER and key not in ("pad_token", "image_token"):
            continue  # a processor asked for the others as it was made, with the base's tokenizer
        theirs, ours = _token(base, key), _token(folder, key)
        if not theirs or ours == theirs or (key == "pad_token" and ours) or _is_in_map(folder):
            continue
        yield Fault(
            file=TOKENIZER_CONFIG,
            key=key,
            found=folder.get(TOKENIZER_CONFIG, key),
            expected=f"{theirs!r}, as in the base",
            remedies=(Edit(file=TOKENIZER_CONFIG, path=(key,), value=base.get(TOKENIZER_CONFIG, key)),),
        )


def _token(folder: Folder, key: str) -> str:
    """Return the text of a special token, whichever of the places for it has it."""
    for path in ((key,), ("extra_special_tokens", key)):
        value = folder.get(TOKENIZER_CONFIG, *path)
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            return text
    return ""


def _is_in_map(folder: Folder) -> bool:
    """Return whether special_tokens_map.json, which is not read here, may have them: it counts in older forms."""
    return folder.has("special_tokens_map.json") and folder.get(TOKENIZER_CONFIG, "added_tokens_decoder") is ABSENT


def _tokens_of_pictures(base: Folder) -> Iterator[str]:
    """Yield the tokens that the installed processor's class takes from its tokenizer and has no default for."""
    if not base.is_multimodal:
        return
    places = ((PROCESSOR, "processor_class"), (TOKENIZER_CONFIG, "processor_class"))
    named = [value for value in (base.get(*place) for place in places) if isinstance(value, str)]
    source = class_source(named[0], "processing") if named else ""
    for key in sorted(set(re.findall(r"\btokenizer\.(\w+_token)\b", source))):
        if key not in _STANDARD and f'"{_token(base, key)}" if not hasattr' not in source:
            yield key
