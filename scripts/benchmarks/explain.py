"""Seed known causes of slowness into a model and see whether `explain_latency` finds each, alone and in pairs.

    python -m scripts.benchmarks.explain --shape qwen2.5-vl-3b --device cuda --output OUT   # one H200, nine minutes
    python -m scripts.benchmarks.explain --shape tiny --output OUT                          # anywhere

A case is right if exactly the seeded causes were found and the top cause is one of them. `explained` is one minus
|unexplained| / |difference|; it says nothing where the difference is as small as the noise, which is why the table has
the interval of what is unexplained too. Rows go to OUT/latency.jsonl, what is printed also to OUT/log.txt, the table
comes last. What the time did not allow is listed as not run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.latency.engines.pool import Engines, Source, source_of
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.explain.explanation import explain_latency, top_cause, unexplained_share
from grpo_toolkit.latency.rows.store import append_rows
from scripts.benchmarks.seeded_causes import ABOUT_LENGTHS, ALL, bases, seed_causes
from scripts.models.random_vlm import SHAPES, make_random_vlm

if TYPE_CHECKING:
    from grpo_toolkit.latency.rows.row import ExplanationRow
    from grpo_toolkit.model.generation.request import Request

PAIRS: Final = (
    ("cache-off", "longer-answers"),
    ("cache-off", "pixel-limits"),
    ("float32", "unmerged-adapter"),
    ("attention", "eos"),
    ("device-map", "sdpa-backend"),
    ("training-state", "pixel-limits"),
)
LAST: Final = ("static-cache",)
"""Compiles on a GPU, which takes its time: after the other single causes."""


def main() -> int:
    """Run the cases that the flags and the budget allow; return 1 where one of them was not right."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--model", type=Path, help="a Qwen2.5-VL folder to use instead of random weights of the shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="an empty or new folder")
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--image-tokens", type=int, default=256)
    parser.add_argument("--max-new-tokens", type=int, default=16, help="cap of an answer (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--budget", type=float, default=450, help="seconds after which no case begins")
    parser.add_argument("--cases", nargs="*", help="such as cache-off or cache-off+eos; by default all of them")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    with (arguments.output / "log.txt").open("a") as log:
        return _run(arguments, Log(log))


class Log:
    """A log on standard output and in a file."""

    def __init__(self, file: object) -> None:
        self._file = file
        self._start = time.monotonic()

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        print(line, file=self._file, flush=True)  # type: ignore[call-overload]

    @property
    def seconds(self) -> float:
        """The seconds since the start."""
        return time.monotonic() - self._start


def _run(arguments: argparse.Namespace, log: Log) -> int:
    work = arguments.output / "models"
    base = arguments.model or make_random_vlm(arguments.shape, work / "base")
    log(f"{log.seconds:5.0f} s  base: {base}")
    wanted = arguments.cases or [*(c for c in ALL if c not in LAST), *LAST, *("+".join(pair) for pair in PAIRS)]
    lines, is_right = [], True
    with Engines(isolated=False) as pool:
        request = _request(base, arguments)
        both = bases(base, work, request, pool, device=arguments.device)
        log(f"{log.seconds:5.0f} s  bases ready, prompt of {arguments.prompt_tokens} tokens")
        for name in wanted:
            if log.seconds > arguments.budget:
                lines.append(f"{name:34} not run: the budget of {arguments.budget:.0f} s was spent")
                continue
            row, right = _case(tuple(name.split("+")), both, work / name, request, pool, arguments)
            append_rows(arguments.output / "latency.jsonl", [row])
            is_right &= right
            lines.append(_line(name, row, right))
            log(f"{log.seconds:5.0f} s  {lines[-1]}")
            for effect in row.audit:
                log(f"          {effect.cause}: {effect.evidence}")
            log("          " + json.dumps({effect.cause: round(effect.effect_s * 1e3, 2) for effect in row.split}))
    log("")
    log(_HEADER)
    for line in lines:
        log(line)
    log(f"{log.seconds:.0f} s in all; {json.dumps(row.environment)}")
    return 0 if is_right else 1


_HEADER: Final = (
    f"{'case':34} {'right':>5} {'top cause':>17} {'base ms':>8} {'trained':>8} {'explained':>9}  "
    "effects ms [95%] (physics) | unexplained [95%]"
)


def _line(name: str, row: ExplanationRow, is_right: bool) -> str:
    *effects, rest = row.effects
    shown = ", ".join(
        f"{e.cause} {e.effect_s * 1e3:+.0f} [{_ms(e.low_s)}, {_ms(e.high_s)}]"
        + ("" if e.predicted_s is None else f" ({e.predicted_s * 1e3:+.0f})")
        for e in effects
    )
    return (
        f"{name:34} {'yes' if is_right else 'NO':>5} {top_cause(row) or '-':>17} {row.base_s * 1e3:8.0f} "
        f"{row.trained_s * 1e3:8.0f} {1 - unexplained_share(row):9.0%}  {shown} | "
        f"{rest.effect_s * 1e3:+.1f} [{_ms(rest.low_s)}, {_ms(rest.high_s)}]"
    )


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:+.0f}"


def _request(base: Path, arguments: argparse.Namespace) -> Request:
    from grpo_toolkit.latency.bench.workload import made_up
    from grpo_toolkit.model.load import load_processor

    traffic = made_up(
        load_processor(base),
        prompt_tokens=arguments.prompt_tokens,
        image_tokens=arguments.image_tokens,
        max_new_tokens=arguments.max_new_tokens,
    )
    return traffic.make(0)


def _case(
    causes: tuple[str, ...],
    both: tuple[Path, Path],
    folder: Path,
    request: Request,
    pool: Engines,
    arguments: argparse.Namespace,
) -> tuple[ExplanationRow, bool]:
    seeded = seed_causes(both[bool(ABOUT_LENGTHS & set(causes))], folder, causes, device=arguments.device)
    row = explain_latency(
        seeded.base,
        seeded.trained,
        requests=[request],
        processor=seeded.processor,
        max_new_tokens=arguments.max_new_tokens,
        rounds=arguments.rounds,
        device=arguments.device,
        options=Options(device=arguments.device),
        trained_options=replace(seeded.options, device=arguments.device),
        pool=pool,
    )
    pool.release(source_of(seeded.trained, seeded.processor))
    pool.release(Source(path=folder / "trained"))
    del seeded
    _free(arguments.device)
    found = {effect.cause for effect in row.audit}
    return row, found == set(causes) and top_cause(row) in causes


def _free(device: str) -> None:
    import gc

    import torch

    gc.collect()
    if device.startswith("cuda"):
        torch._dynamo.reset()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(main())
