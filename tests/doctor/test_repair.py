"""Repairs: the exact edits, atomic and undone byte for byte; links, times, weights, what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit import diagnose_checkpoint, repair_checkpoint, undo_repair
from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.doctor.findings import Diagnosis
from grpo_toolkit.doctor.repair_plan import FileChange
from grpo_toolkit.doctor.undo import UNDO
from grpo_toolkit.errors import CheckpointError, InputError, VerificationError
from scripts.benchmarks.oracle import bases
from scripts.benchmarks.oracle.folders import write
from tests.support.faulty import fill, unpack

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return unpack("base", tmp_path_factory.mktemp("bases") / "base")


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file's bytes and mode, but what the repair keeps for itself."""
    files = (path for path in folder.rglob("*") if path.is_file() and UNDO.parts[0] not in path.parts)
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mode) for path in files}


def test_only_the_poisoned_lines_change(tmp_path: Path) -> None:
    folder = unpack("vlm_r1_451", tmp_path / "checkpoint-1")
    plan = repair_checkpoint(folder).plan
    assert [line for line in plan.diff.splitlines() if line[0] in "+-"] == [
        "--- a/config.json",
        "+++ b/config.json",
        '-  "use_cache": false,',
        '+  "use_cache": true,',
        "--- a/generation_config.json",
        "+++ b/generation_config.json",
        '-  "use_cache": false',
        '+  "use_cache": true',
    ]
    assert [finding.code for finding in plan.mended] == ["generation-cache-off", "config-cache-off-latent"]


def test_a_diff_is_short_and_plain() -> None:
    added = FileChange(file="tokenizer.json", before=None, after=b"x" * 100_000)
    assert list(added.diff()) == ["--- /dev/null", "+++ b/tokenizer.json", "@@ 100,000 bytes @@"]
    rung = FileChange(file="a.jinja", before=None, after=b"\x1b[2Jbell\x07\n")
    assert list(rung.diff())[-1] == r"+\x1b[2Jbell\x07"


def test_beside_the_base_the_key_is_deleted(base: Path, tmp_path: Path) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "checkpoint-1")
    assert repair_checkpoint(folder, base=base).applied
    assert "use_cache" not in json.loads((folder / "config.json").read_text())
    assert "use_cache" not in json.loads((folder / "generation_config.json").read_text())


@pytest.mark.parametrize("route", ["vlm_r1_449", "trl_grpo_523", "easyr1_merger_451", "zero3_523", "fsdp_full_523"])
def test_undo_puts_everything_back_byte_for_byte(route: str, base: Path, tmp_path: Path) -> None:
    folder = unpack(route, tmp_path / route)
    before, times = contents(folder), folder.stat()
    result = repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert result.applied
    assert contents(folder) != before
    assert folder.stat().st_mtime_ns == times.st_mtime_ns
    assert set(undo_repair(folder)) == {change.file for change in result.plan.changes} | set(result.plan.shards)
    assert contents(folder) == before
    assert not (folder / UNDO.parts[0]).exists()
    assert folder.stat().st_mtime_ns == times.st_mtime_ns
    with pytest.raises(InputError, match="no repair to undo"):
        undo_repair(folder)


def test_a_second_repair_changes_nothing(base: Path, tmp_path: Path) -> None:
    folder = unpack("trl_grpo_523", tmp_path / "x")
    assert repair_checkpoint(folder, base=base, rewrite_weights=True).applied
    after = contents(folder)
    kept = sorted(path.name for path in (folder / UNDO).iterdir())
    again = repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert not again.applied
    assert again.plan.is_empty
    assert contents(folder) == after
    assert sorted(path.name for path in (folder / UNDO).iterdir()) == kept


def test_two_different_repairs_are_undone_to_the_first_state(base: Path, tmp_path: Path) -> None:
    folder = unpack("trl_grpo_523", tmp_path / "x")
    before = contents(folder)
    assert repair_checkpoint(folder).applied
    generation = folder / "generation_config.json"
    assert repair_checkpoint(folder, base=base, rewrite_weights=True).applied
    undo_repair(folder)
    assert contents(folder) == before
    assert generation.exists()


def test_undo_refuses_what_was_changed_since(tmp_path: Path) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    repair_checkpoint(folder)
    (folder / "config.json").write_text("{}")
    after = contents(folder)
    with pytest.raises(InputError, match=r"config\.json: changed since the repair"):
        undo_repair(folder)
    assert contents(folder) == after


def test_a_dry_run_touches_nothing(tmp_path: Path) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    before = contents(folder)
    result = repair_checkpoint(folder, dry_run=True)
    assert not result.applied
    assert not result.plan.is_empty
    assert contents(folder) == before
    assert not (folder / UNDO.parts[0]).exists()


def test_weights_are_rewritten_only_if_asked(base: Path, tmp_path: Path) -> None:
    folder = unpack("trl_grpo_523", tmp_path / "x")
    weights = (folder / "model.safetensors").read_bytes()
    result = repair_checkpoint(folder, base=base)
    assert (folder / "model.safetensors").read_bytes() == weights
    assert [finding.code for finding in result.plan.left] == ["wider-than-base", "resume-starts-from-base"]
    assert not result.plan.is_clean_afterwards
    assert repair_checkpoint(folder, base=base, rewrite_weights=True).plan.shards == ("model.safetensors",)
    found, wanted = open_checkpoint(folder).tensors(), open_checkpoint(base).tensors()
    assert found == wanted
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_sharded_weights_are_rewritten_with_their_index(base: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(base, tmp_path / "x")
    (folder / "model.safetensors").unlink()
    shapes = {name: info.shape for name, info in open_checkpoint(base).tensors().items()}
    from scripts.models.published_shapes import write_weights

    write_weights(folder, {f"module.{name}": shape for name, shape in shapes.items()}, shards=3)
    assert [finding.code for finding in diagnose_checkpoint(folder, base=base).findings] == ["wrapped-names"]
    result = repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert len(result.plan.shards) == 3
    assert diagnose_checkpoint(folder, base=base).findings == ()
    undo_repair(folder)
    assert [finding.code for finding in diagnose_checkpoint(folder, base=base).findings] == ["wrapped-names"]


def test_a_value_that_the_bases_dtype_cannot_hold_is_refused(base: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = unpack("trl_grpo_523", tmp_path / "x")
    weights = load_file(folder / "model.safetensors")
    name = next(iter(weights))
    weights[name].view(-1)[0] = 3.4e38  # finite in float32, and not in bfloat16
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    before = contents(folder)
    with pytest.raises(
        VerificationError, match=rf"{re.escape(name)} has values that are not finite in torch.bfloat16"
    ):
        repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert contents(folder) == before
    assert not (folder / UNDO.parts[0]).exists()


def test_a_doubled_head_is_dropped_only_if_it_is_a_copy(qwen: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = fill(unpack("fsdp_full_523", tmp_path / "x"), qwen)
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"][0, 0] += 1
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    left = repair_checkpoint(folder, rewrite_weights=True).plan.left
    assert "head-differs" in {finding.code for finding in left}
    assert "lm_head.weight" in open_checkpoint(folder).tensors()
    assert "head-differs" in {finding.code for finding in diagnose_checkpoint(folder, deep=True).findings}


def test_deep_finds_a_merge_that_did_nothing(qwen: Path, tmp_path: Path) -> None:
    folder = fill(unpack("trl_grpo_523", tmp_path / "x"), qwen)  # float32 copies of the base's numbers
    codes = {finding.code for finding in diagnose_checkpoint(folder, base=qwen, deep=True).findings}
    assert "identical-to-base" in codes
    assert "identical-to-base" not in {f.code for f in diagnose_checkpoint(folder, base=qwen).findings}


def test_the_hub_cache_is_never_written_through(tmp_path: Path) -> None:
    blobs = tmp_path / "models--x--y" / "blobs"
    source = unpack("vlm_r1_451", blobs)
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(f"../../blobs/{path.name}")
    before = contents(blobs)
    links = {path.name: os.readlink(path) for path in snapshot.iterdir()}  # noqa: PTH115
    assert repair_checkpoint(snapshot).applied
    assert contents(blobs) == before
    assert not (snapshot / "config.json").is_symlink()
    assert diagnose_checkpoint(snapshot).is_clean
    undo_repair(snapshot)
    assert {path.name: os.readlink(path) for path in snapshot.iterdir()} == links  # noqa: PTH115
    assert contents(blobs) == before


def test_modes_are_kept(tmp_path: Path) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    (folder / "config.json").chmod(0o640)
    repair_checkpoint(folder)
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("content", [b"[]", b"", b'{"image_processor"'])
def test_keys_of_a_file_that_is_no_object_are_not_mended(content: bytes, tmp_path: Path) -> None:
    base = write(bases.base_folder("paligemma/v5/full"), tmp_path / "base")
    folder = write(bases.good_folder("paligemma/v5/full"), tmp_path / "checkpoint")
    (folder / "processor_config.json").write_bytes(content)
    found = diagnose_checkpoint(folder, base=base)
    assert isinstance(found, Diagnosis)
    assert [one.code for one in found.findings if one.file == "processor_config.json"] == ["unreadable-file"]
    assert repair_checkpoint(folder, base=base).plan.mended == ()
    assert (folder / "processor_config.json").read_bytes() == content


def test_a_failure_leaves_the_folder_as_it_was(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = unpack("zero3_523", tmp_path / "x")
    before = contents(folder)

    def full(*_: object, **__: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("grpo_toolkit.doctor.repair.rewrite_shard", full)
    with pytest.raises(InputError, match="No space left on device"):
        repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert contents(folder) == before
    assert not (folder / UNDO.parts[0]).exists()
    assert repair_checkpoint(folder, base=base).applied
    mended = contents(folder)
    with pytest.raises(InputError, match="No space left on device"):
        repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert contents(folder) == mended
    assert [path.name for path in (folder / UNDO).iterdir() if path.name.startswith(".")] == []
    undo_repair(folder)
    assert contents(folder) == before


def test_wrong_use(tmp_path: Path, base: Path) -> None:
    with pytest.raises(CheckpointError, match="not a folder"):
        repair_checkpoint(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="nothing to examine"):
        repair_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"--base .*neither a model folder"):
        repair_checkpoint(base, base=tmp_path)
    with pytest.raises(InputError, match="no repair to undo"):
        undo_repair(base)


def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    # In a process that may not write there: tests often run as root, who may write anywhere.
    folder = unpack("vlm_r1_449", tmp_path / "x")
    before = contents(folder)
    folder.chmod(0o555)
    code = (
        "import os; from grpo_toolkit.doctor.repair import repair_checkpoint\n"
        "repair_checkpoint('.', dry_run=True)  # all is imported\n"
        "os.geteuid() == 0 and os.setuid(65534)\n"
        "try: repair_checkpoint('.')\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout == "InputError .: no permission to write there; nothing was changed\n"
    folder.chmod(0o755)
    assert contents(folder) == before


def test_weights_for_which_there_is_no_room_are_refused(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = unpack("trl_grpo_523", tmp_path / "x")
    before = contents(folder)
    real = shutil.disk_usage
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda path: real(path)._replace(free=size - 1))
    with pytest.raises(InputError, match=r"needs .* GB beside the old ones, and only .* nothing was changed"):
        repair_checkpoint(folder, base=base, rewrite_weights=True)
    assert contents(folder) == before
    assert repair_checkpoint(folder, base=base).applied  # the files that are not weights need none


@pytest.mark.parametrize("name", [".grpo_toolkit", ".grpo_toolkit/undo"])
def test_what_is_kept_goes_through_no_link(name: str, tmp_path: Path) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    repaired = unpack("vlm_r1_449", tmp_path / "y")
    repair_checkpoint(repaired)
    manifest = json.loads((repaired / UNDO / "undo.json").read_text())
    manifest["unfinished"] = {"staging": ".staging-x", "files": sorted(manifest["files"]), "times": [0, 0]}
    (repaired / UNDO / "undo.json").write_text(json.dumps(manifest))
    (repaired / UNDO / ".staging-x").mkdir()
    (repaired / UNDO / ".staging-x" / "config.json").write_text("{}")
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).symlink_to(repaired / name)
    before = contents(folder), contents(repaired)
    with pytest.raises(InputError, match="is a link; nothing was changed"):
        repair_checkpoint(folder)
    with pytest.raises(InputError, match="no repair to undo"):
        undo_repair(folder)
    assert (contents(folder), contents(repaired)) == before
    assert (repaired / UNDO / "undo.json").is_file()


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc/hostname"])
def test_an_undo_from_a_stranger_stays_in_the_folder(tmp_path: Path, name: str) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    repair_checkpoint(folder)
    entry = {"before": None, "after": None, "link": "/etc"}
    (folder / UNDO / "undo.json").write_text(json.dumps({"files": {name: entry}}))
    with pytest.raises(InputError, match="damaged"):
        undo_repair(folder)
