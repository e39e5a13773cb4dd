"""`grpo-toolkit doctor`: say what is wrong with a folder."""

from __future__ import annotations

import gc
import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.cli.shell import EXIT_FINDINGS, READER_HELP, add_json, add_verb, print_lines
from grpo_toolkit.errors import InputError
from grpo_toolkit.reporting.terminal.diagnosis import diagnosis_lines, paper, rule_lines, run_lines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from grpo_toolkit.cli.shell import Commands


def add_command(commands: Commands) -> None:
    """Add `doctor` and its flags."""
    parser = add_verb(
        commands,
        "doctor",
        help="say what is wrong with a model folder, or with a run's checkpoints",
        examples=(
            "out/checkpoint-500 --base Qwen/Qwen2.5-VL-3B-Instruct",
            "out --deep --json",
            "--explain rope-parameters-alone",
        ),
    )
    parser.add_argument(
        "path", type=Path, nargs="?", help="a model, an adapter, a checkpoint, or a run folder with many"
    )
    parser.add_argument("--base", help="folder or Hub name (in the local cache) of the model it was trained from")
    parser.add_argument(
        "--deep", action="store_true", help="also read the weights: are they the base's, zero, constant, not finite?"
    )
    parser.add_argument(
        "--explain",
        metavar="CODE",
        help="say what a finding means, who is affected and what repairs it; reads no folder",
    )
    parser.add_argument("--for", dest="reader", metavar="READER", help=READER_HELP)
    parser.set_defaults(run=doctor)
    add_json(parser)


def doctor(arguments: argparse.Namespace) -> int:
    """Diagnose a folder, or every checkpoint of a run; 0 clean, 1 with findings worse than a note."""
    if arguments.explain is not None:
        return _explain(arguments.explain, as_json=arguments.json)
    if arguments.path is None:
        raise InputError("name a folder, or a finding: --explain CODE")
    with _no_collector():
        return _doctor(arguments.path, arguments)


def _explain(code: str, *, as_json: bool) -> int:
    import difflib

    from grpo_toolkit.doctor.diagnose import ALL_RULES

    rules = {rule.code: rule for rule in ALL_RULES}
    if code not in rules:
        near = ", ".join(difflib.get_close_matches(code, rules, n=3))
        raise InputError(f"--explain {code}: no such finding" + (f"; near it: {near}" if near else ""))
    if as_json:
        print(json.dumps(rules[code].to_json()))
    else:
        print_lines(rule_lines(rules[code], paper()))
    return 0


def _doctor(path: Path, arguments: argparse.Namespace) -> int:
    from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
    from grpo_toolkit.doctor.findings import RunDiagnosis

    found = diagnose_checkpoint(path, base=arguments.base, deep=arguments.deep, reader=arguments.reader)
    if arguments.json:
        print(json.dumps(found.to_json()))
    elif isinstance(found, RunDiagnosis):
        print_lines(run_lines(found.diagnoses, found.empty, paper()))
    else:
        print_lines(diagnosis_lines(found, paper()))
    return 0 if found.is_clean else EXIT_FINDINGS


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
