"""`grpo-toolkit repair`: repair what the doctor found, or undo it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.cli.shell import add_json, add_verb, print_lines
from grpo_toolkit.errors import CheckpointError
from grpo_toolkit.reporting.terminal.diagnosis import paper, repair_lines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping, Sequence

    from grpo_toolkit.cli.shell import Commands
    from grpo_toolkit.doctor.repair import RepairResult


def add_command(commands: Commands) -> None:
    """Add `repair` and its flags."""
    parser = add_verb(
        commands,
        "repair",
        help="mend what the doctor found, atomically and with an undo",
        examples=(
            "out/checkpoint-500 --base BASE --dry-run",
            "out/checkpoint-500 --base BASE",
            "out/checkpoint-500 --undo",
        ),
    )
    parser.add_argument("path", type=Path, help="as for doctor")
    parser.add_argument("--base", help="as for doctor; many faults are mended with what the base says")
    parser.add_argument("--dry-run", action="store_true", help="print the changes as a diff and make none")
    parser.add_argument("--undo", action="store_true", help="put back, byte for byte, what repairs replaced")
    parser.add_argument(
        "--rewrite-weights",
        action="store_true",
        help="also mend what needs new safetensors files; without it that is left, and the exit code is 1",
    )
    parser.set_defaults(run=repair)
    add_json(parser)


def repair(arguments: argparse.Namespace) -> int:
    """Repair a folder, or every checkpoint of a run; 0 if all is clean afterwards, 1 if something is left."""
    from grpo_toolkit.doctor.diagnose import parts_of
    from grpo_toolkit.doctor.repair import undo_repair
    from grpo_toolkit.doctor.undo import UNDO

    path: Path = arguments.path
    checkpoints = parts_of(path) if path.is_dir() else []
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
