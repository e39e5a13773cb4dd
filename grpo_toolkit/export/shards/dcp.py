"""FSDP's sharded state dicts, as torch.distributed.checkpoint (DCP) writes them and accelerate names them.

`.metadata` is a plain pickle that says which part of which tensor lies where. It is opened by an unpickler that knows
the classes of a metadata and no other; the parts themselves are tensors, opened with `weights_only=True`.
Layout: https://github.com/pytorch/pytorch/blob/v2.11.0/torch/distributed/checkpoint/filesystem.py
"""

from __future__ import annotations

import io
import pickle
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.look_around import names_in
from grpo_toolkit.checkpoint.json_files import open_regular
from grpo_toolkit.doctor.parsed_folder import is_plain
from grpo_toolkit.errors import CheckpointError, UnsupportedError

if TYPE_CHECKING:
    from pathlib import Path

    import torch

METADATA: Final = ".metadata"
_MOST_METADATA: Final = 256 * 2**20
_OF_METADATA: Final = "torch.distributed.checkpoint.metadata"
# Closed: what torch itself puts into a metadata. None of them does anything but hold what it is given.
_CLASSES: Final = frozenset(
    {
        *((_OF_METADATA, name) for name in (
            "Metadata", "TensorStorageMetadata", "BytesStorageMetadata", "TensorProperties", "ChunkStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch", "Size"),
        ("torch.serialization", "_get_layout"),
        ("collections", "OrderedDict"),
    }
)  # fmt: skip
_DTYPES: Final = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "int64", "int32", "int16", "int8"}
    | {"uint8", "bool"}
)


def dcp_folder(shards: Path) -> Path:
    """Return the folder of accelerate's shards of the model: the one given, or the one in it."""
    inner = shards / "pytorch_model_fsdp_0"
    return inner if METADATA not in names_in(shards) and inner.is_dir() else shards


class _Unpickler(pickle.Unpickler):
    """An unpickler that builds a metadata and refuses whatever else a pickle asks for."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in _DTYPES:
            import torch

            return getattr(torch, name)
        if module in ("pathlib", "pathlib._local") and name in ("PosixPath", "WindowsPath", "PurePosixPath", "Path"):
            return _as_text  # where it was saved to: not used
        if (module, name) not in _CLASSES:
            raise CheckpointError(f"the metadata asks for {module}.{name}, which no metadata holds")
        return super().find_class(module, name)


def _as_text(*parts: object) -> str:
    return "/".join(map(str, parts))


class DcpParts:
    """The tensors of a sharded state dict, by the names that the model has for them."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / METADATA
        with open_regular(self.path, inside=True) as file:
            raw = file.read(_MOST_METADATA + 1)
        if len(raw) > _MOST_METADATA:
            raise CheckpointError(f"{self.path}: larger than {_MOST_METADATA} bytes")
        metadata = _Unpickler(io.BytesIO(raw)).load()
        self._folder = folder
        self.nbytes = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
        self._stored = metadata.state_dict_metadata
        self._places = {(index.fqn, tuple(index.offset or ())): info for index, info in metadata.storage_data.items()}
        tensors = [name for name, held in self._stored.items() if hasattr(held, "chunks")]
        # accelerate saves {"model": state_dict}.
        prefix = "model." if tensors and all(self._path(metadata, name)[0] == "model" for name in tensors) else ""
        self._names = {name.removeprefix(prefix): name for name in tensors}
        self.names = list(self._names)

    @staticmethod
    def _path(metadata: Any, name: str) -> tuple[Any, ...]:
        path = (metadata.planner_data or {}).get(name) or (name,)
        return path if len(path) == 2 else ("",)

    def form(self, name: str) -> tuple[torch.dtype, tuple[int, ...]]:
        """Return a whole tensor's dtype and shape."""
        held = self._stored[self._names[name]]
        return held.properties.dtype, tuple(held.size)

    def joined(self, name: str) -> torch.Tensor:
        """Return a whole tensor of its parts.

        Raises:
            CheckpointError: a part is missing, or is not what the metadata says.
            UnsupportedError: parts that were transformed (compressed) when they were written.
        """
        import torch

        dtype, shape = self.form(name)
        whole = torch.empty(shape, dtype=dtype)
        filled = 0
        for chunk in self._stored[self._names[name]].chunks:
            part = self._part(self._names[name], tuple(chunk.offsets), tuple(chunk.sizes))
            if part.dtype != dtype:
                raise CheckpointError(f"{self.path}: a part of {name} is {part.dtype}, not {dtype}")
            place = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
            whole[place] = part
            filled += part.numel()
        if filled != whole.numel():
            raise CheckpointError(f"{self.path}: the parts of {name} have {filled} of its {whole.numel()} elements")
        return whole

    def _part(self, stored: str, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> torch.Tensor:
        import torch

        info = self._places.get((stored, offsets))
        if info is None or not is_plain(str(info.relative_path)):
            raise CheckpointError(
                f"{self.path}: the part of {stored} at {list(offsets)} lies in no file of the folder"
            )
        if getattr(info, "transform_descriptors", None):
            raise UnsupportedError(f"{self.path}: parts that were transformed when they were written")
        with open_regular(self._folder / str(info.relative_path), inside=True) as file:
            file.seek(info.offset)
            raw = file.read(info.length)
        part = torch.load(io.BytesIO(raw), map_location="cpu", weights_only=True)
        if not isinstance(part, torch.Tensor) or tuple(part.shape) != sizes:
            raise CheckpointError(f"{info.relative_path}: holds no part of {stored} of shape {list(sizes)}")
        return part.detach()
