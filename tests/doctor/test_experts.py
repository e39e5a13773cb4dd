"""Experts counted under the name that transformers 5 writes, held against the installed reader."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import transformers
from packaging.version import Version

from grpo_toolkit import diagnose_checkpoint, repair_checkpoint
from grpo_toolkit.errors import GrpoToolkitError
from grpo_toolkit.model.load import load_model
from scripts.models.tiny_bases import build_qwen3_moe

if TYPE_CHECKING:
    from pathlib import Path

VERSION = Version(transformers.__version__)
pytestmark = [
    pytest.mark.stack,
    pytest.mark.skipif(Version("4.51") > VERSION, reason="4.49 has no Qwen3-MoE"),
]


def is_read_whole(folder: Path) -> bool:
    try:
        return load_model(folder)[2].is_clean
    except (RuntimeError, GrpoToolkitError):
        return False


def config_of(folder: Path) -> dict[str, object]:
    content: dict[str, object] = json.loads((folder / "config.json").read_text())
    return content


def test_experts_counted_under_the_newer_name_are_found_and_mended(tmp_path: Path) -> None:
    """4.x builds 128 experts where four are stored; mended, every release reads what is there."""
    folder = build_qwen3_moe(tmp_path / "model")
    config = config_of(folder)
    config["num_local_experts"] = config.pop("num_experts", None) or config["num_local_experts"]
    (folder / "config.json").write_text(json.dumps(config))
    assert is_read_whole(folder) is (Version("5") <= VERSION)
    for reader, is_fine in (("transformers==4.57", False), ("transformers==5.24", True)):
        codes = {found.code for found in diagnose_checkpoint(folder, reader=reader).judged}
        assert ("experts-renamed" not in codes) is is_fine
    repair_checkpoint(folder)
    assert config_of(folder)["num_experts"] == 4
    assert "num_local_experts" not in config_of(folder)
    assert is_read_whole(folder)


def test_as_many_as_the_class_builds_are_no_fault(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_local_experts": 128}')
    assert "experts-renamed" not in {found.code for found in diagnose_checkpoint(tmp_path).findings}
