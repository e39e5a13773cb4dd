"""Files that cannot be read, must not be trusted, or are only a part of a checkpoint."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.model_folder import (
    CONFIG,
    WEIGHTS,
    WEIGHTS_INDEX,
    Kind,
)
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, Unmark, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import (
    JSON_LIMITS,
    is_plain,
    plain_shards,
)
from grpo_toolkit.doctor.readers import ALL, SERVERS, TRAINER, TRANSFORMERS, without
from grpo_toolkit.doctor.rules.generation import fails_without
from grpo_toolkit.doctor.rules.tensors.tensor_facts import base_by_live_name, by_live_name, new_names
from grpo_toolkit.doctor.rules.tensors.weights import without_prefix

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_HEADER_FORMAT = "https://github.com/huggingface/safetensors#format"


@rule(
    Severity.UNLOADABLE,
    "model below the folder that was named",
    effect="a reader that is given the folder above finds no config.json in it, and looks no further down",
    evidence="https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel.from_pretrained",
)
def model_below(folder: Folder) -> Iterator[Fault]:
    if folder.below is not None:
        where = folder.path.relative_to(folder.below).as_posix()
        yield Fault(file=where, expected=f"readers to be given {folder.path}")


@rule(
    Severity.UNLOADABLE,
    "file that cannot be read",
    effect="other libraries fail at it as well, or they wait for ever, follow a link out of the folder or fill the "
    "memory",
    evidence=_HEADER_FORMAT,
)
def unreadable_file(folder: Folder) -> Iterator[Fault]:
    for file, reason in sorted(folder.refused.items()):
        fails = fails_without(folder, file)
        if fails is None:
            continue
        expected = "a whole safetensors file" if file.endswith(".safetensors") else "a readable file of its format"
        yield Fault(file=file, found=reason, expected=expected, fails=fails)


@rule(
    Severity.WRONG,
    "link that leaves the folder",
    effect="the folder needs a file that lies elsewhere, so a copy of the folder may not be whole; that file was not "
    "read",
    evidence="https://huggingface.co/docs/huggingface_hub/guides/manage-cache",
)
def link_leaves_folder(folder: Folder) -> Iterator[Fault]:
    for name, entry in sorted(folder.entries.items()):
        if entry.leaves and name not in folder.refused:
            yield Fault(file=name, found="a link out of the folder", expected="the file itself")


@rule(
    Severity.WRONG,
    "neither file nor folder",
    effect="a pipe, a device or a link to nothing: reading it may wait for ever; nothing was read",
    evidence="https://man7.org/linux/man-pages/man7/inode.7.html",
)
def special_file(folder: Folder) -> Iterator[Fault]:
    for name, entry in sorted(folder.entries.items()):
        if not entry.is_regular and not entry.is_folder and not entry.leaves and name not in folder.refused:
            yield Fault(file=name, found="not a regular file", expected="a file, or nothing")


@rule(
    Severity.WRONG,
    "key that stands twice",
    effect="libraries take the first or the last of the two, each in its own way",
    evidence="https://www.rfc-editor.org/rfc/rfc8259#section-4",
)
def repeated_key(folder: Folder) -> Iterator[Fault]:
    for file, keys in sorted(folder.repeated.items()):
        yield Fault(file=file, key=keys[0], found=f"{len(keys)} repeated", expected="every key once")


@rule(
    Severity.UNLOADABLE,
    "byte-order mark",
    effect="Python's JSON reader stops there: Unexpected UTF-8 BOM",
    evidence="https://docs.python.org/3/library/json.html#json.loads",
    mend="the mark removed",
)
def byte_order_mark(folder: Folder) -> Iterator[Fault]:
    for file in sorted(folder.marked & set(JSON_LIMITS)):
        fails = fails_without(folder, file)
        if fails is not None:
            yield Fault(
                file=file, found="a byte-order mark", expected="none", remedies=(Unmark(file=file),), fails=fails
            )


@rule(
    Severity.UNLOADABLE,
    "index that names no file of this folder",
    effect="the index names something that is no plain file of this folder, which would be read from elsewhere on "
    "your disk; it was not opened",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/utils/hub.py",
)
def index_leaves_folder(folder: Folder) -> Iterator[Fault]:
    strange = [name for name in _shard_names(folder) if not isinstance(name, str) or not is_plain(name)]
    if strange:
        yield Fault(
            file=WEIGHTS_INDEX, key="weight_map", found=strange[0], expected="plain names of files in this folder"
        )


def _shard_names(folder: Folder) -> list[Any]:
    """Return each name once, then the values that are no names at all."""
    weight_map = folder.get(WEIGHTS_INDEX, "weight_map")
    values = weight_map.values() if isinstance(weight_map, dict) else ()
    names = sorted({value for value in values if isinstance(value, str)})
    return [*names, *(value for value in values if not isinstance(value, str))]


@lru_cache(maxsize=4)  # several rules ask
def _indexed(folder: Folder) -> dict[str, str]:
    """Return the sound entries of the index: tensor to shard."""
    weight_map = folder.get(WEIGHTS_INDEX, "weight_map")
    known = weight_map.items() if isinstance(weight_map, dict) else ()
    return {name: shard for name, shard in known if isinstance(shard, str)}


@rule(
    Severity.UNLOADABLE,
    "index without its metadata or its map",
    effect="transformers reads both before any shard: KeyError or TypeError",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/utils/hub.py",
    mend="empty metadata, which is enough",
    fails=TRANSFORMERS,
)
def index_incomplete(folder: Folder) -> Iterator[Fault]:
    if WEIGHTS_INDEX not in folder.objects or folder.kind is not Kind.MODEL or folder.has(WEIGHTS):
        return
    if folder.get(WEIGHTS_INDEX, "weight_map") in (ABSENT, {}):
        found = folder.get(WEIGHTS_INDEX, "weight_map")
        yield Fault(file=WEIGHTS_INDEX, key="weight_map", found=found, expected="the shard of each tensor")
    metadata = folder.get(WEIGHTS_INDEX, "metadata")
    if not isinstance(metadata, dict):
        remedies = (Edit(file=WEIGHTS_INDEX, path=("metadata",), value={}),)
        yield Fault(file=WEIGHTS_INDEX, key="metadata", found=metadata, expected="an object", remedies=remedies)


@rule(
    Severity.UNLOADABLE,
    "shard missing",
    effect="the index names a file that is not here: loading stops, or leaves layers random",
    evidence="https://github.com/Neph0s/CoSER/issues/3",
)
def shard_missing(folder: Folder) -> Iterator[Fault]:
    if folder.kind is Kind.ADAPTER or folder.has(WEIGHTS):
        return
    shards = plain_shards(_indexed(folder))
    missing = [name for name in shards if not folder.has(name)]
    if missing:
        yield Fault(
            file=WEIGHTS_INDEX,
            key="weight_map",
            found=f"{missing[0]} and {len(missing) - 1} more" if len(missing) > 1 else missing[0],
            expected=f"all {len(shards)} shards in the folder",
        )


@rule(
    Severity.WRONG,
    "index and shards disagree",
    effect="tensors are looked for where they are not, or are loaded from the wrong shard",
    evidence="https://github.com/vllm-project/vllm/pull/54230",
)
def index_disagrees(folder: Folder) -> Iterator[Fault]:
    index = _indexed(folder)
    if folder.has(WEIGHTS) or not index or folder.kind is Kind.ADAPTER:
        return
    lost = [name for name, shard in index.items() if shard in folder.shards and name not in folder.shards[shard]]
    unnamed = [name for shard, held in folder.shards.items() for name in held if index.get(name) != shard]
    if lost or unnamed:
        # transformers reads every shard that is named, whichever tensors it looks for there.
        fails = SERVERS if set(index) == set(folder.tensors) else _of_names(folder, lost, unnamed)
        holding = {shard for shard, held in folder.shards.items() if held}
        is_all_read = set(index) <= set(folder.tensors) and holding <= {*index.values()}
        yield Fault(
            file=WEIGHTS_INDEX,
            key=(sorted(lost) or sorted(unnamed))[0],
            found=f"{len(lost)} tensors not in the shard that is named, {len(unnamed)} stored and not named so"
            + (f"; {sorted(lost)[0]} is not in {index[sorted(lost)[0]]}" if lost else ""),
            expected="the index to name every stored tensor, and no other",
            fails=without(fails or ALL, "vllm") if is_all_read else fails,  # it takes all tensors of the named shards
        )


def _are_asked_for(folder: Folder, names: list[str]) -> bool:
    """Return whether a model has some of the tensors that are stored: one without a base may have any."""
    base, ours = base_by_live_name(folder), by_live_name(folder)
    return not base or any(live in base for live, name in ours.items() if name in {*names})


def _of_names(folder: Folder, lost: list[str], unnamed: list[str]) -> str:
    """Return whom an index concerns that names tensors which are not there, or are there under another name."""
    if not lost:
        return f"transformers<5; {SERVERS}" if _are_asked_for(folder, unnamed) else SERVERS
    return without_prefix(folder) if {*lost} <= {*new_names(folder).values()} else ""


@rule(
    Severity.WRONG,
    "a single file and an index",
    effect="transformers loads model.safetensors, others the shards of the index: one folder, two models",
    evidence="https://github.com/vllm-project/vllm/pull/54230",
)
def two_sets_of_weights(folder: Folder) -> Iterator[Fault]:
    others = [name for name in plain_shards(_indexed(folder)) if name != WEIGHTS and folder.has(name)]
    if folder.kind is Kind.MODEL and folder.has(WEIGHTS) and others:
        yield Fault(file=WEIGHTS_INDEX, found=f"{WEIGHTS} and {len(others)} shards", expected="one of the two")


@rule(
    Severity.WASTEFUL,
    "index left over",
    effect="the index names shards that are gone; the single file is loaded, but tools that begin with the index fail",
    evidence="https://github.com/Blaizzy/mlx-vlm/pull/1464",
    mend="the index removed",
)
def index_left_over(folder: Folder) -> Iterator[Fault]:
    shards = [name for name in plain_shards(_indexed(folder)) if name != WEIGHTS]
    is_whole = WEIGHTS in folder.shards and not folder.entries[WEIGHTS].leaves
    if folder.kind is Kind.MODEL and is_whole and shards and not any(folder.has(name) for name in shards):
        remedies = (WholeFile(file=WEIGHTS_INDEX, content=ABSENT),)
        yield Fault(file=WEIGHTS_INDEX, found=f"{len(shards)} shards", expected="absent", remedies=remedies)


@rule(
    Severity.NOTE,
    "pickled weights",
    effect="a pickle can run code when it is opened, so it was not; nothing is known about these weights",
    evidence="https://huggingface.co/docs/hub/security-pickle",
)
def pickled_weights(folder: Folder) -> Iterator[Fault]:
    pickles = sorted(name for name in folder.entries if name.startswith("pytorch_model") and name.endswith(".bin"))
    if folder.kind is Kind.MODEL and pickles and not folder.shards:
        yield Fault(file=pickles[0], found=f"{len(pickles)} pickles", expected="safetensors")


@rule(
    Severity.UNLOADABLE,
    "weights without a config",
    effect="nothing says which class these weights are of: no reader can load them (accelerate's and DeepSpeed's "
    "mergers write weights alone)",
    evidence="https://huggingface.co/docs/accelerate/usage_guides/fsdp",
    mend="the base's config",
)
def config_missing(folder: Folder) -> Iterator[Fault]:
    if folder.kind is Kind.MODEL and not folder.has(CONFIG):
        has_base = folder.base is not None and folder.base.has(CONFIG)
        yield Fault(
            file=CONFIG,
            expected="the base's config" if has_base else "a config; pass --base to take the base's",
            remedies=(WholeFile(file=CONFIG, content=None),) if has_base else (),
        )


_RESUMABLE = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "rng_state.pth", "rng_state_0.pth")


@rule(
    Severity.WRONG,
    "no trainer_state.json beside an optimizer",
    effect="no resume takes this checkpoint: Trainer reads its step from there and stops without it; the model itself "
    "loads",
    evidence="https://huggingface.co/docs/transformers/main_classes/trainer#transformers.Trainer.train",
    fails=TRAINER,
)
def trainer_state_missing(folder: Folder) -> Iterator[Fault]:
    parts = [name for name in _RESUMABLE if folder.has(name)]
    if folder.kind in (Kind.MODEL, Kind.ADAPTER) and parts and not folder.has("trainer_state.json"):
        yield Fault(file="trainer_state.json", expected=f"the trainer's state, as {parts[0]} is here")


@rule(
    Severity.NOTE,
    "resume with care",
    effect="this checkpoint has the published names and the live model has others: a resume that starts from the base "
    "silently goes on from the base's weights, unless ResumeGuardCallback or model=<checkpoint> is used",
    evidence="https://github.com/QwenLM/Qwen3-VL/issues/1763",
)
def resume_starts_from_base(folder: Folder) -> Iterator[Fault]:
    family = folder.family
    if (
        folder.kind is Kind.MODEL
        and folder.is_trainer_checkpoint
        and family is not None
        and family.is_flat
        and folder.tensors
    ):
        yield Fault(file="trainer_state.json", expected="ResumeGuardCallback, or model= this folder")
