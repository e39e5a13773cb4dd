"""Run the recipe at the 3B shape, as its configs say, and compare what it costs with what the preflight estimated.

    python -m scripts.benchmarks.recipe --arms full lora resume            # one GPU
    python -m scripts.benchmarks.recipe --arms fsdp2 zero3                 # two
    python -m scripts.benchmarks.recipe --shape tiny --cpu                 # the same on a CPU, to try the script
    python -m scripts.benchmarks.recipe --arms zero3 --shape qwen2.5-vl-3b-quarter --cpu \
        -- --per_device_train_batch_size 2

Random weights at the published shape (`scripts/models/random_vlm.py`) and a made-up dataset in geometry3k's layout:
images that resize to the config's limit, questions up to its longest prompt. Such a model never ends its answers, so
every completion has the full length: the worst case for time and memory. Each arm ends in an export that is verified
and timed. `resume` trains the LoRA config in another process that is killed (SIGKILL) once its first checkpoint is
whole, and goes on from there. A table comes last; `--output` keeps logs, summaries and exports' manifests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["angle", "line", "circle", "triangle", "radius", "square", "parallel", "chord", "tangent", "area", "point"]


@dataclass(frozen=True)
class Arm:
    """A config of the recipe, another on top of it, an accelerate config, and how many GPUs it takes."""

    config: str
    accelerate: str = "single"
    overlay: str | None = None
    gpus: int = 1
    is_killed: bool = False


ARMS = {
    "full": Arm("qwen2_5_vl_3b_full"),
    "lora": Arm("qwen2_5_vl_3b_lora"),
    "resume": Arm("qwen2_5_vl_3b_lora", is_killed=True),
    "full_vllm": Arm("qwen2_5_vl_3b_full", overlay="with_vllm_colocate"),
    "lora_vllm": Arm("qwen2_5_vl_3b_lora", overlay="with_vllm_colocate"),
    "fsdp2": Arm("qwen2_5_vl_3b_full", "fsdp2", gpus=2),
    "zero3": Arm("qwen2_5_vl_3b_full", "zero3", gpus=2),
    "lora_ddp": Arm("qwen2_5_vl_3b_lora", "ddp", gpus=2),
    "lora_ddp4": Arm("qwen2_5_vl_3b_lora", "ddp", gpus=4),
}


def main() -> None:
    options = parse()
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-recipe-", dir=options.scratch) as scratch:
        base = Path(options.base) if options.base else make_base(options.shape, Path(scratch, "base"))
        dataset = make_dataset(Path(scratch, "dataset"))
        found = [run_arm(name, base, dataset, Path(scratch), output, options) for name in options.arms]
    print(f"\n{'arm':>10} {'step':>9} {'peak':>10} {'estimate':>10} {'off':>6} {'verified':>9} {'TPOT ms':<40} total")
    for row in found:
        print(line(row))
    print(json.dumps(found))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arms", nargs="+", choices=sorted(ARMS), default=["full", "lora", "resume"])
    parser.add_argument("--shape", default="qwen2.5-vl-3b", help="of scripts/models/random_vlm.py")
    parser.add_argument("--base", help="a model folder instead")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--completion-length", type=int, help="instead of the config's")
    parser.add_argument("--accumulate", type=int, help="gradient accumulation steps instead of the config's")
    parser.add_argument("--latency-rounds", type=int, default=3, help="0 leaves the timing out")
    parser.add_argument("--cpu", action="store_true", help="one process without bfloat16, or zero3's two with it")
    parser.add_argument("--scratch", help="where to put models and runs (60 GB); by default the temporary folder")
    parser.add_argument("--output", default="bench_recipe")
    parser.add_argument("flags", nargs="*", help="after --: more flags of recipes/grpo.py, instead of the config's")
    return parser.parse_args()


def letters_reward(completions: list[Any], **kwargs: Any) -> list[float]:
    """Reward different characters.

    The text of random weights earns nothing by the usual rewards, and a group of equal rewards has no gradient.
    """
    return [float(len(set(completion[0]["content"]))) for completion in completions]


def make_base(shape: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "scripts.models.random_vlm", "--shape", shape, str(folder)]
    subprocess.run(command, check=True, stdout=sys.stderr, cwd=ROOT)
    return folder


def make_dataset(folder: Path) -> Path:
    """Write 96 rows to train on and 8 to hold out, in the layout of hiyouga/geometry3k."""
    from datasets import Dataset, Features, Image, List, Value
    from PIL import Image as Pictures

    rng = random.Random(0)
    kinds = Features({"images": List(Image()), "problem": Value("string"), "answer": Value("string")})
    (folder / "data").mkdir(parents=True)
    for split, count in (("train", 96), ("test", 8)):
        rows: dict[str, list[Any]] = {"images": [], "problem": [], "answer": []}
        for _ in range(count):
            picture = Pictures.effect_noise((rng.randint(700, 900), rng.randint(600, 800)), 60).convert("RGB")
            rows["images"].append([picture])
            rows["problem"].append("<image>" + " ".join(rng.choices(WORDS, k=rng.randint(20, 160))) + "?")
            rows["answer"].append(str(rng.randint(1, 90)))
        Dataset.from_dict(rows, features=kinds).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return folder


def run_arm(
    name: str, base: Path, dataset: Path, scratch: Path, output: Path, options: argparse.Namespace
) -> dict[str, Any]:
    arm, began = ARMS[name], time.monotonic()
    run = scratch / f"run-{name}"
    command = recipe_command(arm, base, dataset, run, options)
    row: dict[str, Any] = {"arm": name, "gpus": arm.gpus}
    log = output / f"{name}.log"
    if arm.is_killed:
        row["killed_after_checkpoint"] = kill_after_checkpoint(command, run, log, environment(options))
        command += ["--resume_from_checkpoint", "true"]
    with log.open("a") as file:
        code = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment(options), check=False
        ).returncode
    row |= {"exit_code": code, "total_s": round(time.monotonic() - began)}
    text = log.read_text(errors="replace")
    row["cost"] = [found for found in text.splitlines() if " steps of " in found]
    row["sampling_logp_difference"] = re.findall(r"sampling_logp_difference/mean': '?([\d.e-]+)", text)  # with vLLM
    row["resumed"] = [line for line in text.splitlines() if line.startswith("resuming from ")]
    if (run / "summary.json").is_file():
        row |= json.loads((run / "summary.json").read_text())
        shutil.copy(run / "summary.json", output / f"{name}.summary.json")
    for kept in (run / "export" / "grpo_toolkit.json", run / "latency" / "latency.jsonl"):
        if kept.is_file():
            shutil.copy(kept, output / f"{name}.{kept.name}")
    if code:
        print(f"{name}: exit code {code}\n" + "\n".join(text.splitlines()[-25:]), file=sys.stderr)
    print(line(row), flush=True)
    shutil.rmtree(run, ignore_errors=True)  # a full fine-tune with its export is 50 GB
    return row


def recipe_command(arm: Arm, base: Path, dataset: Path, run: Path, options: argparse.Namespace) -> list[str]:
    launcher = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"]
    if options.cpu and arm.gpus == 1:
        launcher += ["--cpu", "--num_processes", "1"]
    else:
        launcher += ["--config_file", str(ROOT / f"recipes/accelerate/{arm.accelerate}.yaml")]
        launcher += ["--num_processes", str(arm.gpus)]
        # Any free port: another run may be on other GPUs of the same host (CUDA_VISIBLE_DEVICES).
        launcher += ["--main_process_port", "0"] if arm.gpus > 1 else []
    configs = [name for name in (arm.config, arm.overlay) if name is not None]
    flags = {
        "model_name_or_path": base,
        "dataset_name": dataset,
        "dataset_layout": "geometry3k",
        "output_dir": run,
        "max_steps": options.steps,
        "held_out_size": 2,
        # Such answers are all cut off: masked, there would be no gradient, and what is exported would be the base.
        "mask_truncated_completions": "false",
        "warmup_steps": 0,
        "eval_strategy": "no",
        "load_best_model_at_end": "false",
        "direct_baseline": "false",
        "save_strategy": "steps" if arm.is_killed else "no",
        "save_steps": 1,
        "latency_new_tokens": 64,
        "latency_rounds": options.latency_rounds,
        "report_to": "none",
    }
    if options.completion_length:
        flags["max_completion_length"] = options.completion_length
    if options.accumulate:
        flags |= {"gradient_accumulation_steps": options.accumulate, "steps_per_generation": options.accumulate}
    if options.cpu:
        flags |= {"use_cpu": "true", "bf16": str(arm.gpus > 1).lower()}
    rewards = ["--reward_funcs", "format", f"{Path(__file__).resolve()}:{letters_reward.__name__}"]
    pairs = [("config", ROOT / f"recipes/configs/{name}.yaml") for name in configs] + list(flags.items())
    given = [part for flag, value in pairs for part in (f"--{flag}", str(value))]
    return [*launcher, str(ROOT / "recipes" / "grpo.py"), *given, *rewards, *options.flags]


def environment(options: argparse.Namespace) -> dict[str, str]:
    on_a_cpu = {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | (on_a_cpu if options.cpu else {})


def kill_after_checkpoint(command: list[str], run: Path, log: Path, env: dict[str, str]) -> str | None:
    """Train until a whole checkpoint lies there, then kill every process of the run at once."""
    from grpo_toolkit import last_whole_checkpoint

    with log.open("a") as file:
        started = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        checkpoint = None
        while checkpoint is None and started.poll() is None:
            time.sleep(1)
            if any(run.glob("checkpoint-*")):
                checkpoint, _ = last_whole_checkpoint(run)
        if started.poll() is None:
            os.killpg(started.pid, signal.SIGKILL)
        started.wait()
    return None if checkpoint is None else checkpoint.name


def line(row: dict[str, Any]) -> str:
    if "held_out_accuracy" not in row:
        return f"{row['arm']:>10} FAILED with exit code {row['exit_code']}, {row['total_s']} s {row['cost']}"
    step, peak, estimated = row["step_s"], row["peak_gib"], row["estimated_gib"]
    tpot = " ".join(f"{arm} {value:.1f}" for arm, value in row["tpot_ms"].items())
    memory = " " * 27
    if peak is not None:
        memory = f" {peak:6.1f} GiB {estimated:6.1f} GiB {estimated / peak - 1:+6.0%}"
    note = f"; {row['resumed'][0].rsplit('/', 1)[-1]}" if row.get("resumed") else ""
    return f"{row['arm']:>10} {step or 0:7.1f} s{memory} {row['verified']!s:>9}  {tpot:<40} {row['total_s']} s{note}"


if __name__ == "__main__":
    main()
