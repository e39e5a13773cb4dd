"""`grpo-toolkit report` and `workspace`: a run's page and pictures, two runs side by side, rows logged again."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.rows.review import load_review
from grpo_toolkit.reporting.charts.gallery import write_pictures
from grpo_toolkit.reporting.report.page import write_comparison, write_report

if TYPE_CHECKING:
    import argparse


def report(arguments: argparse.Namespace) -> int:
    """The command; prints the page's path, or with `--json` all that was written."""
    if (arguments.path is None) == (arguments.compare is None):
        raise InputError("give one run's folder, or two with --compare RUN RUN")
    if arguments.compare is not None:
        if arguments.replay is not None:
            raise InputError("--replay logs one run's rows; it does not go with --compare")
        if arguments.card:
            raise InputError("--card is about one run's export; it does not go with --compare")
        one, other = map(load_review, arguments.compare)
        page = write_comparison(one, other, arguments.output or other.path / "compare.html")
        print(json.dumps({"report": str(page)}) if arguments.json else page)
        return 0
    review = load_review(arguments.path)
    page = write_report(review, arguments.output)
    pictures = write_pictures(review, page.parent / "pictures")
    facts: dict[str, Any] = {"report": str(page), "pictures": {name: str(file) for name, file in pictures.items()}}
    if arguments.card:
        from grpo_toolkit.reporting.report.model_card import write_model_card

        by_arm = {row.arm: row.path for row in review.arms}
        if "export" not in by_arm:
            raise InputError(f"{review.path}: no arm named export was measured, so there is no card to write")
        facts["card"] = str(write_model_card(by_arm["export"], review, base=by_arm.get("base")))
    if arguments.replay is not None:
        from grpo_toolkit.reporting.trackers.replay import replay

        results = replay(review, arguments.replay)
        facts["replayed"] = [result.to_json() for result in results]
        print(*results, sep="\n", file=sys.stderr)
    print(json.dumps(facts) if arguments.json else page)
    return 0


def workspace(arguments: argparse.Namespace) -> int:
    """The command; prints the workspace's address, or its JSON with `--dry-run`."""
    from grpo_toolkit.reporting.trackers.wandb_workspace import build_workspace, save_workspace, workspace_json

    built = build_workspace(arguments.entity, arguments.project)
    if arguments.dry_run:
        print(json.dumps(workspace_json(built), indent=None if arguments.json else 2))
        return 0
    saved = save_workspace(built)
    print(f"{'updated' if saved.was_there else 'created'}: {built.name}", file=sys.stderr)
    print(json.dumps({"url": saved.url, "was_there": saved.was_there}) if arguments.json else saved.url)
    return 0
