"""The JSON schema of `step_time.jsonl`: `python -m scripts.docs.step_time_schema > docs/step_time.schema.json`."""

from __future__ import annotations

import json
import sys
from typing import Any

from grpo_toolkit.step_time.rows import SCHEMA_VERSION, StepExplanation, StepRow


def json_schema() -> dict[str, Any]:
    """Return the schema of one line, Draft 2020-12: a step or an explanation of steps, told apart by `kind`."""
    from pydantic import TypeAdapter

    schema = TypeAdapter(StepRow | StepExplanation).json_schema()
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A line of step_time.jsonl, schema version {SCHEMA_VERSION}",
        **schema,
    }


if __name__ == "__main__":
    sys.stdout.write(json.dumps(json_schema(), indent=1, ensure_ascii=False) + "\n")
