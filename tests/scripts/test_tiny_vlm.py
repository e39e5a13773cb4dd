"""The tiny base: a real Qwen2.5-VL in published form, in a cache that mends itself."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.model.load import load_model
from grpo_vlm.data.digits import load_digits_split
from scripts.models import tiny_vlm

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def builds(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Builds without the supervision (half a minute; the default run's test does it for real), counted."""
    counted: list[int] = []

    def untrained(*args: object, **kwargs: object) -> float:
        counted.append(1)
        return 0.5

    monkeypatch.setattr(tiny_vlm, "_supervise", untrained)
    return counted


def test_it_is_built_once_and_looks_like_a_hub_folder(builds: list[int], tmp_path: Path) -> None:
    folder = tiny_vlm.ensure_tiny_vlm(tmp_path)
    assert tiny_vlm.ensure_tiny_vlm(tmp_path) == folder
    assert len(builds) == 1
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "qwen2_5_vl"
    assert "text_config" not in config  # the flat form, as published
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["do_sample"] is True
    assert (generation["temperature"], generation["repetition_penalty"]) == (1e-06, 1.05)
    assert len(generation["eos_token_id"]) == 2
    assert "use_cache" not in generation
    tensors = open_checkpoint(folder).tensors()
    assert "lm_head.weight" not in tensors  # tied embeddings, stored once
    assert "visual.patch_embed.proj.weight" in tensors
    assert "model.layers.0.self_attn.q_proj.weight" in tensors


def test_it_is_the_real_architecture_shrunk(builds: list[int], tmp_path: Path) -> None:
    model, processor, report = load_model(tiny_vlm.ensure_tiny_vlm(tmp_path))
    assert report.is_clean
    assert type(model).__name__ == "Qwen2_5_VLForConditionalGeneration"
    assert type(processor).__name__ == "Qwen2_5_VLProcessor"
    assert 1_000_000 <= model.num_parameters() <= 3_000_000
    vision = model.config.vision_config
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth  # full and windowed attention
    side = load_digits_split("held_out", size=1)[0]["image"].size[0]
    assert side > vision.window_size  # so that there is more than one window


def test_a_damaged_build_is_built_again_and_leftovers_go(
    builds: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tiny_vlm.ensure_tiny_vlm(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / ".tiny-vlm-dead").mkdir()
    (folder / "model.safetensors").write_bytes(whole[:-1])
    assert tiny_vlm.ensure_tiny_vlm(tmp_path) == folder
    assert len(builds) == 2
    assert "model.safetensors has changed): building it again" in capsys.readouterr().err
    assert (folder / "model.safetensors").read_bytes() == whole  # seeded: the same model again
    assert not list(tmp_path.glob(".tiny-vlm-*"))


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never_learns(*args: object, **kwargs: object) -> float:
        raise tiny_vlm.TinyModelError("never right")

    monkeypatch.setattr(tiny_vlm, "_supervise", never_learns)
    with pytest.raises(tiny_vlm.TinyModelError):
        tiny_vlm.ensure_tiny_vlm(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-vlm.lock"]


def test_splits_share_no_scan_and_come_in_the_trainers_form() -> None:
    splits: dict[str, Any] = {name: load_digits_split(name) for name in ("supervised", "train", "held_out")}
    assert {name: len(rows) for name, rows in splits.items()} == {"supervised": 500, "train": 1000, "held_out": 297}
    row = splits["train"][0]
    assert row["prompt"][0]["role"] == "user"
    assert row["image"].mode == "RGB"
    assert row["answer"] in "0123456789"
    assert load_digits_split("train", size=5, seed=1)["answer"] == load_digits_split("train", size=5, seed=1)["answer"]
    with pytest.raises(ValueError, match="Unknown split 'test'"):
        load_digits_split("test")
    with pytest.raises(ValueError, match="has 1 to 297 to give"):
        load_digits_split("held_out", size=298)
