"""`grpo-toolkit bench`: time models side by side."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.cli.bench_arguments import add_arguments, find_arms, find_workloads, given_requests
from grpo_toolkit.cli.shell import add_device, add_json, add_verb, check_writable, quiet_libraries
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from grpo_toolkit.cli.shell import Commands
    from grpo_toolkit.latency.bench.compare import Comparison
    from grpo_toolkit.latency.bench.gate import Missed
    from grpo_toolkit.latency.bench.measure import Progress
    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.pool import Engines
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow


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
    from grpo_toolkit.latency.rows.store import FILE_NAME, append_rows
    from grpo_toolkit.reporting.terminal.console import turn_progress

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
    if arguments.rounds < 1:
        raise InputError("bench needs at least one arm, one request, one round and one new token")
    _say_order(arms)
    given = given_requests(arguments)
    processor = processor_of(arms)
    if arguments.output is not None:
        check_writable(arguments.output)
    progress = cache(partial(turn_progress, ", ".join(arm.name for arm in arms)))
    found: list[Comparison] = []
    try:
        with Engines() as engines:
            for make in find_workloads(arguments, given, processor):
                for comparison in _measured(arguments, arms, make, engines, progress):
                    found.append(comparison)
                    rows = [*comparison.rows, *([] if comparison.control is None else [comparison.control])]
                    if not arguments.json:
                        _show(rows)
                    if arguments.output is not None:
                        append_rows(arguments.output / FILE_NAME, rows)
    except (KeyboardInterrupt, OSError):
        if arguments.json and found:  # what there is; without JSON it is on the screen
            _finish(arguments, None, found, base="")
        raise
    return _finish(arguments, gate, found, base=arms[0].place)


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
    make: Callable[..., Traffic],
    engines: Engines,
    progress: Callable[[], Progress],
) -> Iterator[Comparison]:
    """Compare the arms at each batch size."""
    from grpo_toolkit.latency.bench.compare import compare_latency, doubling, sweep_batches

    def compare(left: Sequence[Arm], size: int) -> Comparison:
        traffic = make(batch_size=size)  # refuses what cannot be asked, before anything is said of loading
        return compare_latency(
            left,
            traffic,
            rounds=arguments.rounds,
            control=len(left) > 1 and not arguments.no_control,
            roofline=not arguments.no_roofline,
            precision=None if arguments.precision is None else arguments.precision / 100,
            budget_s=arguments.budget,
            engines=engines,
            progress=progress(),
        )

    return sweep_batches(arms, doubling() if arguments.batch_size == ["max"] else arguments.batch_size, compare)


def _show(rows: Sequence[LatencyRow]) -> None:
    from grpo_toolkit.reporting.terminal.console import show
    from grpo_toolkit.reporting.terminal.tables import latency_table, ratio_lines

    show(latency_table(rows), *ratio_lines(rows))
