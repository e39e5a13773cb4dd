"""The accuracy that the tiny recipe learns with everything that makes a step fast, beside its spread without.

    python -m scripts.benchmarks.learning                       # the recipe's 140 steps: some minutes a run
    python -m scripts.benchmarks.learning --steps 20            # shorter, to see that it runs

Four runs of recipes/grpo.py: three seeds with `--packed_vision false --fast_rollouts false`, and the recipe's own seed
with packed vision and with rollouts that go the fast way, which "auto" does not choose on a CPU. Printed as one JSON
line: accuracies before and after training, and whether the fast one lies within what the seeds span.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SEEDS = (42, 43, 44)
OFF = ("--packed_vision", "false", "--fast_rollouts", "false")
FORCED = """
import sys
import grpo
from grpo_toolkit import FastRolloutCallback
grpo.FastRolloutCallback = lambda way: FastRolloutCallback("fast", strict=True)
grpo.main(sys.argv[1:])
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=140)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="learning-") as scratch:
        plain = [run(Path(scratch, f"plain-{seed}"), options.steps, seed, *OFF) for seed in SEEDS]
        fast = run(Path(scratch, "fast"), options.steps, SEEDS[0])
    after = [accuracies[1] for accuracies in plain]
    print(json.dumps({"plain": plain, "fast": fast, "is_within": min(after) <= fast[1] <= max(after)}))


def run(folder: Path, steps: int, seed: int, *flags: str) -> list[float]:
    """Run the tiny recipe and return the held-out accuracy before and after training."""
    arguments = ["--output_dir", str(folder), "--max_steps", str(steps), "--seed", str(seed), *flags]
    arguments += ["--latency_rounds", "0", "--save_strategy", "no", "--report_to", "none"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "recipes"), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-c", FORCED, *arguments]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{folder.name}: {done.stderr[-2000:]}")
    summary: dict[str, Any] = json.loads((folder / "summary.json").read_text())
    print(folder.name, summary["held_out_accuracy"], f"{summary['step_s']:.2f} s a step", file=sys.stderr, flush=True)
    accuracy: list[float] = summary["held_out_accuracy"]
    return accuracy


if __name__ == "__main__":
    main()
