"""The answers of a policy that was trained on a quantised base (QLoRA), as they will be served.

Its adapter is merged into the base that the quantised one was made from, so the export says what that merge says, and
is held against it: loaded anew, adapted and merged by PEFT. The policy that was trained differs from it by what
quantisation rounds, which for four bits is far more than any tolerance. That distance is told, and judges nothing.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

from grpo_toolkit.export.live_adapter import saved_adapter
from grpo_toolkit.export.policy_answers import PolicyAnswers, ask_policy, distance_from
from grpo_toolkit.merge.adapter import find_adapter
from grpo_toolkit.model.load import auto_class, dtype_argument
from grpo_toolkit.model.memory import why_too_large

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.export.export_plan import ExportPlan
    from grpo_toolkit.model.generation.request import Request


def ask_unquantised(plan: ExportPlan, base: Base, requests: Sequence[Request]) -> PolicyAnswers:
    """Ask a quantised policy's adapter in its unquantised base, where the policy runs or, without room, on the CPU.

    Args:
        plan: of the export of a live adapter, not sharded.
        base: the unquantised base.
        requests: what to ask.
    """
    from peft import PeftModel

    source = plan.source
    places = [place for place in (source.device, "cpu") if why_too_large(base.tensors, place) is None]
    if not places:  # nor can the export be loaded: verification says so
        return PolicyAnswers(requests=tuple(requests), records=(), noise=0.0)
    attention = getattr(source.plain.config, "_attn_implementation", None)
    model = auto_class(base.path).from_pretrained(
        base.path, attn_implementation=attention, **{dtype_argument(): plan.dtype}
    )
    folder = nullcontext(find_adapter(source.folder)) if source.folder is not None else saved_adapter(source.model)
    with folder as adapter:
        merged = PeftModel.from_pretrained(model, adapter).eval().to(places[0])
    answers = ask_policy(merged, source.processor, requests, dtype=plan.dtype, defaults=plan.defaults)
    return replace(
        answers,
        device=places[0],
        distance=distance_from(source.model, source.processor, answers.requests, answers.records),
    )
