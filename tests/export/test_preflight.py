"""The look ahead at an export before the training: right models are silent, and what is said comes true."""

from __future__ import annotations

import json
import re
import shutil
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import TrainerCallback

from grpo_toolkit import ExportCallback
from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.errors import GrpoToolkitError, VerificationError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.export.preflight import look_ahead, name_findings, room_findings, tie_findings
from grpo_toolkit.model.load import load_model
from scripts.models.families import build_family
from tests.support.training import LANGUAGE_QV, grpo_trainer, v5_only

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.stack


def adapted(model: Any, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": LANGUAGE_QV, **options}))


@pytest.mark.parametrize("is_adapted", [False, True])
def test_of_right_models_nothing_is_said(any_base: Path, tmp_path: Path, is_adapted: bool) -> None:
    model, processor, _ = load_model(any_base)
    model = adapted(model) if is_adapted else model
    state = torch.random.get_rng_state()
    assert list(look_ahead(model, tmp_path / "export", processing_class=processor)) == []
    assert torch.random.get_rng_state().equal(state)
    assert list(tmp_path.iterdir()) == []


def copied(base: Path, folder: Path) -> Path:
    shutil.copytree(base, folder)
    return folder


def pickled(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")


def quantised(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"bits": 4}}))


def without_layer(base: Path) -> None:
    weights = {n: t for n, t in load_file(base / "model.safetensors").items() if "layers.1." not in n}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


def without_tokenizer(base: Path) -> None:
    for path in base.iterdir():
        if path.suffix != ".safetensors" and path.name not in ("config.json", "generation_config.json"):
            path.unlink()


OBSTACLES: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "base is gone": (shutil.rmtree, {}, r"is no folder here.*pass base="),
    "base of pickles": (pickled, {}, "only safetensors are read"),
    "base is quantised on disk": (quantised, {}, "quantization_config is set; name the unquantised base"),
    "targets are not in the base": (without_layer, {}, r"2 of its modules are not in .*Is it this adapter's base"),
    "settings of generation": (
        lambda base: None,
        {"overrides": {"max_new_tokens": -3}},
        "do not fit",
    ),
    "no tokenizer": (without_tokenizer, {"processing_class": None}, "no tokenizer to export; pass processing_class="),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_an_obstacle_is_named_and_is_one(obstacle: str, qwen: Path, tmp_path: Path) -> None:
    base = copied(qwen, tmp_path / "base")
    model, processor, _ = load_model(base)
    policy = adapted(model, init_lora_weights=False)
    damage, options, message = OBSTACLES[obstacle]
    damage(base)
    options = {"processing_class": processor, **options}
    findings = list(look_ahead(policy, tmp_path / "export", **options))
    assert [finding.is_obstacle for finding in findings] == [True]
    assert re.search(message, str(findings[0]))
    if "overrides" in options:
        options["generation_overrides"] = options.pop("overrides")
    with pytest.raises(GrpoToolkitError):
        export_model(policy, tmp_path / "export", **options)


def test_a_training_with_a_part_of_the_processor_is_told_what_is_carried(qwen: Path, tmp_path: Path) -> None:
    model, processor, _ = load_model(qwen)
    [finding] = look_ahead(model, tmp_path / "export", processing_class=processor.tokenizer)
    assert not finding.is_obstacle
    assert f"of the {type(processor).__name__} in {qwen}: the export carries that one's image_processor" in str(
        finding
    )
    result = export_model(model, tmp_path / "export", processing_class=processor.tokenizer)
    assert result.verification.passed
    assert (result.path / "preprocessor_config.json").read_bytes() == (qwen / "preprocessor_config.json").read_bytes()


def test_a_processor_that_does_not_load_again_is_an_obstacle(qwen: Path, tmp_path: Path) -> None:
    model, processor, _ = load_model(qwen)
    processor.image_processor.image_processor_type = "MyOwnImageProcessor"
    processor.image_processor.__class__ = type("MyOwnImageProcessor", (type(processor.image_processor),), {})
    [finding] = look_ahead(model, tmp_path / "export", processing_class=processor)
    assert finding.is_obstacle
    assert "cannot be loaded again once it is saved" in finding.what
    with pytest.raises(GrpoToolkitError):
        export_model(model, tmp_path / "export", processing_class=processor)


def test_a_place_that_cannot_be_written_is_said(qwen: Path, tmp_path: Path) -> None:
    model, processor, _ = load_model(qwen)
    (tmp_path / "file").write_text("x")
    [finding] = look_ahead(model, tmp_path / "file" / "export", processing_class=processor)
    assert "is a file, so no folder can be made there; name another" in str(finding)


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    assert list(room_findings(tmp_path / "a" / "export", 10**6)) == []
    [finding] = room_findings(tmp_path / "a" / "export", 10**18)
    assert str(finding).startswith(f"the export after this training would fail: {tmp_path} has ")
    assert "the export takes 1000000000.1 GB" in finding.what


def test_names_and_ties_are_held_against_the_base(qwen: Path) -> None:
    base = open_base(open_checkpoint(qwen))
    live = ["model.language_model.norm.weight", "lm_head.weight", "visual.merger.ln_q.weight"]
    assert list(name_findings(live, base)) == []
    [finding] = name_findings([*live, "v_head.weight"], base)
    assert "1 tensors of the model are not in" in finding.what
    assert "(v_head.weight)" in finding.what
    assert [list(tie_findings(tied, base)) for tied in (True, None)] == [[], []]
    [finding] = tie_findings(False, base)
    assert finding.what == f"the model's embeddings are not tied, those in {qwen} tied"


def test_a_model_with_a_head_of_its_own_is_no_surprise_at_the_end(qwen: Path, tmp_path: Path) -> None:
    model, processor, _ = load_model(qwen)
    model.v_head = torch.nn.Linear(4, 1, bias=False)
    [finding] = look_ahead(model, tmp_path / "export", processing_class=processor)
    assert "1 tensors of the model are not in" in finding.what
    with pytest.raises(VerificationError, match="v_head"):
        export_model(model, tmp_path / "export", processing_class=processor)


@v5_only
def test_the_text_part_of_a_vlm_is_said_before_its_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import AutoTokenizer, Gemma3ForCausalLM

    base = build_family("gemma3", tmp_path / "base")
    said: list[str] = []

    class Listening(TrainerCallback):  # type: ignore[misc]
        """Takes down what was said before the first step."""

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            said[:] = [r.getMessage() for r in caplog.records if "Gemma3ForConditionalGeneration" in r.getMessage()]

    exporting = ExportCallback(tmp_path / "export")
    model = Gemma3ForCausalLM.from_pretrained(base)
    options = {"with_images": False, "max_steps": 1, "processing_class": AutoTokenizer.from_pretrained(base)}
    grpo_trainer(model, tmp_path / "out", [exporting, Listening()], **options).train()
    assert len(said) == 1
    assert "the model is a Gemma3ForCausalLM (gemma3_text)" in said[0]
    assert "train a Gemma3ForConditionalGeneration" in said[0]
    # The tokenizer alone is told, too.
    assert [finding.is_obstacle for finding in exporting.findings] == [False, True]
    assert exporting.failures  # it came true

    whole = ExportCallback(tmp_path / "export", strict=True)  # what was said to do
    grpo_trainer(base, tmp_path / "again", [whole], with_images=False, max_steps=1).train()
    assert whole.findings == ()
    assert whole.result is not None
    assert whole.result.verification.passed


def test_a_look_that_fails_is_no_failure_of_the_training(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr("grpo_toolkit.callbacks.export.look_ahead", broken)
    exporting = ExportCallback(tmp_path / "export", strict=True)
    grpo_trainer(qwen, tmp_path / "out", [exporting], max_steps=1).train()
    assert exporting.result is not None
    assert any("looking ahead to the export failed" in record.getMessage() for record in caplog.records)
