"""The weights of a model folder in FP8, from file to file, in a fixed amount of memory.

A weight of (out, in) becomes a tensor of float8_e4m3fn and, under `weight_scale`, a column with the scale of each
output channel. Both are made of a few rows at a time by compressed-tensors' own arithmetic; no data is needed.
Activations get their scale as they come, token by token: nothing is stored for them.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.weights.shard_plan import plan_shards, refuse_full_disk, split_shards
from grpo_toolkit.checkpoint.weights.shard_writer import read_at, write_at, write_shards
from grpo_toolkit.checkpoint.weights.tensor_blocks import (
    Buffer,
    is_finite_in,
    raw_bytes,
    single_threaded,
    worker_count,
)
from grpo_toolkit.errors import InputError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    import torch

    from grpo_toolkit.checkpoint.json_files import JsonObject
    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.checkpoint.weights.shard_writer import Entry, Progress, Shard
    from grpo_toolkit.export.fp8.layers import Layers

FP8: Final = "F8_E4M3"
SCALE: Final = "_scale"
_PRESET: Final = "FP8_DYNAMIC"
_VALUES: Final = "values"
_SCALES: Final = "scales"
_BLOCK_VALUES: Final = 2**20


def refuse_without_library() -> None:
    """Raise where compressed-tensors, whose format this is, is not installed.

    Raises:
        InputError: it is not.
    """
    try:
        import compressed_tensors.quantization  # noqa: F401
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] == "compressed_tensors":
            what = "is not installed here: pip install grpo-toolkit[fp8]"
        else:
            what = f"cannot be imported beside this transformers ({error}): update transformers"
        raise InputError(f"FP8 needs compressed-tensors, which {what}") from error


def quantization_config(ignore: Iterable[str]) -> JsonObject:
    """Return the `quantization_config` of a folder, as compressed-tensors writes it."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.config import CompressionFormat
    from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

    stored_as = CompressionFormat.float_quantized.value
    config = QuantizationConfig(
        config_groups={"group_0": _scheme().model_copy(update={"format": stored_as})},
        format=stored_as,
        quantization_status=QuantizationStatus.COMPRESSED,
        ignore=list(ignore),
    )
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-fp8-") as folder:
        ModelCompressor(quantization_config=config).update_config(folder)
        found: JsonObject = read_json(Path(folder) / CONFIG)["quantization_config"]
    return found


def plan_fp8(folder: Base, layers: Layers, *, max_shard_size: str | int | None = None) -> list[Shard]:
    """Plan the files of a model folder in FP8: its own files and order, unless a size is given.

    Args:
        folder: the unquantised model.
        layers: which of its weights become FP8.
        max_shard_size: see `shard_plan.plan_shards`.
    """
    shards = [
        replace(shard, entries=tuple(entry for one in shard.entries for entry in _entries(one, layers)))
        for shard in plan_shards(folder.path, folder.tensors, work={})
    ]
    return shards if max_shard_size is None else split_shards(shards, max_shard_size)


def write_fp8(shards: list[Shard], folder: Path, *, progress: Progress | None = None) -> None:
    """Write what `plan_fp8` planned into an existing folder.

    Raises:
        VerificationError: a weight has values that are not finite.
        InputError: no room, or no permission.
    """
    refuse_full_disk(folder, shards)
    with single_threaded() as setup:
        write_shards(shards, folder, fill=_fill, workers=worker_count(), setup=setup, progress=progress)


def _scheme() -> Any:
    from compressed_tensors.quantization import preset_name_to_scheme

    return preset_name_to_scheme(_PRESET, ["Linear"])


def _entries(entry: Entry, layers: Layers) -> Iterator[Entry]:
    if entry.name not in layers.quantised:
        yield entry
        return
    yield replace(entry, dtype=FP8, work=_VALUES)
    yield replace(entry, name=entry.name + SCALE, shape=(entry.shape[0], 1), work=_SCALES)


def _fill(entry: Entry, descriptor: int, offset: int) -> None:
    """Write a weight's values or its scales, a few rows at a time; each of the two reads the weight once."""
    from compressed_tensors.quantization.lifecycle.forward import quantize

    arguments, done = _scheme().weights, 0
    for rows in _row_blocks(entry):
        made = _scales(rows, arguments)
        if entry.work == _VALUES:
            made = quantize(x=rows, scale=made, zero_point=None, args=arguments, dtype=arguments.pytorch_dtype())
        write_at(descriptor, raw_bytes(made.contiguous()), offset + done)
        done += made.nbytes
    assert done == entry.nbytes, entry


def _scales(rows: torch.Tensor, arguments: Any) -> torch.Tensor:
    """Return the scale of each row, which leads its largest value to the largest one of the format."""
    import torch
    from compressed_tensors.quantization.utils import calculate_qparams

    low, high = torch.aminmax(rows, dim=1, keepdim=True)
    scales: torch.Tensor = calculate_qparams(low, high, arguments)[0]
    return scales


def _row_blocks(entry: Entry) -> Iterator[torch.Tensor]:
    import torch

    dtype: Any = getattr(torch, FLOAT_NAMES[entry.source.dtype])
    span, buffer = entry.source, Buffer()
    row_bytes = (span.end - span.begin) // entry.shape[0]
    columns = row_bytes // dtype.itemsize
    descriptor = os.open(span.path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        step = max(1, _BLOCK_VALUES // columns)
        for first in range(0, entry.shape[0], step):
            rows = buffer.take(min(step, entry.shape[0] - first), columns, dtype)
            read_at(descriptor, raw_bytes(rows), span.begin + first * row_bytes, span.path)
            if not is_finite_in(rows, dtype):
                name = entry.name.removesuffix(SCALE)
                raise VerificationError(f"{span.path}: {name} has NaN or infinity in it, for which FP8 has no scale")
            yield rows
    finally:
        os.close(descriptor)
