"""Adapters that reach too little, too much, or nothing."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS, CONFIG, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.checkpoint.module_lookup import is_stored
from grpo_toolkit.checkpoint.tensor_names import find_suffix, is_lora, is_vision, live_name
from grpo_toolkit.doctor.findings import Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.readers import SERVERS, TRAINER
from grpo_toolkit.doctor.rules.tensors.tensor_facts import HEAD

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder


def _tail(module: str) -> str:
    """Return the part of a module's name that no wrapper changes: from its layer on."""
    return re.split(r"(?:^|\.)(?=(?:layers|blocks|h)\.\d)", module)[-1]


def modules_of(folder: Folder) -> list[str]:
    """Return the modules that the adapter's factors belong to, as the base's live model names them.

    PEFT wraps stacked experts once for each of their parameters, `.base_layer` by `.base_layer`.
    """
    if folder.kind is not Kind.ADAPTER:
        return []
    bare = (name.removeprefix("base_model.model.") for name in folder.tensors if is_lora(name))
    return sorted({re.split(r"\.lora_", name, maxsplit=1)[0].replace(".base_layer", "") for name in bare})


@rule(
    Severity.UNLOADABLE,
    "adapter without weights",
    effect="PEFT finds a config and nothing to load",
    evidence="https://github.com/huggingface/peft/issues/309",
)
def adapter_weights_missing(folder: Folder) -> Iterator[Fault]:
    has_any = folder.has(ADAPTER_WEIGHTS) or folder.has("adapter_model.bin") or is_of_mlx(folder)
    if folder.kind is Kind.ADAPTER and not has_any:
        yield Fault(file=ADAPTER_WEIGHTS, expected=f"the adapter's weights beside its {ADAPTER_CONFIG}")
    elif folder.kind is Kind.ADAPTER and folder.shards and not folder.tensors:
        yield Fault(file=ADAPTER_WEIGHTS, found="0 tensors", expected="the adapter's weights")


def is_of_mlx(folder: Folder) -> bool:
    settings = folder.objects.get(ADAPTER_CONFIG, {})
    return "peft_type" not in settings and {"fine_tune_type", "lora_parameters"} <= settings.keys()


@rule(
    Severity.UNLOADABLE,
    "adapter in the form of mlx-lm",
    effect="PEFT, transformers and servers stop (KeyError 'peft_type'): mlx-lm uses other keys and another file, and "
    "stores the matrices transposed",
    evidence="https://github.com/ml-explore/mlx-lm/issues/1119",
)
def adapter_of_mlx(folder: Folder) -> Iterator[Fault]:
    if folder.kind is Kind.ADAPTER and is_of_mlx(folder):
        yield Fault(
            file=ADAPTER_CONFIG,
            key="peft_type",
            found="an adapter of mlx-lm",
            expected="a merged model: mlx_lm.fuse --model BASE --adapter-path FOLDER --save-path OUT",
        )


@rule(
    Severity.WRONG,
    "names of a wrapper in the adapter",
    effect="PEFT finds no factor under its name and starts the adapter anew, which changes nothing: the base "
    "answers, after a warning. `grpo-toolkit merge` understands these names",
    evidence="https://github.com/MakazhanAlpamys/Soup/issues/351",
)
def adapter_names_wrapped(folder: Folder) -> Iterator[Fault]:
    names = sorted(folder.tensors) if folder.kind is Kind.ADAPTER else []
    wrapped = [name for name in names if _WRAPPED.search(name)]
    strange = [name for name in names if is_lora(name) and (not name.startswith(_PEFT) or name.startswith(2 * _PEFT))]
    if strange and not wrapped and not is_of_mlx(folder):
        yield Fault(
            file=ADAPTER_WEIGHTS,
            key=strange[0],
            found=f"{len(strange)} of {len(names)} tensors",
            expected=_PEFT + strange[0].rpartition(_PEFT)[2],
        )
    elif wrapped:
        yield Fault(
            file=ADAPTER_WEIGHTS,
            key=wrapped[0],
            found=f"{len(wrapped)} of {len(names)} tensors",
            expected=_WRAPPED.sub("", wrapped[0]),
        )


_PEFT = "base_model.model."
"""The start of every name that PEFT saves and looks for."""
_WRAPPED = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


@rule(
    Severity.WRONG,
    "adapter named for an older release",
    effect="its modules have the names of the base's files, which were the live model's names before 4.52: PEFT "
    "renames them on transformers 4 and finds none of them on 5, where the base answers, after a warning. "
    "`grpo-toolkit merge` reads both",
    evidence="https://github.com/illuin-tech/colpali/issues/424",
    needs_base=True,
    fails="transformers>=5",
)
def adapter_named_for_older(folder: Folder) -> Iterator[Fault]:
    base, modules = folder.base, modules_of(folder)
    # PEFT renames the modules of LLaVA's kin on 5, too; those of a family that is published flat it does not.
    if base is None or base.family is None or not base.family.is_flat or not modules:
        return
    named = {module: live_name(module, base.family) for module in modules}
    older = [module for module, live in named.items() if module != live and is_stored(module, base.tensors)]
    if older:
        yield Fault(
            file=ADAPTER_WEIGHTS,
            key=older[0],
            found=f"{len(older)} of {len(modules)} modules",
            expected=named[older[0]],
        )


_SERVED_RANK = 16


@rule(
    Severity.NOTE,
    "adapter of a higher rank than vLLM's default",
    effect="vLLM refuses it (LoRA rank is greater than max_lora_rank 16) unless it is started with --max-lora-rank",
    evidence="https://github.com/gpustack/gpustack/issues/5438",
    fails="vllm",
)
def adapter_rank_high(folder: Folder) -> Iterator[Fault]:
    rank = folder.get(ADAPTER_CONFIG, "r")
    if folder.kind is Kind.ADAPTER and type(rank) is int and rank > _SERVED_RANK:
        yield Fault(file=ADAPTER_CONFIG, key="r", found=rank, expected=f"vllm serve ... --max-lora-rank {rank}")


@rule(
    Severity.WRONG,
    "a factor of the adapter without its other half",
    effect="PEFT starts the missing half anew, with a warning only: with zeros or random numbers in place of what "
    "was trained",
    evidence="https://huggingface.co/docs/peft/developer_guides/checkpoint",
)
def adapter_factor_alone(folder: Folder) -> Iterator[Fault]:
    names = folder.tensors if folder.kind is Kind.ADAPTER else {}
    halves = {name: re.sub(r"\.lora_([AB])\b", lambda m: f".lora_{'BA'['AB'.index(m[1])]}", name) for name in names}
    alone = sorted(other for name, other in halves.items() if other not in names)
    if alone:
        yield Fault(file=ADAPTER_WEIGHTS, key=alone[0], found=f"{len(alone)} factors absent", expected="both of each")


@rule(
    Severity.UNLOADABLE,
    "another rank in the adapter's config than in its weights",
    effect="PEFT makes factors of the config's rank, and the stored ones do not fit: size mismatch",
    evidence="https://huggingface.co/docs/peft/developer_guides/checkpoint",
)
def adapter_rank_differs(folder: Folder) -> Iterator[Fault]:
    rank = folder.get(ADAPTER_CONFIG, "r")
    # The factors of stacked experts (target_parameters) have the ranks of all experts, one below the other.
    others = (folder.get(ADAPTER_CONFIG, key) for key in ("rank_pattern", "target_parameters"))
    if (
        folder.kind is not Kind.ADAPTER
        or type(rank) is not int
        or any(one not in (ABSENT, None, {}, []) for one in others)
    ):
        return
    ranks = {
        info.shape[0]
        for name, info in folder.tensors.items()
        if name.endswith(".lora_A.weight") and all(info.shape) and info.shape
    }
    if len(ranks) == 1 and rank not in ranks:
        (stored,) = ranks
        yield Fault(file=ADAPTER_CONFIG, key="r", found=rank, expected=f"{stored}, the rows of its factors")


@rule(
    Severity.WRONG,
    "adapter on the vision tower",
    effect="servers apply adapters to the language model only: the vision part is ignored with a warning, or the "
    "adapter is refused. Merge it with `grpo-toolkit export`",
    evidence="https://github.com/vllm-project/vllm/issues/23796",
    fails=SERVERS,
)
def adapter_on_vision(folder: Folder) -> Iterator[Fault]:
    modules = modules_of(folder)
    seeing = [module for module in modules if is_vision(module + ".")]
    if seeing:
        yield Fault(
            file=ADAPTER_CONFIG,
            key="target_modules",
            found=f"{len(seeing)} of {len(modules)} modules, {seeing[0]} for one",
            expected="modules of the language model",
        )


@rule(
    Severity.NOTE,
    "adapter with whole modules",
    effect="servers refuse adapters on the head or the embedding, or with modules_to_save; a merge takes them in",
    evidence="https://github.com/vllm-project/vllm/issues/21500",
    fails=SERVERS,
)
def adapter_with_whole_modules(folder: Folder) -> Iterator[Fault]:
    if any(True for _ in adapter_unties(folder)):
        return
    saved = folder.get(ADAPTER_CONFIG, "modules_to_save")
    ends = [module for module in modules_of(folder) if module.endswith(("lm_head", "embed_tokens"))]
    if folder.kind is Kind.ADAPTER and (ends or (isinstance(saved, list) and saved)):
        yield Fault(file=ADAPTER_CONFIG, key="modules_to_save", found=ends or saved, expected="none")


@rule(
    Severity.WRONG,
    "tied ends trained apart",
    effect="the base ties its head to its embedding and the adapter holds a copy of its own: a merge has to untie "
    "them (tie_word_embeddings false, both stored), and releases that tie again at loading lose the trained head",
    evidence="https://github.com/huggingface/transformers/issues/45127",
    needs_base=True,
)
def adapter_unties(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if folder.kind is not Kind.ADAPTER or base is None or find_suffix(base.tensors, HEAD) is not None:
        return
    if base.text_value("tie_word_embeddings") is not True and not (base.family is not None and base.family.is_tied):
        return
    if folder.get(ADAPTER_CONFIG, "ensure_weight_tying") is True:
        return
    own = sorted(name for name in folder.tensors if _END.search(name))
    names = [end for end in ("embed_tokens", "lm_head") if any(f".{end}." in f".{name}" for name in own)]
    if names:
        yield Fault(
            file=ADAPTER_CONFIG,
            key="modules_to_save",
            found=f"{' and '.join(names)} of its own, over a tied base",
            expected="neither of them, or ensure_weight_tying true",
        )


# Whole copies, and factors; of an embedding's LoRA, too, a merge changes one end alone.
_END = re.compile(r"(?:^|\.)(?:embed_tokens|lm_head)\.(?:modules_to_save\.|weight$|lora_)")


@rule(
    Severity.WRONG,
    "adapter that reaches nothing",
    effect="none of its modules is in the base under any of its names: PEFT and servers load it without an error, and "
    "the base answers",
    evidence="https://github.com/vllm-project/vllm/issues/34186",
    needs_base=True,
)
def adapter_reaches_nothing(folder: Folder) -> Iterator[Fault]:
    base, modules = folder.base, modules_of(folder)
    if base is None or not modules or not base.tensors:
        return
    family = family_of(base.model_type)
    known = {live_name(name, family) for name in base.tensors}
    tails = {_tail(name.rpartition(".")[0]) for name in known}
    unreached = [
        module
        for module in modules
        if not _is_reached(module, live_name(module, family), known, base)
        # Where we do not know how the live model names its parts, only a layer that is nowhere is unreached.
        and not (_tail(module) in tails and (is_vision(module + ".") or not family.published))
    ]
    if unreached:
        yield Fault(
            file=ADAPTER_WEIGHTS,
            key=unreached[0],
            found=f"{len(unreached)} of {len(modules)} modules are not in {base.path.name}",
            expected="modules of the base",
        )


def _is_reached(module: str, live: str, known: set[str], base: Folder) -> bool:
    """Return whether a module is in the base under the name that a loader looks for: the live or the stored one.

    A merge understands more spellings. PEFT and servers pass those over without a word.
    """
    return is_stored(live, known) and (module == live or is_stored(module, base.tensors))


@rule(
    Severity.WRONG,
    "adapter that does nothing",
    effect="the second factor of every pair is zero, as before the first step: the base answers (found with --deep)",
    evidence="https://github.com/huggingface/peft/issues/918",
)
def adapter_is_zero(folder: Folder) -> Iterator[Fault]:
    if folder.kind is Kind.ADAPTER and folder.digests is not None and folder.digests.is_zero:
        yield Fault(file=ADAPTER_WEIGHTS, found="every lora_B is zero", expected="trained factors")


@rule(
    Severity.WRONG,
    "adapter and full model in one folder",
    effect="a resume takes the full model and silently drops the adapter; loaders take the adapter on top of merged "
    "weights, twice",
    evidence="https://github.com/huggingface/peft/issues/2368",
)
def adapter_beside_model(folder: Folder) -> Iterator[Fault]:
    weights = [name for name in folder.entries if name.startswith("model") and name.endswith(".safetensors")]
    if folder.kind is Kind.ADAPTER and weights:
        found = [*sorted(weights)[:2], *([CONFIG] if folder.has(CONFIG) else [])]
        yield Fault(
            file=sorted(weights)[0],
            found=found,
            expected="a folder of its own for one of the two",
            fails="" if folder.has(CONFIG) else TRAINER,  # without a config nothing else finds a model there
        )


@rule(
    Severity.UNLOADABLE,
    "adapter beside its base's config.json",
    effect="since 5.4 transformers takes the folder for a whole model: no file named model.safetensors",
    evidence="https://github.com/huggingface/transformers/blob/v5.16.1/src/transformers/models/auto/auto_factory.py",
    mend="config.json removed, which no other reader of an adapter asks for",
    fails="transformers>=5.4",
)
def adapter_beside_config(folder: Folder) -> Iterator[Fault]:
    if folder.kind is Kind.ADAPTER and folder.has(CONFIG) and not any(n.startswith("model") for n in folder.entries):
        yield Fault(file=CONFIG, expected="no such file", remedies=(WholeFile(file=CONFIG, content=ABSENT),))
