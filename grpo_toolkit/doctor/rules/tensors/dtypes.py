"""Dtypes: wider than the base, said otherwise than stored, quantisation that is not there."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.safetensors_header import DTYPE_BITS, FLOAT_NAMES
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.readers import SINCE_5, V4, without
from grpo_toolkit.doctor.rules.tensors.tensor_facts import HEAD, base_tensors, common_tensors, weights
from grpo_toolkit.doctor.tensor_changes import TensorChanges

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder


@rule(
    Severity.WASTEFUL,
    "wider weights than the base",
    effect="more memory, and more bytes read for every token; TRL loads a model given by name in float32",
    evidence="https://github.com/meta-llama/llama-cookbook/issues/289",
    mend="the base's dtypes (--rewrite-weights)",
    needs_base=True,
)
def wider_than_base(folder: Folder) -> Iterator[Fault]:
    ours, pairs = weights(folder), common_tensors(folder)
    casts = {
        name: other.dtype
        for name, (own, other) in pairs.items()
        if {own.dtype, other.dtype} <= set(FLOAT_NAMES) and _is_wider(own.dtype, other.dtype)
    }
    if not casts:
        return
    common = folder.base.stored_dtype if folder.base else None
    casts |= {  # a doubled head is in no base, and is cast with the rest so that it can be compared and dropped
        name: common
        for name, info in ours.items()
        if common and name not in pairs and name.endswith(HEAD) and _is_wider(info.dtype, common)
    }
    first = min(casts)
    yield Fault(
        file=folder.tensors[first].file,
        key=first,
        found=f"{folder.tensors[first].dtype}, with {len(casts)} of {len(ours)} tensors",
        expected=f"{casts[first]}, as in the base",
        remedies=(TensorChanges(dtypes=casts), *_declare(folder, common)),
    )


def _is_wider(dtype: str, other: str) -> bool:
    return DTYPE_BITS[dtype] > DTYPE_BITS[other]


def _declare(folder: Folder, dtype: str | None) -> tuple[Edit, ...]:
    """Return the edits that make every dtype in the config the stored one."""
    if dtype is None:
        return ()
    wanted = FLOAT_NAMES[dtype]
    return tuple(
        Edit(file=CONFIG, path=(*level, key), value=wanted)
        for level, node in folder.levels()
        for key in ("dtype", "torch_dtype")
        if isinstance(node.get(key), str) and node[key] != wanted
    )


@rule(
    Severity.WASTEFUL,
    "config says another dtype than the weights have",
    effect="dtype='auto' (the default of 5.x) casts at loading: float32 in memory from bfloat16 files, or the reverse",
    evidence="https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel.from_pretrained",
    mend="the stored dtype in config.json",
)
def dtype_disagrees(folder: Folder) -> Iterator[Fault]:
    stored = folder.stored_dtype if weights(folder) else None
    said = [(key, folder.get(CONFIG, key)) for key in ("dtype", "torch_dtype")]
    known = [(key, value) for key, value in said if value in FLOAT_NAMES.values()]
    if stored is None or not known or folder.get(CONFIG, "quantization_config") is not ABSENT:
        return
    wrong = [(key, value) for key, value in known if value != FLOAT_NAMES[stored]]
    if wrong and not _is_published_so(folder, stored):
        key, value = wrong[0]
        yield Fault(file=CONFIG, key=key, found=value, expected=FLOAT_NAMES[stored], remedies=_declare(folder, stored))


def _is_published_so(folder: Folder, stored: str) -> bool:
    base = folder.base
    said = [folder.get(CONFIG, key) for key in ("dtype", "torch_dtype")]
    return (
        base is not None
        and base.stored_dtype == stored
        and [base.get(CONFIG, key) for key in ("dtype", "torch_dtype")] == said
    )


_NAMES: Final = frozenset({*FLOAT_NAMES.values(), "auto", "half", "float", "double", "float8_e4m3fn", "float8_e5m2"})


@rule(
    Severity.UNLOADABLE,
    "a dtype that is none of torch's floating-point types",
    effect="transformers looks the name up in torch when it reads the config: it stops with an AttributeError, or "
    "loads integer weights",
    evidence="https://docs.pytorch.org/docs/stable/tensor_attributes.html",
    mend="the stored dtype in config.json",
)
def dtype_unknown(folder: Folder) -> Iterator[Fault]:
    for level, node in folder.levels():
        for key in ("dtype", "torch_dtype"):
            value = node.get(key)
            if isinstance(value, str) and value.removeprefix("torch.") not in _NAMES:
                path = (*level, key)
                stored = FLOAT_NAMES.get(folder.stored_dtype or "")
                remedies = (Edit(file=CONFIG, path=path, value=stored),) if stored else ()
                expected = stored or "a floating-point type"
                is_second = key == "torch_dtype" and node.get("dtype") is not None
                fails = _SINCE_DTYPE if key == "dtype" else _BEFORE_DTYPE if is_second else ""
                yield Fault(
                    file=CONFIG, key=".".join(path), found=value, expected=expected, remedies=remedies, fails=fails
                )


_BEFORE_DTYPE: Final = "transformers<4.56; vllm@<4.56; sglang@<4.56"
"""The releases that ask for `torch_dtype` alone: https://github.com/huggingface/transformers/pull/39782"""
_SINCE_DTYPE: Final = "transformers>=4.56; vllm@>=4.56; sglang@>=4.56"
"""Those that ask for `dtype` first."""


@rule(
    Severity.WRONG,
    "a part of the model under another dtype than the whole",
    effect="4.x makes each part in the dtype that its own config says: the first product of two of them raises "
    "(expected mat1 and mat2 to have the same dtype)",
    evidence="https://github.com/huggingface/transformers/issues/34071",
    mend="one dtype in all parts",
    fails=V4,
)
def part_of_another_dtype(folder: Folder) -> Iterator[Fault]:
    for is_later in (False, True):
        whole_key, whole = _dtype_at(folder, (), is_later=is_later)
        for part in ("text_config", "vision_config"):
            own_key, own = _dtype_at(folder, (part,), is_later=is_later)
            if own == whole or own not in _FLOATS or whole not in _FLOATS:
                continue
            base = folder.base
            theirs = (
                [None, None] if base is None else [_dtype_at(base, at, is_later=is_later)[1] for at in ((part,), ())]
            )
            if base is not None and theirs[0] == own != theirs[1]:
                continue  # published so
            is_part = base is None or theirs[1] == whole
            path, right = ((part, own_key), whole) if is_part else ((whole_key,), own)
            yield Fault(
                file=CONFIG,
                key=".".join(path),
                found=own if is_part else whole,
                expected=str(right),
                remedies=(Edit(file=CONFIG, path=path, value=right),),
                fails=_DTYPE_IN_V4 if is_later else "",
            )
            return


_DTYPE_IN_V4: Final = "transformers>=4.56<5; vllm@>=4.56<5; sglang@>=4.56<5"
_FLOATS: Final = tuple(FLOAT_NAMES.values())


def _dtype_at(folder: Folder, level: tuple[str, ...], *, is_later: bool) -> tuple[str, Any]:
    """Return the key that says the dtype of a part, and what it says; releases since 4.56 ask for `dtype` first."""
    for key in ("dtype", "torch_dtype") if is_later else ("torch_dtype",):
        value = folder.get(CONFIG, *level, key)
        if value not in (ABSENT, None):
            return key, value
    return "torch_dtype", ABSENT


@rule(
    Severity.UNLOADABLE,
    "float64 for a mixture of experts",
    effect="transformers 5 multiplies all experts at once, which torch does in 16 and 32 bits alone: RuntimeError",
    evidence="https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.grouped_mm.html",
    mend="the stored dtype in config.json",
    fails=without(SINCE_5, "vllm"),  # which computes them in 16 bits
)
def experts_in_float64(folder: Folder) -> Iterator[Fault]:
    key, value = _dtype_at(folder, (), is_later=True)
    if value == "float64" and any(".experts." in name for name in weights(folder)):
        stored = FLOAT_NAMES.get(folder.stored_dtype or "", "float32")
        right = "float32" if stored == value else stored
        edit = Edit(file=CONFIG, path=(key,), value=right)
        yield Fault(file=CONFIG, key=key, found=value, expected=right, remedies=(edit,))


@rule(
    Severity.NOTE,
    "mixed dtypes",
    effect="loading casts everything to one dtype; harmless where the maker meant it (norms in float32)",
    evidence="https://huggingface.co/docs/transformers/main_classes/model#transformers.PreTrainedModel.from_pretrained",
)
def mixed_dtypes(folder: Folder) -> Iterator[Fault]:
    counts: dict[str, int] = {}
    for info in weights(folder).values():
        if info.dtype in FLOAT_NAMES:
            counts[info.dtype] = counts.get(info.dtype, 0) + 1
    if len(counts) > 1 and not (folder.base and len({i.dtype for i in base_tensors(folder).values()}) > 1):
        yield Fault(file=next(iter(folder.shards)), found=counts, expected="one floating-point dtype")


@rule(
    Severity.WRONG,
    "quantization_config left over",
    effect="the weights are not quantised, yet loading asks for the quantizer's library and quantises them again",
    evidence="https://github.com/huggingface/transformers/issues/34847",
    mend="the key deleted",
)
def quantization_left_over(folder: Folder) -> Iterator[Fault]:
    value = folder.get(CONFIG, "quantization_config")
    if value in (ABSENT, None) or not weights(folder):
        return
    if folder.base is not None and folder.base.get(CONFIG, "quantization_config") not in (ABSENT, None):
        return
    if all(info.dtype in FLOAT_NAMES for info in folder.tensors.values()):
        yield Fault(
            file=CONFIG,
            key="quantization_config",
            found=value,
            expected="absent: no quantised tensor is stored",
            remedies=(Edit(file=CONFIG, path=("quantization_config",), value=ABSENT),),
        )
