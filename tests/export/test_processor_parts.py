"""Trainings that hold a part of a processor, and what rollouts leave in all of its parts."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image
from transformers import AutoTokenizer

from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.export.export import export_model
from grpo_toolkit.model.load import load_model, load_processor
from scripts.models.base_variants import build_vlm, change_json
from tests.support.training import grpo_trainer, v5_only

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.stack


def saved_by_this_library(base: Path, folder: Path) -> Path:
    """Return the base with its processor as this version of transformers saves it."""
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        shutil.copyfile(base / name, folder / name)
    load_processor(base).save_pretrained(folder)
    return folder


def see(folder: Path) -> Any:
    image = Image.new("RGB", (84, 56), (90, 120, 30))
    return load_processor(folder).image_processor(image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize("form", ["published", "saved"])
def test_a_vision_model_trained_with_its_tokenizer_alone_is_exported_whole(
    form: str, qwen: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    base = qwen if form == "published" else saved_by_this_library(qwen, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left", truncation_side="left")
    trainer = grpo_trainer(base, tmp_path / "out", with_images=False, processing_class=tokenizer)
    trainer.train()
    assert trainer.processing_class is tokenizer
    result = export_model(trainer, tmp_path / "export", compat="v5")
    assert result.verification.passed
    assert result.changes == ()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            assert (result.path / path.name).read_bytes() == path.read_bytes(), path.name
    assert see(result.path).equal(see(base))


def test_a_tokenizer_that_training_changed_takes_the_place_of_the_bases_and_of_nothing_else(
    qwen: Path, tmp_path: Path
) -> None:
    model, processor, _ = load_model(qwen)
    tokenizer = processor.tokenizer
    tokenizer.add_tokens(["<box>"])
    result = export_model(model, tmp_path / "export", processing_class=tokenizer)
    assert result.verification.passed
    assert "tokenizer.json" in {change.file for change in result.changes}
    assert "preprocessor_config.json" not in {change.file for change in result.changes}
    for name in ("preprocessor_config.json", "chat_template.json"):
        assert (result.path / name).read_bytes() == (qwen / name).read_bytes()
    again = load_processor(result.path)
    assert again.tokenizer.convert_tokens_to_ids("<box>") == tokenizer.convert_tokens_to_ids("<box>")
    assert again.chat_template == processor.chat_template
    # Who loads the tokenizer alone prompts as with the base's.
    alone = AutoTokenizer.from_pretrained(result.path)
    assert alone.chat_template == AutoTokenizer.from_pretrained(qwen).chat_template
    assert see(result.path).equal(see(qwen))


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_a_chat_template_that_only_the_trained_tokenizer_has_is_the_exports(
    place: str, qwen: Path, tmp_path: Path
) -> None:
    base = shutil.copytree(qwen, tmp_path / "base")
    if place == "tokenizer_config.json":
        template = json.loads((base / "chat_template.json").read_text())["chat_template"]
        (base / "chat_template.json").unlink()
        change_json(base, place, lambda config: config.update(chat_template=template))
    model, processor, _ = load_model(base)
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    processor.tokenizer.chat_template = (
        "{% for m in messages %}Q: {% for part in m['content'] %}{% if part['type'] == 'image' %}"
        + picture
        + "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endfor %} A:"
    )
    template = processor.tokenizer.chat_template
    result = export_model(model, tmp_path / "export", processing_class=processor.tokenizer)
    assert result.verification.passed
    assert load_processor(result.path).chat_template == template
    codes = {finding.code for finding in diagnose_checkpoint(result.path, base=base).findings}
    assert not codes & {"chat-templates-differ", "chat-template-lost"}


@v5_only
def test_padding_for_rollouts_is_taken_back_in_every_part(tmp_path: Path) -> None:
    from transformers import AutoProcessor

    base = build_vlm("Gemma4", tmp_path / "base")
    processor = AutoProcessor.from_pretrained(base, padding_side="left", truncation_side="left")
    assert processor.feature_extractor.padding_side == "left"
    assert load_processor(base).feature_extractor.padding_side == "right"
    result = export_model(load_model(base)[0], tmp_path / "export", processing_class=processor)
    assert result.verification.passed
    assert result.changes == ()
    assert (
        json.loads((result.path / "processor_config.json").read_text())["feature_extractor"]["padding_side"] == "right"
    )
    assert processor.feature_extractor.padding_side == "left"  # the training's own is left alone
    assert diagnose_checkpoint(result.path, base=base).is_clean
