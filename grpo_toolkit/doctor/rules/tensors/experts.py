"""Stacked experts of a mixture: stored as transformers 5 holds them, or named as it names them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.readers import V4
from grpo_toolkit.doctor.rules.tensors.tensor_facts import (
    common_tensors,
    is_transposed,
    stacked_though_published_apart,
)
from grpo_toolkit.doctor.tensor_changes import TensorChanges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder


@rule(
    Severity.WRONG,
    "experts stored as transformers 5 holds them",
    effect="transformers 4 looks for a tensor for each expert, finds none, and starts every expert from random "
    "weights, with a warning only",
    evidence="https://github.com/vllm-project/vllm/pull/42577",
    fails=V4,
)
def experts_stacked(folder: Folder) -> Iterator[Fault]:
    names = stacked_though_published_apart(folder)
    if names:
        yield Fault(
            file=folder.tensors[names[0]].file,
            key=names[0],
            found=f"{len(names)} tensors with all experts of a layer in each",
            expected="a tensor for each expert, as published: save_pretrained writes them so",
        )


# What 4.x builds where `num_experts` is absent; transformers 5 has renamed the setting of these and no others.
# https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/qwen3_moe/configuration_qwen3_moe.py
_EXPERTS_OF_V4: Final = {"qwen3_moe": 128, "qwen3_vl_moe_text": 60}


@rule(
    Severity.UNLOADABLE,
    "number of experts under the name of transformers 5 alone",
    effect="transformers 4 looks for num_experts, does not find it, and builds 128 or 60 experts, the default of its "
    "class, whose weights are not stored",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/models/qwen3_moe/"
    "configuration_qwen3_moe.py",
    mend="num_experts in its place, as published",
    fails=V4,
)
def experts_renamed(folder: Folder) -> Iterator[Fault]:
    for level, node in folder.levels():
        count, default = node.get("num_local_experts"), _EXPERTS_OF_V4.get(str(node.get("model_type")))
        is_read = default is None or count == default or "num_experts" in node
        base = None if folder.base is None else folder.base.get(CONFIG, *level, "num_local_experts")
        if type(count) is int and not is_read and base in (None, ABSENT):
            remedies = (
                Edit(file=CONFIG, path=(*level, "num_experts"), value=count),
                Edit(file=CONFIG, path=(*level, "num_local_experts"), value=ABSENT),
            )
            key = ".".join((*level, "num_local_experts"))
            yield Fault(file=CONFIG, key=key, found=count, expected=f"num_experts {count}", remedies=remedies)


@rule(
    Severity.UNLOADABLE,
    "experts stored as transformers 5 computes with them",
    effect="the matrices are transposed: transformers 5 loads them either way round, transformers 4 and vLLM stop at "
    "a size mismatch",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/conversion_mapping.py",
    mend="transposed, as the base's (--rewrite-weights)",
    needs_base=True,
    fails="transformers<5; vllm; sglang",
)
def experts_transposed(folder: Folder) -> Iterator[Fault]:
    pairs = common_tensors(folder)
    names = [name for name, (ours, theirs) in pairs.items() if is_transposed(ours, theirs)]
    if names:
        ours, theirs = pairs[names[0]]
        is_float = all(pairs[name][0].dtype in FLOAT_NAMES for name in names)
        yield Fault(
            file=ours.file,
            key=names[0],
            found=f"{list(ours.shape)}; {len(names)} such tensors",
            expected=f"{list(theirs.shape)}, as in the base",
            remedies=(TensorChanges(transposed=frozenset(names)),) if is_float else (),
        )
