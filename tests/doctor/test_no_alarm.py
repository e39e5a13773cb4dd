"""Healthy folders that look like faults: what the doctor must say nothing about."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from grpo_toolkit import diagnose_checkpoint
from grpo_toolkit.doctor.diagnose import diagnose_folder
from grpo_toolkit.doctor.parse import read_folder
from scripts.models.tiny_bases import build_llama
from tests.support.memory_files import folder_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.memory_files import MemoryFiles

FACTOR = "base_model.model.model.layers.0.mlp.experts.lora_{}.weight"


def codes(files: MemoryFiles, base: MemoryFiles | None = None) -> set[str]:
    folder = replace(read_folder(files), base=None if base is None else read_folder(base))
    return {finding.code for finding in diagnose_folder(folder).findings}


@pytest.mark.parametrize(("targets", "is_found"), [(["mlp.experts.down_proj"], False), (None, True)])
def test_factors_of_stacked_experts_have_all_their_ranks(targets: Any, is_found: bool) -> None:
    config = {"r": 2, "lora_alpha": 4, "target_parameters": targets}
    factors = {FACTOR.format("A"): ("F32", (8, 4)), FACTOR.format("B"): ("F32", (4, 8))}
    found = codes(folder_of({"adapter_config.json": config}, factors))
    assert ("adapter-rank-differs" in found) is is_found


def text_model(**special: str) -> MemoryFiles:
    tokenizer = {"added_tokens": [], "model": {"vocab": {"a": 0}}}
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    files = {"config.json": config, "tokenizer.json": tokenizer, "tokenizer_config.json": special}
    return folder_of(files, {"model.norm.weight": ("F32", (4,))})


def test_a_special_token_that_the_base_lacks_as_well_is_its_makers_choice() -> None:
    assert "special-token-unknown" in codes(text_model(unk_token="<unk>"))
    assert "special-token-unknown" in codes(text_model(unk_token="<unk>"), text_model())
    assert "special-token-unknown" not in codes(text_model(unk_token="<unk>"), text_model(unk_token="<unk>"))


KEY_BIAS = "vision_tower.vision_model.encoder.layers.0.self_attn.k_proj.bias"
POSITIONS = "vision_tower.vision_model.embeddings.position_embedding.weight"


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_llama(tmp_path_factory.mktemp("llama") / "base")


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def trained(base: Path, folder: Path, change: dict[str, torch.Tensor], more: dict[str, torch.Tensor]) -> Path:
    """Copy a base with tensors changed; `more` are tensors that both have."""
    for path, values in ((folder / "base", more), (folder / "trained", {**more, **change})):
        shutil.copytree(base, path)
        save_file({**load_file(base / "model.safetensors"), **values}, path / "model.safetensors")
    return folder / "trained"


def deep_codes(folder: Path) -> set[str]:
    return {f.code for f in diagnose_checkpoint(folder, base=folder.parent / "base", deep=True).findings}


@pytest.mark.parametrize("has_positions", [True, False])
@pytest.mark.parametrize("code", ["tensors-empty", "tensors-unlike-base"])
def test_a_bias_of_keys_that_softmax_takes_away(code: str, has_positions: bool, llama: Path, tmp_path: Path) -> None:
    more = {KEY_BIAS: torch.randn(64)} | ({POSITIONS: torch.randn(4, 64)} if has_positions else {})
    other = torch.zeros(64) if code == "tensors-empty" else torch.randn(64)
    found = deep_codes(trained(llama, tmp_path, {KEY_BIAS: other}, more))
    assert (code in found) is not has_positions  # keys that are turned by their positions keep their bias


@pytest.mark.parametrize(("step", "is_found"), [(1e-3, False), (0.1, True)])
def test_what_an_optimizer_moves_a_small_bias_by(step: float, is_found: bool, llama: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.bias"
    before, sign = 1e-4 * torch.randn(256), torch.sign(torch.randn(256))
    found = deep_codes(trained(llama, tmp_path, {name: before + step * sign}, {name: before}))
    assert ("tensors-unlike-base" in found) is is_found
