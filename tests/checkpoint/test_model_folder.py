"""Folders as data: recognised, read from headers, published atomically."""

from __future__ import annotations

import json
import os
import platform
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from grpo_toolkit.checkpoint.folders.base_lookup import find_base
from grpo_toolkit.checkpoint.folders.model_folder import Kind, open_checkpoint
from grpo_toolkit.checkpoint.json_files import ABSENT, read_json
from grpo_toolkit.checkpoint.publish import check_output, staged
from grpo_toolkit.checkpoint.safetensors_header import TensorInfo, read_safetensors_header
from grpo_toolkit.errors import CheckpointError, OutputExistsError


def write_safetensors(path: Path, header: object, data: bytes = b"") -> Path:
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return path


def tensor(shape: list[int], end: int, dtype: str = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}


def test_header_gives_names_dtypes_and_shapes(tmp_path: Path) -> None:
    header = {"__metadata__": {"format": "pt"}, "w": tensor([2, 3], 12, "BF16")}
    path = write_safetensors(tmp_path / "model.safetensors", header, b"\0" * 12)
    assert read_safetensors_header(path) == {
        "w": TensorInfo(dtype="BF16", shape=(2, 3), file="model.safetensors"),
    }


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\1\2", "too short"),
        (struct.pack("<Q", 10**12) + b"{}", "does not fit"),
        (struct.pack("<Q", 3) + b"abc", "damaged"),
        (struct.pack("<Q", 2) + b"[]", "damaged"),
        (struct.pack("<Q", 9) + b'{"w": {}}', "damaged"),
    ],
)
def test_damaged_weights_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_safetensors_header(path)
    assert str(path) in str(caught.value)


def test_a_file_cut_off_is_named(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "model.safetensors", {"w": tensor([4], 16)}, b"\0" * 15)
    with pytest.raises(CheckpointError, match="it is cut off"):
        read_safetensors_header(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"{", "not valid JSON"), (b"[1]", "holds a JSON list"), (b"[" * 100_000, "not valid JSON"), (b"\xff", "JSON")],
)
def test_bad_json_is_one_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_kinds(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert open_checkpoint(tmp_path).kind is Kind.MODEL
    assert open_checkpoint(tmp_path).json("generation_config.json") is ABSENT
    (tmp_path / "adapter_config.json").write_text("{}")
    assert open_checkpoint(tmp_path).kind is Kind.ADAPTER


def test_a_run_folder_points_at_its_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-9").mkdir()
    with pytest.raises(CheckpointError, match=r"did you mean .*checkpoint-20"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd", "..", "", 7])
def test_shard_names_stay_in_the_folder(tmp_path: Path, shard: object) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"w": shard}}))
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_checkpoint(tmp_path).tensors()


def test_shards_are_read_together(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    write_safetensors(tmp_path / "one.safetensors", {"a": tensor([1], 4)}, b"\0" * 4)
    with pytest.raises(CheckpointError, match=r"two\.safetensors, which is not in the folder"):
        open_checkpoint(tmp_path).tensors()
    write_safetensors(tmp_path / "two.safetensors", {"b": tensor([1], 4)}, b"\0" * 4)
    assert sorted(open_checkpoint(tmp_path).tensors()) == ["a", "b"]


def test_find_base_takes_folders_and_never_downloads(tmp_path: Path) -> None:
    assert find_base(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{}")
    assert find_base(str(tmp_path)) == tmp_path
    assert find_base(None) is None
    assert find_base("no-such/model-anywhere") is None
    assert find_base("not a/valid/name") is None


def test_staged_publishes_whole_folders_with_the_mode_of_the_umask(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "export"
    with staged(target, overwrite=False) as staging:
        (staging / "config.json").write_text("{}")
        (staging / "config.json").chmod(0o600)
        (staging / "folder").mkdir(mode=0o700)
        (staging / "folder" / "file").write_text("x")
        assert not target.exists()
        assert not list(target.parent.glob("checkpoint-*"))
        assert staging.parent == target.parent
    assert (target / "config.json").read_text() == "{}"
    umask = os.umask(0)
    os.umask(umask)
    assert (target / "config.json").stat().st_mode & 0o777 == 0o666 & ~umask
    assert target.stat().st_mode & 0o777 == (target / "folder").stat().st_mode & 0o777 == 0o777 & ~umask
    assert [path.name for path in target.parent.iterdir()] == ["export"]


def test_a_failure_leaves_nothing_and_keeps_the_old(tmp_path: Path) -> None:
    target = tmp_path / "export"
    target.mkdir()
    (target / "grpo_toolkit.json").write_text("old")

    def fill_and_fail() -> None:
        with staged(target, overwrite=True) as staging:
            (staging / "grpo_toolkit.json").write_text("new")
            raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        fill_and_fail()
    assert (target / "grpo_toolkit.json").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]
    with staged(target, overwrite=True) as staging:
        (staging / "grpo_toolkit.json").write_text("new")
    assert (target / "grpo_toolkit.json").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_leftovers_of_dead_exporters_are_swept_and_of_live_ones_kept(tmp_path: Path) -> None:
    ended = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    here = platform.node()
    dead = tmp_path / f".export.staging-{here}-abc-{int(ended.stdout)}"
    alive = tmp_path / f".export.staging-{here}-abc-{os.getpid()}"
    elsewhere = tmp_path / f".export.staging-other-host-abc-{int(ended.stdout)}"
    moved_by_the_living = tmp_path / f".export.previous-{here}-abc-{os.getpid()}"
    of_nobody = tmp_path / f".export.staging-{here}-notes"
    for folder in (elsewhere, dead, alive, moved_by_the_living, of_nobody):
        folder.mkdir()
    with staged(tmp_path / "export", overwrite=False) as staging:
        (staging / "config.json").write_text("{}")
    assert not dead.exists()
    assert alive.exists()
    assert elsewhere.exists()  # its owner may be alive on its own machine
    assert moved_by_the_living.exists()  # and may still put it back
    assert of_nobody.exists()


def test_the_owner_may_be_another_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refused)
    theirs = tmp_path / f".export.staging-{platform.node()}-abc-1"
    theirs.mkdir()
    with staged(tmp_path / "export", overwrite=False) as staging:
        (staging / "config.json").write_text("{}")
    assert theirs.exists()


def test_what_may_not_be_replaced_is_refused_before_anything_is_made_and_again_at_the_end(tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.tex").write_text("x")
    entered = False
    with pytest.raises(OutputExistsError), staged(mine, overwrite=True):
        entered = True
    assert not entered
    with pytest.raises(OutputExistsError, match="not an export of ours"), staged(tmp_path / "export", overwrite=False):
        shutil.copytree(mine, tmp_path / "export")  # somebody else's, meanwhile
    assert (tmp_path / "export" / "chapter1.tex").read_text() == "x"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "thesis"]


def test_a_link_in_a_folder_does_not_change_what_it_points_to(tmp_path: Path) -> None:
    blobs = tmp_path / "soft", tmp_path / "hard"
    for blob in blobs:
        blob.write_text("x")
        blob.chmod(0o640)
    with staged(tmp_path / "export", overwrite=False) as staging:
        (staging / "soft").symlink_to(blobs[0])
        (staging / "hard").hardlink_to(blobs[1])
    assert [blob.stat().st_mode & 0o777 for blob in blobs] == [0o640, 0o640]
    assert (tmp_path / "export" / "soft").is_symlink()


def test_an_error_of_the_disk_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="full") as caught, staged(tmp_path / "export", overwrite=False):
        raise OSError(28, "full")
    assert caught.value.filename == str(tmp_path / "export")


def test_an_error_of_a_library_keeps_its_words(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^no image processor in base$"), staged(tmp_path / "export", overwrite=False):
        raise OSError("no image processor in base")


def test_a_link_and_the_current_folder_are_published_where_they_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    for target in (tmp_path / "link", Path()):
        with staged(target, overwrite=False) as staging:
            (staging / "config.json").write_text("{}")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "config.json").is_file()
    assert (tmp_path / "here" / "config.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["here", "link", "real"]


def test_output_that_is_not_ours_is_refused(tmp_path: Path) -> None:
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "chapter1.tex").write_text("x")
    with pytest.raises(OutputExistsError, match="not an export of ours"):
        check_output(mine, overwrite=True)
    (mine / "grpo_toolkit.json").write_text("{}")
    with pytest.raises(OutputExistsError, match="pass overwrite=True"):
        check_output(mine, overwrite=False)
    check_output(mine, overwrite=True)
    with pytest.raises(OutputExistsError, match="is a mount point"):
        check_output(Path("/"), overwrite=True)
    with pytest.raises(OutputExistsError, match="is a file, so no folder"):
        check_output(mine / "chapter1.tex", overwrite=True)
    with pytest.raises(OutputExistsError, match="is a file, so no folder"):
        check_output(mine / "chapter1.tex" / "export", overwrite=True)


def test_output_without_permission_is_refused(tmp_path: Path) -> None:
    # In a process that may not write there: tests often run as root, who may write anywhere.
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o500)
    code = (
        "import os, sys; from pathlib import Path; from grpo_toolkit.checkpoint.publish import check_output\n"
        "os.geteuid() == 0 and os.setuid(65534)\n"
        f"try: check_output(Path({str(locked / 'export')!r}), overwrite=False)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("InputError")
    assert "no permission to write in" in done.stdout
