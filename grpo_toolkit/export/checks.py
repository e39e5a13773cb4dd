"""The comparisons of a verification: pure functions from folders and records to checks, each with its figure."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG
from grpo_toolkit.checkpoint.generation_defaults import capture_defaults
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.weights.shard_plan import named_dtype
from grpo_toolkit.checkpoint.weights.shard_writer import read_at
from grpo_toolkit.checkpoint.weights.tensor_blocks import Buffer, is_finite_in, raw_bytes
from grpo_toolkit.doctor.compat import published_renames
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.model.generation.agreement import (
    LOGIT_TOLERANCES,
    first_difference,
    input_differences,
    logit_distance,
    rival_gap,
)
from grpo_toolkit.model.unheld_tensors import unheld_in_folder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from grpo_toolkit.checkpoint.folders.model_folder import Checkpoint
    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.model.generation.evidence import Evidence
    from grpo_toolkit.model.generation.generate import Record
    from grpo_toolkit.model.load import LoadReport


_BLOCK_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, kw_only=True)
class Check:
    """A single check of a verification: its name, its outcome, and the figure behind it or the reason to skip it."""

    name: str
    passed: bool
    detail: str
    skipped: bool = False


def check_files(checkpoint: Checkpoint) -> Check:
    config = checkpoint.json(CONFIG)
    if not isinstance(config, dict):
        raise CheckpointError(f"{checkpoint.path / CONFIG}: missing")
    defaults = capture_defaults(config, checkpoint.json(GENERATION_CONFIG))
    poisoned = ", ".join(f"{repair.file}: {repair.key} is {repair.found}" for repair in defaults.repairs)
    return Check(
        name="cache not switched off in the files",
        passed=not defaults.repairs,
        detail=poisoned or f"use_cache true or absent at every level of {CONFIG} and {GENERATION_CONFIG}",
    )


def check_tensors(export: Checkpoint, found: Mapping[str, TensorInfo], base: Base, dtype: str | None) -> Check:
    """Check names, shapes and dtypes of an export's tensors, `found` in its headers, against its base's.

    What the base stores and no class holds, or holds twice, may be missing: the loader is asked.
    """
    wanted = _expected_tensors(base, found, dtype)
    if not wanted:
        return Check(name="tensors as in the base", passed=True, detail=f"skipped: no safetensors in {base.path}")
    absent, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    missing = [] if absent and _can_do_without(base, {wanted[name][0] for name in absent}) else absent
    vocabularies = (_vocabulary(export.json(CONFIG)), _vocabulary(base.config))
    other = sorted(n for n in found.keys() & wanted.keys() if not same_form(found[n], wanted[n][1], vocabularies))
    passed = not (missing or extra or other)
    detail = f"{len(found)} tensors with the names, shapes and dtypes of {base.path}"
    if passed and absent:
        detail += f"; without {len(absent)} that its class does not need ({absent[0]}, ...)"
    if not passed:
        parts = {"missing": missing, "not in the base": extra, "of another shape or dtype": other}
        detail = "; ".join(f"{len(names)} {what} ({names[0]}, ...)" for what, names in parts.items() if names)
    return Check(name="tensors as in the base", passed=passed, detail=detail)


def _can_do_without(base: Base, names: set[str]) -> bool:
    return bool(unheld_in_folder(base.path, base.tensors, {"": names}))


def _expected_tensors(
    base: Base, found: Mapping[str, TensorInfo], dtype: str | None
) -> dict[str, tuple[str, TensorInfo]]:
    """Return the base's tensors with their names there, in another dtype, by the name that the export has of them."""
    tensors = dict(base.tensors)
    if dtype is not None:
        stored_as = named_dtype(dtype)
        floats = {name: info for name, info in tensors.items() if info.dtype in FLOAT_NAMES}
        tensors |= {name: replace(info, dtype=stored_as) for name, info in floats.items()}
    renames = published_renames(tensors, base.config.get("model_type"), compat="all")
    return {name if name in found else renames.get(name, name): (name, info) for name, info in tensors.items()}


def same_form(one: TensorInfo, other: TensorInfo, vocabularies: tuple[int, int]) -> bool:
    # A resized vocabulary changes the first dimension of the embeddings, and of nothing else.
    resized = (one.shape[:1], other.shape[:1]) == tuple((size,) for size in vocabularies)
    shapes_fit = one.shape == other.shape or (resized and one.shape[1:] == other.shape[1:])
    return one.dtype == other.dtype and shapes_fit


def _vocabulary(config: object) -> int:
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    size = text.get("vocab_size") if isinstance(text, dict) else None
    return size if isinstance(size, int) else -1


def check_values(folder: Path, tensors: Mapping[str, TensorInfo]) -> Check:
    """Check that every stored value is finite; the weights are read once, a block at a time."""
    import torch

    tensors = {name: info for name, info in tensors.items() if info.dtype in FLOAT_NAMES}
    buffer, broken = Buffer(), []
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].file, item[1].span)):
        dtype: Any = getattr(torch, FLOAT_NAMES[info.dtype])
        path = folder / info.file
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            for begin in range(*info.span, _BLOCK_BYTES):
                count = min(_BLOCK_BYTES, info.span[1] - begin) // dtype.itemsize
                block = buffer.take(1, count, dtype)
                read_at(descriptor, raw_bytes(block), begin, path)
                if not is_finite_in(block, dtype):
                    broken.append(name)
                    break
        finally:
            os.close(descriptor)
    size = sum(info.nbytes for info in tensors.values())
    detail = f"{len(tensors)} tensors, {size / 1e9:.2f} GB"
    if broken:
        detail = f"{len(broken)} of {len(tensors)} tensors have NaN or infinity in them ({broken[0]}, ...)"
    return Check(name="every stored value is finite", passed=not broken, detail=detail)


def check_ties(report: LoadReport, base: Base | None, policy: bool | None) -> Check:
    """Check that the output embeddings are the input embeddings where, and only where, they are in the trained model.

    Args:
        report: of the load.
        base: decides where the trained model is not here.
        policy: whether they are tied in the trained model, or None.
    """
    name = "embeddings tied as in the base"
    if report.tied is None:
        return Check(name=name, passed=True, skipped=True, detail="the model does not have both of them")
    if policy is None and (base is None or not base.tensors):
        where = "no trained model and no base" if base is None else f"no safetensors in {base.path}"
        return Check(name=name, passed=True, skipped=True, detail=where)
    words = {True: "tied", False: "not tied"}
    wanted, where = (base.is_tied, str(base.path)) if policy is None and base is not None else (policy, "training")
    detail = words[report.tied]
    if report.tied is not wanted:
        detail += f", in {where} {words[bool(wanted)]}"
    return Check(name=name, passed=report.tied is wanted, detail=detail)


def check_inputs(pairs: Sequence[tuple[Evidence, Evidence]], *, sees: bool = False) -> Check:
    """Check that the export's processor makes the very same token ids and pixel values as the trained model's.

    Of one that `sees`, and was given no picture, the pixel values were not checked, which is said.
    """
    differing = {index: list(input_differences(*pair)) for index, pair in enumerate(pairs)}
    said = "; ".join(f"request {index}: {', '.join(words)}" for index, words in differing.items() if words)
    ids = sum(want.inputs["input_ids"].numel() for want, _ in pairs)
    pixels = sum(tensor.numel() for want, _ in pairs for name, tensor in want.inputs.items() if "pixel" in name)
    values = f"{ids} token ids and {pixels:,} pixel values" if pixels or not sees else f"{ids} token ids"
    detail = said or f"{values} of {len(pairs)} requests are equal"
    if sees and not pixels:
        detail += "; pixel values were not compared: no picture was asked"
    return Check(name="same token ids and pixel values from the processor", passed=not said, detail=detail)


def check_logits(
    pairs: Sequence[tuple[Evidence, Evidence]], *, dtype: str, noise: float, distance: float | None = None
) -> Check:
    """Check that the export's logits are the trained model's, along the trained model's own tokens.

    Of an adapter those are its merge's; `distance` says how far that is from the adapter beside its base.
    """
    name = "same logits as the trained policy"
    tolerance = max(LOGIT_TOLERANCES.get(dtype, 1e-3), 2 * noise)
    try:
        distances = [logit_distance(*pair) for pair in pairs]
    except ValueError as error:
        return Check(name=name, passed=False, detail=str(error))
    relative, largest = (max(distances) for distances in zip(*distances, strict=True))
    tokens = sum(len(want.logits) for want, _ in pairs)
    merged = "" if distance is None else f"; the live policy, its adapter not merged, is {distance:.2g} from that"
    return Check(
        name=name,
        passed=relative <= tolerance,  # which NaN is not
        detail=f"{relative:.2g} of their spread apart (allowed in {dtype}: {tolerance:.2g}), {largest:.2g} at "
        f"the worst token; {tokens} tokens of {len(pairs)} requests{merged}",
    )


def check_scores(
    name: str, score: Callable[[Sequence[Record]], list[float]], pairs: Sequence[tuple[Record, Record]]
) -> Check:
    """Check that equal answers earn the same reward; other tokens have a check of their own."""
    title = f"same {name} on the same prompts"
    try:
        want, got = (score([pair[side] for pair in pairs]) for side in (0, 1))
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        return Check(name=title, passed=True, skipped=True, detail=f"it could not be asked ({reason})")
    wrong = [
        index for index, (one, other) in enumerate(pairs) if one.tokens == other.tokens and want[index] != got[index]
    ]
    means = [sum(values) / len(values) for values in (want, got)]
    detail = f"policy {means[0]:.3g}, export {means[1]:.3g} on average over {len(pairs)} prompts"
    if wrong:
        detail += f"; request {wrong[0]} has the same tokens and another reward"
    return Check(name=title, passed=not wrong, detail=detail)


def check_tokens(name: str, expected: Sequence[Record], found: Sequence[Record], tie_margin: float) -> Check:
    equal, ties, broken = 0, 0, []
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        where = first_difference(want.tokens, got.tokens)
        gap = 0.0 if where is None else rival_gap(want.rivals, got.tokens, where)
        if where is None:
            equal += 1
        elif gap <= tie_margin:
            ties += 1
        else:
            stops = where == min(len(want.tokens), len(got.tokens))
            how = f"logit gap {gap:.3g}, ties are <= {tie_margin:.3g}" if gap < float("inf") else "no near rival"
            what = f"stops after {where}" if stops else f"differs from token {where} on ({how})"
            broken.append(f"request {index} {what}")
    detail = f"{equal} of {len(expected)} requests, {sum(len(want.tokens) for want in expected)} tokens in all"
    if ties:
        detail += f"; {ties} more differ from a tie on (logit gap <= {tie_margin:g})"
    if broken:
        detail += "; " + ", ".join(broken)
    return Check(name=name, passed=not broken, detail=detail)


def check_cache(records: Sequence[Record]) -> Check:
    longest = max(records, key=lambda record: len(record.step_lengths))
    steps = longest.step_lengths
    shown = ", ".join(map(str, steps[:4])) + (", ..." if len(steps) > 4 else "")
    calls = max(record.vision_calls for record in records)
    # A cache that does not tell its length: one token a forward needs it, and the other checks compare what was said.
    untold = any(record.is_cached is None for record in records)
    cached = all(record.is_cached is not False and record.vision_calls <= 1 for record in records)
    return Check(
        name="KV cache in use",
        passed=cached and len(steps) > 1,
        detail=f"tokens fed per forward: {shown}; vision tower runs per request: {calls}"
        + ("; what the cache held was not seen" if untold else ""),
    )
