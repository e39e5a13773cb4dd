"""The base's own files, with only what training changed merged in."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.checkpoint.base_files import (
    Change,
    carried_files,
    config_changes,
    differing_files,
    merge_changes,
    write_configs,
)
from grpo_toolkit.checkpoint.json_files import ABSENT

if TYPE_CHECKING:
    from pathlib import Path


def change(key: str, before: object, after: object) -> Change:
    return Change(file="config.json", key=key, before=before, after=after)


def test_what_libraries_and_trainers_write_of_themselves_is_no_change() -> None:
    base: dict[str, Any] = {"text_config": {"hidden_size": 8, "pad_token_id": None, "dtype": "bfloat16"}}
    trained = {
        "text_config": {"hidden_size": 8, "pad_token_id": 3, "dtype": "float32"},
        "use_cache": False,
        "transformers_version": "5.23.0",
        "architectures": ["X"],
    }
    assert config_changes(base, trained) == ()


def test_a_resized_vocabulary_is_a_change_and_brings_its_token_ids() -> None:
    base: dict[str, Any] = {"text_config": {"vocab_size": 8, "pad_token_id": None}}
    trained = {"text_config": {"vocab_size": 9, "pad_token_id": 8}}
    assert config_changes(base, trained) == (
        change("text_config.vocab_size", 8, 9),
        change("text_config.pad_token_id", None, 8),
    )


def test_changes_are_merged_into_the_flat_form() -> None:
    published = {"model_type": "qwen2_5_vl", "vocab_size": 8, "vision_config": {"depth": 2}}
    changes = (change("text_config.vocab_size", 8, 9), change("vision_config.depth", 2, 3))
    assert merge_changes(published, changes) == {
        "model_type": "qwen2_5_vl",
        "vocab_size": 9,
        "vision_config": {"depth": 3},
    }
    assert published["vocab_size"] == 8


def test_changes_are_merged_into_the_nested_form_and_deleted_keys_go() -> None:
    published = {"text_config": {"vocab_size": 8, "gone": 1}}
    changes = (change("text_config.vocab_size", 8, 9), change("text_config.gone", 1, ABSENT))
    assert merge_changes(published, changes) == {"text_config": {"vocab_size": 9}}


def test_clean_files_are_carried_byte_for_byte(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    base.mkdir()
    target.mkdir()
    (base / "config.json").write_text('{"b":1,   "use_cache": true, "tie": 1e-06}')
    (base / "generation_config.json").write_text('{"temperature":   0.000001}')
    assert write_configs(base, target).repairs == ()
    for name in ("config.json", "generation_config.json"):
        assert (target / name).read_bytes() == (base / name).read_bytes()


def test_poisoned_files_are_put_right_and_said(tmp_path: Path) -> None:
    base, target = tmp_path / "base", tmp_path / "target"
    base.mkdir()
    target.mkdir()
    (base / "config.json").write_text('{"use_cache": false, "a": 1}')
    (base / "generation_config.json").write_text('{"use_cache": null, "top_k": 1}')
    defaults = write_configs(base, target, overrides={"top_k": 2})
    assert [repair.file for repair in defaults.repairs] == ["config.json", "generation_config.json"]
    assert json.loads((target / "config.json").read_text()) == {"use_cache": True, "a": 1}
    assert json.loads((target / "generation_config.json").read_text()) == {"use_cache": True, "top_k": 2}


def test_carried_files_are_neither_weights_nor_configs_nor_leftovers(tmp_path: Path) -> None:
    for name in (
        "config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json", "README.md",
        "pytorch_model.bin", "optimizer.pt", "trainer_state.json", "grpo_toolkit.json", ".gitattributes",
        "tokenizer.json", "merges.txt", "LICENSE", "chat_template.json", "preprocessor_config.json",
        "data.pkl", "modeling_custom.py", "zero_to_fp32.py", "train.log", "model.ckpt",
    ):  # fmt: skip
        (tmp_path / name).write_text("{}")
    assert [path.name for path in carried_files(tmp_path)] == [
        "LICENSE",
        "chat_template.json",
        "merges.txt",
        "preprocessor_config.json",
        "tokenizer.json",
    ]


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ('{"padding_side": "left", "a": 1}', '{"a": 1}', []),
        ('{"a": 1}', '{"a": 2}', ["tokenizer_config.json"]),
    ],
)
def test_rollout_padding_is_no_change_of_a_tokenizer(
    tmp_path: Path, left: str, right: str, expected: list[str]
) -> None:
    for name, content in (("left", left), ("right", right)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "tokenizer_config.json").write_text(content)
    assert differing_files(tmp_path / "left", tmp_path / "right") == expected
