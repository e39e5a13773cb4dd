"""Strict readers on real files from a stranger: refused with one clear error, never waited for, never followed."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from grpo_toolkit.checkpoint.folders.base_lookup import find_base
from grpo_toolkit.checkpoint.json_files import open_regular, parse_json, read_json
from grpo_toolkit.checkpoint.safetensors_header import read_safetensors_header
from grpo_toolkit.cli import main
from grpo_toolkit.errors import CheckpointError
from tests.support.faulty import unpack


def write(path: Path, header: object, data: int) -> Path:
    raw = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(raw)) + raw)
        file.truncate(8 + len(raw) + data)
    return path


def entry(begin: int, end: int, shape: object = None, dtype: object = "U8") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        ({"a": entry(0, 4), "b": entry(2, 6)}, 6, "tensors overlap at byte"),
        ({"a": entry(0, 4), "b": entry(5, 6)}, 6, "tensors leave a hole at byte"),
        ({"a": entry(1, 4)}, 4, "tensors leave a hole"),
        ({"a": entry(0, 4)}, 5, "1 bytes belong to no tensor"),
        ({"a": entry(0, 4)}, 3, "it is cut off"),
        ({"a": entry(0, 4, [3])}, 4, "U8 [3] is not 4 bytes"),
        ({"a": entry(0, 4, [2**62, 2**62, 2**62])}, 4, "is not 4 bytes"),
        ({"a": entry(0, 4, [2**62] * 100_000 + [0])}, 4, "is not 4 bytes"),
        ({"a": entry(0, 4, [-4])}, 4, "not whole numbers"),
        ({"a": entry(0, 4, [4.0])}, 4, "not whole numbers"),
        ({"a": entry(0, 1, [True])}, 1, "not whole numbers"),
        ({"a": entry(0, 4, "4")}, 4, "no list"),
        ({"a": entry(0, 4, {"4": 4})}, 4, "no list"),
        ({"a": entry(4, 0, [0])}, 4, "is not -4 bytes"),
        ({"a": entry(0, 2**64, [2**64])}, 4, "not whole numbers"),
        ({"a": entry(0, 4, dtype="F12")}, 4, "KeyError"),
        ({"a": entry(0, 4, dtype=["U8"])}, 4, "TypeError"),
        ({"a": [1, 2]}, 4, "TypeError"),
        ({"a": {"dtype": "U8", "shape": [4], "data_offsets": [0, 2, 4]}}, 4, "ValueError"),
        ({"__metadata__": {"a": 1}}, 0, "not a map of strings"),
        ({"__metadata__": []}, 0, "not a map of strings"),
    ],
)
def test_damaged_headers_are_refused(tmp_path: Path, header: object, data: int, message: str) -> None:
    path = write(tmp_path / "model.safetensors", header, data)
    with pytest.raises(CheckpointError) as caught:
        read_safetensors_header(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_tensor_that_is_said_twice_is_refused(tmp_path: Path) -> None:
    one = json.dumps(entry(0, 4))
    raw = f'{{"a": {one}, "a": {one}}}'.encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + b"\0" * 4)
    with pytest.raises(CheckpointError, match="'a' stands twice"):
        read_safetensors_header(path)


def test_a_sound_header_is_what_safetensors_says(qwen: Path) -> None:
    from safetensors import safe_open

    tensors = read_safetensors_header(qwen / "model.safetensors")
    with safe_open(qwen / "model.safetensors", "pt") as file:
        assert sorted(tensors) == sorted(file.keys())
        for name, info in tensors.items():
            assert info.shape == tuple(file.get_tensor(name).shape)
            assert info.nbytes == file.get_tensor(name).nbytes


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b'{"a": 1, "a": 2}', "'a' stands twice"),
        (b'{"x": {"a": 1, "a": 2}}', "'a' stands twice"),
        (b'{"a":' * 100 + b"1" + b"}" * 100, "nested deeper than 64"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"9" * 5000, "not valid JSON"),
        ('{"a": 1}'.encode("utf-16"), "not valid JSON"),
    ],
)
def test_odd_json_is_refused(tmp_path: Path, raw: bytes, message: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=message):
        read_json(path)


def test_repeated_keys_can_be_collected() -> None:
    repeated: list[str] = []
    raw = b'\xef\xbb\xbf{"a": 1, "a": 2, "b": {"c": 1, "c": 1}}'
    assert parse_json(raw, "x", repeated=repeated) == {"a": 2, "b": {"c": 1}}
    assert repeated == ["c", "a"]


def test_pipes_devices_and_folders_are_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path in (tmp_path / "pipe", tmp_path / "folder", Path("/dev/zero")):
        with pytest.raises(CheckpointError, match="not a regular file"):
            open_regular(path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        open_regular(tmp_path / "a\0b")


def test_links_out_of_the_folder_are_not_followed_and_hub_snapshots_are(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "secret.json").write_text('{"secret": 1}')
    (folder / "config.json").symlink_to("../secret.json")
    with pytest.raises(CheckpointError, match="a link that leaves its folder"):
        open_regular(folder / "config.json", inside=True)
    assert read_json(folder / "config.json") == {"secret": 1}  # a user's own folder may be made of links
    (folder / "inside.json").write_text("{}")
    (folder / "again.json").symlink_to("inside.json")
    open_regular(folder / "again.json", inside=True).close()
    blobs = tmp_path / "models--x--y" / "blobs"
    snapshot = tmp_path / "models--x--y" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "0123").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/0123")
    open_regular(snapshot / "config.json", inside=True).close()
    (tmp_path / "linked").symlink_to(snapshot)
    open_regular(tmp_path / "linked" / "config.json", inside=True).close()


@pytest.mark.parametrize("name", ["a\0b", "x" * 5000, "../..", "a/b/c", "-", "a//b", "\ud800"])
def test_names_of_bases_from_a_stranger(name: str) -> None:
    assert find_base(name) is None


LARGE: dict[str, bytes] = {
    "nested lists": b'{"a":' + b"[" * 2**20 + b"]" * 2**20 + b"}",
    "two million empty lists": b'{"a":[' + b"[]," * (2 * 2**20 // 3) + b"1]}",
    "half a million keys": b"{" + b",".join(b'"%d":0' % i for i in range(180_000)) + b"}",
    "64 MiB of spaces": b"{" + b" " * (64 * 2**20) + b"}",
    "a long number": b'{"vocab_size":' + b"9" * 2**20 + b"}",
}


@pytest.mark.parametrize("what", LARGE)
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "model.safetensors.index.json"])
def test_enormous_json_costs_little(what: str, file: str, tmp_path: Path) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    (folder / file).write_bytes(LARGE[what])
    assert _peak_megabytes(folder) < 512


@pytest.mark.parametrize("kind", ["tensors", "too many tensors", "lists", "keys"])
def test_an_enormous_header_costs_little(kind: str, tmp_path: Path) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    if "tensors" in kind:
        count = 240_000 if kind == "tensors" else 280_000
        body = b"{" + b",".join(b'"%x":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}' % i for i in range(count))
    elif kind == "lists":
        body = b'{"a":[' + b"[]," * 5_500_000 + b"1]"
    else:
        body = b"{" + b",".join(b'"%x":0' % number for number in range(1_500_000))
    raw = body[: 16 * 2**20 - 2] + b"}"
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(raw)) + raw)
    assert _peak_megabytes(folder) < 512


def test_more_shards_than_any_model_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {f"layer.{number}": f"{number}.safetensors" for number in range(20_000)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert main(["doctor", str(folder), "--json"]) == 1
    found = [finding["found"] for finding in json.loads(capsys.readouterr().out)["findings"]]
    assert "names 20,000 shards, which no model has" in found


def _peak_megabytes(folder: Path) -> float:
    """The peak of a process that examines the folder, which must end by itself with a diagnosis or an error."""
    code = (
        "import sys; from grpo_toolkit.cli import main; code = main(sys.argv[1:])\n"
        "peak = next(line for line in open('/proc/self/status') if line.startswith('VmHWM'))\n"
        "print(code, peak.split()[1], file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, "doctor", str(folder), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    code_of_doctor, peak = done.stderr.splitlines()[-1].split()
    assert code_of_doctor in ("1", "2")
    return int(peak) / 1024


def test_a_hostile_folder_is_one_diagnosis(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = unpack("vlm_r1_449", tmp_path / "x")
    (folder / "preprocessor_config.json").unlink()
    os.mkfifo(folder / "preprocessor_config.json")
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").symlink_to("/etc/passwd")
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"a": "../../../etc/passwd", "b": "/etc/passwd", "c": "x\0y", "d": ["model"], "e": "gone"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'false'\ntR.")
    assert main(["doctor", str(folder), "--json"]) == 1
    said = json.loads(capsys.readouterr().out)
    found = {(finding["code"], finding["file"]): finding["found"] for finding in said["findings"]}
    assert found["unreadable-file", "preprocessor_config.json"] == "is not a regular file"
    assert "leaves its folder" in found["unreadable-file", "generation_config.json"]
    assert found["index-leaves-folder", "model.safetensors.index.json"] == "../../../etc/passwd"
    assert found["shard-missing", "model.safetensors.index.json"] == "gone"
    assert ("pickled-weights", "pytorch_model.bin") in found
    assert "root:" not in json.dumps(said)
