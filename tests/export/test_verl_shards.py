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
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file

from grpo_toolkit import export_model
from grpo_toolkit.cli import main
from grpo_toolkit.errors import CheckpointError, UnsupportedError
from grpo_toolkit.export.shards.verl import shard_files

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

base, actor, shape, kind = Path(sys.argv[1]), Path(sys.argv[2]), eval(sys.argv[3]), sys.argv[4]
dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
names = ("fsdp",) if len(shape) == 1 else ("ddp", "fsdp")
mesh = init_device_mesh("cpu", shape, mesh_dim_names=names)
state = {name: tensor.float() for name, tensor in load_file(base / "model.safetensors").items()}
state["lm_head.weight"] = state["model.embed_tokens.weight"]  # tied: the live model says it twice
placements = [Shard(0)] if len(shape) == 1 else [Replicate(), Shard(0)]
state = {name: distribute_tensor(tensor, mesh, placements) for name, tensor in state.items()}
if kind == "dcp":  # what accelerate does with FSDP's sharded state dict
    import torch.distributed.checkpoint as dcp
    dcp.save({"model": state}, checkpoint_id=actor / "pytorch_model_fsdp_0")
else:
    torch.save(state, actor / f"model_world_size_{world}_rank_{rank}.pt")
dist.destroy_process_group()
"""


def save(base: Path, run: Path, *, shape: tuple[int, ...] = (2,), kind: str = "full") -> Path:
    actor = run / "global_step_60" / "actor" if kind != "dcp" else run / "checkpoint-2"
    actor.mkdir(parents=True)
    if kind != "dcp":
        (actor / "huggingface").mkdir()
        for path in base.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, actor / "huggingface")
        torch.save({}, run / "global_step_60" / "data.pt")
    script = run / "save.py"
    script.write_text(SAVE)
    ranks = 1
    for size in shape:
        ranks *= size
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--master_port", "0"]
    arguments = [str(script), str(base), str(actor), repr(shape), kind]
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


@pytest.mark.parametrize("is_dcp", [False, True])
def test_tensors_that_say_more_than_their_files_hold_are_refused(is_dcp: bool, base: Path, tmp_path: Path) -> None:
    """A stride of zero makes a terabyte of four bytes: nothing is allocated, neither in memory nor on the disk."""
    copy = tmp_path / "shards"
    copy.mkdir()
    if is_dcp:
        inner = copy / "pytorch_model_fsdp_0"
        dcp.save({"model": {"model.norm.weight": torch.ones(4)}}, checkpoint_id=inner, no_dist=True)
        metadata = pickle.loads((inner / ".metadata").read_bytes())
        for held in metadata.state_dict_metadata.values():
            held.size = torch.Size([2**40])
        (inner / ".metadata").write_bytes(pickle.dumps(metadata))
    else:
        state = {"model.norm.weight": torch.zeros(1).expand(2**40)}
        torch.save(state, copy / "model_world_size_1_rank_0.pt")
    with pytest.raises(CheckpointError, match=r"tensors of [0-9,]{17} bytes in files of"):
        export_model(copy, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()


def test_the_process_takes_memory_in_proportion_to_its_files() -> None:
    code = (
        "from grpo_toolkit.export.shards.model_folder import _limit_memory\n"
        "_limit_memory(2**20)\nbytearray(2**33 + 2**24)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert "MemoryError" in done.stderr


def factors(name: str, place: int, width: int, rows: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(place)
    stem = f"base_model.model.{name.removesuffix('weight')}lora_"
    return {
        f"{stem}A.default.weight": torch.randn(4, width, generator=generator),
        f"{stem}B.default.weight": torch.randn(rows, 4, generator=generator),
    }


def save_lora(base: Path, actor: Path) -> dict[str, torch.Tensor]:
    """Save the shard of one rank as verl does for a LoRA, and return what base and factors come to at a scale of 2."""
    (actor / "huggingface").mkdir(parents=True)
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, actor / "huggingface")
    weights = load_file(base / "model.safetensors")
    adapted = sorted(name for name in weights if name.endswith(("q_proj.weight", "v_proj.weight")))
    state = {}
    for name, tensor in weights.items():
        inside = name.replace("weight", "base_layer.weight") if name in adapted else name
        state[f"base_model.model.{inside}"] = tensor.float()
    for place, name in enumerate(adapted):
        made = factors(name, place, weights[name].shape[1], weights[name].shape[0])
        state |= made
        first, second = made.values()
        weights[name] = (weights[name].float() + 2.0 * (second @ first)).to(weights[name].dtype)
    torch.save(state, actor / "model_world_size_1_rank_0.pt")
    return weights


@pytest.mark.parametrize("has_base", [True, False])
def test_a_lora_is_merged_with_the_scale_that_lies_beside_it(has_base: bool, base: Path, tmp_path: Path) -> None:
    actor = tmp_path / "actor"
    wanted = save_lora(base, actor)
    with pytest.raises(UnsupportedError, match="lora_train_meta"):  # a guess would be another model
        export_model(actor, tmp_path / "export", base=base)
    assert not (tmp_path / "export").exists()
    (actor / "lora_train_meta.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM"}))
    result = export_model(actor, tmp_path / "export", base=base if has_base else None, verify=has_base)
    assert result is not None
    assert result.verification is None or result.verification.passed
    found = load_file(tmp_path / "export" / "model.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["actor", "export"]


def test_a_sharded_state_dict_of_fsdp_becomes_a_verified_export(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = save(base, tmp_path / "run", kind="dcp")
    shards = checkpoint / "pytorch_model_fsdp_0"
    with pytest.raises(CheckpointError, match="--base"):
        export_model(checkpoint, tmp_path / "out")
    for number, source in enumerate((checkpoint, shards)):
        out = tmp_path / f"export-{number}"
        assert main(["export", str(source), str(out), "--base", str(base), *(["--no-verify"] * number)]) == 0
        found, wanted = load_file(out / "model.safetensors"), load_file(base / "model.safetensors")
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in wanted)

    metadata, marker = shards / ".metadata", tmp_path / "ran"
    whole = metadata.read_bytes()
    metadata.write_bytes(pickle.dumps(Evil(marker)))
    with pytest.raises(
        CheckpointError, match=r"its shards cannot be read.*(posix|os)\.mkdir, which no metadata holds"
    ):
        export_model(checkpoint, tmp_path / "out", base=base)
    assert not marker.exists()
    metadata.write_bytes(whole)
    part = next(path for path in shards.iterdir() if path.suffix == ".distcp")
    part.write_bytes(part.read_bytes()[:-2000])
    with pytest.raises(CheckpointError, match="its shards cannot be read"):
        export_model(checkpoint, tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    capsys.readouterr()
