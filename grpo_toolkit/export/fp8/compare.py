"""An export and its FP8 folder, each loaded in a fresh process, asked the same held-out prompts."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.export.checks import Check
from grpo_toolkit.export.fp8.fidelity import Figure, check_agreement, check_divergence, check_reward
from grpo_toolkit.export.verification_process import Worker
from grpo_toolkit.model.generation.drawn_pictures import question
from grpo_toolkit.model.generation.evidence import LOGIT_STEPS
from grpo_toolkit.model.generation.request import plain_request, requests_from_rows
from grpo_toolkit.model.generation.trainer_rows import IMAGE_COLUMNS, PROMPT_COLUMNS
from grpo_toolkit.model.load import load_processor
from grpo_toolkit.model.memory import why_too_large

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    from grpo_toolkit.model.generation.drawn_pictures import Sight
    from grpo_toolkit.model.generation.evidence import Evidence
    from grpo_toolkit.model.generation.generate import Record
    from grpo_toolkit.model.generation.request import Request

    RewardFunction = Callable[..., list[float]]

MOST_PROMPTS: Final = 64
NOT_COMPARED: Final = "answers compared with the export's"
_FEWEST: Final = 16
_PICTURES: Final = ((112, 84), (84, 168), (140, 140))
_QUESTIONS: Final = (
    "Count from one to ten.",
    "What is the capital of France?",
    "Write one sentence about rain.",
    "What is 12 times 12?",
)


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The checks that compare an FP8 folder with its export, and their figures by name."""

    checks: tuple[Check, ...]
    figures: Mapping[str, Figure] = field(default_factory=dict)


def compare_answers(
    export: Path,
    quantised: Path,
    *,
    requests: Sequence[Request] = (),
    prompts: Sequence[Mapping[str, Any]] = (),
    reward_funcs: Sequence[RewardFunction] = (),
    device: str = "cpu",
) -> Comparison:
    """Ask an export and its FP8 folder the same prompts, one model after the other, and compare what they say.

    Args:
        export: the unquantised folder.
        quantised: the FP8 folder that was made of it.
        requests: what to ask, beside `prompts`.
        prompts: held-out rows as trainers take them, at most 64; without any prompts there are some of our own, with
            drawn pictures for a model that sees.
        reward_funcs: reward functions, as trainers call them, which value the answers to `prompts`.
        device: where both are loaded.

    Raises:
        WorkerError: one of the two cannot be loaded or asked.
    """
    too_large = why_too_large(open_checkpoint(export).tensors(), device)  # FP8 is unpacked for the first forward
    if too_large is not None:
        return Comparison(checks=(Check(name=NOT_COMPARED, passed=False, detail=too_large),))
    rows = list(prompts)[:MOST_PROMPTS]
    asked = [*requests_from_rows(rows, limit=MOST_PROMPTS, max_new_tokens=256 if reward_funcs else 64), *requests]
    with Worker(export, device=device) as worker:
        asked = asked or _own_prompts(worker.sight)
        wanted = [worker.generate(replace(request, with_evidence=True)) for request in asked]
    with Worker(quantised, device=device) as worker:
        pairs = [_led(worker, request, record) for request, record in zip(asked, wanted, strict=True)]
        found = [worker.generate(request) for request in asked[: len(rows)]] if reward_funcs else []
    divergence, agreement = check_divergence(pairs), check_agreement(pairs)
    checks, figures = [divergence[0], agreement[0]], {"divergence": divergence[1], "agreement": agreement[1]}
    processor = load_processor(export) if reward_funcs and rows else None
    for reward in reward_funcs if rows else ():
        name = str(getattr(reward, "__name__", "reward"))
        paid = [_paid(reward, processor, rows, records) for records in (wanted[: len(rows)], found)]
        check, figures[name] = check_reward(name, *paid)
        checks.append(check)
    return Comparison(checks=tuple(checks), figures=figures)


def _led(worker: Worker, request: Request, record: Record) -> tuple[Evidence, Evidence]:
    """Return the logits of both models along the first tokens that the export said."""
    forced = record.tokens[:LOGIT_STEPS]
    led = replace(request, forced=forced, max_new_tokens=len(forced), with_evidence=True)
    found = worker.generate(led).evidence
    assert record.evidence is not None, "it was asked for"
    assert found is not None, "it was asked for"
    return record.evidence, found


def _own_prompts(sight: Sight) -> list[Request]:
    """Return prompts where none are given: questions and, for a model that sees, as many again about pictures."""
    words = [replace(plain_request(), messages=[{"role": "user", "content": text}]) for text in _QUESTIONS]
    if not sight.takes_pictures or sight.why_not:
        return words
    count = _FEWEST - len(words)
    return [*words, *(question(_PICTURES[number % len(_PICTURES)], f"held out {number}") for number in range(count))]


def _paid(
    reward: RewardFunction, processor: Any, rows: Sequence[Mapping[str, Any]], records: Sequence[Record]
) -> list[float]:
    """Return what a reward function pays for answers to rows: it gets their other columns, as trainers give them."""
    tokenizer = getattr(processor, "tokenizer", processor)
    texts = [tokenizer.decode(record.tokens, skip_special_tokens=True) for record in records]
    names = [name for name in rows[0] if name not in (*PROMPT_COLUMNS, *IMAGE_COLUMNS)]
    columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
    return [
        float(value)
        for value in reward(
            prompts=[next(row[name] for name in PROMPT_COLUMNS if row.get(name)) for row in rows],
            completions=[[{"role": "assistant", "content": text}] for text in texts],
            completion_ids=[record.tokens for record in records],
            **columns,
        )
    ]
