"""The time of a token: kernels of a decoding step, and what the GPU waits for between them.

    python -m scripts.benchmarks.profile_decode --model BASE --device cuda --output OUT

For each setting: the time per output token as the lab measures it, then sixteen steps under torch's profiler. `busy`
is the time in which some kernel runs; of the rest of a step, `host` is the part of `generate` between two steps that
no kernel covers (gaps of 50 us and more). A setting that cannot run says why. The table comes last; kernels by time
go to OUT/profile.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.latency.bench.workload import made_up
from grpo_toolkit.latency.engines.local import LocalEngine
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.model.load import load_model, load_processor
from scripts.benchmarks.decode_steps import after_each_step

if TYPE_CHECKING:
    from grpo_toolkit.model.generation.request import Request

SKIPPED, PROFILED = 8, 16
HOST_GAP_US = 50.0
STATIC = {"cache_implementation": "static", "compiled": True}
SETTINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "compiled": STATIC,
    "compiled, ahead": STATIC | {"ahead": True},
    "compiled, SDPA math": STATIC | {"sdpa_backend": "math"},
    "compiled, SDPA efficient": STATIC | {"sdpa_backend": "efficient"},
    "compiled, eager attention": STATIC | {"attn_implementation": "eager"},
    "compiled, max-autotune": STATIC | {"compile_mode": "max-autotune"},
}


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A decoding step, in microseconds per token."""

    tpot: float
    wall: float
    busy: float
    host: float
    kernels: float
    by_kernel: dict[str, tuple[float, float]]
    """Name to microseconds and launches per token."""


class Window:
    """A profiler of steps `SKIPPED` to `SKIPPED + PROFILED` of the next `model.generate`."""

    def __init__(self, model: Any, device: str) -> None:
        import torch

        self.model, self.device, self.wall_s = model, device, 0.0
        activity = torch.profiler.ProfilerActivity
        self.profiler = torch.profiler.profile(activities=[activity.CUDA if device != "cpu" else activity.CPU])

    def __enter__(self) -> Window:
        self._steps = 0
        self._watching = after_each_step(self.model, self._step)
        self._watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watching.__exit__(*error)

    def _step(self) -> None:
        self._steps += 1
        if self._steps == SKIPPED:
            self.begin()
        elif self._steps == SKIPPED + PROFILED:
            self.end()

    def begin(self) -> None:
        self._wait()
        self.profiler.start()
        self._began = time.perf_counter()

    def end(self) -> None:
        self._wait()
        self.wall_s = time.perf_counter() - self._began
        self.profiler.stop()

    def _wait(self) -> None:
        if self.device != "cpu":
            import torch

            torch.cuda.synchronize()

    def kernels(self) -> list[tuple[str, float, float]]:
        """Return name, start and end in microseconds of all that ran on the device (on a CPU: of outermost ops)."""
        from torch.autograd import DeviceType

        events = self.profiler.events() or []
        if self.device == "cpu":
            found = [event for event in events if event.cpu_parent is None]
        else:
            found = [event for event in events if event.device_type == DeviceType.CUDA]
        return sorted(
            ((event.name, event.time_range.start, event.time_range.end) for event in found), key=lambda one: one[1]
        )


def profile(engine: LocalEngine, request: Request, options: Options) -> Profile:
    """Warm up, time three answers, then look into one."""
    for _ in range(3):
        engine.ask([request], options)
    tpots = [engine.ask([request], options).timeline.tpot_s or 0.0 for _ in range(3)]
    with Window(engine.model, options.device) as window:
        engine.ask([request], options)
    busy, host, last = 0.0, 0.0, None
    times: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    for name, start, end in (found := window.kernels()):
        if last is not None and start - last >= HOST_GAP_US:
            host += start - last
        begins = start if last is None else max(start, last)
        busy += max(end - begins, 0.0)
        last = end if last is None else max(last, end)
        times[name] += end - start
        counts[name] += 1
    return Profile(
        tpot=statistics.median(tpots) * 1e6,
        wall=window.wall_s * 1e6 / PROFILED,
        busy=busy / PROFILED,
        host=host / PROFILED,
        kernels=len(found) / PROFILED,
        by_kernel={name: (spent / PROFILED, counts[name] / PROFILED) for name, spent in times.most_common()},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--image-tokens", type=int, default=256)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    parser.add_argument("--budget", type=float, default=400, help="seconds after which no setting begins")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    request = made_up(
        load_processor(options.model),
        prompt_tokens=options.prompt_tokens,
        image_tokens=options.image_tokens,
        max_new_tokens=options.new_tokens,
    ).batch(0)[0]
    found: dict[str, Any] = {}
    table = [f"{'setting':28} {'TPOT':>8} {'profiled':>9} {'busy':>8} {'host':>8} {'kernels':>8}   us a token"]
    for name in options.settings:
        if time.monotonic() - began > options.budget:
            table.append(f"{name:28} not run: the budget of {options.budget:.0f} s was spent")
            continue
        chosen = replace(Options(device=options.device), **SETTINGS[name])
        try:
            one = _fresh(options.model, request, chosen)
        except Exception as error:  # the other settings still have something to say
            table.append(f"{name:28} {type(error).__name__}: {' '.join(str(error).split())[:120]}")
            continue
        found[name] = {**one.__dict__}
        table.append(f"{name:28} {one.tpot:8.0f} {one.wall:9.0f} {one.busy:8.0f} {one.host:8.0f} {one.kernels:8.0f}")
        print(f"{time.monotonic() - began:5.0f} s  {table[-1]}", flush=True)
        for kernel, (spent, count) in list(one.by_kernel.items())[:12]:
            print(f"          {spent:8.1f} us in {count:6.1f}  {kernel[:110]}", flush=True)
        (options.output / "profile.json").write_text(json.dumps(found, indent=1))
    print("\n" + "\n".join(table), flush=True)


def _fresh(folder: Path, request: Request, options: Options) -> Profile:
    """Profile in a model of its own: what was compiled for another setting is dropped."""
    import gc

    import torch

    torch.compiler.reset()
    model, processor, _ = load_model(folder, device=options.device, attn_implementation=options.attn_implementation)
    try:
        return profile(LocalEngine(model, processor), request, options)
    finally:
        del model
        gc.collect()
        if options.device != "cpu":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
