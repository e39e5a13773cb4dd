"""Tokenizer, processor and chat template: missing, changed, or saying two things."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.model_folder import Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.pixel_limits import PIXEL_LIMITS, pixel_limits
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import (
    PREPROCESSOR,
    PROCESSOR,
    TEMPLATE_JINJA,
    TEMPLATE_JSON,
    TOKENIZER_CONFIG,
    VIDEO_PREPROCESSOR,
)
from grpo_toolkit.doctor.rules.inputs.prompts import UNREAD_OF_ADAPTER
from grpo_toolkit.doctor.rules.inputs.tokenizers import fails_without_config

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_PROCESSOR_FILES = (PREPROCESSOR, PROCESSOR, VIDEO_PREPROCESSOR)


@rule(
    Severity.UNLOADABLE,
    "no tokenizer",
    effect="AutoTokenizer and AutoProcessor find nothing to load, and servers do not start",
    evidence="https://github.com/hiyouga/EasyR1/issues/265",
    mend="the base's tokenizer files",
)
def tokenizer_missing(folder: Folder) -> Iterator[Fault]:
    is_half = folder.kind is Kind.ADAPTER and TOKENIZER_CONFIG in folder.objects
    if ((folder.kind is Kind.MODEL and folder.is_generative) or is_half) and not folder.has_tokenizer:
        yield Fault(
            file="tokenizer.json",
            expected="a tokenizer; pass --base to take the base's" if folder.base is None else "the base's tokenizer",
            remedies=_copies(folder, of_processor=False),
        )


@rule(
    Severity.UNLOADABLE,
    "empty tokenizer file",
    effect="AutoTokenizer fails, or falls back on another class",
    evidence="https://huggingface.co/docs/transformers/main_classes/tokenizer",
    mend="the base's file",
)
def tokenizer_empty(folder: Folder) -> Iterator[Fault]:
    for name in ("tokenizer.json", "tokenizer.model", "vocab.json"):
        entry = folder.entries.get(name)
        if entry is not None and entry.is_regular and not entry.is_folder and entry.size == 0:
            has_base = folder.base is not None and folder.base.has(name)
            remedies = (WholeFile(file=name, content=None),) if has_base else ()
            yield Fault(file=name, found="0 bytes", expected="a tokenizer", remedies=remedies)


@rule(
    Severity.WRONG,
    "tokenizer_config.json lost",
    effect="the tokenizer's class, its special tokens and its chat template are gone: other ids, or none at all",
    evidence="https://huggingface.co/docs/transformers/main_classes/tokenizer",
    mend="the base's file",
    needs_base=True,
)
def tokenizer_config_lost(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    is_whole = folder.kind is Kind.MODEL and folder.has_tokenizer
    if is_whole and base is not None and base.has(TOKENIZER_CONFIG) and not folder.has(TOKENIZER_CONFIG):
        fails = fails_without_config(folder)
        if fails is not None:
            remedies = (WholeFile(file=TOKENIZER_CONFIG, content=None),)
            yield Fault(file=TOKENIZER_CONFIG, expected="the base's file", remedies=remedies, fails=fails)


@rule(
    Severity.UNLOADABLE,
    "no image processor",
    effect="AutoProcessor fails: no file named preprocessor_config.json, no image can be asked about",
    evidence="https://github.com/2U1/Qwen-VL-Series-Finetune/issues/34",
    mend="the base's processor files",
)
def processor_missing(folder: Folder) -> Iterator[Fault]:
    has_any = any(folder.has(name) for name in _PROCESSOR_FILES)
    is_hollow = _is_hollow(folder) and not (folder.base is not None and _is_hollow(folder.base))
    if folder.kind is Kind.MODEL and folder.is_generative and folder.is_multimodal and (is_hollow or not has_any):
        is_nested = is_hollow and not (folder.base is not None and folder.base.has(PREPROCESSOR))
        yield Fault(
            file=PROCESSOR if is_nested else PREPROCESSOR,
            key="image_processor" if is_nested else "",
            found=folder.get(PROCESSOR, "image_processor") if is_nested else ABSENT,
            expected="a processor; pass --base to take the base's" if folder.base is None else "the base's processor",
            remedies=_copies(folder, of_processor=True),
            fails=_LATER if is_hollow else "",
        )


def _is_hollow(folder: Folder) -> bool:
    """Return whether a processor has settings, and nowhere any for pictures."""
    has_images = isinstance(folder.get(PROCESSOR, "image_processor"), dict)
    return not folder.has(PREPROCESSOR) and PROCESSOR in folder.objects and not has_images


# 4.57 makes a processor of its class's defaults; 4.49 and 5.24 do not.
_LATER = "transformers<4.50; transformers>=5; vllm@<4.50; vllm@>=5; sglang@<4.50; sglang@>=5"


def _copies(folder: Folder, *, of_processor: bool) -> tuple[WholeFile, ...]:
    """Return copies of the base's processor files, or of its other carried files, that the folder lacks."""
    if folder.base is None:
        return ()
    from grpo_toolkit.checkpoint.base_files import is_carried

    template = {TEMPLATE_JSON, TEMPLATE_JINJA}
    wanted = [
        name
        for name in sorted(folder.base.entries)
        if is_carried(name)
        and folder.base.has(name)
        and not folder.has(name)
        and (name in _PROCESSOR_FILES or name in template if of_processor else name not in _PROCESSOR_FILES)
    ]
    return tuple(WholeFile(file=name, content=None) for name in wanted)


def _image_settings(folder: Folder) -> tuple[str, Any]:
    if PREPROCESSOR in folder.objects:
        return PREPROCESSOR, folder.objects[PREPROCESSOR]
    return PROCESSOR, folder.get(PROCESSOR, "image_processor")


@rule(
    Severity.NOTE,
    "pixel limits differ from the base",
    effect="an image becomes another number of tokens: latency and accuracy change. Right only if training used them",
    evidence="https://github.com/QwenLM/Qwen3-VL/issues/959",
    needs_base=True,
)
def pixel_limits_differ(folder: Folder) -> Iterator[Fault]:
    if folder.base is None:
        return
    file, settings = _image_settings(folder)
    ours, base = pixel_limits(settings), pixel_limits(_image_settings(folder.base)[1])
    if isinstance(settings, dict) and ABSENT not in base and ours != base:
        yield Fault(
            file=file, key="size", found=list(map(str, ours)), expected=f"{base[0]} to {base[1]}, as in the base"
        )


@rule(
    Severity.WRONG,
    "pixel limits that contradict each other",
    effect="one library version makes another number of image tokens from the same picture than the next",
    evidence="https://github.com/unslothai/unsloth/issues/1747",
)
def pixel_limits_disagree(folder: Folder) -> Iterator[Fault]:
    for file, path in ((PREPROCESSOR, ()), (PROCESSOR, ("image_processor",))):
        for short, long in PIXEL_LIMITS.items():
            one, other = folder.get(file, *path, short), folder.get(file, *path, "size", long)
            if ABSENT not in (one, other) and None not in (one, other) and one != other:
                yield Fault(
                    file=file, key=".".join((*path, short)), found=one, expected=f"{other!r}, as size.{long} says"
                )
    alone, nested = folder.objects.get(PREPROCESSOR), folder.get(PROCESSOR, "image_processor")
    limits = pixel_limits(alone), pixel_limits(nested)
    if (
        isinstance(nested, dict)
        and alone is not None
        and limits[0] != limits[1]
        and ABSENT not in limits[0] + limits[1]
    ):
        yield Fault(
            file=PROCESSOR,
            key="image_processor.size",
            found=str(limits[1]),
            expected=f"{limits[0]}, as {PREPROCESSOR}",
        )


@rule(
    Severity.WRONG,
    "chat template lost",
    effect="prompts are built without the turns and image placeholders that the model was trained with, or not at all",
    evidence="https://huggingface.co/docs/transformers/chat_templating",
    mend="the base's template file",
    needs_base=True,
)
def chat_template_lost(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if (
        base is None
        or folder.templates
        or not base.templates
        or folder.kind not in (Kind.MODEL, Kind.ADAPTER)
        or not folder.has_tokenizer
        or (folder.kind is Kind.ADAPTER and not folder.has(TOKENIZER_CONFIG))  # the base's is asked
    ):
        return
    whole = [name for name in (TEMPLATE_JINJA, TEMPLATE_JSON) if name in base.templates]
    remedies: list[WholeFile | Edit] = [WholeFile(file=name, content=None) for name in whole]
    inside = base.templates.get(TOKENIZER_CONFIG)
    if inside is not None and TOKENIZER_CONFIG in folder.objects:
        remedies.append(Edit(file=TOKENIZER_CONFIG, path=("chat_template",), value=inside))
    yield Fault(
        file=TEMPLATE_JSON,
        expected=f"a template, as in the base's {', '.join(base.templates)}",
        remedies=tuple(remedies),
    )


@rule(
    Severity.UNLOADABLE,
    "chat_template.json without a template",
    effect="AutoProcessor fails: KeyError 'chat_template'",
    evidence="https://huggingface.co/docs/transformers/chat_templating_multimodal",
    mend="the base's file",
)
def chat_template_json_empty(folder: Folder) -> Iterator[Fault]:
    is_read = folder.has(PREPROCESSOR) or folder.has(PROCESSOR)
    if is_read and TEMPLATE_JSON in folder.objects and folder.get(TEMPLATE_JSON, "chat_template") is ABSENT:
        has_base = folder.base is not None and TEMPLATE_JSON in folder.base.templates
        remedies = (WholeFile(file=TEMPLATE_JSON, content=None),) if has_base else ()
        yield Fault(file=TEMPLATE_JSON, key="chat_template", expected="a template", remedies=remedies)


@rule(
    Severity.WRONG,
    "chat template lost from the tokenizer",
    effect="the processor has a template and the tokenizer has none: whoever builds prompts with the tokenizer alone "
    "(servers, text training) gets other prompts, or an error",
    evidence="https://github.com/huggingface/transformers/pull/33957",
    mend="the base's template in tokenizer_config.json",
    needs_base=True,
)
def tokenizer_template_lost(folder: Folder) -> Iterator[Fault]:
    inside = None if folder.base is None else folder.base.templates.get(TOKENIZER_CONFIG)
    ours = folder.templates
    if inside is None or not ours or TOKENIZER_CONFIG not in folder.objects:
        return
    if folder.kind not in (Kind.MODEL, Kind.ADAPTER):
        return
    if TEMPLATE_JINJA not in ours and folder.get(TOKENIZER_CONFIG, "chat_template") in (ABSENT, None):
        yield Fault(
            file=TOKENIZER_CONFIG,
            key="chat_template",
            found=folder.get(TOKENIZER_CONFIG, "chat_template"),
            expected="the base's template",
            remedies=(Edit(file=TOKENIZER_CONFIG, path=("chat_template",), value=inside),),
        )


@rule(
    Severity.NOTE,
    "no chat template",
    effect="a vision-language model has no way to place an image in a prompt but by hand",
    evidence="https://huggingface.co/docs/transformers/chat_templating_multimodal",
)
def chat_template_missing(folder: Folder) -> Iterator[Fault]:
    is_whole = folder.kind is Kind.MODEL and folder.is_multimodal and folder.has_tokenizer
    if is_whole and folder.base is None and not folder.templates and "additional_chat_templates" not in folder.entries:
        yield Fault(file=TEMPLATE_JINJA, expected=f"a template here, in {TEMPLATE_JSON} or in {TOKENIZER_CONFIG}")


@rule(
    Severity.WRONG,
    "copies of the chat template differ",
    effect="which prompt the model sees depends on the library version that reads the folder",
    evidence="https://github.com/huggingface/transformers/pull/33957",
    mend="the base's template in every copy, where one of them has it",
    needs_base=True,
)
def chat_templates_differ(folder: Folder) -> Iterator[Fault]:
    if folder.base is None:
        return
    unread = UNREAD_OF_ADAPTER.get(folder.kind, ())
    copies = {file: text for file, text in _stripped(folder).items() if file not in unread}
    published = _stripped(folder.base)
    if len(set(copies.values())) < 2:
        return
    if all(published.get(file) == text for file, text in copies.items()):
        return  # published that way
    good = set(published.values())
    other = [file for file, text in copies.items() if text not in good]
    remedies: tuple[Edit, ...] = ()
    if len(good) == 1 and good & set(copies.values()) and TEMPLATE_JINJA not in other:
        text = next(iter(folder.base.templates.values()))
        remedies = tuple(Edit(file=file, path=("chat_template",), value=text) for file in other)
    yield Fault(
        file=(other or sorted(copies))[0],
        key="chat_template",
        found=f"{len(set(copies.values()))} different texts in {', '.join(copies)}",
        expected="one text",
        remedies=remedies,
    )


@rule(
    Severity.NOTE,
    "copies of the chat template differ, perhaps on purpose",
    effect="which prompt the model sees depends on the library version that reads it; some makers publish it so",
    evidence="https://github.com/huggingface/transformers/pull/33957",
)
def chat_templates_unequal(folder: Folder) -> Iterator[Fault]:
    if folder.base is None and _has_two_templates(folder):
        files = ", ".join(folder.templates)
        yield Fault(file=next(iter(folder.templates)), key="chat_template", found=files, expected="one text")


@rule(
    Severity.NOTE,
    "another chat template than the base's",
    effect="prompts are built otherwise than for the base. Right only if training used this template",
    evidence="https://huggingface.co/docs/transformers/chat_templating",
    needs_base=True,
)
def chat_template_changed(folder: Folder) -> Iterator[Fault]:
    if folder.base is None or folder.kind is not Kind.MODEL or _has_two_templates(folder):
        return
    ours, published = set(_stripped(folder).values()), set(_stripped(folder.base).values())
    if ours and published and not ours <= published:
        file = next(iter(folder.templates))
        found = f"{len(folder.templates[file])} characters"
        yield Fault(file=file, key="chat_template", found=found, expected="the base's text")


def _stripped(folder: Folder) -> dict[str, str]:
    return {file: text.rstrip("\n") for file, text in folder.templates.items()}


def _has_two_templates(folder: Folder) -> bool:
    return len(set(_stripped(folder).values())) > 1
