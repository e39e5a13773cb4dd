"""Does an export say the same as the policy that was trained, and does it decode with its cache?

The export is loaded from disk in a fresh process, as its user will load it, and asked the same requests as the live
policy was. Each check is a line with its figure; one that fails keeps the export from being published.
"""

from __future__ import annotations

from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.cache import base_model, inference_ready
from grpo_toolkit.checkpoint import CONFIG, GENERATION_CONFIG, Checkpoint, TensorInfo, open_checkpoint, read_json
from grpo_toolkit.defaults import capture_defaults
from grpo_toolkit.dialect import published_renames
from grpo_toolkit.distributed import gathered_root, is_sharded
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.inference import Record, Request, generate
from grpo_toolkit.reading import FLOAT_NAMES
from grpo_toolkit.saving import inference_defaults
from grpo_toolkit.shards import named_dtype
from grpo_toolkit.worker import Worker

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator, Mapping, Sequence

    import torch

    from grpo_toolkit.defaults import InferenceDefaults

TIE_MARGINS: Final = {"float32": 1e-3, "float16": 0.05, "bfloat16": 0.25}
"""Logit gap under which rounding may pick either of two tokens, by dtype.

Logits of a language model lie within about +-32, where neighbouring bfloat16 values are 0.125 apart and float16 ones
0.016; twice to three times that spacing covers two roundings. float32 leaves room for another order of summation. On a
GPU a model need not even agree with itself: `policy_noise` measures by how much it does not.
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was verified: what, whether it held, and the figure that shows it; or why it was skipped."""

    name: str
    passed: bool
    detail: str
    skipped: bool = False


@dataclass(frozen=True, kw_only=True)
class VerificationResult:
    """Every check of one export, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}


def verify_export(
    export: str | os.PathLike[str],
    *,
    requests: Sequence[Request] = (),
    expected: Sequence[Record] = (),
    noise: float = 0.0,
    base: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> VerificationResult:
    """Check an exported folder.

    Args:
        export: the folder, loaded in a fresh process.
        requests: what to ask it; a text-only request is made up where there are none.
        expected: the records of the trained policy on the same requests (`policy_records`); without them the tokens
            are compared between cached and uncached decoding alone.
        noise: by how much logits of the policy differ between two runs of the same requests (`policy_noise`).
        base: the base's folder, to compare tensor names (as published), shapes and dtypes with.
        dtype: what every floating-point tensor is to be stored in ("float16"), where that is not the base's.
        device: where the fresh process puts the model.
        attn_implementation: the attention that the policy used, so that like is compared with like.

    Raises:
        CheckpointError: the folder cannot be read at all.
        WorkerError: it cannot be loaded.
    """
    checkpoint = open_checkpoint(export)
    checks = [_check_files(checkpoint)]
    if base is not None:
        checks.append(_check_tensors(checkpoint, open_checkpoint(base), dtype))
    requests = requests or [plain_request()]
    with Worker(checkpoint.path, device=device, attn_implementation=attn_implementation) as worker:
        report = worker.report
        checks.append(
            Check(
                name="loads whole",
                passed=report.is_clean,
                detail=f"{report.parameters:,} parameters in {report.dtype}; missing {report.missing or 'none'}, "
                f"unexpected {report.unexpected or 'none'}, mismatched {report.mismatched or 'none'}",
            )
        )
        if not report.is_clean:
            return VerificationResult(checks=tuple(checks))
        records = [worker.generate(request) for request in requests]
        # Each of the two that are compared is as noisy as the policy.
        tie_margin = max(TIE_MARGINS.get(report.dtype, 1e-3), 2 * noise)
        if expected:
            checks.append(_check_tokens("same greedy tokens as the trained policy", expected, records, tie_margin))
        # Exactly so many tokens: a policy may answer in one, which proves nothing about a cache.
        probe = replace(requests[0], max_new_tokens=8, exact=True, with_rivals=True)
        cached, uncached = (worker.generate(replace(probe, use_cache=use)) for use in (None, False))
        checks.append(_check_cache([cached, *records]))
        checks.append(_check_tokens("same tokens with and without the cache", [uncached], [cached], tie_margin))
    return VerificationResult(checks=tuple(checks))


@dataclass(frozen=True, kw_only=True)
class PolicyAnswers:
    """What a trained policy was asked and answered, and by how much its logits may be off: between two runs of it, and
    by what its dtype rounds."""

    requests: tuple[Request, ...]
    records: tuple[Record, ...]
    noise: float


def ask_policy(
    model: torch.nn.Module,
    processor: Any,
    requests: Sequence[Request],
    *,
    dtype: torch.dtype | None = None,
    defaults: InferenceDefaults | None = None,
) -> PolicyAnswers:
    """Ask a live policy everything twice; collective where it is sharded.

    Args:
        model: the trained model.
        processor: its processor or tokenizer; without one it cannot be asked anything.
        requests: what to ask; a text-only request is made up where there are none.
        dtype: what its export will be stored in.
        defaults: the generation defaults of the export. Trainers give the live model other end-of-sequence ids for
            their rollouts, and a policy that stops elsewhere cannot be compared.
    """
    if processor is None:
        return PolicyAnswers(requests=tuple(requests), records=(), noise=0.0)
    asked = tuple(replace(request, with_rivals=True) for request in requests or [plain_request()])
    generating = nullcontext() if defaults is None else inference_defaults(base_model(model), defaults)
    with generating, _seen_dtype(model) as computed_in:
        records = policy_records(model, processor, asked, dtype=dtype)
        rounding = [TIE_MARGINS.get(name, 0.0) for name in computed_in]
        again = _records_again(model, processor, asked, dtype=dtype)
    # FSDP2 and ZeRO compute in bfloat16 also where the export of a float32 base does not: the export's own margin is
    # too narrow for what the policy rounds.
    noise = max([policy_noise(records, again), *(margin / 2 for margin in rounding)])
    return PolicyAnswers(requests=asked, records=tuple(records), noise=noise)


def _records_again(
    model: torch.nn.Module, processor: Any, asked: Sequence[Request], *, dtype: torch.dtype | None
) -> list[Record]:
    """The same weights on the same requests in float32, which shows what their dtype rounds; in that dtype once more
    where the model is sharded, or float32 does not fit."""
    import torch

    if not is_sharded(model):
        with suppress(torch.cuda.OutOfMemoryError):
            return policy_records(model, processor, asked, dtype=dtype, computed_in=torch.float32)
        torch.cuda.empty_cache()
    return policy_records(model, processor, asked, dtype=dtype)


@contextmanager
def _seen_dtype(model: torch.nn.Module) -> Iterator[set[str]]:
    """The dtypes in which a model's embeddings came out inside, which are those that it computed in."""
    seen: set[str] = set()
    embeddings = base_model(model).get_input_embeddings()
    handle = embeddings.register_forward_hook(lambda _m, _args, out: seen.add(str(out.dtype).removeprefix("torch.")))
    try:
        yield seen
    finally:
        handle.remove()


def policy_records(
    model: torch.nn.Module,
    processor: Any,
    requests: Sequence[Request],
    *,
    dtype: torch.dtype | None = None,
    computed_in: torch.dtype | None = None,
) -> list[Record]:
    """What the trained policy answers, greedily, with its weights rounded to the export's `dtype`.

    It computes in that dtype too, or in `computed_in`. A sharded model is asked as it stands: it computes in the dtype
    of its mixed precision, and its engine holds on to parameters of its own.
    """
    rounded = (None, None) if is_sharded(model) else (dtype, computed_in or dtype)
    with inference_ready(model), _without_autocast(model), gathered_root(model), _parameters_as(model, *rounded):
        return [generate(model, processor, request) for request in requests]


def policy_noise(once: Sequence[Record], again: Sequence[Record]) -> float:
    """By how much the logits of two runs of the same requests differ.

    A dtype rounds, and by more where weights are wide: a tiny bfloat16 model was 0.33 away from itself in float32.
    Kernels on a GPU may sum in another order each time: at the 3B shape in bfloat16 on an H200 the same model differed
    from itself by up to 0.75, and said other words from such a token on.
    """
    gaps = [0.0]
    for first, second in zip(once, again, strict=True):
        where = _first_difference(first.tokens, second.tokens)
        for step in range(min(len(first.rivals), len(second.rivals)) if where is None else where):
            shared = first.rivals[step].keys() & second.rivals[step].keys()
            gaps += [abs(first.rivals[step][token] - second.rivals[step][token]) for token in shared]
        if where is not None and where < min(len(first.rivals), len(second.tokens)):
            gaps.append(first.rivals[where].get(second.tokens[where], 0.0))
    return max(gaps)


def reference_records(reference: str | os.PathLike[str], *, device: str = "cpu") -> tuple[list[Request], list[Record]]:
    """What a model folder answers to the made-up requests, in a process of its own: requests and records."""
    requests = [replace(plain_request(), with_rivals=True)]
    with Worker(open_checkpoint(reference).path, device=device) as worker:
        return requests, [worker.generate(request) for request in requests]


def plain_request() -> Request:
    """A request that any language model can answer."""
    return Request(messages=[{"role": "user", "content": "Count from one to ten."}], max_new_tokens=16)


@contextmanager
def _without_autocast(model: torch.nn.Module) -> Iterator[None]:
    """Take off accelerate's mixed-precision wrapper for a while: an export runs in the dtype of its files.

    `Accelerator.prepare` replaces `forward` on the instance by one inside `torch.autocast`, and keeps the original as
    `_original_forward`; norms and softmaxes then run in another precision than they do after loading from disk.
    """
    wrapped = [(module, module.forward) for module in model.modules() if "_original_forward" in vars(module)]
    try:
        for module, _ in wrapped:
            module.forward = vars(module)["_original_forward"]
        yield
    finally:
        for module, forward in wrapped:
            module.forward = forward


@contextmanager
def _parameters_as(
    model: torch.nn.Module, dtype: torch.dtype | None, computed_in: torch.dtype | None
) -> Iterator[None]:
    """Round the parameters to `dtype`, hold them as `computed_in`, and put the very same tensors back.

    Buffers stay, as `from_pretrained` leaves them.
    """
    if dtype is None or computed_in is None or base_model(model).dtype == dtype == computed_in:
        yield
        return
    kept = [(parameter, parameter.data) for parameter in model.parameters() if parameter.is_floating_point()]
    try:
        for parameter, data in kept:
            parameter.data = data.to(dtype).to(computed_in)
        yield
    finally:
        for parameter, data in kept:
            parameter.data = data


def _check_files(checkpoint: Checkpoint) -> Check:
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


def _check_tensors(export: Checkpoint, base: Checkpoint, dtype: str | None) -> Check:
    found, wanted = export.tensors(), _expected_tensors(base, export.tensors(), dtype)
    if not wanted:
        return Check(name="tensors as in the base", passed=True, detail=f"skipped: no safetensors in {base.path}")
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    vocabularies = (_vocabulary(export), _vocabulary(base))
    other = sorted(n for n in found.keys() & wanted.keys() if not _same(found[n], wanted[n], vocabularies))
    passed = not (missing or extra or other)
    detail = f"{len(found)} tensors with the names, shapes and dtypes of {base.path}"
    if not passed:
        parts = {"missing": missing, "not in the base": extra, "of another shape or dtype": other}
        detail = "; ".join(f"{len(names)} {what} ({names[0]}, ...)" for what, names in parts.items() if names)
    return Check(name="tensors as in the base", passed=passed, detail=detail)


def _expected_tensors(base: Checkpoint, found: Mapping[str, TensorInfo], dtype: str | None) -> dict[str, TensorInfo]:
    """The base's tensors in another dtype, and under published names where the export has those."""
    tensors = base.tensors()
    if dtype is not None:
        stored_as = named_dtype(dtype)
        floats = {name: info for name, info in tensors.items() if info.dtype in FLOAT_NAMES}
        tensors |= {name: replace(info, dtype=stored_as) for name, info in floats.items()}
    renames = published_renames(tensors, read_json(base.path / CONFIG).get("model_type"), compat="all")
    return {name if name in found else renames.get(name, name): info for name, info in tensors.items()}


def _same(one: TensorInfo, other: TensorInfo, vocabularies: tuple[int, int]) -> bool:
    # A resized vocabulary changes the first dimension of the embeddings, and of nothing else.
    resized = (one.shape[:1], other.shape[:1]) == tuple((size,) for size in vocabularies)
    shapes_fit = one.shape == other.shape or (resized and one.shape[1:] == other.shape[1:])
    return one.dtype == other.dtype and shapes_fit


def _vocabulary(checkpoint: Checkpoint) -> int:
    config = checkpoint.json(CONFIG)
    text = config.get("text_config", config) if isinstance(config, dict) else {}
    size = text.get("vocab_size") if isinstance(text, dict) else None
    return size if isinstance(size, int) else -1


def _check_tokens(name: str, expected: Sequence[Record], found: Sequence[Record], tie_margin: float) -> Check:
    equal, ties, broken = 0, 0, []
    for index, (want, got) in enumerate(zip(expected, found, strict=True)):
        where = _first_difference(want.tokens, got.tokens)
        if where is None:
            equal += 1
        elif _gap(want, got, where) <= tie_margin:
            ties += 1
        else:
            stops = where == min(len(want.tokens), len(got.tokens))
            gap = _gap(want, got, where)
            how = f"logit gap {gap:.3g}, ties are <= {tie_margin:.3g}" if gap < float("inf") else "no near rival"
            what = f"stops after {where}" if stops else f"differs from token {where} on ({how})"
            broken.append(f"request {index} {what}")
    detail = f"{equal} of {len(expected)} requests, {sum(len(want.tokens) for want in expected)} tokens in all"
    if ties:
        detail += f"; {ties} more differ from a tie on (logit gap <= {tie_margin:g})"
    if broken:
        detail += "; " + ", ".join(broken)
    return Check(name=name, passed=not broken, detail=detail)


def _gap(want: Record, got: Record, where: int) -> float:
    """How far the token that the export took was below the policy's own; infinite where it was not among the next."""
    if where >= min(len(want.rivals), len(got.tokens)):
        return float("inf")
    return want.rivals[where].get(got.tokens[where], float("inf"))


def _first_difference(one: Sequence[int], other: Sequence[int]) -> int | None:
    if list(one) == list(other):
        return None
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _check_cache(records: Sequence[Record]) -> Check:
    longest = max(records, key=lambda record: len(record.step_lengths))
    steps = longest.step_lengths
    shown = ", ".join(map(str, steps[:4])) + (", ..." if len(steps) > 4 else "")
    calls = max(record.vision_calls for record in records)
    return Check(
        name="KV cache in use",
        passed=all(record.is_cached and record.vision_calls <= 1 for record in records) and len(steps) > 1,
        detail=f"tokens fed per forward: {shown}; vision tower runs per request: {calls}",
    )
