"""Model folders in memory: what the doctor's rules and readers see, without a disk."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.safetensors_header import TensorInfo, parse_safetensors_header
from grpo_toolkit.doctor.planned_files import Entry
from grpo_toolkit.errors import CheckpointError
from tests.support.faulty import DATA

if TYPE_CHECKING:
    from collections.abc import Mapping

    Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


@dataclass
class MemoryFiles:
    """The files of a folder that lies nowhere. `sizes` has the files that are longer than their bytes."""

    contents: dict[str, bytes]
    sizes: dict[str, int] = field(default_factory=dict)
    strange: dict[str, Entry] = field(default_factory=dict)
    path: Path = Path("/nowhere/checkpoint-1")

    @property
    def entries(self) -> Mapping[str, Entry]:
        known = {name: Entry(size=self.sizes.get(name, len(raw))) for name, raw in self.contents.items()}
        return {**known, **self.strange}

    def read(self, name: str, *, limit: int) -> bytes:
        if name in self.strange or name not in self.contents:
            raise CheckpointError(f"{self.path / name}: is not a regular file")
        if len(self.contents[name]) > limit:
            raise CheckpointError(f"{self.path / name}: larger than {limit} bytes")
        return self.contents[name]

    def head(self, name: str, *, limit: int) -> bytes:
        return self.read(name, limit=2**40)[:limit]

    def tensors(self, name: str) -> dict[str, TensorInfo]:
        raw = self.read(name, limit=2**40)
        size = self.sizes.get(name, len(raw))
        if len(raw) < 8:
            raise CheckpointError(f"{name}: too short")
        (length,) = struct.unpack("<Q", raw[:8])
        if length > min(16 * 2**20, size - 8):
            raise CheckpointError(f"{name}: header does not fit")
        return parse_safetensors_header(raw[8 : 8 + length], size=size, where=name, file=name)


def load_seed(name: str) -> MemoryFiles:
    """Load a reference folder into memory; `sharded` is the base in two shards."""
    source = DATA / ("base" if name == "sharded" else name)
    files = MemoryFiles({path.name: path.read_bytes() for path in source.iterdir() if path.is_file()})
    files.strange = {path.name: Entry(is_folder=True, is_regular=False) for path in source.iterdir() if path.is_dir()}
    for weights in [path for path in files.contents if path.endswith(".safetensors")]:
        header = json.loads(files.contents[weights][8:])
        files.sizes[weights] = len(files.contents[weights]) + max(
            entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"
        )
    if name == "sharded":
        _split(files)
    return files


def _split(files: MemoryFiles) -> None:
    header = json.loads(files.contents.pop("model.safetensors")[8:])
    files.sizes.clear()
    names = [name for name in header if name != "__metadata__"]
    weight_map = {}
    for number, part in enumerate((names[:30], names[30:]), start=1):
        end, shard = 0, {}
        for name in part:
            begin, stop = header[name]["data_offsets"]
            shard[name] = {**header[name], "data_offsets": [end, end + stop - begin]}
            end += stop - begin
        put_header(files, f"model-{number}.safetensors", shard, data=end)
        weight_map |= dict.fromkeys(part, f"model-{number}.safetensors")
    files.contents["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()


def put_header(files: MemoryFiles, name: str, header: Any, *, data: int) -> None:
    raw = json.dumps(header).encode()
    files.contents[name] = struct.pack("<Q", len(raw)) + raw
    files.sizes[name] = 8 + len(raw) + data


def copied(files: MemoryFiles) -> MemoryFiles:
    return MemoryFiles(dict(files.contents), dict(files.sizes), dict(files.strange), files.path)


def folder_of(
    files: Mapping[str, Any], tensors: Mapping[str, tuple[str, tuple[int, ...]]] | None = None
) -> MemoryFiles:
    """Return a folder of JSON values (or bytes) by file name, with tensors as (dtype, shape) by name."""
    contents = {
        name: value if isinstance(value, bytes) else json.dumps(value).encode() for name, value in files.items()
    }
    memory = MemoryFiles(contents)
    if tensors is not None:
        name = "adapter_model.safetensors" if "adapter_config.json" in files else "model.safetensors"
        put_tensors(memory, name, tensors)
    return memory


def put_tensors(files: MemoryFiles, name: str, tensors: Tensors) -> None:
    """Give a folder a safetensors file with these tensors."""
    widths = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "U8": 1, "F8_E4M3": 1}
    header: dict[str, Any] = {}
    end = 0
    for tensor, (dtype, shape) in tensors.items():
        begin, end = end, end + widths[dtype] * math.prod(shape)
        header[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    put_header(files, name, header, data=end)
