"""Two processes and an adapter: a sharded model's adapter is gathered, and merged from file to file on rank 0."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.merge.merge import merge_adapter
from tests.merge.test_merge import stored
from tests.support.launch import launch

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("kind", ["fsdp2_full", "zero3"])
def test_the_adapter_of_a_sharded_model_is_exported(kind: str, qwen: Path, tmp_path: Path) -> None:
    main, other = launch(kind, "all_callbacks", tmp_path, model=str(qwen), lora=True)
    assert (main["step"], main["exported"], main["failures"]) == (2, True, [])
    assert "same greedy tokens as the trained policy" in main["checks"]
    assert (other["step"], other["exported"], other["failures"]) == (2, False, [])
    base, found = stored(qwen), stored(tmp_path / "export")
    assert {n: (t.dtype, t.shape) for n, t in found.items()} == {n: (t.dtype, t.shape) for n, t in base.items()}
    changed = {name for name in base if not found[name].equal(base[name])}
    assert changed == {
        n for n in base if n.startswith("model.layers") and n.endswith(("q_proj.weight", "v_proj.weight"))
    }
    # The trainer's own save of the adapter says the same, where it has gathered it.
    if (tmp_path / "saved" / "adapter_config.json").is_file() and open_checkpoint(tmp_path / "saved").tensors():
        merge_adapter(tmp_path / "saved", tmp_path / "merged")
        assert all(tensor.equal(found[name]) for name, tensor in stored(tmp_path / "merged").items())


@pytest.mark.parametrize(("kind", "drifts"), [("fsdp2_full", True), ("zero3", False)])
def test_the_base_of_a_sharded_model_is_kept_through_merges(
    kind: str, drifts: bool, qwen: Path, tmp_path: Path
) -> None:
    """FSDP2's shards drift as whole weights do; ZeRO-3 throws away what a merge writes into gathered ones."""
    for guarded in (False, True):
        report, _ = launch(kind, "merged_for_vllm", tmp_path / str(guarded), model=str(qwen), guarded=guarded)
        assert report["weights"] == 8  # two layers, q and v, each with a bias
        assert min(report["sent"]) > 0
        assert bool(report["changed"]) == (drifts and not guarded)
