"""The way from a question to a prompt: the chat template, and a tokenizer that cuts."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

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
)
from grpo_toolkit.doctor.readers import TRANSFORMERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_PICTURE: Final = re.compile(r"image|img|vision|picture|media", re.IGNORECASE)


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


UNREAD_OF_ADAPTER: Final = {Kind.ADAPTER: (TEMPLATE_JSON,)}
"""Copies that only a processor reads, where a folder has a tokenizer alone."""
_BLOCKS: Final = ("for", "if", "macro")
_TAGS: Final = re.compile(r"\{%[-+]?\s*(\w+)")


def _fault_in(template: str) -> str:
    """Return the reason why a template is not whole; empty where nothing speaks against it."""
    text = re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)
    if not text.strip():
        return "empty"
    odd = next((sign for sign in text if ord(sign) < 32 and sign not in "\t\n\r\f"), None)
    if odd is not None:
        return f"a control character (code {ord(odd)})"
    last = max(text.rfind("{%"), text.rfind("{{"))
    if last >= 0 and not re.search(r"[%}]\}", text[last + 2 :]):
        return "it ends within a tag"
    tags = _TAGS.findall(text)
    for name in _BLOCKS if "raw" not in tags else ():
        if tags.count(name) != tags.count(f"end{name}"):
            return f"{tags.count(name)} {name}, {tags.count(f'end{name}')} end{name}"
    return ""


@rule(
    Severity.UNLOADABLE,
    "chat template that is not whole",
    effect="the template does not compile (TemplateSyntaxError), or writes control characters into every prompt",
    evidence="https://huggingface.co/docs/transformers/chat_templating_writing",
    mend="the base's template",
)
def chat_template_broken(folder: Folder) -> Iterator[Fault]:
    for file, text in folder.templates.items():
        fault = _fault_in(text)
        if not fault or file in UNREAD_OF_ADAPTER.get(folder.kind, ()):
            continue
        is_file = file == TEMPLATE_JINJA
        right = None if folder.base is None else folder.base.templates.get(file)
        whole, edit = WholeFile(file=file, content=None), Edit(file=file, path=("chat_template",), value=right)
        yield Fault(
            file=file,
            key="" if is_file else "chat_template",
            found=fault,
            expected="a whole template",
            remedies=() if right is None else (whole if is_file else edit,),
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
