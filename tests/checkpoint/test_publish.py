"""One folder in the place of another: in one step, or with renames where there is no such step."""

from __future__ import annotations

import ctypes
import errno
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from grpo_toolkit.checkpoint import publish
from grpo_toolkit.checkpoint.folders.model_folder import MANIFEST
from grpo_toolkit.checkpoint.publish import make_folder, replace_folder, staged
from grpo_toolkit.errors import OutputExistsError


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """A staged folder and a published one, each with a file that says which it is."""
    folders = tmp_path / ".x.staging-1", tmp_path / "x"
    for folder, word in zip(folders, ("new", "old"), strict=True):
        folder.mkdir()
        (folder / "word").write_text(word)
    return folders


def words(folder: Path) -> dict[str, str]:
    return {path.parent.name: path.read_text() for path in folder.glob("*/word")}


def fail(folder: Path) -> None:
    raise OSError(errno.EIO, "a disk that fails")


def test_they_change_places(two: tuple[Path, Path], tmp_path: Path) -> None:
    if not publish.exchange(*two):
        pytest.skip("neither this kernel nor its file system exchanges folders")
    assert words(tmp_path) == {".x.staging-1": "old", "x": "new"}


def test_what_is_not_there_cannot_be_exchanged(two: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        publish.exchange(two[0], tmp_path / "nowhere")
    assert words(tmp_path) == {".x.staging-1": "new", "x": "old"}


def test_a_library_without_the_call_changes_nothing(
    two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda *arguments, **options: object())
    assert publish.exchange(*two) is False
    replace_folder(*two)
    assert words(tmp_path) == {"x": "new"}


@pytest.mark.parametrize("can_exchange", [True, False])
@pytest.mark.parametrize("published", [True, False])
def test_a_flush_that_fails_is_taken_back(
    can_exchange: bool, published: bool, two: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not can_exchange:
        monkeypatch.setattr(publish, "exchange", lambda one, other: False)
    if not published:
        two[1].rename(tmp_path.parent / f"{tmp_path.name}-elsewhere")
    before = words(tmp_path)
    monkeypatch.setattr(publish, "sync_folder", fail)
    with pytest.raises(OSError, match="a disk that fails"):
        replace_folder(*two)
    assert words(tmp_path) == before


def test_folders_are_made_one_by_one_and_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr(publish, "sync_folder", lambda folder: seen.append((folder, sorted(folder.iterdir()))))
    deepest = tmp_path / "a" / "b"
    make_folder(deepest)
    assert deepest.is_dir()
    assert seen == [(tmp_path, [tmp_path / "a"]), (tmp_path / "a", [deepest])]
    make_folder(deepest)
    assert len(seen) == 2


@pytest.mark.parametrize("overwrite", [True, False])
def test_another_is_published_between_the_look_and_the_rename(
    overwrite: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "export"
    rename = Path.rename

    def late(self: Path, target: Path) -> Path:
        if target == output and not output.exists():
            output.mkdir()
            (output / MANIFEST).write_text("theirs")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", late)
    refused: Any = nullcontext() if overwrite else pytest.raises(OutputExistsError, match="is there already")
    with refused, staged(output, overwrite=overwrite) as folder:
        (folder / MANIFEST).write_text("ours")
    assert (output / MANIFEST).read_text() == ("ours" if overwrite else "theirs")
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
