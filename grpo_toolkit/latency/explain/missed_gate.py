"""The explanation of a missed gate."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.bench.gate import Missed
    from grpo_toolkit.latency.rows.row import ExplanationRow
    from grpo_toolkit.model.generation.request import Request


def explain_missed(
    base: str,
    missed: Sequence[Missed],
    *,
    device: str,
    requests: Sequence[Request] = (),
    max_new_tokens: int = 64,
    budget_s: float | None = None,
) -> list[ExplanationRow]:
    """Explain each folder that missed its gate; what is no folder (an endpoint) is left out.

    Args:
        base: the first arm's folder; "" explains nothing.
        missed: what missed the gate.
        device, requests, max_new_tokens, budget_s: as for `explain_latency`.
    """
    from grpo_toolkit.latency.explain.explanation import explain_latency

    if not base or not Path(base).is_dir():
        return []
    folders = dict.fromkeys(miss.path for miss in missed if Path(miss.path).is_dir())
    return [
        explain_latency(
            base, folder, requests=requests, max_new_tokens=max_new_tokens, device=device, budget_s=budget_s
        )
        for folder in folders
    ]
