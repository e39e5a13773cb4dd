"""The publication of an FP8 folder: the export first, then its layers quantised, both checked, and compared.

    source -> the export, verified (a scratch folder, unless the source is one) -> FP8, file to file
           -> verified as every export -> held against the unquantised export -> published

Whatever the training left is exported first, so that what is quantised is known to say what the policy says.
"""

from __future__ import annotations

import os
import tempfile
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.base_files import carried_files, copy_files
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG, MANIFEST, Kind, open_checkpoint
from grpo_toolkit.checkpoint.json_files import dump_json, read_json
from grpo_toolkit.checkpoint.manifest import compare_manifest, manifest_of, write_manifest
from grpo_toolkit.checkpoint.publish import check_output, staged
from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
from grpo_toolkit.checkpoint.tensor_names import names_by_live
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.export.export_result import NONE, ExportResult, refuse_failed, report_of
from grpo_toolkit.export.fp8.compare import Comparison, compare_answers
from grpo_toolkit.export.fp8.layers import find_layers, refuse_quantised
from grpo_toolkit.export.fp8.quantise import plan_fp8, quantization_config, refuse_without_library, write_fp8
from grpo_toolkit.export.verify import VerificationResult, verify_export

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.checkpoint.weights.shard_writer import Progress, Shard
    from grpo_toolkit.export.fp8.compare import RewardFunction
    from grpo_toolkit.export.fp8.layers import Layers
    from grpo_toolkit.model.generation.request import Request

KEY: Final = "fp8"
"""The manifest's key."""
_KEPT_KEYS: Final = ("base", "put_right", "changed_in_training", "made_portable", "card")
_WAY_OUT: Final = "; to publish what is only too far from its export: accept_loss=True (--accept-loss)"
READERS: Final = {
    "vllm": "computes in FP8, where it has a kernel for the device",
    "sglang": "reads the format; not tried",
    "transformers": "needs compressed-tensors; unpacks the weights to the unquantised dtype for the first forward, so "
    "it saves download and disk and no memory, and rounds activations as FP8 does",
}


def publish_fp8(
    source: Any,
    target: Path,
    export: Callable[[Path], ExportResult | None],
    *,
    is_taken_as_it_is: bool,
    requests: Sequence[Request] = (),
    prompts: Sequence[Mapping[str, Any]] = (),
    reward_funcs: Sequence[RewardFunction] = (),
    accept_loss: bool = False,
    verify: bool = True,
    device: str = "cpu",
    overwrite: bool = False,
    max_shard_size: str | int | None = None,
    progress: Progress | None = None,
    notes: Mapping[str, Any] | None = None,
    finish: Callable[[Path], object] | None = None,
) -> ExportResult | None:
    """Publish a model in FP8; see `export_model`.

    Args:
        source: what `export_model` was given.
        target: the folder to publish.
        export: makes the unquantised export of it in a folder.
        is_taken_as_it_is: nothing was asked for that would make another export of a source that is one.
        requests, prompts, reward_funcs, device: see `compare_answers`.
        accept_loss: publish also what is further from its export than the tolerance, with the figure.
        verify, overwrite, max_shard_size, progress, notes, finish: see `export_model`.
    """
    started = time.monotonic()
    refuse_without_library()
    check_output(target, overwrite=overwrite)
    with _exported(source, target, export, is_taken_as_it_is=is_taken_as_it_is) as first:
        if first is None:
            return None
        folder = open_base(open_checkpoint(first.path))
        layers = find_layers(folder)
        shards = plan_fp8(folder, layers, max_shard_size=max_shard_size)
        with staged(target, overwrite=overwrite) as staging:
            write_fp8(shards, staging, progress=progress)
            config = _write_files(folder, layers, staging)
            verification, comparison = None, Comparison(checks=())
            if verify:
                verification, comparison = _judge(
                    staging,
                    _as_quantised(folder, shards),
                    partial(compare_answers, requests=requests, prompts=prompts, reward_funcs=reward_funcs),
                    device=device,
                )
            missed = [check.name for check in comparison.checks if not check.passed]
            facts = {
                **_facts_of_the_export(first.path),
                "verification": report_of(verification),
                **(notes or {}),
                KEY: _facts(layers, config, comparison) | {"loss_accepted": missed if accept_loss else []},
            }
            write_manifest(staging, facts, sums=verification is not None)
            refuse_failed(staging, target, verification, accepted=missed if accept_loss else (), way_out=_WAY_OUT)
            if finish is not None:
                finish(staging)
            size = sum(path.stat().st_size for path in staging.rglob("*") if path.is_file())
    seconds = time.monotonic() - started
    report = verification if isinstance(verification, VerificationResult) else None
    return replace(first, path=target, verification=report, bytes=size, seconds=seconds)


@contextmanager
def _exported(
    source: Any, target: Path, export: Callable[[Path], ExportResult | None], *, is_taken_as_it_is: bool
) -> Iterator[ExportResult | None]:
    """Yield the unquantised export: the source itself where it is one, or one that is made for the while."""
    if isinstance(source, (str, os.PathLike)):
        found = open_checkpoint(source) if (Path(source) / CONFIG).is_file() else None
        if found is not None and found.kind is Kind.MODEL:
            refuse_quantised(open_base(found))
            if is_taken_as_it_is and is_verified_export(Path(source)):
                manifest = manifest_of(source)
                yield ExportResult(
                    path=Path(source),
                    base=None if manifest.get("base") is None else Path(str(manifest["base"])),
                    repairs=(),
                    changes=(),
                    made_portable=(),
                    sources={"source": f"export {source}", "base": str(manifest.get("base") or NONE)},
                    verification=None,
                    bytes=0,
                    seconds=0.0,
                )
                return
    beside = next(place for place in Path(os.path.realpath(target)).parents if place.is_dir())
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.fp8-", dir=beside) as scratch:
        yield export(Path(scratch) / "unquantised")


def is_verified_export(folder: Path) -> bool:
    """Return whether a folder is an export of ours that passed its verification, unchanged since."""
    if not (folder / MANIFEST).is_file():
        return False
    try:
        manifest = manifest_of(folder)
        verification = manifest.get("verification")
        passed = isinstance(verification, dict) and verification.get("passed") is True
        return passed and not compare_manifest(folder)[1]
    except InputError:  # damaged, or of another kind: it is exported like any folder
        return False


def _write_files(folder: Base, layers: Layers, staging: Path) -> dict[str, Any]:
    """Write the export's own files, with the quantisation in its config; return that."""
    files = [*carried_files(folder.path), folder.path / GENERATION_CONFIG]
    copy_files([path for path in files if path.is_file()], folder.path, staging)
    config = quantization_config(layers.ignore)
    written = {**read_json(folder.path / CONFIG), "quantization_config": config}
    (staging / CONFIG).write_text(dump_json(written), encoding="utf-8")
    return config


def _as_quantised(folder: Base, shards: Sequence[Shard]) -> Base:
    """Return the export's headers as the FP8 folder's have to be: tensors that are copied have their place there."""
    tensors = {
        entry.name: TensorInfo(dtype=entry.dtype, shape=entry.shape, file="")
        if entry.work
        else folder.tensors[entry.name]
        for shard in shards
        for entry in shard.entries
    }
    return replace(folder, tensors=tensors, stored=names_by_live(tensors, folder.family))


def _judge(
    staging: Path, expected: Base, compare: Callable[..., Comparison], *, device: str
) -> tuple[VerificationResult | WorkerError, Comparison]:
    """Check a staged FP8 folder as every export is checked, and against the one that it was made of."""
    try:
        verification = verify_export(staging, base=expected, device=device)
        comparison = compare(expected.path, staging, device=device)
    except WorkerError as error:
        return error, Comparison(checks=())
    return VerificationResult(checks=(*verification.checks, *comparison.checks)), comparison


def _facts(layers: Layers, config: Mapping[str, Any], comparison: Comparison) -> dict[str, Any]:
    return {
        "format": f"{config['quant_method']} {config['format']}, version {config['version']}",
        "weights": "float8_e4m3fn, a scale for each output channel",
        "activations": "float8_e4m3fn, a scale for each token, found as it comes",
        "layers": len(layers.quantised),
        "readers": READERS,
        "figures": {name: figure.to_json() for name, figure in comparison.figures.items()},
    }


def _facts_of_the_export(path: Path) -> dict[str, Any]:
    """Return what the manifest of the unquantised export says of the model, and its report."""
    manifest = manifest_of(path)
    kept: dict[str, Any] = {key: manifest[key] for key in _KEPT_KEYS if key in manifest}
    return {**kept, "verification_of_the_export": manifest.get("verification")}
