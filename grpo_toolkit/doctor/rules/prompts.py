"""The way from a question to the model's inputs: the tokenizer, the chat template, the pictures."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import (
    PREPROCESSOR,
    PROCESSOR,
    TEMPLATE_JINJA,
    TEMPLATE_JSON,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_PARTS,
)
from grpo_toolkit.doctor.readers import TRANSFORMERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_PICTURE: Final = re.compile(r"image|img|vision|picture|media", re.IGNORECASE)


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
            )


def _class_of(folder: Folder) -> str:
    return str(folder.get(TOKENIZER_CONFIG, "tokenizer_class")).removesuffix("Fast")


def _first_difference(ours: Any, theirs: Any, where: str) -> str:
    """Return the path of the first value that both have and that differs; releases leave out and add defaults."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        shared = (key for key in theirs if key in ours and key != "trim_offsets")
        return next(filter(None, (_first_difference(ours[key], theirs[key], f"{where}.{key}") for key in shared)), "")
    return "" if ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool) else where


@rule(
    Severity.UNLOADABLE,
    "a special token that is no text",
    effect="AutoTokenizer fails: a special token has to be a text or an AddedToken",
    evidence="https://huggingface.co/docs/transformers/main_classes/tokenizer",
)
def special_token_no_text(folder: Folder) -> Iterator[Fault]:
    content = folder.objects.get(TOKENIZER_CONFIG, {})
    extra = content.get("extra_special_tokens")
    named = {key: value for key, value in content.items() if key.endswith("_token") and not key.startswith("add_")}
    if isinstance(extra, dict):
        named |= {f"extra_special_tokens.{key}": value for key, value in extra.items()}
    for path, value in named.items():
        if value is not None and not isinstance(value, (str, dict)):
            yield Fault(file=TOKENIZER_CONFIG, key=path, found=value, expected="a text")


@rule(
    Severity.WRONG,
    "a special token that the tokenizer does not have",
    effect="it is added as a new id when the tokenizer loads: no row of the embedding is its own, and an IndexError "
    "comes with the first batch that has it",
    evidence="https://github.com/hiyouga/LlamaFactory/pull/8823",
)
def special_token_unknown(folder: Folder) -> Iterator[Fault]:
    if folder.tokenizer is None or folder.tokenizer.fault or folder.kind is not Kind.MODEL:
        return
    base = None if folder.base is None else folder.base.tokenizer
    for key in ("eos_token", "pad_token", "unk_token"):
        value = folder.get(TOKENIZER_CONFIG, key)
        text = value.get("content") if isinstance(value, dict) else value
        if not isinstance(text, str) or text not in folder.tokenizer.unknown:
            continue
        is_published_so = base is not None and text in base.unknown
        if text and not is_published_so:
            yield Fault(file=TOKENIZER_CONFIG, key=key, found=text, expected="a token of the vocabulary")


def _sees(folder: Folder) -> bool:
    has_processor = folder.has(PREPROCESSOR) or isinstance(folder.get(PROCESSOR, "image_processor"), dict)
    return folder.kind is Kind.MODEL and folder.is_multimodal and has_processor


def _of_the_processor(folder: Folder) -> str | None:
    """Return the file of the template that a processor takes; a tokenizer's own is none."""
    return next((file for file in (TEMPLATE_JINJA, TEMPLATE_JSON) if file in folder.templates), None)


@rule(
    Severity.WRONG,
    "tokenizer that cuts prompts",
    effect="the tokenizer was saved with the truncation of its last call: prompts with a picture are cut inside it, "
    "and the processor raises (Mismatch in `image` token count)",
    evidence="https://github.com/vllm-project/llm-compressor/pull/2917",
    mend="truncation set to null",
)
def tokenizer_cuts(folder: Folder) -> Iterator[Fault]:
    # A text model's tokenizer is told anew at each call; a processor hands on what its tokenizer was loaded with.
    limit = folder.truncation
    base = None if folder.base is None else folder.base.truncation
    if _sees(folder) and limit is not None and limit != base:
        yield Fault(
            file=TOKENIZER,
            key="truncation",
            found=limit,
            expected="null",
            remedies=(Edit(file=TOKENIZER, path=("truncation",), value=None),),
        )


@rule(
    Severity.WRONG,
    "chat template that places no picture",
    effect="the template of a text model took the place of this model's: a picture in a prompt gets no placeholder, "
    "and the processor or the model raises",
    evidence="https://github.com/hiyouga/LlamaFactory/issues/8356",
    mend="the base's template",
)
def template_without_pictures(folder: Folder) -> Iterator[Fault]:
    file = _of_the_processor(folder)
    if not _sees(folder) or file is None or _PICTURE.search(folder.templates[file]):
        return
    base = folder.base
    good = None if base is None else _of_the_processor(base)
    if base is not None and good is not None and not _PICTURE.search(base.templates[good]):
        return  # published that way
    remedies: list[WholeFile | Edit] = []
    if base is not None and good is not None:
        remedies = [WholeFile(file=good, content=None)]
        if file != good:
            remedies.append(WholeFile(file=file, content=ABSENT))
        inside = folder.templates.get(TOKENIZER_CONFIG)
        if inside is not None and not _PICTURE.search(inside):
            value = base.templates.get(TOKENIZER_CONFIG, ABSENT)
            remedies.append(Edit(file=TOKENIZER_CONFIG, path=("chat_template",), value=value))
    yield Fault(
        file=file,
        key="" if file == TEMPLATE_JINJA else "chat_template",
        found=f"{len(folder.templates[file])} characters, none of them about an image",
        expected="a template that says where an image goes" + ("" if good is None else ", as the base's"),
        remedies=tuple(remedies),
    )


@rule(
    Severity.WRONG,
    "chat template in the tokenizer's config alone",
    effect="the processor does not look there: its apply_chat_template raises (this processor does not have a chat "
    "template)",
    evidence="https://github.com/QwenLM/Qwen3-VL/issues/1488",
    mend="the same text in chat_template.json",
    fails=TRANSFORMERS,
)
def template_in_tokenizer_alone(folder: Folder) -> Iterator[Fault]:
    text = folder.templates.get(TOKENIZER_CONFIG)
    if not _sees(folder) or text is None or _of_the_processor(folder) is not None:
        return
    if isinstance(folder.get(PROCESSOR, "chat_template"), str):
        return
    base = folder.base
    if base is not None and _of_the_processor(base) is None:
        return  # published that way
    blind = not _PICTURE.search(text)
    yield Fault(
        file=TOKENIZER_CONFIG,
        key="chat_template",
        found=f"{len(text)} characters, and neither {TEMPLATE_JINJA} nor {TEMPLATE_JSON}",
        expected=f"a template in {TEMPLATE_JSON} too",
        remedies=() if blind else (WholeFile(file=TEMPLATE_JSON, content={"chat_template": text}),),
    )
