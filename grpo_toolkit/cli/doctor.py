"""`grpo-toolkit doctor`: say what is wrong with a folder."""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cli.shell import READER_HELP, add_json, add_verb, print_lines
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.reporting.terminal.diagnosis import diagnosis_lines, paper, run_lines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Sequence

    from grpo_toolkit.cli.shell import Commands
    from grpo_toolkit.doctor.findings import Diagnosis


def add_command(commands: Commands) -> None:
    """Add `doctor` and its flags."""
    parser = add_verb(
        commands,
        "doctor",
        help="say what is wrong with a model folder, or with a run's checkpoints",
        examples=(
            "out/checkpoint-500 --base Qwen/Qwen2.5-VL-3B-Instruct",
            "out",
            "out/checkpoint-500 --base BASE --deep --json",
        ),
    )
    parser.add_argument("path", type=Path, help="a model, an adapter, a checkpoint, or a run folder with many")
    parser.add_argument("--base", help="folder or Hub name (in the local cache) of the model it was trained from")
    parser.add_argument("--deep", action="store_true", help="also compare weights byte by byte")
    parser.add_argument("--for", dest="reader", metavar="READER", help=READER_HELP)
    parser.set_defaults(run=doctor)
    add_json(parser)


def doctor(arguments: argparse.Namespace) -> int:
    """Diagnose a folder, or every checkpoint of a run; 0 clean, 1 with findings worse than a note."""
    with _no_collector():
        return _doctor(arguments.path, arguments)


def _doctor(path: Path, arguments: argparse.Namespace) -> int:
    from grpo_toolkit.checkpoint.trainer_checkpoints import checkpoints_in
    from grpo_toolkit.doctor.diagnose import diagnose_checkpoint, diagnose_run, parts_of

    options = {"base": arguments.base, "deep": arguments.deep, "reader": arguments.reader}
    parts = parts_of(path) if path.is_dir() else []
    if len(parts) == 1 and parts[0].parent == path and not checkpoints_in(path):
        path, parts = parts[0], []
    if parts:
        diagnoses, empty = diagnose_run(path, **options)
        if not diagnoses:
            raise CheckpointError(f"{path}: none of its checkpoints holds anything to examine: {empty[0]}")
        _say_run(path, diagnoses, empty, as_json=arguments.json)
    else:
        diagnoses = [diagnose_checkpoint(path, **options)]
        _say_one(diagnoses[0], as_json=arguments.json)
    return 0 if all(diagnosis.is_clean for diagnosis in diagnoses) else 1


@contextmanager
def _no_collector() -> Iterator[None]:
    """Switch the garbage collector off: nothing here is cyclic, and it would take a third of a large index's time."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _say_one(diagnosis: Diagnosis, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(diagnosis.to_json()))
    else:
        print_lines(diagnosis_lines(diagnosis, paper()))


def _say_run(path: Path, diagnoses: Sequence[Diagnosis], empty: Sequence[str], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(run_json(path, diagnoses, empty)))
    else:
        print_lines(run_lines(diagnoses, empty, paper()))


def run_json(path: Path, diagnoses: Sequence[Diagnosis], empty: Sequence[str]) -> dict[str, Any]:
    """Return a run as one object; each finding names its checkpoint."""
    return {
        "path": str(path),
        "kind": "run",
        "clean": all(diagnosis.is_clean for diagnosis in diagnoses),
        "checkpoints": [{**diagnosis.to_json(), "findings": len(diagnosis.findings)} for diagnosis in diagnoses],
        "empty": list(empty),
        "findings": [
            {"checkpoint": diagnosis.path.name, **finding.to_json()}
            for diagnosis in diagnoses
            for finding in diagnosis.findings
        ],
    }
