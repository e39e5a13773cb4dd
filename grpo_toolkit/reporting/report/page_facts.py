"""The facts beside a report's figures: when and where they were made, how far they can be trusted."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from grpo_toolkit.latency.bench.statistics import PERCENTILES
from grpo_toolkit.latency.bench.thinking import mean_reward
from grpo_toolkit.latency.rows.review import median_of
from grpo_toolkit.reporting.charts.style import label_of, milliseconds

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.latency.rows.review import Review
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow, Summary


def facts_of(row: LatencyRow) -> list[str]:
    """Return what was asked of a row's model, on what, when, and with which versions."""
    work = row.workload
    images = f" ({work.image_tokens:,} of an image)" if work.image_tokens else ""
    facts = [
        f"{work.max_new_tokens:,} new tokens after {work.prompt_tokens:,}{images}",
        f"batch {work.batch_size}",
        f"{row.rounds} rounds, arms in turns",
        row.settings.dtype.removeprefix("torch."),
        row.environment.get("hardware", row.settings.device),
        *_when_and_with(row),
    ]
    if row.parameters:
        in_millions = row.parameters / 1e6
        size = f"{in_millions / 1e3:.2f} B" if in_millions >= 1e3 else f"{in_millions:.1f} M"
        facts.insert(0, f"{size} parameters")
    if row.step is not None:
        facts.insert(0, f"step {row.step:,}")
    return facts


def facts_explained(row: ExplanationRow) -> list[str]:
    """Return the same of an explanation that stands alone."""
    facts = ["explained, no arms measured beside it", row.environment.get("hardware", ""), *_when_and_with(row)]
    return [*([] if row.step is None else [f"step {row.step:,}"]), *filter(None, facts)]


def _when_and_with(row: LatencyRow | ExplanationRow) -> list[str]:
    names = {"grpo_toolkit": "grpo-toolkit", "transformers": "transformers", "torch": "torch"}
    commit = row.environment.get("grpo_toolkit_commit", "")
    versions = ", ".join(
        f"{name} {row.environment[key]}{f' ({commit})' if commit and key == 'grpo_toolkit' else ''}"
        for key, name in names.items()
        if key in row.environment
    )
    return [row.measured_at[:16].replace("T", " ") + " UTC", *filter(None, [versions])]


def busy_machine(row: LatencyRow | ExplanationRow) -> str:
    """Return a warning where more processes wanted the processor than it has cores; "" where it was idle or unknown.

    Arms that take turns are slowed alike, so ratios hold; times and intervals suffer.
    """
    cores = re.search(r"(\d+) cores?\b", row.environment.get("hardware", ""))
    try:
        load = float(row.environment.get("load_average", ""))
    except ValueError:
        return ""
    if cores is None or load <= int(cores[1]) + 1:  # what is measured keeps one busy itself
        return ""
    return f"This machine was busy: {load:.1f} processes wanted its {cores[1]} cores. Intervals are wide for that."


def percentile_note(rows: Sequence[LatencyRow]) -> str:
    """Return the percentiles of TPOT that the sample carries, or how many rounds the first of them takes."""
    shown = [f"{label_of(row.arm)} {_percentiles(row.tpot_s)}" for row in rows if row.tpot_s and row.tpot_s.p90]
    if shown:
        return f"Percentiles of TPOT, ms: {'; '.join(shown)}."
    least = ", ".join(f"{name} from {least} rounds on" for name, (_, least) in PERCENTILES.items())
    return f"Medians and quartiles. No percentiles of {rows[0].rounds} rounds: {least}." if rows else ""


def _percentiles(summary: Summary) -> str:
    values = {name: getattr(summary, name) for name in PERCENTILES}
    return ", ".join(f"{name} {milliseconds(value)}" for name, value in values.items() if value is not None)


def natural_lines(review: Review) -> list[dict[str, Any]]:
    """Return a line per arm of the answers that ended where the model ended them."""
    return [
        {
            "arm": label_of(row.arm),
            "thinking": {None: "", True: "asked for", False: "not asked for"}[row.workload.thinking],
            "tokens": row.tokens.output.median,
            "ttft": median_of(row.ttft_s, 1e3),
            "first_answer": median_of(row.first_answer_s, 1e3),
            "e2e": median_of(row.e2e_s, 1e3),
            "reward": mean_reward(row.timelines),
            "capped": f"{row.tokens.capped} of {row.rounds}",
        }
        for row in review.natural
        if row.tokens is not None
    ]
