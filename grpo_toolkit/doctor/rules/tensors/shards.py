"""Weights that no reader finds: none at all, shards of a trainer's own, safetensors files that nobody names."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.folders.model_folder import WEIGHTS, WEIGHTS_INDEX, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import unnamed_weights
from grpo_toolkit.doctor.readers import SERVERS, TRANSFORMERS

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


_NUMBERED = re.compile(r"(?P<stem>.+)-(?P<number>[0-9]{5})-of-(?P<count>[0-9]{5})\.safetensors")


@rule(
    Severity.UNLOADABLE,
    "weights that no index names",
    effect="transformers looks for model.safetensors or for an index, and finds no file; servers load every "
    "safetensors file that they see",
    evidence="https://github.com/FlashML-org/FreeToken/issues/124",
    mend="an index made from the headers",
    fails=TRANSFORMERS,
)
def weights_unnamed(folder: Folder) -> Iterator[Fault]:
    if folder.kind is not Kind.MODEL or folder.has(WEIGHTS) or folder.has(WEIGHTS_INDEX) or folder.has_pickles:
        return
    files = unnamed_weights(folder.entries)
    consolidated = [name for name in sorted(folder.entries) if re.fullmatch(r"consolidated.*\.safetensors", name)]
    if not files:
        if consolidated:
            yield Fault(
                file=consolidated[0],
                found="weights in Mistral's own form",
                expected=f"{WEIGHTS} (transformers' convert_mistral_weights_to_hf.py); vLLM: --load-format mistral",
            )
        return
    missing = _missing_numbers(files)
    held = [name for file in folder.shards.values() for name in file]
    is_whole = not missing and len(folder.shards) == len(files) and held and len(set(held)) == len(held)
    index = {
        "metadata": {"total_size": sum(info.nbytes for info in folder.tensors.values())},
        "weight_map": {name: file for file, tensors in folder.shards.items() for name in sorted(tensors)},
    }
    yield Fault(
        file=WEIGHTS_INDEX,
        found=f"{missing[0]} is missing too" if missing else ABSENT,
        expected=f"an index of {files[0]}" + (f" and {len(files) - 1} more" if len(files) > 1 else ""),
        remedies=(WholeFile(file=WEIGHTS_INDEX, content=index),) if is_whole else (),
    )


def _missing_numbers(files: list[str]) -> list[str]:
    """Return the names of a numbered series that are not there."""
    missing = []
    for match in filter(None, map(_NUMBERED.fullmatch, files)):
        wanted = (
            f"{match['stem']}-{number:05d}-of-{match['count']}.safetensors"
            for number in range(1, min(int(match["count"]), 2_000) + 1)
        )
        missing += [name for name in wanted if name not in files]
    return sorted(set(missing))


@rule(
    Severity.WRONG,
    "shards left over beside a single file",
    effect="servers without an index load every safetensors file that they see: the older shards overwrite tensors of "
    "model.safetensors, or the other way round",
    evidence="https://github.com/vllm-project/vllm/pull/54230",
    fails=SERVERS,
)
def shards_left_over(folder: Folder) -> Iterator[Fault]:
    numbered = [name for name in unnamed_weights(folder.entries) if _NUMBERED.fullmatch(name)]
    if folder.kind is Kind.MODEL and folder.has(WEIGHTS) and not folder.has(WEIGHTS_INDEX) and numbered:
        yield Fault(file=numbered[0], found=f"{len(numbered)} shards beside {WEIGHTS}", expected="one of the two")


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
    effect="ZeRO-3 without 16-bit gathering saves no weights beside the config; next time, set "
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
