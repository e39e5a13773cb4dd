"""`grpo-toolkit doctor` and `grpo-toolkit repair`: thin commands over the library."""

from __future__ import annotations

import gc
import json
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.trainer_checkpoints import checkpoints_in
from grpo_toolkit.doctor.diagnose import diagnose_checkpoint, diagnose_run
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.reporting.terminal.diagnosis import diagnosis_lines, paper, print_lines, repair_lines, run_lines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from grpo_toolkit.doctor.findings import Diagnosis
    from grpo_toolkit.doctor.repair import RepairResult


def doctor(arguments: argparse.Namespace) -> int:
    """Diagnose a folder, or every checkpoint of a run; 0 clean, 1 with findings worse than a note."""
    path: Path = arguments.path
    with _no_collector():
        return _doctor(path, arguments)


def _doctor(path: Path, arguments: argparse.Namespace) -> int:
    options = {"base": arguments.base, "deep": arguments.deep}
    if path.is_dir() and checkpoints_in(path):
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
    """Nothing here is cyclic and the process ends soon: collecting would take a third of the time of a large index."""
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
    """A run as one object; each finding says its checkpoint."""
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


def repair(arguments: argparse.Namespace) -> int:
    """Mend a folder, or every checkpoint of a run; 0 if all is clean afterwards, 1 if something is left."""
    from grpo_toolkit.doctor.repair import undo_repair
    from grpo_toolkit.doctor.undo import UNDO

    path: Path = arguments.path
    checkpoints = checkpoints_in(path) if path.is_dir() else []
    folders = [*checkpoints, path]
    if arguments.undo:
        mended = [folder for folder in folders if (folder / UNDO).is_dir()] or [path]
        _say_undone(path, {str(folder): undo_repair(folder) for folder in mended}, as_json=arguments.json)
        return 0
    results = list(_repair_each(folders, arguments))
    if arguments.json:
        said = [result.to_json() for result in results]
        print(json.dumps({"path": str(path), "repairs": said} if checkpoints else said[0]))
    else:
        for result in results:
            print_lines(repair_lines(result, paper()))
    return 0 if all(result.plan.is_clean_afterwards for result in results) else 1


def _repair_each(folders: Sequence[Path], arguments: argparse.Namespace) -> Iterator[RepairResult]:
    """Repair the folders of a run in turn (the run itself comes last); what holds no model is passed over."""
    from grpo_toolkit.doctor.repair import repair_checkpoint

    options = {"dry_run": arguments.dry_run, "rewrite_weights": arguments.rewrite_weights}
    found = False
    for folder in folders:
        try:
            yield repair_checkpoint(folder, base=arguments.base, **options)
            found = True
        except CheckpointError as error:
            if folder != folders[-1]:
                print(f"grpo-toolkit: passed over: {error}", file=sys.stderr)
            elif not found:
                raise


def _say_undone(path: Path, undone: Mapping[str, Sequence[str]], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"path": str(path), "put_back": undone}))
    else:
        print_lines(f"{folder}: put back {', '.join(files)}" for folder, files in undone.items())
