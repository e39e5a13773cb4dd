"""Trainings on two processes of this machine, each as one of the kinds that people launch, and each rank's report.

`single` is the same training on one process, with all the prompts of both.

Which launches are real was tried: `accelerate launch --cpu --num_processes 2` and a MULTI_CPU yaml run one process; an
FSDP yaml with `use_cpu: true` is silently DDP. So DDP and FSDP2 go through torchrun (FSDP2 with a shim, see ranks.py),
ZeRO through an accelerate yaml with DS_ACCELERATOR=cpu; and every rank reports what it runs on before anything else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.benchmarks.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Sequence

ROOT = Path(__file__).resolve().parents[2]
RANKS = Path(__file__).with_name("ranks.py")
KINDS = ("ddp", "fsdp2_full", "fsdp2_sharded", "zero2", "zero3", "zero3_without_gathering")
ALONE = "single"
WHAT_IT_MUST_BE = {
    ALONE: {"distributed_type": "NO", "shards": "none", "zero_stage": None},
    "ddp": {"distributed_type": "MULTI_CPU", "shards": "none", "zero_stage": None},
    "fsdp2_full": {"distributed_type": "FSDP", "shards": "DTensor", "zero_stage": None},
    "fsdp2_sharded": {"distributed_type": "FSDP", "shards": "DTensor", "zero_stage": None},
    "zero2": {"distributed_type": "DEEPSPEED", "shards": "none", "zero_stage": 2},
    "zero3": {"distributed_type": "DEEPSPEED", "shards": "ds_id", "zero_stage": 3},
    "zero3_without_gathering": {"distributed_type": "DEEPSPEED", "shards": "ds_id", "zero_stage": 3},
}


def launch(
    kind: str,
    scenario: str,
    folder: Path,
    *,
    device: str = "cpu",
    gpus: str = "0,1",
    timeout_s: int = 300,
    program: Path = RANKS,
    python: Sequence[str] = (sys.executable,),
    **options: Any,
) -> list[dict[str, Any]]:
    """Run a scenario of a program on two processes and return what each rank reported, after checking its `kind`.

    On GPUs they see `gpus`, numbers with commas; `single` the first of them, or Trainer would split the batch.

    Args:
        program: ranks.py, or another with scenarios of its own.
        python: the command that runs Python, for the launcher and for each rank.

    Raises:
        RuntimeError: the training failed, or left no report.
    """
    world = 1 if kind == ALONE else 2
    options = {"per_device_train_batch_size": 8 // world} | options
    folder.mkdir(parents=True, exist_ok=True)
    if device == "cuda":
        options |= {"use_cpu": False, "bf16": True}
    (folder / "options.json").write_text(json.dumps(options))
    command = [*_launcher(kind, folder, device, python), *python[1:], str(program), kind, scenario, str(folder)]
    done = _run(command, env=_environment(kind, device, gpus), timeout_s=timeout_s)
    reports = [folder / f"rank{rank}.json" for rank in range(world)]
    if done.returncode or not all(path.is_file() for path in reports):
        raise RuntimeError(
            f"{kind} {scenario}: exit code {done.returncode}\n{done.stdout[-1500:]}\n{done.stderr[-6000:]}"
        )
    found = [json.loads(path.read_text()) for path in reports]
    for rank, report in enumerate(found):
        promised = WHAT_IT_MUST_BE[kind] | {"world_size": world, "rank": rank, "device": device}
        if (kind, device) == ("ddp", "cuda"):
            promised["distributed_type"] = "MULTI_GPU"
        assert report["runs_on"] == promised, f"{report['runs_on']}, and not {promised}"
        report["log"] = done.stderr
    return found


def stored_weights(folder: Path) -> dict[str, Any]:
    """Return every tensor in a folder's safetensors files, by name."""
    from safetensors.torch import load_file

    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def _run(command: list[str], env: dict[str, str], timeout_s: int) -> subprocess.CompletedProcess[str]:
    import psutil

    started = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        out, err = started.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        # The ranks as well: a launcher that is killed leaves them behind, torchrun's in sessions of their own.
        for process in [*psutil.Process(started.pid).children(recursive=True), started]:
            process.kill()
        out, err = started.communicate()
        err += f"\nkilled after {timeout_s} s"
    return subprocess.CompletedProcess(command, started.returncode, out, err)


def _launcher(kind: str, folder: Path, device: str, python: Sequence[str]) -> list[str]:
    if kind == ALONE:
        return [python[0]]
    port = str(free_port())
    if not kind.startswith("zero"):
        return [*python, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", port]
    settings = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {
            "zero_stage": int(kind[4]),
            "zero3_save_16bit_model": kind != "zero3_without_gathering",
            "zero3_init_flag": False,
            "gradient_accumulation_steps": 1,
        },
        "use_cpu": device == "cpu",
        "mixed_precision": "no" if device == "cpu" else "bf16",
        "num_machines": 1,
        "num_processes": 2,
        "main_process_port": int(port),
    }
    path = folder / "accelerate.json"
    path.write_text(json.dumps(settings))
    return [*python, "-m", "accelerate.commands.launch", "--config_file", str(path)]


def _environment(kind: str, device: str, gpus: str) -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    extra = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    if device == "cpu":
        extra |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    else:
        extra["CUDA_VISIBLE_DEVICES"] = gpus.split(",")[0] if kind == ALONE else gpus
    if kind.startswith("fsdp2"):
        extra |= {
            "ACCELERATE_USE_FSDP": "true",
            "FSDP_VERSION": "2",
            "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
            "FSDP_RESHARD_AFTER_FORWARD": "true",
            "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT" if kind == "fsdp2_full" else "SHARDED_STATE_DICT",
            "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
        }
    return dict(os.environ) | extra
