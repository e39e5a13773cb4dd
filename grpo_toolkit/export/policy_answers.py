"""A trained model's answers, generated as its export will: greedily, with weights rounded as stored, and twice.

The second answers show by how much the first may be off: a GPU need not agree with itself, and every dtype rounds.
"""

from __future__ import annotations

import logging
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.export.live_adapter import is_adapted
from grpo_toolkit.export.policy_weights import is_mergeable, weights_as
from grpo_toolkit.model.generation.agreement import LOGIT_TOLERANCES, TIE_MARGINS, first_difference, logit_distance
from grpo_toolkit.model.generation.drawn_pictures import places_pictures, requests_to
from grpo_toolkit.model.generation.evidence import LOGIT_STEPS
from grpo_toolkit.model.generation.generate import Record, generate
from grpo_toolkit.model.hooks import LookingHooks
from grpo_toolkit.model.kv_cache import inference_ready
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.saving.save_hook import inference_defaults
from grpo_toolkit.model.sharding.gather import is_sharded
from grpo_toolkit.model.sharding.gathered_for_generation import whole_weights
from grpo_toolkit.model.sharding.ranks import failing_together

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch

    from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults
    from grpo_toolkit.model.generation.request import Request


logger = logging.getLogger(__name__)
_STACK: Final = frozenset({"accelerate", "deepspeed", "grpo_toolkit", "peft", "torch", "transformers", "trl"})


@dataclass(frozen=True, kw_only=True)
class PolicyAnswers:
    """The answers of a trained model, and the distance by which an export's logits may differ from its own.

    That distance is the larger one of what two runs of the model differ by and of what its dtype rounds.

    Attributes:
        requests: what it was asked.
        records: what it answered, with evidence.
        noise: the largest gap between two logits that changed, in logits.
        logit_noise: how far all logits were apart, relative to their spread (`logit_distance`).
        distance: the same between what was trained (an adapter beside its base, which may be quantised) and what
            answered (merged, rounded as it is stored); None where the two are one.
        device: where it answered, if that is not where the policy runs.
        sees: its chat template places pictures; True for a model that has no eyes.
    """

    requests: tuple[Request, ...]
    records: tuple[Record, ...]
    noise: float
    logit_noise: float = 0.0
    distance: float | None = None
    device: str | None = None
    sees: bool = True


def ask_policy(
    model: torch.nn.Module,
    processor: Any,
    requests: Sequence[Request],
    *,
    dtype: torch.dtype | None = None,
    defaults: InferenceDefaults | None = None,
) -> PolicyAnswers:
    """Generate a trained model's answers to all requests, twice; collective where it is sharded.

    Args:
        model: the trained model.
        processor: its processor or tokenizer; without one it cannot be asked anything.
        requests: what to ask; questions are made up where there are none, about drawn pictures too where it sees.
        dtype: what its export will be stored in.
        defaults: the generation defaults of the export. Trainers give the live model other end-of-sequence ids for
            their rollouts, and a policy that stops elsewhere cannot be compared.
    """
    if processor is None:
        return PolicyAnswers(requests=tuple(requests), records=(), noise=0.0)
    given = requests or requests_to(model, processor)
    for name in input_hooks(model):
        logger.warning(
            "grpo_toolkit: %s changes what goes into the live model, and not into its saves; if the export is refused "
            "because it answers otherwise, run `grpo-toolkit export CHECKPOINT OUT --base BASE` after the training",
            name,
        )
    asked = tuple(replace(request, with_rivals=True, with_evidence=True) for request in given)
    generating = nullcontext() if defaults is None else inference_defaults(base_model(model), defaults)
    with generating, _seen_dtype(model) as computed_in:
        records = policy_records(model, processor, asked, dtype=dtype)
        computed_in |= _rounded_base(model, dtype)
        rounding = [TIE_MARGINS.get(name, 0.0) / 2 for name in computed_in]
        blurring = [LOGIT_TOLERANCES.get(name, 0.0) / 2 for name in computed_in]
        again = _records_again(model, processor, asked, dtype=dtype)
        is_merged = dtype is not None and not is_sharded(model) and is_mergeable(model)
        distance = distance_from(model, processor, asked, records) if is_merged else None
    # FSDP2 and ZeRO compute in bfloat16 also where the export of a float32 base does not: the export's own margin is
    # too narrow for what the policy rounds.
    return PolicyAnswers(
        requests=asked,
        records=tuple(records),
        noise=max(policy_noise(records, again), *rounding),
        logit_noise=max(logit_noise(records, again), *blurring),
        distance=distance,
        sees=getattr(processor, "image_processor", None) is None or places_pictures(processor),
    )


def input_hooks(model: torch.nn.Module) -> list[str]:
    """Return the names of a model's forward pre-hooks that neither we nor the libraries of the stack put there.

    ms-swift's turns the ids and images of a batch into embeddings, and is on until its training has ended.
    """
    hooks = list(base_model(model)._forward_pre_hooks.values())
    modules = [getattr(hook, "__module__", None) or type(hook).__module__ for hook in hooks]
    return [
        f"{module}.{getattr(hook, '__qualname__', type(hook).__qualname__)}"
        for module, hook in zip(modules, hooks, strict=True)
        if module.partition(".")[0] not in _STACK
    ]


def distance_from(
    model: torch.nn.Module, processor: Any, requests: Sequence[Request], records: Sequence[Record]
) -> float:
    """Return how far a live model, as it is, is from given answers to the same requests, along their first tokens."""
    forced = [
        replace(request, forced=record.tokens[:LOGIT_STEPS], max_new_tokens=len(record.tokens[:LOGIT_STEPS]))
        for request, record in zip(requests, records, strict=True)
    ]
    return logit_noise(records, policy_records(model, processor, forced))


def _records_again(
    model: torch.nn.Module, processor: Any, asked: Sequence[Request], *, dtype: torch.dtype | None
) -> list[Record]:
    """Generate all answers a second time, in float32, which shows how much the model's own dtype rounds.

    A sharded model, and one that does not fit in float32, runs in its own dtype again.
    """
    import torch

    if not is_sharded(model):
        with suppress(torch.cuda.OutOfMemoryError):
            return policy_records(model, processor, asked, dtype=dtype, computed_in=torch.float32)
        torch.cuda.empty_cache()
    return policy_records(model, processor, asked, dtype=dtype)


@contextmanager
def _seen_dtype(model: torch.nn.Module) -> Iterator[set[str]]:
    """Yield the dtypes of a model's embeddings, filled while it runs: those that it computed in."""
    seen: set[str] = set()
    embeddings = base_model(model).get_input_embeddings()
    hooks = LookingHooks("seeing in which dtype the policy computes")
    hooks.after(embeddings, lambda _m, _args, out: seen.add(str(out.dtype).removeprefix("torch.")))
    try:
        yield seen
    finally:
        hooks.close()


def _rounded_base(model: torch.nn.Module, dtype: torch.dtype | None) -> set[str]:
    """Return the live dtype of an adapter's base where it cannot hold the values that are stored, else nothing.

    The export's adapter is merged into the base as it is stored; the policy was trained on its rounded values.
    """
    import torch

    live = base_model(model).dtype
    is_rounded = dtype is not None and is_adapted(model) and torch.promote_types(live, dtype) != live
    return {str(live).removeprefix("torch.")} if is_rounded else set()


def policy_records(
    model: torch.nn.Module,
    processor: Any,
    requests: Sequence[Request],
    *,
    dtype: torch.dtype | None = None,
    computed_in: torch.dtype | None = None,
) -> list[Record]:
    """Return a trained model's greedy answers, with its weights rounded to the export's `dtype`.

    It computes in that dtype too, or in `computed_in`; an adapter is merged for it, as the export's is. All ranks ask
    a sharded model together, as it is and in the dtype of its mixed precision: its engine holds on to parameters of
    its own.

    Raises:
        PeerError: another rank could not ask it.
    """
    sharded = is_sharded(model)
    together = failing_together() if sharded else nullcontext()
    is_merged = not sharded and is_mergeable(model)
    rounded = (
        nullcontext()
        if sharded or dtype is None
        else weights_as(model, dtype, computed_in or dtype, is_merged=is_merged)
    )
    with together, inference_ready(model), _without_autocast(model), whole_weights(model), rounded:
        return [generate(model, processor, request) for request in requests]


def policy_noise(once: Sequence[Record], again: Sequence[Record]) -> float:
    """Return the largest change of a logit between two runs of the same requests.

    A dtype rounds, and by more where weights are wide: a tiny bfloat16 model was 0.33 away from itself in float32.
    Kernels on a GPU may sum in another order each time: at the 3B shape in bfloat16 on an H200 the same model differed
    from itself by up to 0.75, and said other words from such a token on.
    """
    gaps = [0.0]
    for first, second in zip(once, again, strict=True):
        where = first_difference(first.tokens, second.tokens)
        for step in range(min(len(first.rivals), len(second.rivals)) if where is None else where):
            shared = first.rivals[step].keys() & second.rivals[step].keys()
            gaps += [abs(first.rivals[step][token] - second.rivals[step][token]) for token in shared]
        if where is not None and where < min(len(first.rivals), len(second.tokens)):
            gaps.append(first.rivals[where].get(second.tokens[where], 0.0))
    return max(gaps)


def logit_noise(once: Sequence[Record], again: Sequence[Record]) -> float:
    """Return the distance between the logits of two runs of the same requests, up to their first different token."""
    distances = [0.0]
    for first, second in zip(once, again, strict=True):
        where = first_difference(first.tokens, second.tokens)
        if first.evidence is not None and second.evidence is not None:
            steps = {} if where is None else {"steps": where + 1}
            distances.append(logit_distance(first.evidence, second.evidence, **steps)[0])
    return max(distances)


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
