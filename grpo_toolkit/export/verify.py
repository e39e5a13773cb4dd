"""The verification of an export: it answers as the trained model does, and decodes with its cache.

The export is loaded from disk in a fresh process, as its user will load it, and asked the same requests as the live
policy was. Each check is a line with its figure; one that fails keeps the export from being published.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, open_checkpoint
from grpo_toolkit.checkpoint.short_repr import HtmlTable
from grpo_toolkit.checkpoint.weights.base_weights import Base, open_base
from grpo_toolkit.errors import WorkerError
from grpo_toolkit.export.checks import (
    Check,
    check_cache,
    check_files,
    check_inputs,
    check_logits,
    check_scores,
    check_tensors,
    check_ties,
    check_tokens,
    check_values,
)
from grpo_toolkit.export.findings_check import check_findings, loads_whole
from grpo_toolkit.export.picture_check import BLIND_TEMPLATE, PICTURES, check_pictures
from grpo_toolkit.export.verification_process import Worker
from grpo_toolkit.model.generation.agreement import TIE_MARGINS
from grpo_toolkit.model.generation.drawn_pictures import made_up_requests
from grpo_toolkit.model.generation.evidence import LOGIT_STEPS
from grpo_toolkit.model.generation.request import plain_request
from grpo_toolkit.model.memory import why_too_large

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from grpo_toolkit.model.generation.evidence import Evidence
    from grpo_toolkit.model.generation.generate import Record
    from grpo_toolkit.model.generation.request import Request
    from grpo_toolkit.model.load import LoadReport

__all__ = ["VerificationResult", "plain_request", "reference_records", "verify_export"]

_NEED_LOADING: Final = (
    "loads whole",
    "same token ids and pixel values from the processor",
    "same logits as the trained policy",
    "same greedy tokens as the trained policy",
    "KV cache in use",
    "same tokens with and without the cache",
)


@dataclass(frozen=True, kw_only=True, repr=False)
class VerificationResult(HtmlTable):
    """The checks of one export, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if not check.passed)

    @property
    def skipped(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.skipped)

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"passed": self.passed}

    def table_rows(self) -> list[dict[str, object]]:
        return [
            {
                "check": check.name,
                "verdict": "skipped" if check.skipped else "ok" if check.passed else "FAILED",
                "detail": check.detail,
            }
            for check in self.checks
        ]


def verify_export(
    export: str | os.PathLike[str],
    *,
    requests: Sequence[Request] = (),
    expected: Sequence[Record] = (),
    noise: float = 0.0,
    logit_noise: float = 0.0,
    distance: float | None = None,
    scores: Mapping[str, Callable[[Sequence[Record]], list[float]]] | None = None,
    base: str | os.PathLike[str] | Base | None = None,
    tied: bool | None = None,
    dtype: str | None = None,
    sees: bool = True,
    device: str = "cpu",
    attn_implementation: str | None = None,
) -> VerificationResult:
    """Check an exported folder.

    A model for which there is no memory is not loaded: the checks that need it are in the result as skipped, with the
    reason.

    Args:
        export: the folder, loaded in a fresh process.
        requests: what to ask it; a question is made up where there are none, and pictures are drawn for a model that
            sees where none is among them.
        expected: the records of the trained policy on the same requests (`policy_records`); without them the tokens
            are compared between cached and uncached decoding alone.
        noise: by how much logits of the policy differ between two runs of the same requests (`policy_noise`).
        logit_noise: the same over all logits, relative to their spread (`policy_answers.logit_noise`).
        distance: how far the trained policy itself was from `expected`, where that was its merge (told, not judged).
        scores: reward functions by name, as functions of records: the answers have to earn what the policy's do.
        base: the base's folder, or its headers as `open_base` read them, to compare tensor names (as published),
            shapes, dtypes and ties with.
        tied: whether the trained model's output embeddings are its input embeddings; by default as in the base.
        dtype: what every floating-point tensor is to be stored in ("float16"), where that is not the base's.
        sees: False where the policy was trained with a chat template of its own that places no picture: then no
            picture is asked, and that template is no fault.
        device: where the fresh process puts the model.
        attn_implementation: the attention that the policy used, so that like is compared with like.

    Raises:
        CheckpointError: the folder cannot be read at all.
        WorkerError: it cannot be loaded.
    """
    checkpoint = open_checkpoint(export)
    origin = base if base is None or isinstance(base, Base) else open_base(open_checkpoint(base))
    checks, tensors = [check_files(checkpoint)], checkpoint.tensors()
    if origin is not None:
        checks.append(check_tensors(checkpoint, tensors, origin, dtype))
    checks.append(check_values(checkpoint.path, tensors))
    findings = check_findings(checkpoint.path, None if origin is None else origin.path, sees=sees)
    checks.append(findings)
    too_large = why_too_large(tensors, device)
    if too_large is not None:
        config = checkpoint.json(CONFIG)
        sees = isinstance(config, dict) and "vision_config" in config
        names = (*_NEED_LOADING, *((PICTURES,) if sees else ()))
        checks += [Check(name=name, passed=True, skipped=True, detail=too_large) for name in names]
        return VerificationResult(checks=tuple(checks))
    requests = requests or [plain_request()]
    with Worker(checkpoint.path, device=device, attn_implementation=attn_implementation) as worker:
        report = _report(worker, findings)
        checks.append(loads_whole(report, origin))
        if not checks[-1].passed:
            return VerificationResult(checks=tuple(checks))
        if origin is not None:
            checks.append(check_ties(report, origin, tied))
        if pairs := list(_evidence(worker, requests, expected)):
            checks.append(check_inputs(pairs, sees=worker.sight.takes_pictures))
            checks.append(check_logits(pairs, dtype=report.dtype, noise=logit_noise, distance=distance))
        records = [worker.generate(replace(request, with_evidence=False)) for request in requests]
        # Each of the two that are compared is as noisy as the policy.
        tie_margin = max(TIE_MARGINS.get(report.dtype, 1e-3), 2 * noise)
        if expected:
            checks.append(check_tokens("same greedy tokens as the trained policy", expected, records, tie_margin))
            answers = list(zip(expected, records, strict=True))
            checks += [check_scores(name, score, answers) for name, score in (scores or {}).items()]
        # Exactly so many tokens: a policy may answer in one, which proves nothing about a cache.
        probe = replace(requests[0], max_new_tokens=8, exact=True, with_rivals=True, with_evidence=False)
        cached, uncached = (worker.generate(replace(probe, use_cache=use)) for use in (None, False))
        checks.append(check_cache([cached, *records]))
        checks.append(check_tokens("same tokens with and without the cache", [uncached], [cached], tie_margin))
        # Last: a folder that fails at a picture may end the process.
        sight = worker.sight if sees else replace(worker.sight, why_not=BLIND_TEMPLATE)
        pictures = check_pictures(sight, worker.generate, list(zip(requests, records, strict=True)))
        checks += [] if pictures is None else [pictures]
    return VerificationResult(checks=tuple(checks))


def _report(worker: Worker, findings: Check) -> LoadReport:
    """Return the report of loading; where it fails, the doctor's reason stands beside the reader's."""
    try:
        return worker.report
    except WorkerError as error:
        raise (error if findings.passed else WorkerError(f"{error}; the doctor: {findings.detail}")) from error


def _evidence(
    worker: Worker, requests: Sequence[Request], expected: Sequence[Record]
) -> Iterator[tuple[Evidence, Evidence]]:
    """Yield the logits of both models along the first tokens that the trained one generated."""
    for request, record in zip(requests, expected, strict=bool(expected)):
        if record.evidence is None:
            continue
        forced = record.tokens[:LOGIT_STEPS]
        asked = replace(request, forced=forced, max_new_tokens=len(forced), with_rivals=False, with_evidence=True)
        found = worker.generate(asked).evidence
        assert found is not None, "it was asked for"
        yield record.evidence, found


def reference_records(reference: str | os.PathLike[str], *, device: str = "cpu") -> tuple[list[Request], list[Record]]:
    """Return made-up requests and a model folder's answers to them, generated in a process of its own."""
    with Worker(open_checkpoint(reference).path, device=device) as worker:
        made_up = made_up_requests(worker.sight)
        requests = [replace(request, with_rivals=True, with_evidence=True) for request in made_up]
        return requests, [worker.generate(request) for request in requests]
