"""The parts that the report's page and an export's page share: the templates' settings, and a row of the table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.latency.rows.review import median_of
from grpo_toolkit.reporting.charts.style import label_of

if TYPE_CHECKING:
    from jinja2 import Environment

    from grpo_toolkit.latency.rows.row import LatencyRow


def line_of(row: LatencyRow) -> dict[str, Any]:
    """Return a row's figures for a table: times in milliseconds, memory in GB."""
    return {
        "arm": label_of(row.arm),
        "ttft": median_of(row.ttft_s, 1e3),
        "tpot": row.tpot_s,
        "e2e": median_of(row.e2e_s, 1e3),
        "speed": median_of(row.output_tokens_per_s),
        "memory": None if row.memory.peak_bytes is None else row.memory.peak_bytes / 1e9,
        "cache": {None: "not seen", True: "in use", False: "off"}[row.proof.is_cached],
        "vision": row.proof.vision_calls,
    }


def templates(*, autoescape: bool) -> Environment:
    """Return the templates of page and card; a name that one of them uses and is not given is an error."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    return Environment(
        loader=PackageLoader("grpo_toolkit.reporting.report", "templates"),
        autoescape=autoescape,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
