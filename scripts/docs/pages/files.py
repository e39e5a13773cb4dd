"""The files that the package writes, by the names in its source, and the lines of its two logs, by their schemas."""

from __future__ import annotations

import json
from typing import Any, Final

from scripts.docs.pages.markdown import ROOT, plain, table
from scripts.docs.pages.source import constant

FILES: Final = (
    ("checkpoint.file_names", "MANIFEST", "an export or merge", "Its origin, versions and files."),
    ("checkpoint.folders.lineage", "BASE_RECORD", "a checkpoint", "The base that the training began with."),
    ("checkpoint.folders.lineage", "RECIPE_RECORD", "the recipe's output folder", "The settings of the run."),
    ("doctor.undo", "UNDO", "a repaired folder", "What was there before the repair. Leave it out of uploads."),
    ("latency.rows.store", "FILE_NAME", "`<output_dir>/latency`, or the folder of `bench --output`",
     "One line per measurement or explanation."),
    ("latency.rows.store", "PARTIAL_NAME", "the same", "Rounds of a measurement that has not ended. A killed one "
     "leaves it, and `grpo-toolkit report` reads it."),
    ("reporting.report.folder_findings", "FINDINGS_FILE", "the same", "What the doctor found in the timed folders."),
    ("reporting.report.page", "REPORT_FILE", "the same", "The report, one page that needs no network."),
    ("reporting.trackers.tracker_runs", "FILE_NAME", "the same", "The tracker runs that the lines were logged to."),
    ("step_time.store", "FILE_NAME", "the output folder", "One line per training step, and explanations of them."),
    ("callbacks.step_time", "PAGE", "the same", "Where the steps' time went, as a page."),
)  # fmt: skip
"""Module and name of the constant, the folder it is in, what it holds."""

SCHEMAS: Final = {"latency.jsonl": "latency.schema.json", "step_time.jsonl": "step_time.schema.json"}
INTRODUCTION: Final = """# Files and schemas

Everything is on disk first. Trackers such as W&B get a copy.
"""


def files_page() -> str:
    """Return the files, and a table of keys for every kind of line."""
    rows = ([f"`{constant(module, name)}`", place, meaning] for module, name, place, meaning in FILES)
    parts = [INTRODUCTION, table(("file", "in", "what it holds"), rows), ""]
    for file, schema in SCHEMAS.items():
        parts += [f"## `{file}`\n", f"Every line is a JSON object. The whole schema: [{schema}](../{schema}).\n"]
        parts += _definitions(json.loads((ROOT / "docs" / schema).read_text(encoding="utf-8")))
    return "\n".join(parts)


def _definitions(schema: dict[str, Any]) -> list[str]:
    lines = [_name_in(part["$ref"]) for part in schema["anyOf"]]
    names = [*lines, *sorted(schema["$defs"].keys() - set(lines))]
    return [part for name in names for part in _definition(name, schema["$defs"][name], is_line=name in lines)]


def _definition(name: str, schema: dict[str, Any], *, is_line: bool) -> list[str]:
    kept = set(schema.get("required", ()))
    rows = (
        [f"`{key}`", plain(_type(value)), "yes" if key in kept else "no"]
        for key, value in schema.get("properties", {}).items()
    )
    title = f"### `{name}`: a line\n" if is_line else f"### `{name}`\n"
    return [title, *_description(schema), table(("key", "type", "always there"), rows), ""]


def _description(schema: dict[str, Any]) -> list[str]:
    """Return what the class says of itself: sentences, and its attributes as a list."""
    said, _, attributes = schema.get("description", "").partition("Attributes:\n")
    parts = [plain(said.strip()) + "\n"] if said.strip() else []
    items: list[str] = []
    for line in attributes.splitlines():
        if line.startswith("    ") and not line.startswith("     "):
            keys, _, meaning = line.strip().partition(": ")
            items.append(f"- {', '.join(f'`{key.strip()}`' for key in keys.split(','))}: {plain(meaning)}")
        elif line.strip() and items:
            items[-1] += f" {plain(line.strip())}"
    return [*parts, *items, ""]


def _type(value: dict[str, Any]) -> str:
    if "$ref" in value:
        return _name_in(value["$ref"])
    if "anyOf" in value:
        return " or ".join(map(_type, value["anyOf"]))
    if "enum" in value or "const" in value:
        return " or ".join(f"`{json.dumps(one)}`" for one in value.get("enum", [value.get("const")]))
    if value.get("type") == "array":
        return f"list of {_type(value['items'])}" if isinstance(value.get("items"), dict) else "list"
    if value.get("type") == "object":
        of = value.get("additionalProperties")
        return f"object of {_type(of)}" if isinstance(of, dict) else "object"
    return str(value.get("type", "any"))


def _name_in(reference: str) -> str:
    return reference.rpartition("/")[2]
