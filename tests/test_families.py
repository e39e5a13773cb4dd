"""The promises, held against many model families: trained fully and by LoRA, with and without the callbacks.

Six of the most used run always. `bash scripts/test families` runs them all (GRPO_TOOLKIT_FAMILIES=all), a quarter of
an hour on two cores. Bases are as transformers 5 saves them, and trained on text, which every family has to take.
"""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any, Final

import pytest

from grpo_toolkit import (
    ExportCallback,
    KVCacheCallback,
    ResumeGuardCallback,
    diagnose_checkpoint,
    repair_checkpoint,
)
from grpo_toolkit.doctor.findings import RULES, Severity
from tests.support.families import TEXT, VISION, build_family
from tests.support.training import grpo_trainer, v5_only

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import torch

pytestmark = v5_only

MOST_USED: Final = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "qwen2_5_vl")
FAMILIES: Final = (*TEXT, *VISION) if os.environ.get("GRPO_TOOLKIT_FAMILIES") == "all" else MOST_USED

NOT_TRAINED: Final[dict[str, str]] = {}
"""Families that plain TRL cannot train or generate from as they are, with what it says."""

TOKENIZER_ALONE: Final = frozenset({"paligemma"})
"""VLMs whose processor refuses text without a picture: their trainings on text take the tokenizer."""


def train(base: Path, family: str, folder: Path, callbacks: list[Any], *, is_lora: bool, **options: Any) -> Any:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    if is_lora:
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", exclude_modules=EXCLUDED)
    if family in TOKENIZER_ALONE:
        options["processing_class"] = AutoTokenizer.from_pretrained(base)
    resumed = options.pop("resumed", None)
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": False, **options}
    trainer = grpo_trainer(base, folder, callbacks, with_images=False, **settings)
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


EXCLUDED: Final = r".*(vision|visual|multi_modal|projector|connector|conv1d|router|\\.gate$).*"


def weights_of(trainer: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not tensor.equal(theirs[name])] == []


def faults(folder: Path, base: Path | None = None) -> set[str]:
    found = diagnose_checkpoint(folder, base=base).findings
    return {finding.code for finding in found if finding.severity is not Severity.NOTE}


V5_FORMS: Final = frozenset(code for code, rule in RULES.items() if rule.check.__module__.endswith(".dialect"))
"""Faults of what transformers 5 saves of families that 4.x knows: a base here has them, its export must not."""


@pytest.mark.parametrize("is_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_promise_holds(family: str, is_lora: bool, tmp_path: Path) -> None:
    if family in NOT_TRAINED:
        pytest.skip(f"TRL does not train it: {NOT_TRAINED[family]}")
    base = build_family(family, tmp_path / "base")
    run: Callable[..., Any] = lambda folder, callbacks, **options: train(  # noqa: E731
        base, family, tmp_path / folder, callbacks, is_lora=is_lora, **options
    )
    bare = run("bare", [])
    exporting = ExportCallback(tmp_path / "export", num_prompts=2, strict=True)
    ours = run("ours", [KVCacheCallback(strict=True), ResumeGuardCallback(), exporting])
    assert_equal(weights_of(ours), weights_of(bare))
    assert exporting.findings == ()
    assert exporting.result is not None  # and so verified: rollouts and export with their cache, answers the same
    assert exporting.result.verification.passed

    resumed = run("ours", [ResumeGuardCallback()], resumed=str(tmp_path / "ours" / "checkpoint-1"))
    assert_equal(weights_of(resumed), weights_of(ours))

    assert faults(base) <= V5_FORMS
    assert faults(tmp_path / "export", base) == set()

    checkpoint = tmp_path / "bare" / "checkpoint-2"
    shutil.copytree(checkpoint, tmp_path / "mended")
    repair_checkpoint(tmp_path / "mended", base=base, rewrite_weights=True)
    assert faults(tmp_path / "mended", base) == set()
