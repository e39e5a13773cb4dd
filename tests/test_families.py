"""The promises, held against many model families: trained fully and by LoRA, with and without the callbacks.

Each family is trained from a base as transformers 5 saves it and from one as it is published, on text, and a VLM from
its published form on pictures. Six of the most used run always. `bash scripts/test families` runs them all
(GRPO_TOOLKIT_FAMILIES=all); with `--junitxml=FILE`, `python -m scripts.docs.families FILE` makes docs/families.md of
it.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest

from grpo_toolkit import (
    ExportCallback,
    KVCacheCallback,
    ResumeGuardCallback,
    StepTimeCallback,
    diagnose_checkpoint,
    repair_checkpoint,
)
from grpo_toolkit.doctor.diagnose import DIALECT_CODES
from grpo_toolkit.doctor.findings import Severity
from grpo_toolkit.model.cache_probe import Decoding
from grpo_toolkit.model.load import load_model
from scripts.docs.families import PROMISES, VERSIONED, is_current
from scripts.models.families import CASES, Case, build_case, build_family
from scripts.models.published_forms import publish, published_config
from tests.support.published import PUBLISHED
from tests.support.training import grpo_trainer, v5_only

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

MOST_USED: Final = ("llama", "qwen2", "qwen3", "qwen3_moe", "gemma3", "qwen2_5_vl")
IN_CI: Final = [
    case for case in CASES if case.family in MOST_USED and (case.form == "published") == (case.kind == "full")
]
RUN: Final = CASES if os.environ.get("GRPO_TOOLKIT_FAMILIES") == "all" else IN_CI

NEEDS: Final = {"smolvlm": "num2words"}
"""Packages that a family's processor asks for."""

TOKENIZER_ALONE: Final = frozenset({"paligemma"})
"""VLMs whose processor refuses text without a picture: their trainings on text take the tokenizer."""

NO_TARGETS: Final = r".*(vision|visual|multi_modal|projector|connector|conv1d|router|\.gate$"
"""Modules that a LoRA of all linear layers leaves out here."""

REFUSED_TARGETS: Final = {"falcon_h1": "out_proj"}
"""Modules that PEFT refuses to adapt: those of Mamba whose weights its kernels read past the module."""


def train(base: Path, case: Case, folder: Path, callbacks: list[Any], **options: Any) -> Any:
    from peft import LoraConfig
    from transformers import AutoTokenizer

    if case.kind == "lora":
        left_out = "|".join([NO_TARGETS, *filter(None, [REFUSED_TARGETS.get(case.family)])])
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", exclude_modules=f"{left_out}).*")
    if case.family in TOKENIZER_ALONE and case.data == "text":
        options["processing_class"] = AutoTokenizer.from_pretrained(base)
    resumed = options.pop("resumed", None)
    settings = {"save_strategy": "steps", "save_steps": 1, "gradient_checkpointing": False, **options}
    trainer = grpo_trainer(base, folder, callbacks, with_images=case.data == "pictures", **settings)
    for callback in callbacks:
        if isinstance(callback, StepTimeCallback):
            callback.trainer = trainer
    trainer.train(resume_from_checkpoint=resumed)
    return trainer


def weights_of(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name, tensor in ours.items() if not tensor.equal(theirs[name])] == []


def faults(folder: Path, base: Path | None = None) -> set[str]:
    found = diagnose_checkpoint(folder, base=base).findings
    return {finding.code for finding in found if finding.severity is not Severity.NOTE}


V5_FORMS: Final = DIALECT_CODES | {"unpublished-names", "experts-transposed"}
"""Faults of what transformers 5 saves of families that 4.x knows: a base here has them, its export must not."""


@v5_only
@pytest.mark.parametrize("case", RUN, ids=str)
def test_every_promise_holds(case: Case, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    for package in VERSIONED:
        record_property(package, importlib.metadata.version(package))
    if case.family in NEEDS:
        pytest.importorskip(NEEDS[case.family])
    base = build_case(case, tmp_path / "base")
    run: Callable[..., Any] = lambda folder, callbacks, **options: train(  # noqa: E731
        base, case, tmp_path / folder, callbacks, **options
    )
    kept = iter(PROMISES)

    bare = run("bare", [])
    caching = KVCacheCallback(strict=True)
    exporting = ExportCallback(tmp_path / "export", num_prompts=2, strict=True)
    ours = run("ours", [caching, ResumeGuardCallback(), exporting, StepTimeCallback()])
    assert_equal(weights_of(ours.model), weights_of(bare.model))
    record_property("kept", next(kept))

    assert caching.decoding is Decoding.CACHED
    record_property("kept", next(kept))

    resumed = run("ours", [ResumeGuardCallback()], resumed=str(tmp_path / "ours" / "checkpoint-1"))
    assert_equal(weights_of(resumed.model), weights_of(ours.model))
    record_property("kept", next(kept))

    assert [str(finding) for finding in exporting.findings if finding.is_obstacle] == []
    assert exporting.result is not None
    checks = {check.name: check for check in exporting.result.verification.checks}
    assert [check.name for check in checks.values() if not check.passed] == []
    asked = {"same logits as the trained policy", "KV cache in use", "same tokens with and without the cache"}
    assert asked <= {name for name, check in checks.items() if not check.skipped}
    has_pixels = " 0 pixel values" not in checks["same token ids and pixel values from the processor"].detail
    assert has_pixels is ("vision_config" in json.loads((base / "config.json").read_text()))  # drawn, for rows of text
    record_property("kept", next(kept))

    assert faults(base) <= (V5_FORMS if case.form == "v5" else set())
    assert faults(tmp_path / "export", base) == set()
    record_property("kept", next(kept))

    mended = tmp_path / "mended"
    shutil.copytree(tmp_path / "bare" / "checkpoint-2", mended)
    repair_checkpoint(mended, base=base, rewrite_weights=True)
    assert faults(mended, base) == set()
    assert_equal(weights_of(load_model(mended, base=base if case.kind == "lora" else None)[0]), weights_of(bare.model))
    record_property("kept", next(kept))
    assert list(kept) == []


PUBLISHED_AS: Final = {
    "gemma_2_2b": "gemma2",
    "gemma_3_4b": "gemma3",
    "llama_3_2_1b": "llama",
    "llava_1_5_7b": "llava",
    "qwen2_5_vl_3b": "qwen2_5_vl",
    "qwen2_vl_2b": "qwen2_vl",
    "qwen3_vl_2b": "qwen3_vl",
}


@v5_only
@pytest.mark.parametrize("name", PUBLISHED_AS)
def test_the_published_form_is_that_of_real_makers(name: str, tmp_path: Path) -> None:
    """A maker's own config, read and saved by transformers 5 and turned back, says what it said; so do the files."""
    from transformers import AutoConfig

    real = json.loads((PUBLISHED / name / "config.json").read_text())
    AutoConfig.from_pretrained(PUBLISHED / name).save_pretrained(tmp_path)
    ours = published_config(json.loads((tmp_path / "config.json").read_text()))
    assert_says(ours, real)
    assert ours.get("torch_dtype") == real.get("torch_dtype")
    assert ("text_config" in ours) is ("text_config" in real)

    base = publish(build_family(PUBLISHED_AS[name], tmp_path / "base"))
    assert {path.name for path in (PUBLISHED / name).iterdir()} <= {path.name for path in base.iterdir()}
    template = [json.loads((folder / "tokenizer_config.json").read_text()) for folder in (PUBLISHED / name, base)]
    has_file = (base / "chat_template.json").is_file()
    assert has_file or ("chat_template" in template[1]) is ("chat_template" in template[0] or name == "gemma_2_2b")


ROTARY: Final = frozenset({"rope_theta", "rope_scaling", "rope_local_base_freq", "partial_rotary_factor"})


def assert_says(ours: dict[str, Any], real: dict[str, Any]) -> None:
    assert ROTARY & real.keys() <= ours.keys()
    for key in ROTARY & real.keys():
        assert ours[key] == real[key] or {**ours[key], **real[key]} == ours[key], key
    for key in real.keys() & ours.keys():
        if key.endswith("_config"):
            assert_says(ours[key], real[key])


def test_the_table_has_the_families_of_the_matrix() -> None:
    assert is_current((Path(__file__).parents[1] / "docs" / "families.md").read_text(encoding="utf-8"))
