"""A verl run becomes a verified export in one command: real DTensor shards of two ranks, as its trainer saves them."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file

from grpo_toolkit import export_model
from grpo_toolkit.cli import main
from grpo_toolkit.errors import CheckpointError, UnsupportedError
from grpo_toolkit.export.verl_shards import shard_files

if TYPE_CHECKING:
    from pathlib import Path

# What verl's checkpoint manager does: the live model's state dict, sharded over the ranks, pickled by each; the config
# and the tokenizer in huggingface/. Float32, as its actor trains.
SAVE = """
import sys, torch
import torch.distributed as dist
from pathlib import Path
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from safetensors.torch import load_file

base, actor, shape = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3])
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
names = ("fsdp",) if len(shape) == 1 else ("ddp", "fsdp")
mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
state = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: the live model says it twice
placements = [Shard(0)] if len(shape) == 1 else [Replicate(), Shard(0)]
state = {name: distribute_tensor(tensor, mesh, placements) for name, tensor in state.items()}
torch.save(state, actor / f"model_world_size_{world}_rank_{rank}.pt")
dist.destroy_process_group()
"""


def save(base: Path, run: Path, *, shape: tuple[int, ...] = (2,)) -> Path:
    actor = run / "global_step_60" / "actor"
    configs = actor / "huggingface"
    configs.mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, configs)
    torch.save({}, run / "global_step_60" / "data.pt")
    script = run / "save.py"
    script.write_text(SAVE)
    ranks = 1
    for size in shape:
        ranks *= size
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
    arguments = [str(script), str(base), str(actor), repr(shape)]
    done = subprocess.run(
        [*command, "--rdzv_backend", "c10d", "--rdzv_endpoint", "localhost:0", *arguments],
        capture_output=True, text=True, check=False, env=dict(os.environ), timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return actor


@pytest.fixture(scope="module")
def actor(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(base, tmp_path_factory.mktemp("verl"))


@pytest.mark.parametrize("level", ["run", "step", "actor", "configs"])
def test_every_level_becomes_a_verified_export(level: str, actor: Path, base: Path, tmp_path: Path) -> None:
    levels = {"run": actor.parent.parent, "step": actor.parent, "actor": actor, "configs": actor / "huggingface"}
    named = base if level == "run" else None
    result = export_model(levels[level], tmp_path / "export", base=named, verify=level in ("run", "configs"))
    assert result is not None
    assert result.verification is None or result.verification.passed
    assert str(levels[level]) in result.sources["source"]
    found, wanted = load_file(tmp_path / "export" / "model.safetensors"), load_file(base / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_one_command(actor: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(actor.parent), str(tmp_path / "export"), "--json", "--no-verify"]) == 0
    assert json.loads(capsys.readouterr().out)["path"] == str(tmp_path / "export")
    assert (tmp_path / "export" / "tokenizer.json").is_file()


def test_replicas_count_once(base: Path, tmp_path: Path) -> None:
    actor = save(base, tmp_path / "run", shape=(2, 2))
    export_model(actor, tmp_path / "export", verify=False)
    found, wanted = load_file(tmp_path / "export" / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def test_what_is_missing_damaged_or_no_tensor_is_said(actor: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(actor, tmp_path / "actor")
    second = copy / "model_world_size_2_rank_1.pt"
    whole = second.read_bytes()
    second.unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 ranks are missing \(rank 1\)"):
        shard_files(copy)
    for content in (whole[:-100], b"", pickle.dumps({"a": 1})):
        second.write_bytes(content)
        with pytest.raises(CheckpointError, match="its shards cannot be read"):
            export_model(copy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Evil:
    """Code that runs when a pickle is opened."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (os.mkdir, (str(self.marker),))


def test_a_pickle_that_runs_code_is_refused(actor: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(actor, tmp_path / "actor")
    marker = tmp_path / "ran"
    torch.save({"a": Evil(marker)}, copy / "model_world_size_2_rank_0.pt")
    with pytest.raises(CheckpointError, match="its shards cannot be read"):
        export_model(copy, tmp_path / "out")
    assert not marker.exists()


def test_a_lora_is_sent_to_its_adapter(actor: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(actor, tmp_path / "actor")
    for rank in (0, 1):
        state = {"base_model.model.x.lora_A.default.weight": torch.zeros(2, 2)}
        torch.save(state, copy / f"model_world_size_2_rank_{rank}.pt")
    with pytest.raises(UnsupportedError, match="lora_adapter"):
        export_model(copy, tmp_path / "out")
