"""Tensors in the safetensors headers, compared with the base's: names, shapes, missing ones."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.checkpoint.name_lists import summarised
from grpo_toolkit.checkpoint.tensor_names import is_lora, live_name, stored_layers, without_wrappers
from grpo_toolkit.doctor.findings import Fault, Severity, rule
from grpo_toolkit.doctor.readers import SERVERS
from grpo_toolkit.doctor.rules.servers import VALUE_HEAD
from grpo_toolkit.doctor.rules.tensors.tensor_facts import (
    EMBEDDING,
    HEAD,
    PREFIX,
    base_by_live_name,
    base_tensors,
    by_live_name,
    common_tensors,
    has_lora,
    is_passed_over,
    is_transposed,
    lone_head,
    new_names,
    read_tie_flags,
    stacked_experts,
    stacked_though_published_apart,
    text_embedding,
    weights,
)
from grpo_toolkit.doctor.tensor_changes import TensorChanges

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from grpo_toolkit.doctor.parsed_folder import Folder


@rule(
    Severity.WRONG,
    "names of a wrapper in the weights",
    effect="no name fits the model: it loads without an exception, into random weights",
    evidence="https://github.com/pytorch/pytorch/issues/101107",
    mend="prefixes of PEFT, DDP, FSDP, torch.compile stripped (--rewrite-weights)",
)
def wrapped_names(folder: Folder) -> Iterator[Fault]:
    renames = {old: new for old, new in new_names(folder).items() if without_wrappers(old) != old}
    if not renames or has_lora(folder):
        return  # `unmerged_lora` says what to do about the latter
    yield _naming(folder, renames)


@rule(
    Severity.WRONG,
    "other tensor names than the published ones",
    effect="libraries and servers that know the published names load random weights or refuse the folder",
    evidence="https://github.com/vllm-project/vllm/issues/18983",
    mend="the published names (--rewrite-weights)",
)
def unpublished_names(folder: Folder) -> Iterator[Fault]:
    renames = {old: new for old, new in new_names(folder).items() if without_wrappers(old) == old}
    if renames and not has_lora(folder):
        live = tuple(prefix for prefix, _ in folder.family.published) if folder.family else ()
        is_whole = any("language_model.model." in name for name in renames)  # a published name behind another prefix
        is_live = bool(live) and all(name.startswith(live) for name in renames) and not is_whole
        fails = _who_knows_published_names(renames) if is_live else without_prefix(folder)
        if fails != SERVERS:  # a body saved without its head has such names
            yield _naming(folder, renames, fails=fails)


def without_prefix(folder: Folder) -> str:
    """Return whom names concern that have the model's prefix once too often or not at all; empty where others differ.

    transformers 5 looks at each name. Older releases put the prefix before all names or before none, and take a head
    among names without it for a broken file.
    """
    renames, family = new_names(folder), family_of(folder.model_type)
    is_lost = all(new == PREFIX + old for old, new in renames.items())
    is_doubled = all(old == PREFIX + new for old, new in renames.items())
    is_doubled = is_doubled and any(new.startswith(PREFIX) for new in renames.values())
    stays = all(live_name(new, family).split(".")[:2] == new.split(".")[:2] for new in renames.values())
    if not renames or not (is_lost or is_doubled) or not stays:
        return ""
    is_base_model = is_lost and not any(name.startswith(PREFIX) or name.endswith(HEAD) for name in weights(folder))
    return SERVERS if is_base_model else f"transformers<5; {SERVERS}"


def _who_knows_published_names(renames: dict[str, str]) -> str:
    """Return the readers of published names alone; later releases know the live ones too.

    vLLM 0.31 still asks for the `vision_model` of a CLIP or SigLIP tower, which transformers 5 has no longer (asked).
    """
    is_bare = any(".vision_model." in new and ".vision_model." not in old for old, new in renames.items())
    return f"transformers<4.52; vllm{'' if is_bare else _BEFORE_LIVE_NAMES}; sglang"


_BEFORE_LIVE_NAMES: Final = "<0.10"
"""vLLM maps them since: https://github.com/vllm-project/vllm/pull/19054 and its like for LLaVA, Gemma 3 and others."""


def _naming(folder: Folder, renames: dict[str, str], *, fails: str = "") -> Fault:
    old = min(renames)
    stays = set(folder.tensors) - set(renames)
    is_clear = len(set(renames.values()) | stays) == len(folder.tensors)  # no two tensors end under one name
    return Fault(
        file=folder.tensors[old].file,
        key=old,
        found=f"{len(renames)} of {len(folder.tensors)} tensors",
        expected=renames[old],
        remedies=(TensorChanges(renames=renames),) if is_clear else (),
        fails=fails,
    )


@rule(
    Severity.WRONG,
    "an adapter's factors among the weights",
    effect="the adapter was never merged: its factors are ignored, and the folder answers like the base, or at random",
    evidence="https://github.com/huggingface/peft/issues/2368",
)
def unmerged_lora(folder: Folder) -> Iterator[Fault]:
    factors = sorted(name for name in weights(folder) if is_lora(name)) if has_lora(folder) else []
    if factors:
        yield Fault(
            file=folder.tensors[factors[0]].file,
            key=factors[0],
            found=f"{len(factors)} factors",
            expected="merged weights: save the adapter with PEFT and run `grpo-toolkit export` on it",
        )


@rule(
    Severity.UNLOADABLE,
    "empty tensors",
    effect="ZeRO-3 saved its placeholders instead of the weights: size mismatch, shape [0]",
    evidence="https://github.com/huggingface/transformers/issues/20082",
)
def empty_tensors(folder: Folder) -> Iterator[Fault]:
    empty = sorted(name for name, info in folder.tensors.items() if 0 in info.shape)
    if empty:
        yield Fault(
            file=folder.tensors[empty[0]].file,
            key=empty[0],
            found=f"{len(empty)} of {len(folder.tensors)} tensors have no element",
            expected="weights: zero_to_fp32.py in a DeepSpeed checkpoint writes them",
        )


@rule(
    Severity.WRONG,
    "tensors of the base are missing",
    effect="what is missing starts from random weights, with a warning only",
    evidence="https://github.com/illuin-tech/colpali/issues/424",
    needs_base=True,
)
def tensors_missing(folder: Folder) -> Iterator[Fault]:
    ours, base = by_live_name(folder), base_by_live_name(folder)
    if not ours or not base or has_lora(folder):
        return
    missing = sorted(base[live] for live in base.keys() - ours.keys())
    missing = [name for name in missing if not is_passed_over(folder, name)]
    if stacked_experts(folder):  # `experts_stacked` says so
        missing = [name for name in missing if not _OF_ONE_EXPERT.search(name)]
    flags = read_tie_flags(folder)
    if lone_head(folder) and not (flags and all(flag is False for flag in flags.values())):
        missing = [name for name in missing if not name.endswith(EMBEDDING)]
    if missing and not _is_tied_away(folder, missing):
        yield Fault(
            file=next(iter(folder.shards)),
            key=missing[0],
            found=f"{len(missing)} of the base's {len(base)} tensors are not here",
            expected="every tensor of the base",
        )


_OF_ONE_EXPERT: Final = re.compile(r"\.experts\.\d+\.")


def _is_tied_away(folder: Folder, missing: list[str]) -> bool:
    flags = read_tie_flags(folder)
    return (
        all(name.endswith(HEAD) for name in missing) and bool(flags) and all(flag is True for flag in flags.values())
    )


_OF_QUANTISERS: Final = ("_scale", "_scale_inv", "_zero_point", "_g_idx", "_packed", "_shape")
"""Ends of the names of tensors that a quantiser stores beside a weight, or in its place."""


@rule(
    Severity.WRONG,
    "tensors that the base does not have",
    effect="they are ignored with a warning, or the server refuses the folder",
    evidence="https://github.com/vllm-project/vllm/pull/6758",
    needs_base=True,
    fails=SERVERS,
)
def tensors_extra(folder: Folder) -> Iterator[Fault]:
    ours, base = by_live_name(folder), base_by_live_name(folder)
    extra = sorted(ours[live] for live in ours.keys() - base.keys() if not is_lora(live) and not live.endswith(HEAD))
    told = set(stacked_though_published_apart(folder))
    extra = [name for name in extra if name not in told and not VALUE_HEAD.search(name)]
    if folder.get(CONFIG, "quantization_config") not in (ABSENT, None):
        extra = [name for name in extra if not name.endswith(_OF_QUANTISERS)]
    if base and extra:
        yield Fault(
            file=folder.tensors[extra[0]].file,
            key=extra[0],
            found=f"{len(extra)} tensors",
            expected="the base's tensors only",
        )


@rule(
    Severity.UNLOADABLE,
    "shapes differ from the base",
    effect="size mismatch at loading, unless the config was changed with them",
    evidence="https://github.com/huggingface/peft/issues/2415",
    needs_base=True,
)
def shapes_differ(folder: Folder) -> Iterator[Fault]:
    pairs = common_tensors(folder)
    other = sorted(
        name
        for name, (ours, theirs) in pairs.items()
        if ours.shape != theirs.shape and 0 not in ours.shape and not is_transposed(ours, theirs)
    )
    if other and folder.text_value("vocab_size") == (folder.base.text_value("vocab_size") if folder.base else None):
        ours, wanted = pairs[other[0]]
        yield Fault(
            file=ours.file,
            key=other[0],
            found=list(ours.shape),
            expected=f"{list(wanted.shape)}, as in the base",
        )


@rule(
    Severity.UNLOADABLE,
    "embedding does not fit the vocabulary",
    effect="size mismatch at loading: the embedding has another number of rows than vocab_size says",
    evidence="https://github.com/huggingface/peft/issues/2415",
)
def vocabulary_mismatch(folder: Folder) -> Iterator[Fault]:
    name, size = text_embedding(folder), folder.text_value("vocab_size")
    shape = folder.tensors[name].shape if name else ()
    extra = family_of(folder.model_type).extra_embeddings
    if name and len(shape) == 2 and type(size) is int and shape[0] not in (0, size + extra):
        yield Fault(file=CONFIG, key="vocab_size", found=size, expected=f"{shape[0]}, the rows of {name}")


@rule(
    Severity.WRONG,
    "layers missing",
    effect="whole layers start from random weights, with a warning only",
    evidence="https://github.com/Neph0s/CoSER/issues/3",
)
def layers_missing(folder: Folder) -> Iterator[Fault]:
    stored, wanted = stored_layers(weights(folder)), folder.text_value("num_hidden_layers")
    if not stored:
        return
    count = max(stored) + 1
    if type(wanted) is int and wanted <= 10_000:
        count = max(count, wanted)
    holes = sorted(set(range(count)) - stored)
    if holes:
        yield Fault(
            file=CONFIG, key="num_hidden_layers", found=f"layers {holes[:5]} have no weights", expected="every layer"
        )


@rule(
    Severity.WRONG,
    "weights identical to the base",
    effect="the merge or the training did nothing: these are the base's bytes (found with --deep)",
    evidence="https://github.com/huggingface/peft/issues/918",
    needs_base=True,
)
def identical_to_base(folder: Folder) -> Iterator[Fault]:
    if folder.digests is not None and folder.digests.is_the_base and weights(folder):
        yield Fault(
            file=next(iter(folder.shards)),
            found=f"all {folder.digests.compared} tensors equal the base's",
            expected="at least one trained tensor",
        )


@rule(
    Severity.WRONG,
    "tensors without information",
    effect="whole layers are zero, or one value throughout: the model speaks gibberish (found with --deep)",
    evidence="https://github.com/H-EmbodVis/NAUTILUS/issues/5",
)
def tensors_empty(folder: Folder) -> Iterator[Fault]:
    if folder.digests is not None:
        where = "which are not so in the base" if base_tensors(folder) else "matrices among them"
        yield from _in_values(
            folder, folder.digests.empty, f"{{}} of {{}} tensors are one value throughout, {where}", "trained values"
        )


@rule(
    Severity.WRONG,
    "tensors that have nothing of the base's",
    effect="they were swapped, transposed or taken from the wrong shard: a training moves values by little, and these "
    "do not even correlate (found with --deep)",
    evidence="https://github.com/vllm-project/vllm/pull/54230",
    needs_base=True,
)
def tensors_unlike_base(folder: Folder) -> Iterator[Fault]:
    if folder.digests is not None:
        unlike = folder.digests.unlike
        known = [f"{name} has the values of {origin}" for name, origin in unlike.items() if origin][:3]
        found = "; ".join(["{} of {} tensors", *(one.replace("{", "").replace("}", "") for one in known)])
        yield from _in_values(folder, tuple(unlike), found, "values near the base's")


@rule(
    Severity.WRONG,
    "values that are not numbers",
    effect="one NaN or infinity spreads through every answer (found with --deep)",
    evidence="https://github.com/IntMeGroup/FineVQ/issues/6",
)
def values_not_finite(folder: Folder) -> Iterator[Fault]:
    if folder.digests is not None:
        yield from _in_values(folder, folder.digests.broken, "NaN or infinity in {} of {} tensors", "finite values")


def _in_values(folder: Folder, names: Sequence[str], found: str, expected: str) -> Iterator[Fault]:
    """Yield the fault of tensors whose values are wrong, if there are any: how many of all, and which."""
    if names:
        told = found.format(len(names), len(folder.tensors))
        file = folder.tensors[names[0]].file
        yield Fault(file=file, key=names[0], found=f"{told}: {summarised(names)}", expected=expected)
