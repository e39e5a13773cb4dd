"""`grpo-toolkit bench`: time models side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache, partial
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.cli.bench_arguments import add_arguments, find_arms, given_requests
from grpo_toolkit.cli.bench_workloads import find_workloads
from grpo_toolkit.cli.shell import add_device, add_json, add_verb, check_writable, quiet_libraries
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from grpo_toolkit.cli.bench_workloads import Workload
    from grpo_toolkit.cli.shell import Commands
    from grpo_toolkit.latency.bench.compare import Comparison
    from grpo_toolkit.latency.bench.gate import Missed
    from grpo_toolkit.latency.bench.measure import Keep
    from grpo_toolkit.latency.bench.progress import Progress
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.pool import Engines
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow
    from grpo_toolkit.latency.rows.store import RoundRows


def add_command(commands: Commands) -> None:
    """Add `bench` and its flags."""
    parser = add_verb(
        commands,
        "bench",
        help="time models side by side, taking turns",
        examples=(
            "base=BASE export=EXPORT --output timings",
            "EXPORT http://localhost:8000/v1#policy --workload natural",
            "BASE EXPORT --gate max-slowdown=1.05 --rounds 24",
        ),
    )
    add_arguments(parser)
    parser.set_defaults(run=bench)
    add_json(parser)
    add_device(parser)


def bench(arguments: argparse.Namespace) -> int:
    """Time models side by side, print a table of each workload (or JSON), and return the exit code."""
    from grpo_toolkit.latency.bench.gate import gate_of
    from grpo_toolkit.latency.engines.arms import processor_of
    from grpo_toolkit.latency.engines.pool import Engines
    from grpo_toolkit.latency.rows.store import RoundRows, recover_rows
    from grpo_toolkit.reporting.terminal.console import say, turn_progress

    quiet_libraries()
    if arguments.tune:
        from grpo_toolkit.cli.tune import tune_of_bench

        return tune_of_bench(arguments)
    gate = None if arguments.gate is None else gate_of(arguments.gate)
    if any(item.endswith(".jsonl") for item in arguments.models):
        return _finish(arguments, gate, _replayed(arguments), base="")  # explaining would measure anew
    arms = find_arms(arguments)
    if len({arm.name for arm in arms}) < len(arms):
        raise InputError("two models have the same name; give them names of their own: NAME=FOLDER")
    _say_order(arms)
    given = given_requests(arguments)
    processor = processor_of(arms)
    if arguments.output is not None:
        check_writable(arguments.output)
        if left := recover_rows(arguments.output):
            say(f"{arguments.output}: {left} rows of an interrupted measurement are kept")
    load_printing()
    kept = RoundRows(arguments.output)
    progress = cache(partial(turn_progress, ", ".join(arm.name for arm in arms if arm.url is None)))
    found: list[Comparison] = []
    try:
        with Engines() as engines:
            for workload in find_workloads(arguments, given, processor):
                for comparison in _measured(arguments, arms, workload, engines, progress, kept.keep):
                    found.append(comparison)
                    if not arguments.json:
                        _show(_all_rows(comparison))
                    kept.finish(_all_rows(comparison))
    except (KeyboardInterrupt, OSError):
        _show_interrupted(arguments, kept, found)
        raise
    if not arguments.json:
        _answer_questions(found)
    return _finish(arguments, gate, found, base=arms[0].place)


def _all_rows(comparison: Comparison) -> list[LatencyRow]:
    return [*comparison.rows, *([] if comparison.control is None else [comparison.control])]


def load_printing() -> None:
    """Import what tables and intervals need before anything is timed: an interrupt must not wait for it."""
    for name in ("scipy.stats", "rich.table", "grpo_toolkit.reporting.terminal.tables"):
        import_module(name)


def _show_interrupted(arguments: argparse.Namespace, kept: RoundRows, found: list[Comparison]) -> None:
    """Show and keep the rounds that were made; with JSON all that there is, without it the rest is on the screen."""
    from grpo_toolkit.latency.bench.compare import compare_control
    from grpo_toolkit.latency.bench.thinking import plain_arm

    if kept.rows:
        by_workload: dict[str, list[LatencyRow]] = {}
        for row in kept.rows:
            by_workload.setdefault(row.workload.name, []).append(plain_arm(row))
        last = [compare_control(rows) for rows in by_workload.values()]
        for comparison in last:
            if not arguments.json:
                _show(_all_rows(comparison))
        found.extend(last)
        kept.finish([row for comparison in last for row in _all_rows(comparison)])
    if arguments.json and found:
        _finish(arguments, None, found, base="")


def _answer_questions(found: Sequence[Comparison]) -> None:
    """Say what thinking costs each arm, and what its larger batches bring, where both were asked."""
    from grpo_toolkit.latency.bench.batches import batches_of
    from grpo_toolkit.latency.bench.thinking import thinking_in
    from grpo_toolkit.reporting.terminal.console import show
    from grpo_toolkit.reporting.terminal.two_questions import batch_sentence, thinking_sentence

    rows = [row for comparison in found for row in comparison.rows]
    for cost in thinking_in(rows):
        if cost.share is not None:
            show(f"{cost.arm}: {thinking_sentence(cost)}")
    for name in dict.fromkeys(row.workload.name for row in rows if row.workload.kind == "fixed"):
        for arm in dict.fromkeys(row.arm for row in rows):
            batches = batches_of([row for row in rows if (row.workload.name, row.arm) == (name, arm)])
            if batches is not None:
                show(f"{arm}: {batch_sentence(batches)}")


def _say_order(arms: Sequence[Arm]) -> None:
    """Say if the first folder is another's trained model, or given twice with the same settings."""
    from grpo_toolkit.checkpoint.folders.lineage import order_notice
    from grpo_toolkit.reporting.terminal.console import say

    first = arms[0]
    for arm in arms[1:]:
        is_same_setting = arm.options == first.options
        notice = order_notice(first.place, arm.place) if is_same_setting else None
        if notice is not None:
            say(f"NOTE: {notice}")


def _finish(arguments: argparse.Namespace, gate: float | None, found: Sequence[Comparison], *, base: str) -> int:
    """Hold what was measured against the gate, and explain what missed it; print JSON if that is wanted."""
    from grpo_toolkit.latency.bench.gate import missed_by

    missed = [] if gate is None else [miss for comparison in found for miss in missed_by(gate, comparison.rows)]
    explained = report_missed(arguments, base, missed)
    if arguments.json:
        rows = [row.to_json() for comparison in found for row in comparison.rows]
        controls = [comparison.control.to_json() for comparison in found if comparison.control is not None]
        reasons = [asdict(miss) for miss in missed]
        why = [row.to_json() for row in explained]
        print(json.dumps({"rows": rows, "controls": controls, "missed": reasons, "explanations": why}))
    return 1 if missed else 0


def report_missed(arguments: argparse.Namespace, base: str, missed: Sequence[Missed]) -> list[ExplanationRow]:
    """Explain what missed a gate, and print it unless JSON is wanted."""
    if not missed:
        return []
    from grpo_toolkit.latency.explain.explanation import explain_missed

    rows = explain_missed(base, missed, device=arguments.device)
    if not arguments.json:
        from grpo_toolkit.reporting.terminal.console import show
        from grpo_toolkit.reporting.terminal.explanation import explanation

        show(*map(str, missed), style="bold red")
        for row in rows:
            show("", explanation(row))
    return rows


def _replayed(arguments: argparse.Namespace) -> list[Comparison]:
    """Compare rows of earlier measurements again: those of one session and workload with each other."""
    from grpo_toolkit.latency.bench.compare import compare_rows
    from grpo_toolkit.latency.rows.review import CONTROL
    from grpo_toolkit.latency.rows.store import read_measurements

    groups: dict[tuple[str, str], list[LatencyRow]] = {}
    for item in arguments.models:
        if not item.endswith(".jsonl"):
            raise InputError(f"{item}: rows of earlier measurements and models to measure cannot be mixed")
        for row in read_measurements(Path(item)):
            groups.setdefault((row.session, row.workload.name), []).append(row)
    if not groups:
        raise InputError(f"{', '.join(arguments.models)}: holds no measurements")
    compared = []
    for rows in groups.values():
        control = next((row for row in rows if row.arm == CONTROL), None)
        found = compare_rows([row for row in rows if row is not control], control=control)
        compared.append(found)
        if not arguments.json:
            _show([*found.rows, *([] if found.control is None else [found.control])])
    return compared


def _measured(
    arguments: argparse.Namespace,
    arms: Sequence[Arm],
    workload: Workload,
    engines: Engines,
    progress: Callable[[], Progress],
    keep: Keep,
) -> Iterator[Comparison]:
    """Compare the arms at each batch size, asked both ways in turns where the workload has two."""
    from grpo_toolkit.latency.bench.compare import doubling, sweep_batches
    from grpo_toolkit.latency.bench.measure import Plan
    from grpo_toolkit.latency.bench.thinking import compare_asked

    def compare(left: Sequence[Arm], size: int) -> list[Comparison]:
        traffic = workload.make(batch_size=size)  # refuses what cannot be asked, before anything is said of loading
        plan = Plan(
            arms=left,
            traffic=traffic,
            rounds=arguments.rounds,
            roofline=not arguments.no_roofline,
            precision=None if arguments.precision is None else arguments.precision / 100,
            budget_s=arguments.budget,
            progress=progress(),
            keep=keep,
        )
        direct = None if workload.direct is None else workload.direct(batch_size=size)
        control = len(left) > 1 and not arguments.no_control
        return compare_asked(plan, direct, engines=engines, control=control)

    return sweep_batches(arms, doubling() if arguments.batch_size == ["max"] else arguments.batch_size, compare)


def _show(rows: Sequence[LatencyRow]) -> None:
    from grpo_toolkit.reporting.terminal.console import show
    from grpo_toolkit.reporting.terminal.tables import latency_table, ratio_lines

    show(latency_table(rows), *ratio_lines(rows))
