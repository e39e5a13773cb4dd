"""Demands of a server on a folder, and what it makes of one, that transformers does not share."""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, CONFIG, GENERATION_CONFIG, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT, is_number
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.readers import SERVERS
from grpo_toolkit.doctor.rules.settings import as_in_base
from grpo_toolkit.doctor.rules.tensors.tensor_facts import weights
from grpo_toolkit.doctor.tensor_changes import TensorChanges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

VALUE_HEAD: Final = re.compile(r"(?:^|\.)(?:v_head|value_head)\.")


@rule(
    Severity.UNLOADABLE,
    "no architectures in the config",
    effect="transformers finds the class by the model type; servers look for its name here and refuse the folder (No "
    "model architectures are specified; LLM.chat() is only supported for generative models)",
    evidence="https://github.com/vllm-project/vllm/issues/14105",
    mend="the base's architectures",
    fails=SERVERS,
)
def architectures_missing(folder: Folder) -> Iterator[Fault]:
    value = folder.get(CONFIG, "architectures")
    if value not in (ABSENT, None, []) or folder.family is None or not weights(folder):
        return
    right = ABSENT if folder.base is None else folder.base.get(CONFIG, "architectures")
    is_known = isinstance(right, list) and bool(right)
    yield Fault(
        file=CONFIG,
        key="architectures",
        found=value,
        expected=f"{right}, as in the base" if is_known else "the name of the model's class",
        remedies=(Edit(file=CONFIG, path=("architectures",), value=right),) if is_known else (),
    )


@rule(
    Severity.UNLOADABLE,
    "another class in architectures than the base's",
    effect="transformers finds the class by the model type and passes over the name; servers build the class that is "
    "named, or know none of that name (FSDP's and PEFT's wrappers write their own)",
    evidence="https://docs.vllm.ai/en/latest/models/supported_models.html",
    mend="the base's architectures",
    needs_base=True,
    fails=SERVERS,
)
def architectures_differ(folder: Folder) -> Iterator[Fault]:
    base, value = folder.base, folder.get(CONFIG, "architectures")
    if base is None or not folder.is_generative or not weights(folder) or folder.model_type != base.model_type:
        return
    right = base.get(CONFIG, "architectures")
    if isinstance(value, list) and isinstance(right, list) and value and right and value != right:
        yield as_in_base(CONFIG, ("architectures",), value, right)


@rule(
    Severity.WRONG,
    "a value head among the weights",
    effect="PPO's head was saved with the policy: transformers ignores it with a warning, vLLM refuses the folder "
    "(There is no module or parameter named 'v_head')",
    evidence="https://github.com/hiyouga/LlamaFactory/issues/8635",
    mend="the head's tensors dropped (--rewrite-weights)",
    fails="vllm",
)
def value_head_stored(folder: Folder) -> Iterator[Fault]:
    names = sorted(name for name in weights(folder) if VALUE_HEAD.search(name))
    if names and folder.is_generative:
        yield Fault(
            file=folder.tensors[names[0]].file,
            key=names[0],
            found=f"{len(names)} tensors",
            expected="the policy's tensors alone",
            remedies=(TensorChanges(renames=dict.fromkeys(names)),),
        )


@rule(
    Severity.WRONG,
    "ranks or scales of single modules in the adapter",
    effect="vLLM passes over both patterns without a word and scales every module by lora_alpha and r: answers differ "
    "from PEFT's. Merge it with `grpo-toolkit export`",
    evidence="https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py",
    fails="vllm",
)
def adapter_patterns_unread(folder: Folder) -> Iterator[Fault]:
    config = folder.objects.get(ADAPTER_CONFIG, {}) if folder.kind is Kind.ADAPTER else {}
    patterns = {key: value for key in ("alpha_pattern", "rank_pattern") if isinstance(value := config.get(key), dict)}
    ranks, alphas = (patterns.get(key, {}) for key in ("rank_pattern", "alpha_pattern"))
    r, alpha, power = config.get("r"), config.get("lora_alpha"), 0.5 if config.get("use_rslora") else 1.0
    usual = _scale(alpha, r, power)
    other = {name for name in {*ranks, *alphas} if _scale(alphas.get(name, alpha), ranks.get(name, r), power) != usual}
    for key, value in patterns.items():
        if other & value.keys():
            yield Fault(file=ADAPTER_CONFIG, key=key, found=value, expected="one scale for all modules")


def _scale(alpha: Any, rank: Any, power: float) -> float | None:
    """Return the factor of an adapter's product; None where its settings give none."""
    is_sound = is_number(alpha) and is_number(rank) and abs(alpha) < _FAR and 0 < rank < _FAR
    return float(alpha / rank**power) if is_sound else None


_FAR: Final = 10**9


@rule(
    Severity.UNLOADABLE,
    "an adapter of a kind that vLLM refuses",
    effect="vLLM stops at it (vLLM does not yet support DoRA; Adapter bias is not supported). Merge it with "
    "`grpo-toolkit export`",
    evidence="https://github.com/vllm-project/vllm/blob/main/vllm/lora/peft_helper.py",
    fails="vllm",
)
def adapter_kind_refused(folder: Folder) -> Iterator[Fault]:
    for key, taken in {"use_dora": False, "bias": "none"}.items() if folder.kind is Kind.ADAPTER else ():
        value = folder.get(ADAPTER_CONFIG, key)
        if value in (True, "all", "lora_only"):
            yield Fault(file=ADAPTER_CONFIG, key=key, found=value, expected=json.dumps(taken))


@rule(
    Severity.WRONG,
    "a rollout's limit as the default length of answers",
    effect="vLLM cuts every answer after so many tokens, unless the request asks for another number (before February "
    "2026 even then): answers end in the middle of a sentence",
    evidence="https://github.com/vllm-project/vllm/pull/34063",
    mend="max_new_tokens as in the base",
    needs_base=True,
    fails="vllm",
)
def answers_capped(folder: Folder) -> Iterator[Fault]:
    base, value = folder.base, folder.get(GENERATION_CONFIG, "max_new_tokens")
    if base is None or folder.kind is not Kind.MODEL or type(value) is not int:
        return
    published = base.get(GENERATION_CONFIG, "max_new_tokens")
    if published in (ABSENT, None) or (type(published) is int and value < published):
        yield Fault(
            file=GENERATION_CONFIG,
            key="max_new_tokens",
            found=value,
            expected="absent, as in the base" if published in (ABSENT, None) else f"{published}, as in the base",
            remedies=(Edit(file=GENERATION_CONFIG, path=("max_new_tokens",), value=published),),
        )
