"""Weights that no reader finds: none at all, shards of a trainer's own, safetensors files that nobody names."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.model_folder import WEIGHTS, WEIGHTS_INDEX, Kind
from grpo_toolkit.doctor.findings import Fault, Severity, rule

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder


def _foreign(folder: Folder) -> bool:
    return folder.place is not None and folder.place.layout is not None


@rule(
    Severity.UNLOADABLE,
    "no weights",
    effect="there is a config and nothing to load",
    evidence="https://github.com/huggingface/transformers/issues/30491",
)
def weights_missing(folder: Folder) -> Iterator[Fault]:
    has_index = folder.has(WEIGHTS_INDEX)
    others = any(name.endswith((".safetensors", ".gguf", ".h5", ".msgpack")) for name in folder.entries)
    if (
        folder.kind is Kind.MODEL
        and not folder.has(WEIGHTS)
        and not has_index
        and not folder.has_pickles
        and not others
        and not _foreign(folder)
    ):
        yield Fault(file=WEIGHTS, expected="weights")


@rule(
    Severity.UNLOADABLE,
    "FSDP shards only",
    effect="SHARDED_STATE_DICT saves no model: no config, no safetensors; nothing but the trainer can load it",
    evidence="https://github.com/huggingface/transformers/issues/30491",
)
def fsdp_shards_only(folder: Folder) -> Iterator[Fault]:
    if folder.kind is Kind.FSDP:
        yield _shards(folder)


@rule(
    Severity.UNLOADABLE,
    "ZeRO shards only",
    effect="ZeRO-3 without 16-bit gathering saves no weights beside the config: next time "
    "stage3_gather_16bit_weights_on_model_save",
    evidence="https://github.com/huggingface/transformers/issues/20082",
)
def zero_shards_only(folder: Folder) -> Iterator[Fault]:
    if folder.kind is Kind.DEEPSPEED:
        yield _shards(folder)


@rule(
    Severity.UNLOADABLE,
    "shards of another trainer",
    effect="nothing but the trainer that wrote them can load them; its own converter makes a model folder of them",
    evidence="https://github.com/volcengine/verl/issues/770",
)
def shards_of_another_trainer(folder: Folder) -> Iterator[Fault]:
    is_config_beside = folder.kind is Kind.MODEL and _foreign(folder)
    if folder.kind is Kind.FOREIGN or is_config_beside:
        yield _shards(folder)


def _shards(folder: Folder) -> Fault:
    place = folder.place
    assert place is not None
    assert place.layout is not None, "only shards have a layout"
    file = os.path.relpath(place.path, folder.path)
    if file == ".":
        fits = re.compile(place.layout.holds[0]).fullmatch
        file = min(name for name in folder.entries if fits(name))
    return Fault(file=file, found=place.what, expected=f"run: {place.command}")
