"""`grpo-toolkit export`, `merge` and `verify`."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cli.shell import EXIT_FINDINGS, _quiet_libraries
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import argparse
    from pathlib import Path


def _export(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.checkpoint.manifest import manifest_of
    from grpo_toolkit.checkpoint.model_folder import open_checkpoint
    from grpo_toolkit.checkpoint.publish import check_output
    from grpo_toolkit.export.export import export_model
    from grpo_toolkit.reporting.terminal.console import byte_progress, say
    from grpo_toolkit.reporting.terminal.tables import export_table

    if arguments.push_to_hub and arguments.no_verify:
        raise InputError("--push-to-hub sends what was verified: leave out --no-verify")
    check_output(arguments.output, overwrite=arguments.overwrite)
    open_checkpoint(arguments.source)
    _quiet_libraries()
    overrides: dict[str, Any] = {}
    notes: dict[str, Any] = {}
    if arguments.tuned:
        from grpo_toolkit.cli.tune import tuned_overrides

        overrides, notes["tuned"] = tuned_overrides(arguments.source, arguments.base, device=arguments.device)
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
        )
    assert result is not None, "one process is rank 0"
    if is_talking:
        say(export_table(result))
    url = _pushed(arguments.push_to_hub, result.path) if arguments.push_to_hub else None
    if arguments.json:
        facts = {"path": str(result.path), "seconds": result.seconds, "hub": url}
        print(json.dumps({**facts, **manifest_of(result.path)}))
    else:
        print(result.path)
    return 0


def _pushed(repository: str, path: Path) -> str:
    from grpo_toolkit.export.push_to_hub import push_export
    from grpo_toolkit.reporting.terminal.console import say

    url = push_export(path, repository)
    say(f"uploaded to {url}")
    return url


def _merge(arguments: argparse.Namespace) -> int:
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


def _verify(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.checkpoint.base_lookup import named_base
    from grpo_toolkit.checkpoint.model_folder import open_checkpoint
    from grpo_toolkit.export.verify import reference_records, verify_export

    if arguments.manifest:
        return _verify_manifest(arguments)
    open_checkpoint(arguments.export)
    _quiet_libraries()
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
