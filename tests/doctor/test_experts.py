"""Experts as transformers 5 counts and stores them, held against the installed reader."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file

from grpo_toolkit import diagnose_checkpoint, repair_checkpoint, undo_repair
from grpo_toolkit.errors import GrpoToolkitError
from grpo_toolkit.model.load import load_model, load_processor
from scripts.models.families import build_family
from scripts.models.published_forms import publish
from scripts.models.tiny_bases import build_qwen3_moe
from tests.support.training import v5_only

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


@v5_only
def test_experts_saved_the_other_way_round_are_turned_back_beside_their_base(tmp_path: Path) -> None:
    """Qwen3-VL-MoE is published with its stacks turned, and a plain save of transformers 5 has them unturned."""
    base = publish(build_family("qwen3_vl_moe", tmp_path / "base"))
    folder = tmp_path / "saved"
    load_model(base)[0].save_pretrained(folder)
    load_processor(base).save_pretrained(folder)
    wide = {name: tensor.float() for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(wide, folder / "model.safetensors", metadata={"format": "pt"})
    codes = {found.code for found in diagnose_checkpoint(folder, base=base, reader="transformers==4.57").judged}
    assert "experts-transposed" in codes
    assert "shapes-differ" not in codes
    newest = diagnose_checkpoint(folder, base=base, reader="transformers==5.24").judged
    assert "experts-transposed" not in {found.code for found in newest}
    assert is_read_whole(folder)

    before = (folder / "model.safetensors").read_bytes()
    repair_checkpoint(folder, base=base, rewrite_weights=True)
    stored, wanted = load_file(folder / "model.safetensors"), load_file(base / "model.safetensors")
    assert stored.keys() == wanted.keys()
    assert all(tensor.dtype == wanted[name].dtype and tensor.equal(wanted[name]) for name, tensor in stored.items())
    left = diagnose_checkpoint(folder, base=base).findings
    assert "experts-transposed" not in {found.code for found in left}
    undo_repair(folder)
    assert (folder / "model.safetensors").read_bytes() == before
