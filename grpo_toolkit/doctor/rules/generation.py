"""Generation defaults that are lost, or say two things."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG, Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import PREPROCESSOR, PROCESSOR, TEMPLATE_JSON, TOKENIZER_CONFIG, token_text
from grpo_toolkit.doctor.readers import ALL, TRANSFORMERS, without

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

NEUTRAL: Final[dict[str, tuple[Any, ...]]] = {
    "temperature": (None, 1, 1.0),
    "top_p": (None, 1, 1.0),
    "top_k": (None, 50),
    "min_p": (None,),
    "typical_p": (None, 1, 1.0),
    "epsilon_cutoff": (None, 0, 0.0),
    "eta_cutoff": (None, 0, 0.0),
}
"""The settings of sampling, each with the values at which it has no effect (GenerationConfig.validate)."""


@rule(
    Severity.WRONG,
    "generation_config.json lost",
    effect="the base's sampling defaults and end-of-sequence tokens are gone, in transformers and in servers, and "
    "use_cache in config.json counts instead",
    evidence="https://github.com/hiyouga/EasyR1/issues/265",
    mend="the base's file",
    needs_base=True,
)
def generation_config_lost(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    if folder.kind is not Kind.MODEL or base is None or GENERATION_CONFIG not in base.objects:
        return
    fails = fails_without(folder, GENERATION_CONFIG)
    if not folder.has(GENERATION_CONFIG) and fails is not None:
        yield Fault(
            file=GENERATION_CONFIG,
            expected="the base's file",
            remedies=(WholeFile(file=GENERATION_CONFIG, content=None),),
            fails=fails,
        )


def _is_not_missed(folder: Folder, file: str) -> bool:
    """Return whether no reader answers otherwise without a file that is not here, or that none of them can read.

    Without a generation config they take what config.json says. A text model's readers ask for no template of a
    processor.
    """
    if file == TEMPLATE_JSON:
        is_of_pictures = folder.is_multimodal or folder.has(PREPROCESSOR) or folder.has(PROCESSOR)
        return not is_of_pictures and bool(folder.templates)
    if "expected an object" in folder.refused.get(file, ""):
        return False  # they take JSON of another kind, and fail
    base = folder.base
    if file != GENERATION_CONFIG or base is None or GENERATION_CONFIG not in base.objects:
        return False
    published = base.objects[GENERATION_CONFIG]
    neutral = {**NEUTRAL, "do_sample": (None, False), "repetition_penalty": (None, 1, 1.0), "use_cache": (None, True)}
    silent = ("transformers_version", "bos_token_id", "pad_token_id", "eos_token_id")
    is_flag = {"output_attentions", "output_hidden_states", "output_scores", "return_dict_in_generate"}
    spoken = [key for key in published if key not in silent and key not in is_flag and not key.startswith("_")]
    is_neutral = all(key in neutral and published[key] in neutral[key] for key in spoken)
    eos = _ids(published.get("eos_token_id"))
    is_told_alike = folder.get(CONFIG, "cache_implementation") in (ABSENT, None)
    return is_neutral and is_told_alike and (eos is None or sorted(_config_eos(folder)) == sorted(eos))


def fails_without(folder: Folder, file: str) -> str | None:
    """Return whom the loss of a file concerns: "" for every reader of it, None for none."""
    if not _is_not_missed(folder, file):
        return ""
    return _WITH_CACHES if file == GENERATION_CONFIG and folder.model_type in _CACHES_OF_V4 else None


# Whose class of 4.x names a kind of cache, that generate takes from there where no generation_config.json is read.
_CACHES_OF_V4: Final = ("gemma2", "gemma3_text", "cohere2")
_WITH_CACHES: Final = "transformers<4.56"


@rule(
    Severity.WRONG,
    "another file's content in generation_config.json",
    effect="generate takes the settings of the model's config for its own, and has none of those that belong here",
    evidence="https://huggingface.co/docs/transformers/main_classes/text_generation",
    mend="the base's file",
)
def generation_config_of_model(folder: Folder) -> Iterator[Fault]:
    settings = folder.objects.get(GENERATION_CONFIG, {})
    strange = [key for key in ("model_type", "peft_type", "weight_map") if key in settings]
    if strange:
        has_base = folder.base is not None and GENERATION_CONFIG in folder.base.objects
        yield Fault(
            file=GENERATION_CONFIG,
            key=strange[0],
            found=settings[strange[0]],
            expected="settings of generation alone",
            remedies=(WholeFile(file=GENERATION_CONFIG, content=None),) if has_base else (),
            fails=without(ALL, "vllm") if _says_the_same_to_vllm(folder) else "",
        )


def _says_the_same_to_vllm(folder: Folder) -> bool:
    base = {} if folder.base is None else folder.base.objects.get(GENERATION_CONFIG, {})
    return bool(base) and all(folder.get(GENERATION_CONFIG, key) == base.get(key, ABSENT) for key in _OF_VLLM)


_OF_VLLM: Final = (
    "repetition_penalty", "presence_penalty", "frequency_penalty", "temperature", "top_k", "top_p", "min_p",
    "max_new_tokens", "eos_token_id",
)  # fmt: skip
"""All that vLLM takes of the file: `ModelConfig.get_diff_sampling_param` and `SamplingParams` of vLLM 0.31."""


@rule(
    Severity.NOTE,
    "no generation_config.json",
    effect="the library's own defaults decide how this model generates, and use_cache of config.json is live",
    evidence="https://huggingface.co/docs/transformers/main_classes/text_generation",
)
def generation_config_missing(folder: Folder) -> Iterator[Fault]:
    if (
        folder.kind is Kind.MODEL
        and folder.is_generative
        and folder.base is None
        and not folder.has(GENERATION_CONFIG)
    ):
        yield Fault(file=GENERATION_CONFIG, expected="a file; pass --base to compare with the base's")


@rule(
    Severity.WRONG,
    "generation defaults lost",
    effect="the folder no longer says how to sample, or how to penalise repetition: its default answers differ from "
    "the base's",
    evidence="https://github.com/hiyouga/EasyR1/issues/265",
    mend="the base's values",
    needs_base=True,
)
def generation_defaults_lost(folder: Folder) -> Iterator[Fault]:
    ours, base = folder.objects.get(GENERATION_CONFIG), folder.base
    published = {} if base is None else base.objects.get(GENERATION_CONFIG, {})
    if folder.kind is not Kind.MODEL or ours is None:
        return
    neutral: dict[str, tuple[Any, ...]] = {**NEUTRAL, "do_sample": (None, False), "repetition_penalty": (None, 1, 1.0)}
    lost = [key for key, values in neutral.items() if ours.get(key) is None and published.get(key) not in values]
    if lost:
        yield Fault(
            file=GENERATION_CONFIG,
            key=lost[0],
            found=f"{', '.join(lost)} absent or null",
            expected=f"{published[lost[0]]}, as in the base",
            remedies=tuple(Edit(file=GENERATION_CONFIG, path=(key,), value=published[key]) for key in lost),
            fails="" if {*lost} & {*_OF_VLLM} else without(ALL, "vllm"),
        )


@rule(
    Severity.WRONG,
    "states or attentions without a dict to return them in",
    effect="they are computed for every token and not returned; 4.x refuses to save the model again "
    "(GenerationConfig is invalid)",
    evidence="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/generation/"
    "configuration_utils.py",
    mend="the base's value, or none",
    fails="transformers<5",
)
def states_without_dict(folder: Folder) -> Iterator[Fault]:
    if folder.get(GENERATION_CONFIG, "return_dict_in_generate") is True:
        return
    for key in ("output_hidden_states", "output_attentions", "output_scores", "output_logits"):
        if folder.get(GENERATION_CONFIG, key) is True:
            right = ABSENT if folder.base is None else folder.base.get(GENERATION_CONFIG, key)
            if right is not True:
                edit = Edit(file=GENERATION_CONFIG, path=(key,), value=right)
                yield Fault(file=GENERATION_CONFIG, key=key, found=True, expected="absent or false", remedies=(edit,))


@rule(
    Severity.WRONG,
    "sampling settings without do_sample",
    effect="transformers decodes greedily, servers sample, and the next save_pretrained raises "
    "(GenerationConfig is invalid)",
    evidence="https://github.com/huggingface/transformers/issues/29988",
    mend="do_sample as in the base, else true",
    fails=TRANSFORMERS,
)
def sampling_without_do_sample(folder: Folder) -> Iterator[Fault]:
    settings = folder.objects.get(GENERATION_CONFIG, {})
    speaking = [key for key in sorted(NEUTRAL) if key in settings and settings[key] not in NEUTRAL[key]]
    if settings.get("do_sample") is True or not speaking:
        return
    base = folder.base
    written = (
        True if base is None or not base.objects.get(GENERATION_CONFIG) else base.get(GENERATION_CONFIG, "do_sample")
    )
    remedies: tuple[Edit, ...] = (Edit(file=GENERATION_CONFIG, path=("do_sample",), value=True),)
    if written is not True:  # the base is greedy: what says how to sample came from the training
        remedies = tuple(Edit(file=GENERATION_CONFIG, path=(key,), value=ABSENT) for key in speaking)
    yield Fault(
        file=GENERATION_CONFIG,
        key="do_sample",
        found=settings.get("do_sample", ABSENT),
        expected=f"true, since {', '.join(speaking)} {'is' if len(speaking) == 1 else 'are'} set",
        remedies=remedies,
    )


def _ids(value: Any) -> list[int] | None:
    """Return the token ids of a config value that may be one id, a list, or nonsense (None)."""
    values = value if isinstance(value, list) else [value]
    return values if values and all(type(item) is int for item in values) else None


def _eos_place(folder: Folder) -> tuple[str, tuple[str, ...], list[int]] | None:
    """Return the end-of-sequence ids that generate uses, with the file and the path that they are read from.

    transformers asks config.json only where there is no generation_config.json: in one without ids there are none.
    """
    if folder.has(GENERATION_CONFIG):
        if GENERATION_CONFIG not in folder.objects:
            return None
        value = folder.get(GENERATION_CONFIG, "eos_token_id")
        ids = [] if value is ABSENT or value is None else _ids(value)
        return None if ids is None else (GENERATION_CONFIG, ("eos_token_id",), ids)
    for path in (("eos_token_id",), ("text_config", "eos_token_id")):
        ids = _ids(folder.get(CONFIG, *path))
        if ids is not None:
            return CONFIG, path, ids
    return None


def _config_eos(folder: Folder) -> list[int]:
    """Return the ids in config.json, which nobody asks where generation_config.json exists."""
    values = (folder.get(CONFIG, *path) for path in (("eos_token_id",), ("text_config", "eos_token_id")))
    return next((ids for ids in map(_ids, values) if ids is not None), [])


def _token_id(folder: Folder, name: str) -> int | None:
    text = token_text(folder.get(TOKENIZER_CONFIG, name))
    return None if text is None else (folder.added_tokens or {}).get(text)


@rule(
    Severity.WRONG,
    "the tokenizer's end of sequence does not end generation",
    effect="generate does not stop at the end of an answer and goes on to max_new_tokens",
    evidence="https://github.com/meta-llama/llama-cookbook/issues/640",
    mend="the base's ids, else the tokenizer's id added",
    fails=TRANSFORMERS,
)
def eos_token_lost(folder: Folder) -> Iterator[Fault]:
    eos, place = _token_id(folder, "eos_token"), _eos_place(folder)
    if folder.kind is not Kind.MODEL or place is None:
        return
    file, path, ids = place
    if eos in ids or (ids and eos is None) or not (ids or folder.is_generative):
        return
    base = None if folder.base is None else _eos_place(folder.base)
    has_bases_end = folder.base is not None and _token_id(folder.base, "eos_token") in (eos, None)
    if base is not None and sorted(base[2]) == sorted(ids) and has_bases_end:
        return  # the maker's own choice
    written = _right_ids(eos, ids or _config_eos(folder), [] if base is None else base[2])
    if written:
        yield Fault(
            file=file,
            key=".".join(path),
            found=folder.get(file, *path),
            expected=f"{written if len(written) > 1 else written[0]}, with the tokenizer's end of sequence",
            remedies=(Edit(file=file, path=path, value=written if len(written) > 1 else written[0]),),
        )


def _right_ids(eos: int | None, ids: list[int], base: list[int]) -> list[int]:
    """Return the base's ids if the tokenizer's end is among them (or not known), else that end and the known ids."""
    if base and (eos is None or eos in base):
        return base
    return list(dict.fromkeys([*([] if eos is None else [eos]), *ids]))


@rule(
    Severity.WRONG,
    "end-of-sequence ids differ from the base",
    effect="generation stops at other tokens than the base's: too early where pad joined them, too late where one is "
    "missing",
    evidence="https://github.com/huggingface/transformers/issues/48016",
    mend="the base's ids",
    needs_base=True,
)
def eos_differs(folder: Folder) -> Iterator[Fault]:
    ours, base = _eos_place(folder), None if folder.base is None else _eos_place(folder.base)
    eos = _token_id(folder, "eos_token")
    if folder.kind is not Kind.MODEL or ours is None or base is None or sorted(ours[2]) == sorted(base[2]):
        return
    file, path, ids = ours
    if not ids or not base[2] or (eos is not None and (eos not in ids or eos not in base[2])):
        return  # `eos_token_lost` reports the one; in the other the tokenizer was changed on purpose
    written: Any = base[2] if len(base[2]) > 1 else base[2][0]
    yield Fault(
        file=file,
        key=".".join(path),
        found=folder.get(file, *path),
        expected=f"{written}, as in the base",
        remedies=(Edit(file=file, path=path, value=written),),
    )
