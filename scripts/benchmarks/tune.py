"""Tune a model of a published shape with random weights, and hold the result against the targets of one H200.

    python -m scripts.benchmarks.tune --shape qwen2.5-vl-3b --device cuda --output OUT   # one H200, under nine minutes
    python -m scripts.benchmarks.tune --shape tiny --output OUT --new-tokens 32          # anywhere

Batch 1, 1,024 tokens of prompt, 256 new tokens. Wanted on an H200: at least five times as fast a token as the default,
and at most 4.5 ms. The result goes to OUT/tuning.json, what is printed also to OUT/log.txt, the table comes last.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

from grpo_toolkit.latency.bench.statistics import span
from grpo_toolkit.latency.tune.tune import tune_latency
from grpo_toolkit.latency.tune.tuning import Trial, keys_for_files
from scripts.models.random_vlm import SHAPES, make_random_vlm


def main() -> int:
    """Tune, and return 1 where a GPU misses the targets."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="tiny")
    parser.add_argument("--model", type=Path, help="a folder to use instead of random weights of the shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, metavar="OUT", help="an empty or new folder")
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--prompt-tokens", type=int, default=1024)
    parser.add_argument("--image-tokens", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--modes", nargs="*", help="of torch.compile; default: transformers' own, then max-autotune")
    parser.add_argument("--min-speedup", type=float, default=5.0)
    parser.add_argument("--max-tpot", type=float, default=4.5, metavar="MS")
    arguments = parser.parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (arguments.output / "log.txt").open("a") as log:

        def say(line: str) -> None:
            print(line, flush=True)
            print(line, file=log, flush=True)

        def said(trial: Trial) -> None:
            say(f"{time.monotonic() - start:5.0f} s  {_line(trial)}")

        model = arguments.model or make_random_vlm(arguments.shape, arguments.output / "model")
        say(f"{time.monotonic() - start:5.0f} s  {model}")
        tuning = tune_latency(
            model,
            new_tokens=arguments.new_tokens,
            prompt_tokens=arguments.prompt_tokens,
            image_tokens=arguments.image_tokens,
            device=arguments.device,
            rounds=arguments.rounds,
            compile_modes=None if arguments.modes is None else [mode or None for mode in arguments.modes],
            isolated=False,
            progress=said,
        )
        (arguments.output / "tuning.json").write_text(json.dumps(tuning.to_json(), indent=2))
        keys, left_out = keys_for_files(tuning, json.loads((Path(model) / "config.json").read_text()))
        tpot_ms = (tuning.best.tpot_s or 0.0) * 1e3
        ratio = "" if tuning.ratio is None else f"; time over the default's {span(tuning.ratio)}"
        say(f"\n{tuning.code()}\n\nin files: {json.dumps(keys)} {' '.join(left_out)}\n")
        for trial in tuning.trials:
            say(_line(trial))
        say(f"best: {tuning.best.name}, {tpot_ms:.2f} ms a token, {tuning.speedup:.2f} times the default{ratio}")
        say(f"{time.monotonic() - start:.0f} s in all; {json.dumps(dict(tuning.environment))}")
    missed = tuning.speedup < arguments.min_speedup or tpot_ms > arguments.max_tpot
    return 1 if missed and arguments.device.startswith("cuda") else 0


def _line(trial: Trial) -> str:
    times = "-" if trial.tpot_s is None else f"{trial.tpot_s * 1e3:.2f}"
    first = "-" if trial.first_s is None else f"{trial.first_s:.1f}"
    equal = "-" if trial.equal_tokens is None else str(trial.equal_tokens)
    return f"{trial.name:40} {times:>8} ms/token, first answer {first:>6} s, {equal:>4} tokens equal  {trial.note}"


if __name__ == "__main__":
    sys.exit(main())
