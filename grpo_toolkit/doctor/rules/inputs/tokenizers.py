"""The tokenizer: its file, its special tokens, and what else of its config a reader cannot do without."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import Kind
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.installed_classes import class_source, makes_its_steps, registered_tokenizer
from grpo_toolkit.doctor.parsed_folder import (
    TEMPLATE_JINJA,
    TOKENIZER,
    TOKENIZER_CONFIG,
    TOKENIZER_PARTS,
)
from grpo_toolkit.doctor.readers import ALL, SINCE_5, V4

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder


def _copy_of_base(folder: Folder) -> tuple[WholeFile, ...]:
    """Return a copy of the base's file, where no token was added to it."""
    base = folder.base
    is_good = base is not None and base.tokenizer is not None and base.tokenizer.fault == ""
    is_alike = base is not None and folder.added_tokens == base.added_tokens
    return (WholeFile(file=TOKENIZER, content=None),) if is_good and is_alike else ()


@rule(
    Severity.UNLOADABLE,
    "a tokenizer.json that the tokenizers library cannot read",
    effect="AutoTokenizer fails, or falls back on a class that has no vocabulary here",
    evidence="https://huggingface.co/docs/tokenizers/api/tokenizer",
    mend="the base's file, where no token was added",
)
def tokenizer_broken(folder: Folder) -> Iterator[Fault]:
    if folder.tokenizer is not None and folder.tokenizer.fault:
        yield Fault(
            file=TOKENIZER,
            key=folder.tokenizer.key,
            found=folder.tokenizer.fault,
            expected="a tokenizer as the library writes it",
            remedies=_copy_of_base(folder),
            # A class that makes its own takes the vocabulary alone.
            fails=V4 if folder.tokenizer.key == "added_tokens" and _makes_its_steps(folder) else "",
        )


@rule(
    Severity.UNLOADABLE,
    "a tokenizer.json without its list of added tokens",
    effect="transformers 5 looks there for the special tokens where the config has no list of them: KeyError",
    evidence="https://huggingface.co/docs/transformers/main_classes/tokenizer",
    mend="the base's file, where no token was added",
    fails=SINCE_5,
)
def added_tokens_missing(folder: Folder) -> Iterator[Fault]:
    is_told = folder.get(TOKENIZER_CONFIG, "added_tokens_decoder") is not ABSENT
    if folder.tokenizer is not None and not folder.tokenizer.has_added and not folder.tokenizer.fault and not is_told:
        remedies = _copy_of_base(folder)
        yield Fault(file=TOKENIZER, key="added_tokens", expected="a list, be it empty", remedies=remedies)


@rule(
    Severity.WRONG,
    "the tokenizer cuts text otherwise than the base's",
    effect="the same text becomes other ids, or ids become other text, than in training",
    evidence="https://huggingface.co/docs/tokenizers/components",
    mend="the base's file, where no token was added",
    needs_base=True,
)
def tokenizer_differs(folder: Folder) -> Iterator[Fault]:
    ours, base = folder.tokenizer, folder.base
    if ours is None or ours.fault or base is None or base.tokenizer is None or base.tokenizer.fault:
        return
    if _class_of(folder) != _class_of(base):
        return  # a class of transformers 5 makes the steps itself, in training as in every reader since
    for part in TOKENIZER_PARTS:
        if part == "post_processor" and None in (ours.parts.get(part), base.tokenizer.parts.get(part)):
            continue  # the classes of transformers make it anew
        where = _first_difference(ours.parts.get(part), base.tokenizer.parts.get(part), part)
        if where:
            yield Fault(
                file=TOKENIZER,
                key=where,
                found="another value than the base's",
                expected="the base's",
                remedies=_copy_of_base(folder),
                fails=V4 if part != "post_processor" and _makes_its_steps(folder) else "",
            )


def _class_of(folder: Folder) -> str:
    return str(folder.get(TOKENIZER_CONFIG, "tokenizer_class")).removesuffix("Fast")


def _makes_its_steps(folder: Folder, name: str = "") -> bool:
    return makes_its_steps(folder.model_type, name or str(folder.get(TOKENIZER_CONFIG, "tokenizer_class")))


def _first_difference(ours: Any, theirs: Any, where: str) -> str:
    """Return the path of the first value that both have and that differs; releases leave out and add defaults."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        shared = (key for key in theirs if key in ours and key not in _WITHOUT_SAY.get(where, ("trim_offsets",)))
        return next(filter(None, (_first_difference(ours[key], theirs[key], f"{where}.{key}") for key in shared)), "")
    return "" if ours == theirs and isinstance(ours, bool) == isinstance(theirs, bool) else where


_WITHOUT_SAY: Final = {
    "decoder": ("add_prefix_space", "trim_offsets", "use_regex"),
    "post_processor": ("type", "pair", "trim_offsets"),
}
"""Settings that a part does not use, or that only pairs of texts do: https://docs.rs/tokenizers/latest/tokenizers/"""


@rule(
    Severity.UNLOADABLE,
    "input names without the attention mask",
    effect="the tokenizer makes no attention mask: padded batches, processors and whoever asks for it end in a "
    "TypeError or KeyError",
    evidence="https://huggingface.co/docs/transformers/main_classes/tokenizer",
    mend="the key deleted: the class's own names count",
)
def input_names_wrong(folder: Folder) -> Iterator[Fault]:
    names = folder.get(TOKENIZER_CONFIG, "model_input_names")
    if names is not ABSENT and not (isinstance(names, list) and "attention_mask" in names):
        yield Fault(
            file=TOKENIZER_CONFIG,
            key="model_input_names",
            found=names,
            expected="a list with attention_mask, or nothing",
            remedies=(Edit(file=TOKENIZER_CONFIG, path=("model_input_names",), value=ABSENT),),
        )


@rule(
    Severity.UNLOADABLE,
    "a tokenizer class that no release has",
    effect="4.x stops (Tokenizer class ... does not exist or is not currently imported); 5 takes a general one",
    evidence="https://github.com/huggingface/transformers/issues/41553",
    mend="the base's class",
    needs_base=True,
    fails=V4,
)
def tokenizer_class_unknown(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    ours = folder.get(TOKENIZER_CONFIG, "tokenizer_class")
    theirs = ABSENT if base is None else base.get(TOKENIZER_CONFIG, "tokenizer_class")
    if (
        not isinstance(ours, str)
        or not isinstance(theirs, str)
        or folder.get(TOKENIZER_CONFIG, "auto_map") is not ABSENT
    ):
        return
    name = ours.removesuffix("Fast")
    if name == theirs.removesuffix("Fast") or _is_class(name):
        return
    yield Fault(
        file=TOKENIZER_CONFIG,
        key="tokenizer_class",
        found=ours,
        expected=f"{theirs}, as in the base",
        remedies=(Edit(file=TOKENIZER_CONFIG, path=("tokenizer_class",), value=theirs),),
        fails=_OF_V4_SERVERS if _is_named_by_processor(folder) else "",
    )


def _is_class(name: str) -> bool:
    return name in _GENERAL or bool(class_source(name, "tokenization"))


def _is_named_by_processor(folder: Folder) -> bool:
    """Return whether the processor's class in 4.x names the tokenizer's, whatever the tokenizer's config says."""
    whole = folder.kind is Kind.MODEL and folder.is_multimodal
    return whole and folder.processor_class in _NAME_THEIR_TOKENIZER


# Source: `tokenizer_class` of the processors in transformers 4.49 and 4.57, where it is not AutoTokenizer.
_NAME_THEIR_TOKENIZER: Final = frozenset(
    {"PaliGemmaProcessor", "ColPaliProcessor", "Qwen2VLProcessor", "Qwen2_5_VLProcessor", "Qwen3VLProcessor"}
    | {"LlavaNextVideoProcessor", "MllamaProcessor", "IdeficsProcessor", "ChameleonProcessor", "Emu3Processor"}
)
_OF_V4_SERVERS: Final = "vllm@<5; sglang@<5"

_GENERAL: Final = ("PreTrainedTokenizer", "TokenizersBackend", "PythonBackend", "SentencePieceBackend")


@rule(
    Severity.WRONG,
    "another tokenizer class than the base's, or none",
    effect="some classes put a token before each text themselves, or make the tokenizer's steps anew: other ids than "
    "in training. Without a class the one of the model's type is taken",
    evidence="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/llama/"
    "tokenization_llama_fast.py",
    mend="the base's class",
    needs_base=True,
)
def tokenizer_class_differs(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    theirs = ABSENT if base is None else base.get(TOKENIZER_CONFIG, _CLASS)
    if TOKENIZER_CONFIG not in folder.objects or not isinstance(theirs, str) or not folder.has(TOKENIZER):
        return
    if folder.kind not in (Kind.MODEL, Kind.ADAPTER) or folder.get(TOKENIZER_CONFIG, "auto_map") is not ABSENT:
        return
    ours = folder.get(TOKENIZER_CONFIG, _CLASS)
    is_lost = ours in (ABSENT, None)
    if is_lost and folder.kind is Kind.ADAPTER:
        return  # nothing here says of which type the model is
    newest = registered_tokenizer(folder.model_type) if is_lost else ""
    right = theirs.removesuffix("Fast")
    is_of_all = newest not in ("", right) and newest in _PUT_A_TOKEN_BEFORE and _makes_its_steps(folder, newest)
    if is_of_all or _is_other_in_v4(folder, newest if is_lost else ours, right, is_lost=is_lost):
        is_of_v4 = not _is_named_by_processor(folder)
        yield Fault(
            file=TOKENIZER_CONFIG,
            key=_CLASS,
            found=ours,
            expected=f"{theirs}, as in the base",
            remedies=(Edit(file=TOKENIZER_CONFIG, path=(_CLASS,), value=theirs),),
            fails=ALL if is_of_all else V4 if is_of_v4 else _OF_V4_SERVERS,
        )


def _is_other_in_v4(folder: Folder, name: Any, right: str, *, is_lost: bool) -> bool:
    """Return whether 4.x makes other ids with a class, or with the one of the model's type, than with the base's."""
    if is_lost:
        name = _OF_TYPES_IN_V4.get(folder.model_type, name)
        if folder.model_type in _SLOW_ALONE_IN_V4 and not folder.has("vocab.json"):
            return True
    name = name.removesuffix("Fast") if isinstance(name, str) else ""
    if name in ("", right) or not {name, right} & {*_PUT_A_TOKEN_BEFORE}:
        return False
    return is_lost or _is_class(name)  # of one that is none `tokenizer_class_unknown` says so


_CLASS: Final = "tokenizer_class"
_SLOW_ALONE_IN_V4: Final = ("granite", "granitemoe", "granitemoehybrid", "granitemoeshared")
"""Types whose class in 4.x reads vocab.json, and no tokenizer.json."""
_PUT_A_TOKEN_BEFORE: Final = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes of 4.x that make the post-processor anew, with the token that begins a text: `update_post_processor`."""
_OF_TYPES_IN_V4: Final = {
    **dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text", "gemma3n", "recurrent_gemma"), "GemmaTokenizer"),
    **dict.fromkeys(("aya_vision", "cohere", "cohere2"), "CohereTokenizer"),
    **dict.fromkeys(
        ("deepseek_v2", "deepseek_v3", "ernie4_5", "idefics2", "idefics3", "llama", "llama4", "llava", "llava_next",
         "llava_onevision", "mistral", "mistral3", "mixtral", "mllama", "paligemma", "phi3", "phimoe"),
        "LlamaTokenizer",
    ),
}  # fmt: skip
"""The class that 4.x takes where a config names none. Source: `TOKENIZER_MAPPING_NAMES` of transformers 4.57."""


@rule(
    Severity.WRONG,
    "another token before or behind each text than for the base",
    effect="the class puts the token that begins or ends a text where it is told to, whatever tokenizer.json says: "
    "other ids than in training",
    evidence="https://github.com/huggingface/transformers/blob/v4.57.6/src/transformers/models/llama/"
    "tokenization_llama_fast.py",
    mend="the base's flag",
    needs_base=True,
    fails=V4,
)
def tokenizer_flags_differ(folder: Folder) -> Iterator[Fault]:
    base, name = folder.base, _class_of(folder)
    if base is None or folder.kind not in (Kind.MODEL, Kind.ADAPTER) or name not in _PUT_A_TOKEN_BEFORE:
        return
    if folder.kind is Kind.MODEL and folder.model_type == "paligemma":
        return  # whose processor sets them itself
    for key in ("add_bos_token", "add_eos_token"):
        ours, theirs = folder.get(TOKENIZER_CONFIG, key), base.get(TOKENIZER_CONFIG, key)
        if ours is ABSENT or not isinstance(theirs, bool) or bool(ours) == theirs:
            continue
        edit = Edit(file=TOKENIZER_CONFIG, path=(key,), value=theirs)
        expected = f"{str(theirs).lower()}, as in the base"
        yield Fault(file=TOKENIZER_CONFIG, key=key, found=ours, expected=expected, remedies=(edit,))


def fails_without_config(folder: Folder) -> str | None:
    """Return whom the loss of tokenizer_config.json concerns: "" for every reader, None for none.

    The class is then the processor's in 4.x, or the one of the model's type, the special tokens come from
    special_tokens_map.json, as older releases write it, and the template from a file of its own.
    """
    if not folder.has("special_tokens_map.json") or TEMPLATE_JINJA not in folder.templates:
        return ""
    if _is_named_by_processor(folder):
        return SINCE_5
    puts_before = {_OF_TYPES_IN_V4.get(folder.model_type), registered_tokenizer(folder.model_type)}
    return "" if puts_before & {*_PUT_A_TOKEN_BEFORE} else None
