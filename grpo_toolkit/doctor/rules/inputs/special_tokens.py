"""The special tokens that a tokenizer's config names, against its vocabulary, the base's and a processor's wants."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.model_folder import Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.installed_classes import class_source
from grpo_toolkit.doctor.parsed_folder import TOKENIZER_CONFIG, token_text
from grpo_toolkit.doctor.readers import ALL, SINCE_5, TRAINER, V4, without

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_STANDARD: Final = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""The special tokens that every tokenizer has a place for (`SPECIAL_TOKENS_ATTRIBUTES`); others are named freely."""


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
        elif group == "extra_special_tokens" and group in content:
            yield Fault(file=TOKENIZER_CONFIG, key=group, found=None, expected="an object, or nothing", fails=V4)
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
        text = token_text(folder.get(TOKENIZER_CONFIG, key))
        if text is None or text not in folder.tokenizer.unknown:
            continue
        is_published_so = base is not None and text in base.unknown
        if text and not is_published_so and not _gets_its_id_again(folder, text):
            yield Fault(
                file=TOKENIZER_CONFIG,
                key=key,
                found=text,
                expected="a token of the vocabulary",
                # generate() takes its ids from generation_config.json; vLLM pads nothing.
                fails=without(ALL, "vllm") if key == "pad_token" else f"vllm; sglang; {TRAINER}",
            )


def _gets_its_id_again(folder: Folder, text: str) -> bool:
    """Return whether readers, which add what a tokenizer does not have behind its last id, give a token the base's."""
    own = folder.tokenizer
    named = {_token(folder, key): None for key in _STANDARD}
    added = [one for one in named if own is not None and one in own.unknown]
    known = {} if folder.base is None else folder.base.added_tokens or {}
    return own is not None and text in added and known.get(text) == own.size + added.index(text)


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
    source = _processor_of(base)
    for key in ("pad_token", *_tokens_of_pictures(base)):
        if folder.kind is Kind.ADAPTER and key != "pad_token" and f"self.tokenizer.{key}" not in source:
            continue  # a processor asked for it as it was made, with the base's tokenizer
        theirs, ours = _token(base, key), _token(folder, key)
        if not theirs or ours == theirs or (key == "pad_token" and ours) or _is_in_map(folder):
            continue
        yield Fault(
            file=TOKENIZER_CONFIG,
            key=key,
            found=folder.get(TOKENIZER_CONFIG, key),
            expected=f"{theirs!r}, as in the base",
            remedies=(Edit(file=TOKENIZER_CONFIG, path=(key,), value=base.get(TOKENIZER_CONFIG, key)),),
            fails=_who_misses(key, source),
        )


def _who_misses(key: str, source: str) -> str:
    """Return the readers that miss a token of the base, by the text of its processor's class."""
    if key == "pad_token":
        return without(ALL, "vllm")  # which pads nothing
    return SINCE_5 if f'hasattr(tokenizer, "{key}")' in source else ""  # 4.x has its own name for it


def _token(folder: Folder, key: str) -> str:
    """Return the text of a special token, whichever of the places for it has it."""
    for path in ((key,), ("extra_special_tokens", key)):
        text = token_text(folder.get(TOKENIZER_CONFIG, *path))
        if text is not None:
            return text
    return ""


def _is_in_map(folder: Folder) -> bool:
    """Return whether special_tokens_map.json, which is not read here, may have them: it counts in older forms."""
    return folder.has("special_tokens_map.json") and folder.get(TOKENIZER_CONFIG, "added_tokens_decoder") is ABSENT


def _tokens_of_pictures(base: Folder) -> Iterator[str]:
    """Yield the tokens that the installed processor's class takes from its tokenizer and has no default for."""
    source = _processor_of(base)
    for key in sorted(set(re.findall(r"\btokenizer\.(\w+_token)\b", source))):
        is_asked = key not in _STANDARD or f"{{self.tokenizer.{key}}}" in source  # into every prompt with a picture
        if is_asked and f'"{_token(base, key)}" if not hasattr' not in source:
            yield key


def _processor_of(base: Folder) -> str:
    """Return the text of the installed processor's class; empty of a text model."""
    name = base.processor_class if base.is_multimodal else ""
    return class_source(name, "processing") if name else ""
