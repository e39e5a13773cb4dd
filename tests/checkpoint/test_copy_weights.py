"""One cast for repairs and exports: torch's rounding, and no finite value that becomes infinite."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grpo_toolkit.checkpoint.weights.copy_weights import rewrite_shard
from grpo_toolkit.errors import CheckpointError, UnsupportedError, VerificationError

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@pytest.mark.parametrize("name", DTYPES)
def test_casts_are_those_of_torch(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    odd = torch.tensor([0.0, -0.0, float("inf"), float("-inf"), float("nan"), 1e-45, 6e4, 1.00390625, 1.01171875])
    wide = {"a": torch.cat([torch.randn(4093) * 10, odd]), "kept": torch.arange(3), "gone": torch.zeros(2)}
    save_file(wide, tmp_path / "in.safetensors", metadata={"format": "pt"})
    narrow, up = tmp_path / "out.safetensors", tmp_path / "up.safetensors"
    assert (
        rewrite_shard(tmp_path / "in.safetensors", narrow, renames={"a": "b", "gone": None}, dtypes={"a": name}) == 2
    )
    back = load_file(narrow)
    assert sorted(back) == ["b", "kept"]
    assert torch.equal(back["kept"], wide["kept"])
    assert torch.equal(back["b"].nan_to_num(7.0), wide["a"].to(DTYPES[name]).nan_to_num(7.0))
    rewrite_shard(narrow, up, renames={}, dtypes={"b": "F32"})
    assert torch.equal(load_file(up)["b"].nan_to_num(7.0), back["b"].float().nan_to_num(7.0))


@pytest.mark.parametrize(("name", "value"), [("BF16", 3.4e38), ("F16", -7e4)])
def test_no_finite_value_becomes_infinite(name: str, value: float, tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"a": torch.tensor([float("nan"), value])}, source)
    with pytest.raises(VerificationError) as raised:
        rewrite_shard(source, tmp_path / "out.safetensors", renames={}, dtypes={"a": name})
    assert str(raised.value) == (
        f"in.safetensors: a has values that are not finite in {DTYPES[name]}, so it is not cast; keep its dtype"
    )


def test_only_floats_are_cast(tmp_path: Path) -> None:
    source = tmp_path / "in.safetensors"
    save_file({"a": torch.arange(3)}, source)
    with pytest.raises(UnsupportedError, match="a: no cast from I64 to F16; only floats are cast"):
        rewrite_shard(source, tmp_path / "out.safetensors", renames={}, dtypes={"a": "F16"})


def test_a_rename_keeps_bytes_and_metadata(tmp_path: Path) -> None:
    source, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file({"x.a": torch.tensor([float("nan"), 1.0])}, source, metadata={"format": "pt", "made_by": "a test"})
    assert rewrite_shard(source, target, renames={"x.a": "a"}, dtypes={}) == 1
    with safe_open(target, "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "a test"}
    assert load_file(target)["a"].nan_to_num(7.0).tolist() == [7.0, 1.0]


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "in.safetensors")
    link = tmp_path / "folder" / "model.safetensors"
    link.symlink_to("../in.safetensors")
    with pytest.raises(CheckpointError):
        rewrite_shard(link, tmp_path / "folder" / "out.safetensors", renames={}, dtypes={"a": "F16"}, inside=True)
