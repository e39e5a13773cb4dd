"""After a repair the folder is well: it loads on this stack, says what its base says, and its cache works.

The folders are those that real stacks wrote (`tests/data`), filled with the base's weights, so the greedy tokens of a
folder that is well are exactly the base's. Run on every stack: `bash scripts/test all`.
"""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

import pytest
import transformers
from packaging.version import Version

from grpo_toolkit import diagnose_checkpoint, export_model, repair_checkpoint
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.load import load_model
from tests.support.faulty import fill, fill_at_random, unpack

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.model.generation.request import Request

pytestmark = pytest.mark.stack

LLAVA_TOKENS = [187, 185, 182, 90, 182, 90, 182, 90]
IS_V5 = Version(transformers.__version__) >= Version("5.0")
IS_NESTED = Version(transformers.__version__) >= Version("4.52")  # Qwen2.5-VL's config has a text_config

MENDED = (
    "vlm_r1_449", "visual_rft_449", "vlm_r1_451", "easyr1_merger_451", "config_flag_455", "open_r1_457",
    "trl_grpo_457", "trl_grpo_523", "compiled_523", "fsdp_full_523", "zero3_523",
)  # fmt: skip


def test_the_poison_is_real(base: Path, tmp_path: Path, image_request: Request) -> None:
    """On every stack: one more token in every step, and the live leak of a folder without generation defaults too."""
    for route in ("vlm_r1_449", "easyr1_merger_451", "config_flag_455"):
        folder = fill(unpack(route, tmp_path / route), base)
        for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json", "chat_template.json"):
            shutil.copyfile(base / name, folder / name)
        if route == "config_flag_455":
            if not (IS_V5 or IS_NESTED):
                continue  # 4.49 cannot load it at all: the test below
            (folder / "generation_config.json").unlink()
        record = generate(*load_model(folder)[:2], image_request)
        assert not record.is_cached, route
        assert repair_checkpoint(folder, base=base).plan.is_clean_afterwards
        assert generate(*load_model(folder)[:2], image_request).is_cached, route


@pytest.mark.skipif(IS_V5, reason="what transformers 5 writes it can read")
@pytest.mark.parametrize("route", ["trl_grpo_523", "compiled_523", *([] if IS_NESTED else ["trl_grpo_457"])])
def test_the_dialect_is_foreign_here(route: str, base: Path, tmp_path: Path) -> None:
    folder = fill(unpack(route, tmp_path / route), base)
    with pytest.raises((AttributeError, TypeError, OSError, ValueError)):
        load_model(folder)


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


def test_an_export_is_well(base: Path, tmp_path: Path) -> None:
    """An export of a sick checkpoint has no finding when it is compared with its base."""
    folder = fill(unpack("vlm_r1_449", tmp_path / "x"), base)
    export = export_model(folder, tmp_path / "export", base=base, verify=False).path
    assert diagnose_checkpoint(export, base=base).findings == ()


def test_a_llava_that_transformers_5_built(tmp_path: Path, image_request: Request) -> None:
    """Random weights in its vision tower on 4.x, with a warning only; after the repair the same tokens everywhere."""
    folder = fill_at_random(unpack("llava_523", tmp_path / "llava"))
    assert repair_checkpoint(folder, rewrite_weights=True).plan.is_clean_afterwards
    model, processor, report = load_model(folder)
    assert report.is_clean, report
    record = generate(model, processor, image_request)
    assert record.is_cached
    assert record.tokens == LLAVA_TOKENS


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
