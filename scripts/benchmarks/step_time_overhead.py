"""The cost of StepTimeCallback: the same trainings with and without it, in turns, in one process.

    python -m scripts.benchmarks.step_time_overhead --device cuda --output OUT   # 3B shape, random weights, one H200
    python -m scripts.benchmarks.step_time_overhead --shape tiny --completions 4 --groups 2 --new-tokens 8 \\
        --words 20 --image 112 112 --steps 12 --turns 2 --output OUT                                      # on a CPU

The step is that of scripts/benchmarks/grpo_step.py with PackedVisionCallback, FastRolloutCallback and `rows_once`, as
the faster a step, the more a constant cost shows. Same seed and completions of one length: each step of an arm is the
other arm's to the last bit, which is checked by the losses. Arms go A B B A, so that a drift of the machine falls on
both. A step's cost is the ratio of its medians over the turns; the median over steps is given, first for steps as most
are, then for those that are looked at closely (two of the first hundred). The first step, which compiles, is left out.
The outside clock waits for the GPU at each step's end, in both arms. Where steps vary by more than the callback could
cost, `--own` says more: one training under Python's profiler, and the milliseconds of a step as most are that pass in
the callback's own code and in what it calls of C, profiler included.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import os
import pstats
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from scripts.benchmarks.grpo_step import adapter_of, add_step_arguments, build, distinct_letters, prompts, settings_of

LIMIT = 0.005
"""The share of a step that the callback may cost."""


def main() -> None:
    options = parse()
    os.environ["HF_HUB_OFFLINE"] = "1"
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    options.child = (options.weights, "cured")
    with tempfile.TemporaryDirectory(prefix="bench-overhead-") as scratch:
        options.base = str(options.base or build(options.shape, Path(scratch, "base")))
        if options.own:
            print(json.dumps(train(options, timed=True, folder=Path(scratch, "own"), steps=options.steps)["own"]))
            return
        train(options, timed=True, folder=Path(scratch, "warm"), steps=2)
        arms: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
        for turn in range(options.turns):
            for timed in (True, False) if turn % 2 == 0 else (False, True):
                arms[timed].append(train(options, timed=timed, folder=output / f"turn-{turn}", steps=options.steps))
                print(shown(turn, arms[timed][-1], timed=timed), flush=True)
    found = compared(arms)
    (output / "step_time_overhead.json").write_text(json.dumps({"arms": {str(k): v for k, v in arms.items()}} | found))
    print(json.dumps(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    parser.add_argument("--weights", choices=["full", "lora"], default="lora")
    parser.add_argument("--steps", type=int, default=12, help="of a training; the 2nd and 10th are looked at closely")
    parser.add_argument("--turns", type=int, default=4, help="trainings of each arm")
    parser.add_argument("--own", action="store_true", help="profile the callback's own code instead")
    parser.add_argument("--output", default="bench_step_time_overhead")
    return parser.parse_args()


def train(options: argparse.Namespace, *, timed: bool, folder: Path, steps: int) -> dict[str, Any]:
    """Train once; return the outside clock's seconds of the steps after the first, the close ones and the losses."""
    import torch
    from transformers import TrainerCallback
    from trl import GRPOTrainer

    from grpo_toolkit import FastRolloutCallback, KVCacheCallback, PackedVisionCallback, StepTimeCallback, rows_once
    from grpo_toolkit.step_time.watch import LOOKS

    on_gpu = options.device == "cuda"
    ends: list[float] = []
    profiler = cProfile.Profile(time.process_time)  # what other processes take is no cost of ours
    usual = [step for step in range(2, steps + 1) if step not in LOOKS]

    class Outside(TrainerCallback):
        def on_step_begin(self, _args: Any, state: Any, *_: Any, **__: Any) -> None:
            profiler.disable()
            if options.own and state.global_step + 1 in usual:
                profiler.enable()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if on_gpu:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())

    torch.manual_seed(0)
    args = settings_of(options, str(folder))
    args.max_steps = steps
    callbacks = [Outside(), KVCacheCallback(), PackedVisionCallback(), FastRolloutCallback("fast")]
    timing = StepTimeCallback(output_dir=folder) if timed else None
    trainer = GRPOTrainer(
        model=options.base,
        args=args,
        reward_funcs=distinct_letters,
        train_dataset=rows_once(prompts(options)),
        peft_config=adapter_of(options.weights),
        callbacks=callbacks,
    )
    if timing is not None:
        timing.trainer = trainer
        trainer.add_callback(timing)
    trainer.train()
    profiler.disable()
    found = {
        "steps_s": [later - sooner for sooner, later in zip(ends, ends[1:], strict=False)],
        "close": [] if timing is None else [row.step for row in timing.rows if row.is_close],
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "failures": [] if timing is None else list(timing.failures),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "own": own_ms(profiler, len(usual)) if options.own else None,
    }
    del trainer, timing
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    return found


def own_ms(profiler: cProfile.Profile, steps: int) -> dict[str, float]:
    """Return the milliseconds of a step in the callback's own functions, and in the C functions that they call."""
    own, of_c = 0.0, 0.0
    for (file, *_), (_, _, seconds, _, callers) in pstats.Stats(profiler).stats.items():  # type: ignore[attr-defined]
        if is_own(file):
            own += seconds
        elif file == "~":
            of_c += sum(called[2] for (caller, *_), called in callers.items() if is_own(caller))
    return {"own_ms": round(own / steps * 1e3, 2), "c_ms": round(of_c / steps * 1e3, 2), "steps": steps}


def is_own(file: str) -> bool:
    return "/grpo_toolkit/step_time/" in file or file.endswith("/grpo_toolkit/callbacks/step_time.py")


def compared(arms: dict[bool, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the cost of a step as a share of it, its spread over the turns, and whether the arms did the same."""
    close = set(arms[True][0]["close"])
    usual = [index for index in range(len(arms[True][0]["steps_s"])) if index + 2 not in close]
    looked_at = [index for index in range(len(arms[True][0]["steps_s"])) if index + 2 in close]
    by_turn = [
        share([one], [other], usual) for one, other in zip(arms[True], arms[False], strict=True) if usual
    ]  # neighbours in time
    cost = share(arms[True], arms[False], usual)
    return {
        "step_s": round(statistics.median(seconds(arms[False], index) for index in usual), 4),
        "cost": round(cost, 5),
        "cost_by_turn": [round(one, 5) for one in by_turn],
        "cost_of_close_steps": round(share(arms[True], arms[False], looked_at), 4) if looked_at else None,
        "is_within_limit": cost <= LIMIT,
        "losses_are_equal": len({tuple(one["losses"]) for arm in arms.values() for one in arm}) == 1,
        "failures": [text for one in arms[True] for text in one["failures"]],
        "device": arms[True][0]["device"],
    }


def share(timed: list[dict[str, Any]], untimed: list[dict[str, Any]], steps: list[int]) -> float:
    """Return what the first arm takes more than the second, the median over these steps: one that compiles is one."""
    return statistics.median(seconds(timed, index) / seconds(untimed, index) for index in steps) - 1


def seconds(arm: list[dict[str, Any]], index: int) -> float:
    """Return an arm's seconds of a step, the median over its turns."""
    return statistics.median(one["steps_s"][index] for one in arm)


def shown(turn: int, row: dict[str, Any], *, timed: bool) -> str:
    """Return the seconds of a training's steps in one line."""
    arm = "with" if timed else "without"
    return f"turn {turn} {arm:>8}: {'  '.join(f'{step:.3f}' for step in row['steps_s'])} s"


if __name__ == "__main__":
    main()
