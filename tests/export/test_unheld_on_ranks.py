"""Two processes and a base with tensors that its class does not hold: sharded models export them, too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file

from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from scripts.models.base_variants import WEIGHTS
from tests.export.test_unheld_tensors import build, extras
from tests.support.launch import launch, stored_weights

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(
    ("variant", "kind", "lora"),
    [
        ("llama", "fsdp2_full", True),
        ("llama", "fsdp2_sharded", False),
        ("llama", "zero3", True),
        ("llama", "zero3_without_gathering", False),
        ("qwen3_next", "fsdp2_full", False),  # stacks its experts, and hides `mtp.*` from its loader's report
        ("qwen3_next", "zero3", False),
        ("head", "zero3", False),
    ],
)
def test_a_sharded_training_exports_what_its_class_does_not_hold(
    variant: str, kind: str, lora: bool, tmp_path: Path
) -> None:
    base = build(variant, tmp_path / "base")
    run = tmp_path / "run"
    main, other = launch(kind, "all_callbacks", run, model=str(base), lora=lora, with_images=False, arms=["export"])
    assert (main["step"], main["exported"], main["failures"]) == (2, True, [])
    assert (other["step"], other["exported"], other["failures"]) == (2, False, [])
    ours, theirs = load_file(run / "export" / WEIGHTS), load_file(base / WEIGHTS)
    assert {n: (t.dtype, t.shape) for n, t in ours.items()} == {n: (t.dtype, t.shape) for n, t in theirs.items()}
    carried = extras(base)
    assert all(ours[name].equal(theirs[name]) for name in carried)
    changed = {name for name in theirs if not ours[name].equal(theirs[name])}
    projections = {name for name in theirs.keys() - carried if "q_proj.weight" in name or "v_proj.weight" in name}
    assert projections <= changed
    assert not lora or changed == projections
    if variant == "head":
        assert ours["lm_head.weight"].equal(ours["model.embed_tokens.weight"])
    assert diagnose_checkpoint(run / "export", base=base, deep=True).is_clean
    said = [line for line in main["log"].splitlines() if "no place in a " in line]
    assert len(said) == (0 if variant == "head" else 1)
    for folder in (run / "out" / "checkpoint-2", run / "saved"):
        if not lora and stored_weights(folder):
            codes = {finding.code for finding in diagnose_checkpoint(folder, base=base).findings}
            assert not codes & {"tensors-missing", "tensors-extra", "unpublished-names"}
