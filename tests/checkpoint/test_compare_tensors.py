"""Stored tensors compared: within a folder and across two, of one dtype and of two."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from grpo_toolkit.checkpoint.safetensors_header import read_safetensors_header
from grpo_toolkit.checkpoint.weights.compare_tensors import equal_tensors, read_chunks
from grpo_toolkit.errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path


VALUES = torch.tensor([[1.0, -2.5], [0.15625, 3.0]])


@pytest.mark.parametrize(
    ("one", "other", "is_equal"),
    [
        (VALUES, VALUES, True),
        (VALUES, -VALUES, False),
        (VALUES, VALUES.view(4), False),  # the same bytes in another shape
        (VALUES, VALUES.bfloat16(), True),
        (VALUES.bfloat16(), VALUES, True),
        (VALUES + 2**-20, VALUES.bfloat16(), False),  # more digits than bfloat16 has
        (VALUES, VALUES.half(), False),
    ],
)
def test_tensors_are_equal_by_their_numbers(
    one: torch.Tensor, other: torch.Tensor, is_equal: bool, tmp_path: Path
) -> None:
    found = []
    for name, value in (("one", one), ("other", other)):
        (tmp_path / name).mkdir()
        save_file({"before": torch.ones(3), "w": value.contiguous()}, tmp_path / name / "model.safetensors")
        found += [tmp_path / name, read_safetensors_header(tmp_path / name / "model.safetensors")["w"]]
    assert equal_tensors(*found) is is_equal


def test_a_link_that_leaves_the_folder_is_read_only_where_that_is_allowed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file({"w": VALUES}, tmp_path / "model.safetensors")
    (folder / "model.safetensors").symlink_to(tmp_path / "model.safetensors")
    info = read_safetensors_header(tmp_path / "model.safetensors")["w"]
    assert equal_tensors(folder, info, tmp_path, info)
    assert b"".join(read_chunks(folder, info, size=5)) == bytes(VALUES.numpy().tobytes())
    with pytest.raises(CheckpointError, match="link that leaves its folder"):
        equal_tensors(folder, info, tmp_path, info, inside=True)
