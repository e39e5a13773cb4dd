"""After a repair the folder is well: it loads on this stack, says what its base says, and its cache works.

The folders are those that real stacks wrote (`tests/data`), filled with the base's weights, so the greedy tokens of a
folder that is well are exactly the base's. Run on every stack: `bash scripts/test all`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from faulty import fill, unpack
from grpo_toolkit.doctor.repair import repair_checkpoint
from grpo_toolkit.inference import generate, load_model
from models import build_qwen2_5_vl

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.inference import Request

MENDED = (
    "vlm_r1_449", "visual_rft_449", "vlm_r1_451", "easyr1_merger_451", "config_flag_455", "open_r1_457",
    "trl_grpo_457", "trl_grpo_523", "compiled_523", "fsdp_full_523", "zero3_523",
)  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("bases") / "qwen2_5_vl", dtype="bfloat16")


@pytest.mark.parametrize("route", MENDED)
def test_a_repaired_folder_loads_and_says_what_its_base_says(
    route: str, base: Path, tmp_path: Path, image_request: Request
) -> None:
    folder = fill(unpack(route, tmp_path / route), base)
    result = repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert result.applied
    assert result.plan.is_clean_afterwards, [finding.code for finding in result.plan.left]
    wanted = generate(*load_model(base)[:2], image_request)
    model, processor, report = load_model(folder)
    assert report.is_clean, report
    record = generate(model, processor, image_request)
    assert record.is_cached
    assert record.vision_calls == 1
    assert record.tokens == wanted.tokens
    assert not repair_checkpoint(folder, base=base, rewrite_weights=True).applied


@pytest.mark.parametrize("route", ["vlm_r1_449", "trl_grpo_523", "trl_grpo_457"])
def test_a_repair_without_a_base_and_without_rewriting_loads_too(
    route: str, base: Path, tmp_path: Path, image_request: Request
) -> None:
    folder = fill(unpack(route, tmp_path / route), base)
    assert repair_checkpoint(folder).plan.is_clean_afterwards
    model, processor, report = load_model(folder)
    assert report.is_clean, report
    record = generate(model, processor, image_request)
    assert record.is_cached
    assert record.vision_calls == 1
