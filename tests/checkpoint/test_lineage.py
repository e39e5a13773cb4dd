"""The base that a checkpoint names, and folders given twice or in the wrong order."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.checkpoint.folders.lineage import BASE_RECORD, order_notice, record_base, recorded_base

if TYPE_CHECKING:
    from pathlib import Path


def model(folder: Path, **files: dict[str, str]) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "llama"}')
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_record_leads_to_the_base(tmp_path: Path) -> None:
    base, trained = model(tmp_path / "base"), model(tmp_path / "trained")
    assert recorded_base(trained) is None
    record_base(trained, str(base))
    assert recorded_base(trained) == base
    record_base(trained, str(tmp_path / "gone"))
    assert recorded_base(trained) is None
    record_base(trained, str(trained))  # a resume from itself
    assert recorded_base(trained) is None


@pytest.mark.parametrize("text", ["{", "[]", '{"base": 3}', '{"base": "../../etc"}', '{"base": "a\\u0000b"}'])
def test_a_strangers_record_is_none(text: str, tmp_path: Path) -> None:
    trained = model(tmp_path / "trained")
    (trained / BASE_RECORD).write_text(text)
    assert recorded_base(trained) is None


def test_one_folder_twice_is_noticed(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    (tmp_path / "link").symlink_to(base)
    assert order_notice(base, tmp_path / "link") == (
        f"{base} is given twice: every difference below is this machine's noise"
    )


def test_a_base_and_its_model_in_the_wrong_order_are_noticed(tmp_path: Path) -> None:
    base = model(tmp_path / "base")
    recorded = model(tmp_path / "checkpoint-2")
    record_base(recorded, str(base))
    adapter = model(tmp_path / "adapter", adapter_config={"base_model_name_or_path": str(base)})
    export = model(tmp_path / "export", grpo_toolkit={"base": "base"})
    for trained in (recorded, adapter, export):
        assert order_notice(base, trained) is None
        notice = order_notice(trained, base)
        assert notice is not None
        assert f"{trained} was trained from {base}" in notice
    assert order_notice(export, recorded) is None  # two that were trained from one base
    assert order_notice("http://here:8000/v1", base) is None
