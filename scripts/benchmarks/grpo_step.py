"""Seconds of a GRPO step of a vision-language model, plain and with what makes it faster, phase by phase.

    python -m scripts.benchmarks.grpo_step --device cuda --output OUT            # 3B shape, random weights, one H200
    python -m scripts.benchmarks.grpo_step --launch fsdp2 --device cuda --output OUT           # two GPUs of a machine
    python -m scripts.benchmarks.grpo_step --shape tiny --completions 4 --new-tokens 8 --output OUT     # on a CPU

A step is that of the recipe's configs: `--groups` prompts with an image each and `--completions` answers of exactly
`--new-tokens` tokens to each, in micro-batches of one group, gradient checkpointing, sdpa; `full` trains float32
weights under autocast, `lora` an adapter on bfloat16 weights, with rollouts of half a step. `fast` is all that the
recipe has on by default, `padded` has lengths in multiples of 128 besides. Each arm is a process of its own, one after
the other, and all arms see the same rows. The GPU is waited for at each border of a phase. Steps after the first are
timed; the first, which compiles, is shown beside them. `--launch` runs each arm on two processes by a file of
recipes/accelerate, with as much work for each; times and memory are those of the first process.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WORDS = ("alpha", "beta", "gamma", "delta", "omega", "angle", "circle", "degrees")
ROOT = Path(__file__).resolve().parents[2]
ARMS = ("plain", "packed", "rollout", "fast", "padded")
PHASES = ("rollout", "scoring", "forward", "backward")


def main() -> None:
    options = parse()
    if options.child:
        row = train(options)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(row))
        return
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        base = Path(options.base or build(options.shape, Path(scratch, "base")))
        rows = []
        for weights in options.weights:
            for arm in options.arms:
                row = {"weights": weights, "arm": arm} | in_a_process_of_its_own(base, weights, arm, options, output)
                rows.append(row)
                print(line(row), flush=True)
                (output / "grpo_step.json").write_text(json.dumps(rows, indent=1))
    print(
        f"\n{'':>11} {'first':>8} {'step':>8}  {'  '.join(f'{phase:>8}' for phase in PHASES)}  {'the rest':>8}   peak"
    )
    for row in rows:
        print(line(row))
    print(json.dumps(ratios(rows)))


def add_step_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a step's model, size and device, which the benchmarks of steps share."""
    parser.add_argument("--base", help="model folder; by default random weights of --shape are written")
    parser.add_argument("--shape", default="qwen2.5-vl-3b", help="of scripts/models/random_vlm.py")
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--completions", type=int, default=8)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--words", type=int, default=170, help="longest prompt, in words (1,040 tokens)")
    parser.add_argument("--image", type=int, nargs=2, default=(616, 616), help="pixels")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_step_arguments(parser)
    parser.add_argument("--weights", nargs="+", choices=["full", "lora"], default=["full", "lora"])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=["plain", "packed", "fast"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--plain-steps", type=int, default=2, help="of the slow arm")
    parser.add_argument("--launch", choices=["ddp", "fsdp2", "zero2", "zero3"], help="two processes, by this file")
    parser.add_argument("--output", default="bench_step")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def build(shape: str, folder: Path) -> Path:
    subprocess.run(
        [sys.executable, "-m", "scripts.models.random_vlm", "--shape", shape, str(folder)],
        check=True,
        stdout=sys.stderr,
    )
    return folder


def in_a_process_of_its_own(
    base: Path, weights: str, arm: str, options: argparse.Namespace, output: Path
) -> dict[str, Any]:
    numbers = ("groups", "completions", "new_tokens", "words", "device")
    given = [part for name in numbers for part in (f"--{name.replace('_', '-')}", str(getattr(options, name)))]
    given += ["--steps", str(options.plain_steps if arm == "plain" else options.steps)]
    given += ["--image", *map(str, options.image), "--base", str(base), "--child", weights, arm]
    command = [sys.executable, *launcher(options), "-m", "scripts.benchmarks.grpo_step", *given]
    with (output / f"{weights}-{arm}.log").open("w") as log:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, text=True, check=False)
    if done.returncode:
        tail = (output / f"{weights}-{arm}.log").read_text()[-1500:]
        return {"failed": done.returncode, "log": tail}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def launcher(options: argparse.Namespace) -> list[str]:
    """Return what stands between `python` and `-m MODULE`: nothing for one process."""
    if options.launch is None:
        return []
    file = ROOT / "recipes" / "accelerate" / f"{options.launch}.yaml"
    on_cpu = ["--cpu", "--mixed_precision", "no"] if options.device == "cpu" else []
    return ["-m", "accelerate.commands.launch", "--config_file", str(file), "--num_processes", "2", *on_cpu]


def train(options: argparse.Namespace) -> dict[str, Any]:
    """Train one arm and return the seconds of each step and phase, and the peak of memory in GiB."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    from grpo_toolkit import KVCacheCallback, rows_once

    weights, arm = options.child
    on_gpu = options.device == "cuda"
    callbacks: list[Any] = [KVCacheCallback()]
    if arm in ("packed", "fast", "padded"):
        from grpo_toolkit import PackedVisionCallback

        callbacks.append(PackedVisionCallback())
    if arm in ("rollout", "fast", "padded"):
        from grpo_toolkit import FastRolloutCallback

        callbacks.append(FastRolloutCallback(way="fast"))
    with tempfile.TemporaryDirectory(prefix="bench-step-") as scratch:
        settings = settings_of(options, scratch)
        clock = Clock(on_gpu)
        trainer = timed_trainer(clock)(
            model=options.base,
            args=settings,
            reward_funcs=distinct_letters,
            train_dataset=rows_once(prompts(options)) if arm in ("fast", "padded") else prompts(options),
            peft_config=adapter_of(weights),
            callbacks=[clock.callback(), *callbacks],
        )
        trainer.train()
        logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    kept = ("sampling/rollout_kl", "completions/mean_length", "grad_norm", "loss")
    return {
        "steps_s": clock.steps,
        "phases": clock.phases,
        "peak_gib": round(peak, 1),
        "logs": [{name: entry[name] for name in kept if name in entry} for entry in logs],
        "failures": [failure for callback in callbacks for failure in callback.failures],
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
    }


def adapter_of(weights: str) -> Any:
    """Return the adapter that an arm trains; None for `full`."""
    from peft import LoraConfig

    targets = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    lora = LoraConfig(r=64, lora_alpha=64, target_modules=targets, task_type="CAUSAL_LM")
    return lora if weights == "lora" else None


def settings_of(options: argparse.Namespace, output_dir: str) -> Any:
    """Return the training arguments of an arm."""
    from trl import GRPOConfig

    on_gpu, is_lora = options.device == "cuda", options.child[0] == "lora"
    padded = {"pad_to_multiple_of": 128} if options.child[1] == "padded" else {}
    return GRPOConfig(
        output_dir=output_dir,
        max_steps=options.steps,
        per_device_train_batch_size=options.completions,
        num_generations=options.completions,
        gradient_accumulation_steps=options.groups,
        steps_per_generation=max(options.groups // 2, 1) if is_lora else None,
        max_completion_length=options.new_tokens,
        generation_kwargs={"min_new_tokens": options.new_tokens},
        gradient_checkpointing=True,
        model_init_kwargs={"dtype": "bfloat16" if is_lora else "float32"},
        bf16=on_gpu,
        use_cpu=not on_gpu,
        learning_rate=1e-6,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        logging_steps=1,
        seed=0,
        **padded,
    )


class Clock:
    """A clock for the wall time of steps and of their phases, the GPU's work included."""

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.steps: list[float] = []
        self.phases: list[dict[str, float]] = []
        self._open: dict[str, float] = {}
        self._began = 0.0

    def now(self) -> float:
        if self.on_gpu:
            import torch

            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(self, phase: str, call: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something and add its seconds to a phase."""
        began = self.now()
        try:
            return call(*args, **kwargs)
        finally:
            self._open[phase] = self._open.get(phase, 0.0) + self.now() - began

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class StepClock(TrainerCallback):
            def on_train_begin(self, *_: Any, **__: Any) -> None:
                clock._began = clock.now()

            def on_step_end(self, *_: Any, **__: Any) -> None:
                now = clock.now()  # rows of the next step are read before on_step_begin: the border is this one
                clock.steps.append(now - clock._began)
                clock.phases.append(clock._open)
                clock._began, clock._open = now, {}

        return StepClock()


def timed_trainer(clock: Clock) -> Any:
    from trl import GRPOTrainer

    class TimedTrainer(GRPOTrainer):
        def _generate(self, *args: Any, **kwargs: Any) -> Any:
            return clock.timed("rollout", super()._generate, *args, **kwargs)

        def _generate_and_score_completions(self, *args: Any, **kwargs: Any) -> Any:
            before = clock._open.get("rollout", 0.0)
            began = clock.now()
            scored = super()._generate_and_score_completions(*args, **kwargs)
            rolled = clock._open.get("rollout", 0.0) - before
            clock._open["scoring"] = clock._open.get("scoring", 0.0) + clock.now() - began - rolled
            return scored

        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return clock.timed("forward", super().compute_loss, *args, **kwargs)

        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            backward = self.accelerator.backward
            self.accelerator.backward = lambda *a, **k: clock.timed("backward", backward, *a, **k)

    return TimedTrainer


def prompts(options: argparse.Namespace) -> Any:
    from datasets import Dataset
    from PIL import Image

    rng = random.Random(0)
    count = options.groups * options.steps * int(os.environ.get("WORLD_SIZE", "1"))
    texts = [" ".join(rng.choices(WORDS, k=rng.randint(options.words // 2, options.words))) for _ in range(count)]
    images = [Image.effect_noise(tuple(options.image), 40 + index).convert("RGB") for index in range(count)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts], "image": images})


def distinct_letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(str(completion)))) for completion in completions]


def line(row: dict[str, Any]) -> str:
    name = f"{row['weights']} {row['arm']}"
    if "failed" in row:
        return f"{name:>13} FAILED ({row['failed']}): {row['log'][-700:]}"
    later = row["phases"][1:] or row["phases"]
    step = statistics.median(row["steps_s"][1:] or row["steps_s"])
    parts = [statistics.median(phases.get(phase, 0.0) for phases in later) for phase in PHASES]
    shown = "  ".join(f"{part:8.2f}" for part in [*parts, step - sum(parts)])
    notes = " ".join(row["failures"]) or row["logs"][-1].get("sampling/rollout_kl", "")
    return f"{name:>13} {row['steps_s'][0]:6.1f} s {step:6.2f} s  {shown}   {row['peak_gib']} GiB {notes}"


def ratios(rows: list[dict[str, Any]]) -> dict[str, float]:
    step = {
        (row["weights"], row["arm"]): statistics.median(row["steps_s"][1:] or row["steps_s"])
        for row in rows
        if "steps_s" in row
    }
    return {
        f"{weights} plain/{arm}": round(step[weights, "plain"] / seconds, 2)
        for (weights, arm), seconds in step.items()
        if arm != "plain" and (weights, "plain") in step
    }


if __name__ == "__main__":
    main()
