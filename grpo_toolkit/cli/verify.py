"""`grpo-toolkit verify`: reload an export and check it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cli.shell import EXIT_FINDINGS, add_device, add_json, add_verb, quiet_libraries

if TYPE_CHECKING:
    import argparse

    from grpo_toolkit.cli.shell import Commands


def add_command(commands: Commands) -> None:
    """Add `verify` and its flags."""
    parser = add_verb(
        commands,
        "verify",
        help="reload an export in a fresh process and check it",
        examples=(
            "exported --base BASE",
            "exported --manifest",
            "exported --reference out/checkpoint-500 --device cuda",
        ),
    )
    parser.add_argument("export", type=Path, help="the exported folder")
    parser.add_argument("--manifest", action="store_true", help="only compare its files with the sums in its manifest")
    parser.add_argument(
        "--base", help="folder or Hub name of the base, whose names, shapes, dtypes and ties are expected"
    )
    parser.add_argument("--reference", type=Path, help="a model folder that must give the same greedy tokens")
    parser.set_defaults(run=verify)
    add_json(parser)
    add_device(parser)


def verify(arguments: argparse.Namespace) -> int:
    """Verify, print every check (or JSON), and return the exit code."""
    from grpo_toolkit.checkpoint.folders.base_lookup import named_base
    from grpo_toolkit.checkpoint.folders.model_folder import Kind, open_checkpoint
    from grpo_toolkit.errors import CheckpointError
    from grpo_toolkit.export.verify import reference_records, verify_export

    if arguments.manifest:
        return _verify_manifest(arguments)
    if open_checkpoint(arguments.export).kind is Kind.ADAPTER:
        raise CheckpointError(f"{arguments.export}: an adapter, which answers nothing alone: export or merge it first")
    quiet_libraries()
    requests: list[Any] = []
    expected: list[Any] = []
    if arguments.reference is not None:
        requests, expected = reference_records(arguments.reference, device=arguments.device)
    base = None if arguments.base is None else named_base(arguments.base)
    result = verify_export(arguments.export, requests=requests, expected=expected, base=base, device=arguments.device)
    if arguments.json:
        print(json.dumps({"path": str(arguments.export), **result.to_json()}))
    else:
        for check in result.checks:
            verdict = "skip" if check.skipped else "ok  " if check.passed else "FAIL"
            print(f"{verdict}  {check.name}: {check.detail}")
    return 0 if result.passed else EXIT_FINDINGS


def _verify_manifest(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.checkpoint.manifest import compare_manifest

    checked, differing = compare_manifest(arguments.export)
    if arguments.json:
        facts = {"path": str(arguments.export), "passed": not differing, "files": checked}
        print(json.dumps({**facts, "findings": [{"file": file, "problem": what} for file, what in differing.items()]}))
    else:
        for file, what in differing.items():
            print(f"FAIL  {file}: {what}")
        print(f"{'FAIL' if differing else 'ok  '}  {checked} files compared with the manifest")
    return EXIT_FINDINGS if differing else 0
