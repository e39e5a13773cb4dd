"""`grpo-toolkit export`: publish a trained folder."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cli.shell import add_device, add_json, add_publishing, add_verb, quiet_libraries, repository
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import argparse

    from grpo_toolkit.cli.shell import Commands


def add_command(commands: Commands) -> None:
    """Add `export` and its flags."""
    parser = add_verb(
        commands,
        "export",
        help="publish a trained folder for inference: merged, verified, portable",
        examples=(
            "out/checkpoint-500 exported --base BASE",
            "exported exported-fp8 --format fp8",
            "out/checkpoint-500 exported --push-to-hub me/policy",
        ),
    )
    parser.add_argument("source", type=Path, help="a full checkpoint, a LoRA adapter, or a verl run's global_step_N")
    add_publishing(parser)
    parser.add_argument("--base", help="folder or Hub name of the base, whose files the export carries")
    parser.add_argument("--adapter-name", metavar="NAME", help="the adapter to take from a folder that holds several")
    parser.add_argument(
        "--link",
        action="store_true",
        help="use hard links to the source's weight files where they are right as they are",
    )
    parser.add_argument(
        "--format",
        choices=("fp8",),
        help="publish in FP8 (compressed-tensors), held against the export, which is made first of any other source",
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="JSON lines with prompt and image (a path), held out, on which FP8 is held against the export",
    )
    parser.add_argument(
        "--accept-loss",
        action="store_true",
        help="publish FP8 that is further from the export than the tolerance, with the figure",
    )
    parser.add_argument(
        "--push-to-hub", type=repository, metavar="REPO", help="upload the verified folder (a new repo is private)"
    )
    parser.add_argument(
        "--tuned",
        action="store_true",
        help="find the fastest setting, and write it into the export's files as far as they can hold it",
    )
    parser.add_argument("--no-verify", action="store_true", help="publish without reloading and checking")
    parser.set_defaults(run=export)
    add_json(parser)
    add_device(parser)


def export(arguments: argparse.Namespace) -> int:
    """Export, print the folder (or JSON), and return the exit code."""
    from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
    from grpo_toolkit.checkpoint.manifest import manifest_of
    from grpo_toolkit.checkpoint.publish import check_output
    from grpo_toolkit.export.export import export_model
    from grpo_toolkit.merge.adapter import find_adapter
    from grpo_toolkit.reporting.report.card_facts import CardFacts, tags_of_folder
    from grpo_toolkit.reporting.report.model_card import write_model_card
    from grpo_toolkit.reporting.terminal.console import byte_progress, say
    from grpo_toolkit.reporting.terminal.tables import export_table

    if arguments.push_to_hub and arguments.no_verify:
        raise InputError("--push-to-hub sends what was verified: leave out --no-verify")
    prompts = _of_fp8(arguments)
    check_output(arguments.output, overwrite=arguments.overwrite)
    if arguments.adapter_name is not None:
        find_adapter(arguments.source, arguments.adapter_name)
    elif not _are_read_here(arguments.source):
        open_checkpoint(arguments.source)
    quiet_libraries()
    overrides: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    if arguments.tuned:
        from grpo_toolkit.cli.tune import tuned_overrides

        overrides, notes["tuned"] = tuned_overrides(arguments.source, arguments.base, device=arguments.device)
    facts = CardFacts(repository=arguments.push_to_hub, tags=tags_of_folder(arguments.source))
    is_talking = not (arguments.quiet or arguments.json)
    with byte_progress("writing", is_shown=is_talking and sys.stderr.isatty()) as progress:
        result = export_model(
            arguments.source,
            arguments.output,
            base=arguments.base,
            overwrite=arguments.overwrite,
            verify=not arguments.no_verify,
            device=arguments.device,
            link=arguments.link,
            max_shard_size=arguments.max_shard_size,
            dtype=arguments.dtype,
            compat=arguments.compat,
            progress=progress,
            generation_overrides=overrides,
            notes=notes,
            adapter_name=arguments.adapter_name,
            format=arguments.format,
            prompts=prompts,
            accept_loss=arguments.accept_loss,
            finish=partial(write_model_card, facts=facts, name=arguments.output.name),
        )
    assert result is not None, "one process is rank 0"
    if is_talking:
        say(export_table(result))
    url = _pushed(arguments.push_to_hub, result.path) if arguments.push_to_hub else None
    if arguments.json:
        found = {"path": str(result.path), "seconds": result.seconds, "hub": url}
        print(json.dumps({**found, **manifest_of(result.path)}))
    else:
        print(result.path)
    return 0


def _of_fp8(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the held-out rows of `--prompts`, none where there are none.

    Raises:
        InputError: flags that do not go together, or rows that cannot be read.
    """
    from grpo_toolkit.model.generation.request_forms import prompt_rows

    if arguments.format is None:
        if arguments.accept_loss or arguments.prompts is not None:
            raise InputError("--prompts and --accept-loss are about FP8: add --format fp8")
        return []
    if arguments.link:
        raise InputError("--format fp8 writes other weights, to which --link can make no link: leave one of them out")
    return [] if arguments.prompts is None else prompt_rows(arguments.prompts, f"--prompts {arguments.prompts}")


def _are_read_here(source: Path) -> bool:
    """Return whether the source is shards that an export reads itself."""
    from grpo_toolkit.checkpoint.folders.look_around import shards_of

    shards = shards_of(source)
    return shards is not None and shards.layout is not None and shards.layout.is_read


def _pushed(repository: str, path: Path) -> str:
    from grpo_toolkit.export.push_to_hub import push_export
    from grpo_toolkit.reporting.terminal.console import say

    url = push_export(path, repository)
    say(f"uploaded to {url}")
    return url
