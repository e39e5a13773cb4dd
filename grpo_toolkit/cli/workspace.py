"""`grpo-toolkit workspace`: save a W&B workspace with the latency charts."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

from grpo_toolkit.cli.shell import add_json, add_verb

if TYPE_CHECKING:
    import argparse

    from grpo_toolkit.cli.shell import Commands


def add_command(commands: Commands) -> None:
    """Add `workspace` and its flags."""
    parser = add_verb(
        commands,
        "workspace",
        help="save a W&B workspace with the latency charts in their place",
        examples=(
            "--entity me --project digits",
            "--entity me --project digits --dry-run",
            "--entity me --project digits --json",
        ),
    )
    parser.add_argument("--entity", required=True, help="user or team")
    parser.add_argument("--project", required=True, help="the project of the runs")
    parser.add_argument("--dry-run", action="store_true", help="print its JSON and save nothing; needs no account")
    parser.set_defaults(run=workspace)
    add_json(parser)


def workspace(arguments: argparse.Namespace) -> int:
    """Save the workspace, print its address (or its JSON with `--dry-run`), and return the exit code."""
    from grpo_toolkit.reporting.trackers.wandb_workspace import build_workspace, save_workspace, workspace_json

    built = build_workspace(arguments.entity, arguments.project)
    if arguments.dry_run:
        print(json.dumps(workspace_json(built), indent=None if arguments.json else 2))
        return 0
    saved = save_workspace(built)
    print(f"{'updated' if saved.was_there else 'created'}: {built.name}", file=sys.stderr)
    print(json.dumps({"url": saved.url, "was_there": saved.was_there}) if arguments.json else saved.url)
    return 0
