"""The config of an adapter: what PEFT reads in it before any weight, held against the factors that are stored."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT, is_number
from grpo_toolkit.checkpoint.tensor_names import is_lora
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.readers import installed_text
from grpo_toolkit.doctor.rules.adapter import is_of_mlx, modules_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

# https://github.com/huggingface/peft/blob/main/src/peft/utils/peft_types.py
_TASKS: Final = ("SEQ_CLS", "SEQ_2_SEQ_LM", "CAUSAL_LM", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")
_BIASES: Final = ("none", "all", "lora_only")
_RANK: Final = 8
"""LoRA's rank where a config says none."""


@rule(
    Severity.UNLOADABLE,
    "a setting of the adapter that PEFT cannot take",
    effect="PEFT reads it before any weight, and stops with a KeyError, TypeError or ValueError",
    evidence="https://huggingface.co/docs/peft/package_reference/lora",
    mend="what the stored factors say, or PEFT's own default",
)
def adapter_setting_unusable(folder: Folder) -> Iterator[Fault]:
    if folder.kind is not Kind.ADAPTER or ADAPTER_CONFIG not in folder.objects or is_of_mlx(folder):
        return
    config = folder.objects[ADAPTER_CONFIG]
    kind = config.get("peft_type", ABSENT)
    if any(map(is_lora, folder.tensors)) and kind != "LORA":
        yield _fault("peft_type", kind, "LORA, as its factors are named", "LORA")
    if kind != "LORA":
        return
    if config.get("bias", "none") not in _BIASES:
        yield _fault("bias", config["bias"], " or ".join(_BIASES), "none")
    if config.get("task_type") not in (None, *_TASKS):
        yield _fault("task_type", config["task_type"], f"null or one of {', '.join(_TASKS)}", None)
    if not is_number(config.get("lora_dropout", 0)):
        yield _fault("lora_dropout", config["lora_dropout"], "a number", 0.0)
    if "lora_alpha" in config and config["lora_alpha"] is None:
        yield _fault("lora_alpha", None, "the scale it was trained with", ABSENT)
    yield from _rank_faults(folder, config)
    yield from _target_faults(folder, config)


def _rank_faults(folder: Folder, config: dict[str, Any]) -> Iterator[Fault]:
    ranks = {info.shape[0] for name, info in folder.tensors.items() if name.endswith(".lora_A.weight") and info.shape}
    is_plain = not config.get("rank_pattern") and not config.get("target_parameters") and len(ranks) == 1
    if config.get("r") is None and is_plain and ("r" in config or ranks != {_RANK}):
        (stored,) = ranks
        yield _fault("r", config.get("r", ABSENT), f"{stored}, the rows of its factors", stored)


def _target_faults(folder: Folder, config: dict[str, Any]) -> Iterator[Fault]:
    targets, modules = config.get("target_modules", ABSENT), modules_of(folder)
    if config.get("target_parameters") or targets == "all-linear" or not modules:
        return
    leaves = sorted({module.rpartition(".")[2] for module in modules})
    if targets in (ABSENT, None) and leaves == _default_targets(folder):
        return
    if targets in (ABSENT, None, "", []):
        yield _fault("target_modules", targets, f"{leaves}, the modules of its factors", leaves)
    elif (isinstance(targets, list) and not any(_is_named(module, targets) for module in modules)) or (
        isinstance(targets, str) and _is_simple(targets) and not any(_fits(targets, module) for module in modules)
    ):
        yield _fault("target_modules", targets, f"names of modules such as {modules[0]}", leaves)


def _default_targets(folder: Folder) -> list[str]:
    """Return the modules that the installed PEFT takes by itself for the base's model type."""
    kind = "" if folder.base is None else folder.base.model_type
    table = installed_text("peft/utils/constants.py").partition("TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING")[
        2
    ]
    found = re.search(rf'"{re.escape(kind)}": \[([^\]]*)\]', table.partition("\n}")[0])
    return sorted(re.findall(r'"(\w+)"', found[1])) if found else []


def _is_named(module: str, targets: list[Any]) -> bool:
    return any(isinstance(one, str) and f".{module}".endswith(f".{one}") for one in targets)


def _is_simple(pattern: str) -> bool:
    """Return whether a pattern is one that cannot take long: plain names, alternatives, at most three repetitions."""
    is_plain = re.fullmatch(r"[\w.|()\\*?:^$\[\]-]+", pattern) is not None
    return is_plain and len(pattern) < 300 and pattern.count("*") < 4


def _fits(pattern: str, module: str) -> bool:
    """Return whether PEFT's full match of a pattern finds a module under one of the names that releases give it."""
    if re.search(r"\)[*?+]", pattern):
        return True  # a repetition of a group is not tried
    try:
        found = re.compile(pattern)
    except re.error:
        return False
    return any(found.fullmatch(name) for name in (module, f"model.{module}", module.removeprefix("model.")))


def _fault(key: str, found: Any, expected: str, right: Any) -> Fault:
    remedies = (Edit(file=ADAPTER_CONFIG, path=(key,), value=right),)
    return Fault(file=ADAPTER_CONFIG, key=key, found=found, expected=expected, remedies=remedies)


@rule(
    Severity.UNLOADABLE,
    "a factor of the adapter that does not fit the base",
    effect="PEFT makes factors of the base's sizes, and the stored one has another: size mismatch",
    evidence="https://github.com/huggingface/peft/issues/2415",
    needs_base=True,
)
def adapter_shapes_differ(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    config = folder.objects.get(ADAPTER_CONFIG, {})
    if base is None or folder.kind is not Kind.ADAPTER or config.get("target_parameters"):
        return
    sizes: dict[str, set[int]] = {}
    for name, info in base.tensors.items():
        if name.endswith(".weight") and len(info.shape) == 2:
            sizes.setdefault(_tail(name.removesuffix(".weight")), set()).update(info.shape)
    for name, info in sorted(folder.tensors.items()):
        found = _FACTOR.fullmatch(name)
        known = sizes.get(_tail(found["module"]), set()) if found else set()
        side = info.shape[found["half"] == "A"] if found and len(info.shape) == 2 else None
        if known and side not in known and all(info.shape):
            yield Fault(file=info.file, key=name, found=list(info.shape), expected=f"a side of {sorted(known)}")
    yield from _other_ranks(folder)


def _other_ranks(folder: Folder) -> Iterator[Fault]:
    """Yield the factors of another rank than most; where all have another, the config is at fault."""
    if folder.objects.get(ADAPTER_CONFIG, {}).get("rank_pattern"):
        return
    found = {name: _FACTOR.fullmatch(name) for name in sorted(folder.tensors)}
    ranks = {
        name: folder.tensors[name].shape[match["half"] == "B"]
        for name, match in found.items()
        if match and len(folder.tensors[name].shape) == 2 and all(folder.tensors[name].shape)
    }
    usual = Counter(ranks.values()).most_common(1)
    for name, rank in ranks.items():
        if 2 * usual[0][1] > len(ranks) and rank != usual[0][0]:
            info = folder.tensors[name]
            yield Fault(
                file=info.file, key=name, found=list(info.shape), expected=f"rank {usual[0][0]}, as the others"
            )


_FACTOR: Final = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<half>[AB])(?:\.[\w-]+)?\.weight")


def _tail(module: str) -> str:
    """Return the part of a module's name that no wrapper changes: from its layer on."""
    return re.split(r"(?:^|\.)(?=(?:layers|blocks|h)\.\d)", module)[-1]


@rule(
    Severity.WRONG,
    "adapter scaled to nothing",
    effect="lora_alpha is 0 or negative: the adapter adds nothing, so the base answers, or it subtracts what it "
    "learnt",
    evidence="https://huggingface.co/docs/peft/package_reference/lora",
)
def adapter_alpha_zero(folder: Folder) -> Iterator[Fault]:
    value = folder.get(ADAPTER_CONFIG, "lora_alpha")
    if folder.kind is Kind.ADAPTER and type(value) in (int, float) and value <= 0:
        yield Fault(file=ADAPTER_CONFIG, key="lora_alpha", found=value, expected="the scale it was trained with")


@rule(
    Severity.NOTE,
    "adapter whose base is not here",
    effect="names and shapes could not be compared with the base",
    evidence="https://huggingface.co/docs/peft/tutorial/peft_model_config",
)
def adapter_base_elsewhere(folder: Folder) -> Iterator[Fault]:
    if folder.kind is Kind.ADAPTER and folder.base is None:
        value = folder.get(ADAPTER_CONFIG, "base_model_name_or_path")
        yield Fault(
            file=ADAPTER_CONFIG, key="base_model_name_or_path", found=value, expected="a folder here: pass --base"
        )
