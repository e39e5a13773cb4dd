"""The anatomy of a GRPO step as `StepTimeCallback` finds it, before and after what makes it faster.

    python -m scripts.benchmarks.step_time --device cuda --output OUT             # 3B shape, random weights, one H200
    python -m scripts.benchmarks.step_time --shape tiny --completions 4 --groups 2 --new-tokens 8 --words 20 \\
        --image 112 112 --steps 6 --output OUT                                                           # on a CPU

The step is that of scripts/benchmarks/grpo_step.py (`full`: float32 weights under autocast; `lora`: an adapter on
bfloat16 weights). Each arm is a process of its own: `plain` TRL; `cured` with PackedVisionCallback,
FastRolloutCallback and `rows_once`; `untimed` and `untimed-cured`, the same without StepTimeCallback, which say what
it costs. Checked and printed for each arm: that phases add up to the wall time of an outside clock, the share that is
in no phase, the causes found and what they are predicted to save beside what `cured` saves.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.benchmarks.grpo_step import adapter_of, add_step_arguments, build, distinct_letters, prompts, settings_of

ARMS = ("plain", "cured", "untimed", "untimed-cured")


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(train(options)))
        return
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-step-time-") as scratch:
        base = Path(options.base or build(options.shape, Path(scratch, "base")))
        found: dict[str, dict[str, Any]] = {}
        for weights in options.weights:
            for arm in options.arms:
                row = in_a_process_of_its_own(base, weights, arm, options, output)
                found[f"{weights} {arm}"] = row
                (output / "step_time_arms.json").write_text(json.dumps(found, indent=1))
                show_arm(f"{weights} {arm}", row)
    for weights in options.weights:
        compare(weights, found)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    parser.add_argument("--weights", nargs="+", choices=["full", "lora"], default=["full"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain", "cured"])
    parser.add_argument("--profile", action="store_true", help="as StepTimeCallback(profile=True)")
    parser.add_argument("--steps", type=int, default=3, help="of slow arms; the others take twice as many")
    parser.add_argument("--output", default="bench_step_time")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process_of_its_own(
    base: Path, weights: str, arm: str, options: argparse.Namespace, output: Path
) -> dict[str, Any]:
    numbers = ("groups", "completions", "new_tokens", "words", "device")
    given = [part for name in numbers for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    given += ["--steps", str(options.steps * 2 if "cured" in arm else options.steps)]
    given += ["--image", *map(str, options.image), "--base", str(base)]
    given += ["--output", str(output / f"{weights}-{arm}"), "--child", weights, arm]
    given += ["--profile"] if options.profile else []
    log = output / f"{weights}-{arm}.log"
    with log.open("w") as stream:
        command = [sys.executable, "-m", "scripts.benchmarks.step_time", *given]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stream, text=True, check=False)
    if done.returncode:
        return {"failed": done.returncode, "log": log.read_text()[-2500:]}
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm; return its rows, its explanation, and the outside clock's seconds of each step."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from grpo_toolkit import FastRolloutCallback, KVCacheCallback, PackedVisionCallback, StepTimeCallback, rows_once

    weights, arm = options.child
    on_gpu = options.device == "cuda"
    outside: list[float] = []

    class Outside(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu and arm.startswith("untimed"):
                torch.cuda.synchronize()
            outside.append(time.perf_counter())

    cures: list[Any] = [PackedVisionCallback(), FastRolloutCallback("fast")] if "cured" in arm else []
    timing = (
        None
        if arm.startswith("untimed")
        else StepTimeCallback(every=1, output_dir=options.output, profile=options.profile)
    )
    trainer = GRPOTrainer(
        model=options.base,
        args=settings_of(options, options.output),
        reward_funcs=distinct_letters,
        train_dataset=rows_once(prompts(options)) if "cured" in arm else prompts(options),
        peft_config=adapter_of(weights),
        callbacks=[Outside(), KVCacheCallback(), *cures, *([] if timing is None else [timing])],
    )
    if timing is not None:
        timing.trainer = trainer
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    steps = [later - sooner for sooner, later in zip(outside, outside[1:], strict=False)]
    row: dict[str, Any] = {
        "outside_s": steps,
        "losses": losses,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
    }
    if timing is not None:
        row["rows"] = [one.to_json() for one in timing.rows]
        row["explanation"] = None if timing.explanation is None else timing.explanation.to_json()
        row["failures"] = timing.failures
        row["seen"] = repr(timing._seen)
    return row


def show_arm(name: str, row: dict[str, Any]) -> None:
    print(f"\n=== {name} " + "=" * 60, flush=True)
    if "failed" in row:
        print(f"FAILED ({row['failed']}):\n{row['log']}")
        return
    print(f"device {row['device']}, torch {row['torch']}; outside clock, step end to step end (the first left out):")
    print("  " + "  ".join(f"{seconds:.3f}" for seconds in row["outside_s"]) + " s")
    if row.get("explanation") is None:
        return
    from rich.console import Console

    from grpo_toolkit.reporting.terminal.step_time import step_time
    from grpo_toolkit.step_time.store import step_row_of

    explanation: Any = step_row_of(row["explanation"])
    Console(width=120, highlight=False).print(step_time(explanation))
    rows = row["rows"]
    worst = max(abs(sum(one["phases_s"].values()) / one["wall_s"] - 1) for one in rows if one["phases_s"])
    print(f"phases add up to the wall time of each step within {worst:.2%}; clock: {rows[-1]['clock']}")
    inside = sum(one["wall_s"] for one in rows[1:])
    print(
        f"wall time of the steps after the first by the callback {inside:.2f} s, outside {sum(row['outside_s']):.2f} s"
    )
    other = explanation.phases_s.get("other", 0.0) / explanation.wall_s
    print(f"in no phase ('other'): {other:.1%} of the step   failures: {row['failures'] or 'none'}")
    print("seconds of each step (f: first, c: looked at closely):")
    for one in rows:
        mark = ("f" if one["is_first"] else "") + ("c" if one["is_close"] else "")
        shown = {name: round(seconds, 3) for name, seconds in one["phases_s"].items() if seconds >= 5e-4}
        print(f"  {one['step']}{mark:>3} {one['wall_s']:8.3f}  {shown}")
    print(f"seen without a clock: {row['seen']}")


def compare(weights: str, found: dict[str, dict[str, Any]]) -> None:
    arms = {arm: found.get(f"{weights} {arm}", {}) for arm in ARMS}
    plain, cured = (arms[arm].get("explanation") for arm in ("plain", "cured"))
    if plain and cured:
        predicted = sum(
            one["saving_s"] or 0.0 for one in plain["causes"] if "Callback" in one["line"] and one["saving_s"]
        )
        print(
            f"\n{weights}: {plain['wall_s']:.2f} s a step plain, {cured['wall_s']:.2f} s cured: saved "
            f"{plain['wall_s'] - cured['wall_s']:.2f} s, predicted {predicted:.2f} s by the causes that ours cure"
        )
        left = [one["cause"] for one in cured["causes"]]
        print(f"causes left in the cured step: {', '.join(left) or 'none'}")
    for timed, untimed in (("plain", "untimed"), ("cured", "untimed-cured")):
        if arms[timed].get("outside_s") and arms[untimed].get("outside_s"):
            one, other = (statistics.median(arms[arm]["outside_s"][1:]) for arm in (timed, untimed))
            same = arms[timed]["losses"] == arms[untimed]["losses"]
            print(
                f"{weights} {timed}: median step {one:.3f} s with the callback, {other:.3f} s without: "
                f"{one / other - 1:+.2%}; "
                f"losses {'equal to the last bit' if same else 'DIFFER'}"
            )


if __name__ == "__main__":
    main()
