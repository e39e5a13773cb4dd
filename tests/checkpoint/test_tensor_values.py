"""Constant, NaN and infinite tensors are found in every dtype, across the borders of chunks."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import save_file

from grpo_toolkit.checkpoint.safetensors_header import read_safetensors_header
from grpo_toolkit.checkpoint.weights import tensor_values
from grpo_toolkit.checkpoint.weights.tensor_values import constant_value, is_finite

if TYPE_CHECKING:
    from pathlib import Path

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES)
def test_values(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensor_values, "_CHUNK", 64)
    torch.manual_seed(0)
    sound = torch.randn(7, 23).to(dtype)
    largest = torch.finfo(dtype).max
    tensors = {
        "sound": sound, "zero": torch.zeros_like(sound), "ones": torch.ones_like(sound),
        "one": torch.ones(1).to(dtype), "none": torch.zeros(0, 3).to(dtype), "large": torch.full_like(sound, largest),
    }  # fmt: skip
    for name, value in {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf")}.items():
        tensors[name] = sound.clone()
        tensors[name][-1, -1] = value
    save_file(tensors, tmp_path / "model.safetensors")
    infos = read_safetensors_header(tmp_path / "model.safetensors")
    names = ("sound", "zero", "ones", "one", "none", "large")
    values = {name: constant_value(tmp_path, infos[name]) for name in names}
    assert values == {"sound": None, "zero": 0, "ones": 1, "one": None, "none": None, "large": largest}
    assert [name for name in ("nan", "inf", "-inf") if constant_value(tmp_path, infos[name]) is not None] == []
    assert {name for name, info in infos.items() if not is_finite(tmp_path, info)} == {"nan", "inf", "-inf"}


def test_other_dtypes_are_not_judged(tmp_path: Path) -> None:
    save_file({"ids": torch.full((8,), -1)}, tmp_path / "model.safetensors")
    (info,) = read_safetensors_header(tmp_path / "model.safetensors").values()
    assert is_finite(tmp_path, info)
    assert constant_value(tmp_path, info) is None
