"""`grpo-toolkit merge`: merge an adapter into its base."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.cli.shell import add_json, add_publishing, add_verb

if TYPE_CHECKING:
    import argparse

    from grpo_toolkit.cli.shell import Commands


def add_command(commands: Commands) -> None:
    """Add `merge` and its flags."""
    parser = add_verb(
        commands,
        "merge",
        help="merge a LoRA adapter into its base, streamed from file to file",
        examples=(
            "out/adapter merged",
            "out/adapter merged --base BASE",
            "out/adapter merged --overwrite --json",
        ),
    )
    parser.add_argument("adapter", type=Path, help="an adapter as PEFT saves it")
    add_publishing(parser)
    parser.add_argument("--base", help="folder or Hub name of the base (default: the one that the adapter names)")
    parser.add_argument("--adapter-name", metavar="NAME", help="the adapter to take from a folder that holds several")
    parser.add_argument(
        "--allow-unchanged", action="store_true", help="publish even if a part of the adapter changes nothing"
    )
    add_json(parser)
    parser.set_defaults(run=merge)


def merge(arguments: argparse.Namespace) -> int:
    """Merge, print the folder (or JSON), and return the exit code."""
    from grpo_toolkit.merge.merge import merge_adapter
    from grpo_toolkit.reporting.terminal.console import byte_progress, say
    from grpo_toolkit.reporting.terminal.tables import merge_table

    is_talking = not (arguments.quiet or arguments.json)
    with byte_progress("merging", is_shown=is_talking and sys.stderr.isatty()) as progress:
        result = merge_adapter(
            arguments.adapter,
            arguments.output,
            base=arguments.base,
            adapter_name=arguments.adapter_name,
            overwrite=arguments.overwrite,
            allow_unchanged=arguments.allow_unchanged,
            max_shard_size=arguments.max_shard_size,
            dtype=arguments.dtype,
            compat=arguments.compat,
            progress=progress,
        )
    if arguments.json:
        facts = {"path": str(result.path), "base": str(result.base), "adapter": str(result.adapter)}
        counts = {"changed": len(result.changed), "unchanged": list(result.unchanged), "copied": result.copied}
        print(json.dumps({**facts, **counts, "bytes": result.bytes, "seconds": result.seconds}))
        return 0
    if is_talking:
        say(merge_table(result))
        say(f"not verified yet: grpo-toolkit verify {shlex.quote(str(result.path))}")
    print(result.path)
    return 0
