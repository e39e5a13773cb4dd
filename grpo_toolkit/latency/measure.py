"""Time the same requests on several models, fairly.

Each model is loaded in a process of its own, all are warmed up, and then they take turns: one request on every arm,
the order reversed from round to round, so that a machine that drifts or is shared slows all arms alike. Medians and
quartiles are over rounds; the raw times of every token are kept (see `row`).
"""

from __future__ import annotations

import os
import platform
import statistics
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.row import (
    LatencyRow,
    Memory,
    Proof,
    Settings,
    Summary,
    Timeline,
    Tokens,
    Workload,
)
from grpo_toolkit.latency.workload import fixed_length
from grpo_toolkit.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from grpo_toolkit.inference import Record, Request


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing to time: a folder, and whether to overrule its cache setting (None leaves it to the files)."""

    name: str
    path: Path
    use_cache: bool | None = None


def measure_latency(
    arms: Sequence[Arm] | Mapping[str, str | os.PathLike[str]],
    requests: Sequence[Request],
    *,
    new_tokens: int = 64,
    rounds: int = 6,
    warmup: int = 2,
    device: str = "cpu",
    attn_implementation: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[LatencyRow]:
    """Time the arms on the same requests, in turns.

    Args:
        arms: what to time, or simply {name: folder}.
        requests: asked one a round, from the first on; each is given exactly `new_tokens` tokens.
        new_tokens: tokens to generate per request.
        rounds: measured requests per arm.
        warmup: unmeasured requests per arm before.
        device: where each arm's process puts its model.
        attn_implementation: None leaves it to the library.
        progress: called with the arm's name, the round and the number of rounds.

    Returns:
        One row per arm, in the order given.

    Raises:
        InputError: no arms, no requests, or fewer than one round.
        CheckpointError, WorkerError: an arm's folder cannot be read or loaded.
    """
    if isinstance(arms, Mapping):
        arms = [Arm(name=name, path=Path(path)) for name, path in arms.items()]
    if not arms or not requests or rounds < 1 or new_tokens < 1:
        raise InputError("measure_latency needs at least one arm, one request, one round and one new token")
    asked = fixed_length(requests, new_tokens)
    records: dict[str, list[Record]] = {arm.name: [] for arm in arms}
    with ExitStack() as stack:
        workers: dict[Path, Worker] = {}
        for arm in arms:
            if arm.path not in workers:
                worker = Worker(arm.path, device=device, attn_implementation=attn_implementation)
                workers[arm.path] = stack.enter_context(worker)
        for turn in range(-warmup, rounds):
            request = asked[turn % len(asked)]
            for arm in arms if turn % 2 == 0 else reversed(arms):
                record = workers[arm.path].generate(replace(request, use_cache=arm.use_cache))
                if turn >= 0:
                    records[arm.name].append(record)
                if progress is not None:
                    progress(arm.name, turn, rounds)
        environment = environment_of(device)
        session = uuid.uuid4().hex
        return [
            _row(arm, workers[arm.path], records[arm.name], asked[0], device, session, environment) for arm in arms
        ]


def _row(
    arm: Arm,
    worker: Worker,
    records: list[Record],
    asked: Request,
    device: str,
    session: str,
    environment: dict[str, str],
) -> LatencyRow:
    tpots = [record.tpot_s for record in records if record.tpot_s is not None]
    on_gpu = device.startswith("cuda")
    peak = max(record.peak_memory_bytes for record in records)
    return LatencyRow(
        arm=arm.name,
        path=str(arm.path),
        settings=Settings(device=device, dtype=worker.report.dtype, use_cache=arm.use_cache),
        workload=Workload(
            name="fixed",
            requests=len(records),
            prompt_tokens=int(statistics.median(record.prompt_tokens for record in records)),
            max_new_tokens=asked.max_new_tokens,
        ),
        rounds=len(records),
        ttft_s=summary([record.ttft_s for record in records]),
        tpot_s=summary(tpots) if tpots else None,
        e2e_s=summary([record.e2e_s for record in records]),
        output_tokens_per_s=summary([len(record.tokens) / record.e2e_s for record in records]),
        tokens=Tokens(output=summary([len(record.tokens) for record in records])),
        memory=Memory(peak_allocated_bytes=peak) if on_gpu else Memory(peak_resident_bytes=peak),
        proof=Proof(
            is_cached=all(record.is_cached for record in records),
            step_lengths=records[0].step_lengths,
            vision_calls=max(record.vision_calls for record in records),
        ),
        parameters=worker.report.parameters,
        environment=environment,
        timelines=[
            Timeline(
                token_times_s=record.token_times_s,
                prompt_tokens=record.prompt_tokens,
                output_tokens=len(record.tokens),
            )
            for record in records
        ],
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        session=session,
    )


def summary(values: Sequence[float]) -> Summary:
    """Median and quartiles (inclusive method: the values are all there is, not a sample of more)."""
    if len(values) == 1:
        return Summary(n=1, median=values[0], q1=values[0], q3=values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Summary(n=len(values), median=median, q1=q1, q3=q3)


def environment_of(device: str) -> dict[str, str]:
    """What the figures depend on: hardware, threads, versions."""
    import torch
    import transformers

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else _processor_name()
    return {
        "hardware": name,
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }


def _processor_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"
