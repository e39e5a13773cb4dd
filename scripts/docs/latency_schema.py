"""The JSON schema of `latency.jsonl`: `python -m scripts.docs.latency_schema > docs/latency.schema.json`."""

from __future__ import annotations

import json
import sys
from typing import Any

from grpo_toolkit.latency.rows.row import SCHEMA_VERSION, ExplanationRow, LatencyRow


def json_schema() -> dict[str, Any]:
    """Return the schema of one line, Draft 2020-12: a measurement or an explanation, told apart by `kind`."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(LatencyRow | ExplanationRow).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A line of latency.jsonl, schema version {SCHEMA_VERSION}",
        **schema,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n")
