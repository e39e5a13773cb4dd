"""The streamed writer: files that the safetensors library reads back, and faults on the way."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from grpo_toolkit.checkpoint.safetensors_header import read_safetensors_header
from grpo_toolkit.checkpoint.weights import shard_writer
from grpo_toolkit.checkpoint.weights.shard_plan import plan_shards
from grpo_toolkit.checkpoint.weights.shard_writer import Entry, write_at, write_shards
from grpo_toolkit.errors import CheckpointError, InputError

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = {
    "a.weight": torch.arange(600, dtype=torch.float32).view(20, 30),
    "b.weight": torch.randn(7, 3, dtype=torch.bfloat16),
    "counts": torch.tensor([1, 2, 3]),
    "empty": torch.empty(0, 4),
    "scalar": torch.tensor(2.5),
}


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    save_file(WEIGHTS, folder / "model.safetensors", metadata={"format": "pt", "made_by": "a test"})
    return folder


def zero_fill(entry: Entry, descriptor: int, offset: int) -> None:
    write_at(descriptor, bytes(entry.nbytes), offset)


def copy(source: Path, output: Path, *, work: dict[str, object] | None = None, **options: object) -> None:
    output.mkdir(exist_ok=True)
    tensors = read_safetensors_header(source / "model.safetensors")
    write_shards(plan_shards(source, tensors, work=work or {}, **options), output, fill=zero_fill)


def test_what_is_copied_is_the_same_tensors_and_metadata(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "output")
    found = load_file(tmp_path / "output" / "model.safetensors")
    assert found.keys() == WEIGHTS.keys()
    assert all(tensor.equal(WEIGHTS[name]) and tensor.dtype == WEIGHTS[name].dtype for name, tensor in found.items())
    with safe_open(tmp_path / "output" / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "made_by": "a test"}
    assert not (tmp_path / "output" / "model.safetensors.index.json").exists()


def test_what_is_made_lies_between_what_is_copied(source: Path, tmp_path: Path) -> None:
    copy(source, tmp_path / "output", work={"b.weight": "zeros"})
    found = load_file(tmp_path / "output" / "model.safetensors")
    assert not found["b.weight"].any()
    assert all(tensor.equal(WEIGHTS[name]) for name, tensor in found.items() if name != "b.weight")


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_files_are_copied_where_the_kernel_cannot(
    code: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: object) -> int:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    copy(source, tmp_path / "output")
    assert all(t.equal(WEIGHTS[name]) for name, t in load_file(tmp_path / "output" / "model.safetensors").items())


def test_workers_write_into_different_files(source: Path, tmp_path: Path) -> None:
    together = threading.Barrier(2, timeout=30)
    written: list[int] = []

    def fill(entry: Entry, descriptor: int, offset: int) -> None:
        written.append(descriptor)
        if len(written) <= 2:
            together.wait()
        zero_fill(entry, descriptor, offset)

    tensors = read_safetensors_header(source / "model.safetensors")
    shards = plan_shards(source, tensors, work=dict.fromkeys(WEIGHTS, "zeros"), max_shard_size=2450)
    assert len(shards) == 2
    write_shards(shards, tmp_path, fill=fill, workers=2)
    assert len(written) == 5
    assert written[0] != written[1]


def test_short_reads_and_writes_are_gone_on_with(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(os, "copy_file_range", raising=False)
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at, real=os.pwrite: real(fd, data[:7], at))
    monkeypatch.setattr(os, "pread", lambda fd, count, at, real=os.pread: real(fd, min(count, 11), at))
    copy(source, tmp_path / "output", work={"a.weight": "zeros"})
    found = load_file(tmp_path / "output" / "model.safetensors")
    assert found["b.weight"].equal(WEIGHTS["b.weight"])
    assert not found["a.weight"].any()


def test_a_source_that_shrinks_is_named(source: Path, tmp_path: Path) -> None:
    tensors = read_safetensors_header(source / "model.safetensors")
    shards = plan_shards(source, tensors, work={})
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-50])
    (tmp_path / "output").mkdir()
    with pytest.raises(CheckpointError, match=r"source/model.safetensors: ended while it was read"):
        write_shards(shards, tmp_path / "output", fill=zero_fill)


def test_a_size_that_is_none_is_wrong_use(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--max-shard-size plenty: not a size such as 5GB"):
        copy(source, tmp_path / "output", max_shard_size="plenty")


def test_a_full_disk_is_said_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    from grpo_toolkit.checkpoint.weights.shard_plan import refuse_full_disk

    tensors = read_safetensors_header(source / "model.safetensors")
    [shard] = plan_shards(source, tensors, work={})
    refuse_full_disk(tmp_path, [shard])
    huge = Entry(name="huge", dtype="F32", shape=(2**60,), source=shard.entries[0].source)
    with pytest.raises(InputError, match=r"4611686018.5 GB are needed and [\d.]+ GB are free; make room"):
        refuse_full_disk(tmp_path, [shard_writer.Shard(file="model.safetensors", entries=(huge,))])


MERGE = """
import resource, sys
from grpo_toolkit.cli import main
if sys.argv[3] != "-":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
sys.exit(main(["merge", sys.argv[1], sys.argv[2]]))
"""


@pytest.fixture(scope="module")
def adapter(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.merge.test_merge import make_adapter

    return make_adapter(qwen, tmp_path_factory.mktemp("adapters") / "adapter", target_modules=["q_proj"])


def test_a_write_that_fails_leaves_nothing(adapter: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "merged"
    done = subprocess.run(
        [sys.executable, "-c", MERGE, str(adapter), str(output), "50000"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "cannot be written (File too large)" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


def test_a_killed_merge_leaves_nothing_that_looks_like_one_and_the_next_cleans_up(
    adapter: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out" / "merged"
    # Stopped by the kernel in the middle of its first weight file: SIGXFSZ is let through, so the process dies there.
    code = f"import signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n{MERGE}"
    killed = subprocess.run([sys.executable, "-c", code, str(adapter), str(output), "50000"], check=False)
    assert killed.returncode == -signal.SIGXFSZ
    left = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(left) == 1
    assert left[0].startswith(".merged.staging-")
    again = subprocess.run([sys.executable, "-c", MERGE, str(adapter), str(output), "-"], check=False)
    assert again.returncode == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["merged"]


def test_a_dtype_that_no_model_is_loaded_in_is_refused(tmp_path: Path) -> None:
    header = b'{"w":{"dtype":"F4","shape":[4],"data_offsets":[0,2]}}  '
    (tmp_path / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + b"\1\2")
    tensors = read_safetensors_header(tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="w has the dtype F4, which is not known here"):
        plan_shards(tmp_path, tensors, work={})
