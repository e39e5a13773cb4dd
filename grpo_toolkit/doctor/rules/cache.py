"""Faults that switch the KV cache off, or make another."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.readers import TRANSFORMERS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder


@rule(
    Severity.SLOW,
    "KV cache off in generation_config.json",
    effect="every token recomputes the whole prompt, and a vision model re-encodes the image for each of them",
    evidence="https://github.com/om-ai-lab/VLM-R1/issues/229",
    mend="use_cache true, or no use_cache where the base has none",
    fails=TRANSFORMERS,
)
def generation_cache_off(folder: Folder) -> Iterator[Fault]:
    value = folder.get(GENERATION_CONFIG, "use_cache")
    if value is not ABSENT and not value:  # readers ask whether it is true; of a null, 5 takes its own default
        fault = _cache_fault(folder, GENERATION_CONFIG, (), value)
        yield replace(fault, fails="transformers<5") if value is None else fault


@rule(
    Severity.SLOW,
    "KV cache off in config.json, and live",
    effect="there is no generation_config.json, so generate takes use_cache from here: every token recomputes the "
    "whole prompt",
    evidence="https://github.com/hiyouga/EasyR1/issues/265",
    mend="use_cache true, or no use_cache where the base has none",
    fails=TRANSFORMERS,
)
def config_cache_off(folder: Folder) -> Iterator[Fault]:
    if not folder.has(GENERATION_CONFIG):
        yield from _config_cache_faults(folder)


@rule(
    Severity.WASTEFUL,
    "KV cache off in config.json, not yet live",
    effect="generation_config.json keeps generate fast, but a loop that calls the model itself, a trainer that "
    "starts from this folder and a merger that drops that file all decode without a cache",
    evidence="https://github.com/hiyouga/LlamaFactory/issues/1161",
    mend="use_cache true, or no use_cache where the base has none",
    fails=TRANSFORMERS,
)
def config_cache_off_latent(folder: Folder) -> Iterator[Fault]:
    if folder.has(GENERATION_CONFIG):
        yield from _config_cache_faults(folder)


def _config_cache_faults(folder: Folder) -> Iterator[Fault]:
    for level, node in folder.levels():
        value = node.get("use_cache", ABSENT)
        if value is not ABSENT and not value:
            yield _cache_fault(folder, CONFIG, level, value)


def _cache_fault(folder: Folder, file: str, level: tuple[str, ...], value: Any) -> Fault:
    written: Any = True
    base = folder.base
    # Only where the base has this very level can the absence of its key be told from another way of nesting.
    if base is not None and isinstance(base.get(file, *level), dict):
        is_nested_alike = ("text_config" in base.objects[file]) == ("text_config" in folder.objects[file])
        if is_nested_alike and base.get(file, *level, "use_cache") is ABSENT:
            written = ABSENT
    path = (*level, "use_cache")
    return Fault(
        file=file,
        key=".".join(path),
        found=value,
        expected="true" if written is True else "absent, as in the base",
        remedies=(Edit(file=file, path=path, value=written),),
    )


_CHOSEN: Final = ("static", "dynamic")
"""Kinds that somebody wrote for speed: `export --tuned` does, where the first is faster."""


@rule(
    Severity.SLOW,
    "another kind of KV cache than the base's",
    effect="generate makes the cache that is named here: an offloaded one waits for the host, a quantized one is "
    "computed with, and some models refuse either",
    evidence="https://huggingface.co/docs/transformers/kv_cache",
    mend="the base's kind",
    needs_base=True,
    fails=TRANSFORMERS,
)
def cache_kind_differs(folder: Folder) -> Iterator[Fault]:
    key = "cache_implementation"
    ours = folder.get(GENERATION_CONFIG, key)
    if folder.base is None or GENERATION_CONFIG not in folder.base.objects or ours in (ABSENT, None, *_CHOSEN):
        return
    theirs = folder.base.get(GENERATION_CONFIG, key)
    if ours != theirs:
        edit = Edit(file=GENERATION_CONFIG, path=(key,), value=theirs)
        expected = "absent, as in the base" if theirs is ABSENT else f"{theirs!r}, as in the base"
        yield Fault(file=GENERATION_CONFIG, key=key, found=ours, expected=expected, remedies=(edit,))
