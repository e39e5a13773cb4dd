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
    parser.add_argument(
        "path",
        type=Path,
        nargs="?",
        help="an output folder with latency/latency.jsonl or step_time.jsonl, or that file",
    )
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
    from grpo_toolkit.reporting.report.page import write_report

    if (arguments.path is None) == (arguments.compare is None):
        raise InputError("give one run's folder, or two with --compare RUN RUN")
    if arguments.compare is not None:
        if arguments.replay is not None:
            raise InputError("--replay logs one run's rows; it does not go with --compare")
        if arguments.card:
            raise InputError("--card is about one run's export; it does not go with --compare")
        one, other = arguments.compare
        page = _compare(one, other, arguments.output)
        print(json.dumps({"report": str(page)}) if arguments.json else page)
        return 0
    if _has_steps_alone(arguments.path):
        return _report_steps(arguments)
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
        from grpo_toolkit.reporting.report.step_section import steps_beside
        from grpo_toolkit.reporting.trackers.replay import replay
        from grpo_toolkit.reporting.trackers.step_time import replay_steps

        results = replay(review, arguments.replay)
        steps = steps_beside(review.path)
        results += [] if steps is None else replay_steps(steps, arguments.replay)
        facts["replayed"] = [asdict(result) for result in results]
        print(*results, sep="\n", file=sys.stderr)
    print(json.dumps(facts) if arguments.json else page)
    return 0


def _has_steps_alone(path: Path) -> bool:
    """Return whether a run has its steps' time and no latency rows, or the file of the steps was given."""
    from grpo_toolkit.latency.rows.review import load_review
    from grpo_toolkit.step_time.store import find_step_file

    file = find_step_file(path)
    if file is None or path.is_file():
        return file is not None
    try:
        load_review(path)
    except InputError:
        return not any((path / place).is_file() for place in ("latency.jsonl", "latency/latency.jsonl"))
    return False


def _compare(one: Path, other: Path, output: Path | None) -> Path:
    from grpo_toolkit.latency.rows.review import load_review
    from grpo_toolkit.reporting.report.page import write_comparison, write_step_comparison
    from grpo_toolkit.step_time.store import find_step_file, load_step_review

    if any(map(_has_steps_alone, (one, other))) and all(map(find_step_file, (one, other))):
        steps = load_step_review(one), load_step_review(other)
        return write_step_comparison(*steps, output or steps[1].path / "compare.html")
    reviews = load_review(one), load_review(other)
    return write_comparison(*reviews, output or reviews[1].path / "compare.html")


def _report_steps(arguments: argparse.Namespace) -> int:
    from grpo_toolkit.reporting.charts.step_gallery import write_step_pictures
    from grpo_toolkit.reporting.report.page import write_step_report
    from grpo_toolkit.step_time.store import load_step_review

    if arguments.card:
        raise InputError(f"{arguments.path}: no export was timed, so there is no card to write")
    review = load_step_review(arguments.path)
    page = write_step_report(review, arguments.output)
    pictures = write_step_pictures(review, page.parent / "pictures")
    facts: dict[str, Any] = {"report": str(page), "pictures": {name: str(file) for name, file in pictures.items()}}
    if arguments.replay is not None:
        from grpo_toolkit.reporting.trackers.step_time import replay_steps

        results = replay_steps(review, arguments.replay)
        facts["replayed"] = [asdict(result) for result in results]
        print(*results, sep="\n", file=sys.stderr)
    print(json.dumps(facts) if arguments.json else page)
    return 0
