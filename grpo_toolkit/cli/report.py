"""`grpo-toolkit report`: a run's page and pictures, two runs side by side, rows logged again."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cli.shell import add_json, add_verb
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import argparse

    from grpo_toolkit.cli.shell import Commands


def add_command(commands: Commands) -> None:
    """Add `report` and its flags."""
    parser = add_verb(
        commands,
        "report",
        help="make a run's report.html and pictures again, or log its rows again",
        examples=(
            "out",
            "--compare first second --output both.html",
            "out --replay wandb",
        ),
    )
    parser.add_argument("path", type=Path, nargs="?", help="an output folder with latency/latency.jsonl, or that file")
    parser.add_argument("--compare", type=Path, nargs=2, metavar="RUN", help="two runs side by side, in one page")
    parser.add_argument("--replay", choices=("wandb", "trackio"), help="log what the tracker does not have yet")
    parser.add_argument("--card", action="store_true", help="also write the export's page, its README.md")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where to write the page")
    parser.set_defaults(run=report)
    add_json(parser)


def report(arguments: argparse.Namespace) -> int:
    """Write the page, print its path (or with `--json` all that was written), and return the exit code."""
    from grpo_toolkit.latency.rows.review import load_review
    from grpo_toolkit.reporting.charts.gallery import write_pictures
    from grpo_toolkit.reporting.report.page import write_comparison, write_report

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
        facts["card"] = str(write_model_card(by_arm["export"], review))
    if arguments.replay is not None:
        from grpo_toolkit.reporting.trackers.replay import replay

        results = replay(review, arguments.replay)
        facts["replayed"] = [asdict(result) for result in results]
        print(*results, sep="\n", file=sys.stderr)
    print(json.dumps(facts) if arguments.json else page)
    return 0
