"""Rollouts and held-out answers where no process holds the whole model. Two processes on a CPU, sharded for real."""

from __future__ import annotations

import json
import os
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from packaging.version import Version

from scripts.benchmarks.ports import free_port
from tests.recipes.test_data import picture, write_parquet
from tests.support.launch import launch
from tests.support.warm import python, run_python

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)

ROOT = Path(__file__).resolve().parents[2]

GENERATE = """
import os
import sys
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from grpo_toolkit.model.offload_to_cpu import movable

folder = sys.argv[1]
from grpo_vlm.training.sharded_rollouts import generate_whole

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
inputs = processor(text=[text], images=[Image.new("RGB", (112, 112), (9, 80, 200))], return_tensors="pt")

def generate():
    with torch.no_grad():
        return model.generate(**inputs, max_new_tokens=6, do_sample=False)[0].tolist()

whole = generate()
generate_whole(model)  # not sharded yet: nothing to do
for module in reversed(list(model.modules())):
    if type(module).__name__ in model._no_split_modules:
        fully_shard(module, mesh=mesh)
fully_shard(model, mesh=mesh)
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
generate_whole(model)
generate_whole(model)  # once is enough
assert movable(model) == []  # its shards have no storage that could be looked at
before = generate()
assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
model.train()
model(**inputs).logits.sum().backward()
model.eval()
after = generate()
print(f"rank {dist.get_rank()}: {whole == before == after}\\n", end="", flush=True)
dist.barrier()
os._exit(0)  # gloo's threads may outlive the interpreter's end on a busy machine, and abort the process
"""

HELD_OUT = """
import os
import sys
import torch.distributed as dist
from accelerate import Accelerator
from datasets import Dataset
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = sys.argv[1]
from grpo_vlm.training.evaluation import generate_texts, held_out_accuracy

accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model, processor = AutoModelForImageTextToText.from_pretrained(folder), AutoProcessor.from_pretrained(folder)
messages = [{"role": "user", "content": "What is this?"}]
row = {"prompt": messages, "image": Image.new("RGB", (112, 112), (9, 80, 200)), "answer": "?"}
(said,) = generate_texts(model, processor, [row], max_new_tokens=6, direct=True)
for answer in (said, said + "!"):
    rows = Dataset.from_list([row | {"answer": answer}])
    share = held_out_accuracy(model, processor, rows, max_new_tokens=6, direct=True, accelerator=accelerator)
    print(f"rank {dist.get_rank()}: {share}\\n", end="", flush=True)
dist.barrier()
os._exit(0)
"""


def torchrun(script: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", free_port(), *python()[1:]]
    return run_python([*command, script, *arguments])


def test_fsdp2_says_the_same_as_the_whole_model(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "generate.py").write_text(GENERATE)
    done = torchrun(tmp_path / "generate.py", qwen)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n")) == ["", "rank 0: True", "rank 1: True"]


def test_there_may_be_more_processes_than_held_out_rows(qwen: Path, tmp_path: Path) -> None:
    (tmp_path / "held_out.py").write_text(HELD_OUT)
    done = torchrun(tmp_path / "held_out.py", qwen)
    assert done.returncode == 0, done.stderr[-3000:]
    assert sorted(done.stdout.split("\n")) == [
        "",
        *(f"rank {rank}: {share}" for rank in (0, 1) for share in (0.0, 1.0)),
    ]


@pytest.mark.parametrize("lora", [False, True])
def test_fast_rollouts_go_beside_what_gathers_for_plain_ones(lora: bool, qwen: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"model": str(qwen), "way": "fast", "lora": lora, "max_steps": 2, "as_recipe": True}
    for report in launch("fsdp2_full", "fast_rollouts", tmp_path, **options):
        assert (report["chosen"], report["failures"]) == ("fast", [])
        assert [count for count, _ in report["seen"]] == [1, 2]
        assert all(gap < 1e-5 for _, gap in report["seen"])


@pytest.fixture
def zero3(qwen: Path, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """The recipe on two processes, with more flags; it writes to `out`."""
    pytest.importorskip("deepspeed")
    for split in ("train", "test"):
        columns = {"images": [[picture(56, 56)]] * 4, "problem": ["<image>x?"] * 4, "answer": ["3"] * 4}
        write_parquet(tmp_path / "geometry3k", columns, split=split, several=True)
    config = {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED",
        "num_machines": 1,
        "num_processes": 2,
        "use_cpu": True,
        "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": True, "zero3_save_16bit_model": True},
    }
    flags: list[object] = ["--model_name_or_path", qwen, "--dataset_name", tmp_path / "geometry3k"]
    flags += ["--output_dir", tmp_path / "out", "--report_to", "none", "--held_out_size", 2]
    flags += ["--per_device_train_batch_size", 2, "--num_generations", 4, "--max_completion_length", 4]
    flags += ["--latency_rounds", 0, "--use_cpu", "true", "--bf16", "false", "--logging_steps", 1]

    def run(*more: object) -> subprocess.CompletedProcess[str]:
        (tmp_path / "zero3.json").write_text(json.dumps(config | {"main_process_port": free_port()}))
        starts = ["-m", "accelerate.commands.launch", "--config_file", tmp_path / "zero3.json", *python()[1:]]
        command = [*starts, ROOT / "recipes" / "grpo.py", *flags, *more]
        done = run_python(command, env=os.environ | {"DS_ACCELERATOR": "cpu"})
        assert done.returncode == 0, done.stderr[-3000:]
        return done

    return run


def test_zero3_is_asked_before_while_and_after_it_trains(
    zero3: Callable[..., subprocess.CompletedProcess[str]],
) -> None:
    evaluating = ("--eval_strategy", "steps", "--eval_steps", 1, "--per_device_eval_batch_size", 2)
    done = zero3("--max_steps", 1, "--save_strategy", "no", *evaluating, "--verbose")  # with the trainer's own logs
    assert "processes   2 (zero3)" in done.stderr
    assert done.stdout.count("accuracy    0.0% of 2 held-out rows before training") == 1
    assert done.stdout.count("accuracy    0.0% of 2 held-out rows after training") == 1
    assert "'eval_accuracy': " in done.stdout


def test_zero3_that_goes_on_tells_no_figure_of_its_checkpoint_as_the_bases(
    zero3: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Its weights are first whole with the checkpoint's in them: the base's figure is read, in both processes."""
    saving = ("--save_strategy", "steps", "--save_steps", 1)
    zero3("--max_steps", 1, *saving)
    file = tmp_path / "out" / "baselines.json"
    stored = json.loads(file.read_text())
    assert stored["accuracy"] == 0.0
    file.write_text(json.dumps(stored | {"accuracy": 0.5}))  # this model's is 0
    again = zero3("--max_steps", 2, *saving, "--resume_from_checkpoint", "true")
    said = "accuracy    50.0% of 2 held-out rows before training, as measured when the run began"
    assert again.stdout.count(said) == 1

    file.unlink()
    unknown = zero3("--max_steps", 3, *saving, "--resume_from_checkpoint", "true")
    assert "rows before training" not in unknown.stdout
    said = "accuracy    0.0% of 2 held-out rows of checkpoint-2, as the base's on these rows is not known"
    assert unknown.stdout.count(said) == 1
    assert "learnt      0.0% (checkpoint-2) to 0.0% of the held-out rows right" in unknown.stdout
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["begun_with"] == "checkpoint-2"
    assert not file.exists()
