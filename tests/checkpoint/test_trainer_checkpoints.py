"""The checkpoints of a run: listed, and passed over, without a trainer (see `tests/model/test_resume_check.py`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from grpo_toolkit.checkpoint.folders.trainer_checkpoints import checkpoints_in, last_whole_checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_one_listing_serves_the_doctor_and_the_resume(tmp_path: Path) -> None:
    for name in ("checkpoint-9", "checkpoint-20", "checkpoint-best", "old-checkpoint-30"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-40").write_text("a file")
    assert [path.name for path in checkpoints_in(tmp_path)] == ["checkpoint-9", "checkpoint-20"]
    found, skipped = last_whole_checkpoint(tmp_path)
    assert found is None
    assert [line.partition(":")[0] for line in skipped] == [
        str(tmp_path / "checkpoint-20"),
        str(tmp_path / "checkpoint-9"),
    ]
