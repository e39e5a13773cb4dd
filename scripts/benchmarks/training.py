"""The time of a GRPO step: with our callbacks and without, from a clean base and from one with its cache off.

    python -m scripts.benchmarks.training                                 # a tiny base, on the CPU
    python -m scripts.benchmarks.training --base BASE --device cuda --new-tokens 128 --image-size 896

Each block runs every arm once, each in a process of its own, forwards in one block and backwards in the next, so
that neither the machine's drift nor what a process has learnt (cuDNN's plans) favours one. All arms see the same
prompts, of fresh lengths at every step, and generate exactly `--new-tokens` tokens. The first step of a process warms
up and is left out. The last line on standard output is one JSON object.

`--alternate` is for differences of a percent on a shared machine: the arms of a block are trainers in one process that
take turns, a step each, so that both steps of a pair meet the same machine.
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
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Arm:
    """A way to train: with our callbacks or without, from which base, rollouts with cuDNN's attention or not."""

    callbacks: bool = False
    is_poisoned: bool = False
    cudnn_decoding: bool | None = None


ARMS = {
    "plain": Arm(),
    "callbacks": Arm(callbacks=True),
    "poisoned": Arm(is_poisoned=True),
    "poisoned_callbacks": Arm(is_poisoned=True, callbacks=True),
    "cudnn": Arm(callbacks=True, cudnn_decoding=True),
    "no_cudnn": Arm(callbacks=True, cudnn_decoding=False),
}
RATIOS = (
    ("callbacks", "plain"),
    ("poisoned_callbacks", "callbacks"),
    ("poisoned", "plain"),
    ("cudnn", "no_cudnn"),
)


def main() -> None:
    options = parse()
    if options.child:
        print(json.dumps(in_turns(options.child.split(","), options)))
        return
    with tempfile.TemporaryDirectory(prefix="bench-training-") as scratch:
        base = Path(options.base) if options.base else tiny_base(Path(scratch, "base"))
        poisoned = poison(base, Path(scratch, "poisoned"))
        steps: dict[str, list[list[float]]] = {name: [] for name in options.arms}
        for block in range(options.blocks):
            order = options.arms if block % 2 == 0 else list(reversed(options.arms))
            for names in [order] if options.alternate else [[name] for name in order]:
                found = in_a_process_of_its_own(names, (base, poisoned), options)
                for name in names:
                    steps[name].append(found[name]["steps_s"])
                    peak = found[name]["peak_gib"]
                    print(f"block {block} {name:>20}: {show(steps[name][-1])}  peak {peak} GiB", flush=True)
    report(steps)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", help="model folder; by default a tiny one is made")
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=["plain", "callbacks"])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--generations", type=int, default=8, help="completions per prompt, one prompt a step")
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--longest-prompt", type=int, default=60, help="prompts have up to so many words")
    parser.add_argument("--image-size", type=int, default=56, help="pixels; 896 are 1,024 tokens of Qwen2.5-VL")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--alternate", action="store_true", help="the arms take turns in one process, step by step")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--poisoned", help=argparse.SUPPRESS)
    return parser.parse_args()


def tiny_base(folder: Path) -> Path:
    from scripts.models.tiny_bases import build_qwen2_5_vl

    return build_qwen2_5_vl(folder)


def poison(base: Path, folder: Path) -> Path:
    """Copy a base as trainers of transformers 4.x leave it: `use_cache: false` in generation_config.json."""
    folder.mkdir()
    for path in base.iterdir():
        if path.is_file() and path.name != "generation_config.json":
            (folder / path.name).symlink_to(path.resolve())
    generation = json.loads((base / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(generation | {"use_cache": False}))
    return folder


def in_a_process_of_its_own(
    names: list[str], bases: tuple[Path, Path], options: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    flags = ("steps", "generations", "new_tokens", "longest_prompt", "image_size", "device")
    given = [part for flag in flags for part in (f"--{flag.replace('_', '-')}", str(getattr(options, flag)))]
    given += ["--base", str(bases[0]), "--poisoned", str(bases[1])]
    command = [sys.executable, "-m", "scripts.benchmarks.training", "--child", ",".join(names), *given]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{names}: {done.stderr[-3000:]}")
    found: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


def in_turns(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Train every arm in a thread; only the one that holds the baton runs, and it hands it on after each step."""
    batons = [threading.Semaphore(0) for _ in names]
    found: dict[str, dict[str, Any]] = {}

    def run(index: int) -> None:
        batons[index].acquire()
        found[names[index]] = train(ARMS[names[index]], options, lambda: hand_on(index))
        batons[(index + 1) % len(names)].release()  # its turns are over; the others' go on

    def hand_on(index: int) -> None:
        batons[(index + 1) % len(names)].release()
        batons[index].acquire()

    threads = [threading.Thread(target=run, args=[index]) for index in range(len(names))]
    for thread in threads:
        thread.start()
    batons[0].release()
    for thread in threads:
        thread.join()
    return found


def train(arm: Arm, options: argparse.Namespace, hand_on: Callable[[], None]) -> dict[str, Any]:
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch
    from trl import GRPOConfig, GRPOTrainer

    from grpo_toolkit import ExportCallback, KVCacheCallback, ResumeGuardCallback

    on_gpu = options.device == "cuda"
    with tempfile.TemporaryDirectory(prefix="bench-training-") as scratch:
        timer = step_timer(hand_on)
        callbacks: list[Any] = [timer]
        if arm.callbacks:
            callbacks += [KVCacheCallback(cudnn_decoding=arm.cudnn_decoding, strict=True), ResumeGuardCallback()]
            if not on_gpu:  # acts at the end alone, where a big model takes a minute
                callbacks.append(ExportCallback(Path(scratch, "export"), num_prompts=1, strict=True))
        settings = GRPOConfig(
            output_dir=scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.generations,
            num_generations=options.generations,
            max_completion_length=options.new_tokens,
            generation_kwargs={"min_new_tokens": options.new_tokens},
            shuffle_dataset=False,
            gradient_checkpointing=True,
            model_init_kwargs={"dtype": "bfloat16" if on_gpu else "float32"},
            optim="sgd",  # the step's rollout and backward are what is timed, not the optimizer's memory
            learning_rate=1e-6,
            bf16=on_gpu,
            use_cpu=not on_gpu,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=options.poisoned if arm.is_poisoned else options.base,
            args=settings,
            reward_funcs=distinct_letters,
            train_dataset=prompts(options),
            callbacks=callbacks,
        )
        trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if on_gpu else 0.0
    return {"steps_s": timer.seconds, "peak_gib": round(peak, 1)}


def prompts(options: argparse.Namespace) -> Any:
    """Return one prompt a step, each of another length, with an image of noise."""
    from datasets import Dataset
    from PIL import Image

    words, rng = ["alpha", "beta", "gamma", "delta", "omega"], random.Random(0)
    texts = [" ".join(rng.choices(words, k=rng.randint(5, options.longest_prompt))) for _ in range(options.steps)]
    size = (options.image_size, options.image_size)
    images = [Image.effect_noise(size, 60 + index).convert("RGB") for index in range(options.steps)]
    return Dataset.from_dict({"prompt": [[{"role": "user", "content": text}] for text in texts], "image": images})


def distinct_letters(completions: list[Any], **_: Any) -> list[float]:
    return [float(len(set(str(completion)))) for completion in completions]


def step_timer(hand_on: Callable[[], None]) -> Any:
    import torch
    from transformers import TrainerCallback

    class Timer(TrainerCallback):
        """The wall time of each step, the GPU's work included."""

        def __init__(self) -> None:
            self.seconds: list[float] = []
            self._began = 0.0

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self._began = self._now()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self.seconds.append(self._now() - self._began)
            hand_on()

        def _now(self) -> float:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            return time.perf_counter()

    return Timer()


def report(steps: dict[str, list[list[float]]]) -> None:
    timed = {name: [seconds for block in blocks for seconds in block[1:]] for name, blocks in steps.items()}
    print(f"\n{'arm':>20}  median step  quartiles")
    for name, seconds in timed.items():
        low, median, high = statistics.quantiles(seconds, n=4)
        print(f"{name:>20}  {median:9.3f} s  {low:.3f} to {high:.3f} s  ({len(seconds)} steps)")
    ratios = {}
    for name, other in RATIOS:
        if name in steps and other in steps:
            # Step for step: both arms had the same prompt there.
            pairs = [
                one / two
                for block, against in zip(steps[name], steps[other], strict=True)
                for one, two in zip(block[1:], against[1:], strict=True)
            ]
            low, median, high = statistics.quantiles(pairs, n=4)
            ratios[f"{name}/{other}"] = {"median": median, "quartiles": [low, high], "pairs": len(pairs)}
            print(f"{name} / {other}: {median:.3f} (quartiles {low:.3f} to {high:.3f}, {len(pairs)} pairs of steps)")
    print(json.dumps({"steps_s": steps, "ratios": ratios}))


def show(seconds: list[float]) -> str:
    return " ".join(f"{second:.2f}" for second in seconds)


if __name__ == "__main__":
    main()
