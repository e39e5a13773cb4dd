"""Time the same requests on several models, fairly.

Each model is loaded in a process of its own, all are warmed up, and then they take turns: one request on every arm,
the order reversed from round to round, so that a machine that drifts or is shared slows all arms alike. Medians and
quartiles are over rounds; the raw times of every token are kept.

    TTFT = the first token's time, from the start of preprocessing
    TPOT = (t_last - t_first) / (n - 1), null where n < 2
    E2E  = the last token's time;  output tokens/s = n / E2E
"""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.workload import fixed_length
from grpo_toolkit.worker import Worker

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from grpo_toolkit.inference import Record, Request

SCHEMA_VERSION: Final = 1


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One thing to time: a folder, and whether to overrule its cache setting (None leaves it to the files)."""

    name: str
    path: Path
    use_cache: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Median and quartiles of one figure over the rounds."""

    median: float
    q1: float
    q3: float


@dataclass(frozen=True, kw_only=True)
class LatencyRow:
    """One arm's measurement; one line of `latency.jsonl`. Times in seconds, memory in bytes.

    `is_cached`, `step_lengths` and `vision_calls` are the proof that needs no clock (see `cache.CacheProbe`).
    """

    arm: str
    path: str
    use_cache: bool | None
    new_tokens: int
    prompt_tokens: int
    rounds: int
    ttft_s: Spread
    tpot_s: Spread | None
    e2e_s: Spread
    output_tokens_per_s: Spread
    peak_memory_bytes: int
    is_cached: bool
    step_lengths: list[int]
    vision_calls: int
    dtype: str
    parameters: int
    device: str
    environment: Mapping[str, str]
    timelines_s: list[list[float]]
    measured_at: str
    step: int | None = None
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


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
        return [_row(arm, workers[arm.path], records[arm.name], device, environment) for arm in arms]


def _row(arm: Arm, worker: Worker, records: list[Record], device: str, environment: Mapping[str, str]) -> LatencyRow:
    tpots = [record.tpot_s for record in records if record.tpot_s is not None]
    return LatencyRow(
        arm=arm.name,
        path=str(arm.path),
        use_cache=arm.use_cache,
        new_tokens=len(records[0].tokens),
        prompt_tokens=int(statistics.median(record.prompt_tokens for record in records)),
        rounds=len(records),
        ttft_s=spread([record.ttft_s for record in records]),
        tpot_s=spread(tpots) if tpots else None,
        e2e_s=spread([record.e2e_s for record in records]),
        output_tokens_per_s=spread([len(record.tokens) / record.e2e_s for record in records]),
        peak_memory_bytes=max(record.peak_memory_bytes for record in records),
        is_cached=all(record.is_cached for record in records),
        step_lengths=records[0].step_lengths,
        vision_calls=max(record.vision_calls for record in records),
        dtype=worker.report.dtype,
        parameters=worker.report.parameters,
        device=device,
        environment=environment,
        timelines_s=[record.token_times_s for record in records],
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles (inclusive method: the values are all there is, not a sample of more)."""
    if len(values) == 1:
        return Spread(median=values[0], q1=values[0], q3=values[0])
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(median=median, q1=q1, q3=q3)


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
