"""An export's plan: what is exported, opened once, and how it is to be stored."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter
from grpo_toolkit.checkpoint.folders.lineage import recorded_base
from grpo_toolkit.checkpoint.folders.model_folder import Kind, open_checkpoint
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.checkpoint.weights.copy_weights import plan_copy
from grpo_toolkit.doctor.compat import published_renames
from grpo_toolkit.errors import CheckpointError, InputError, UnsupportedError, named
from grpo_toolkit.export.findings_check import loads_whole, refuse_unloadable
from grpo_toolkit.export.live_adapter import is_adapted, refuse_unmergeable
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.load import load_model, model_without_weights
from grpo_toolkit.model.memory import why_too_large
from grpo_toolkit.model.saving.processor_files import processor_of, whole_processor
from grpo_toolkit.model.saving.save_hook import base_folder, capture_model_defaults
from grpo_toolkit.model.sharding.gather import is_fsdp1
from grpo_toolkit.model.unheld_tensors import without_the_bases

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import torch
    from transformers import PreTrainedModel, Trainer

    from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults
    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.checkpoint.weights.shard_writer import Progress, Shard


@dataclass(frozen=True, kw_only=True)
class Storage:
    """The storage of an export's weights.

    Attributes:
        dtype: safetensors' name of the dtype of every floating-point tensor ("BF16"); None for the base's own.
        compat: "all" for the names that the family is published with, "v5" for the base's.
        max_shard_size: largest weight file, such as "5GB"; None for a folder's (or the base's) own files.
        link: hard links in place of copies, where the file system has them.
        progress: called with the bytes done and the bytes in all.
    """

    dtype: str | None = None
    compat: str = "all"
    max_shard_size: str | int | None = None
    link: bool = False
    progress: Progress | None = None

    @property
    def dtype_name(self) -> str | None:
        """The name that torch has for `dtype` ("bfloat16"), or None."""
        return None if self.dtype is None else FLOAT_NAMES[self.dtype]

    def renames(self, names: Iterable[str], model_type: object) -> dict[str, str]:
        """Return new names for the tensors whose names are not the published ones."""
        return published_renames(names, model_type, compat=self.compat)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A trained model and the base it was trained from.

    Attributes:
        model: the live model; a folder's own (an adapter's base), without weights unless `is_loaded`.
        processor: its processor or tokenizer, or None.
        base: the base as its headers describe it, or None where there is no base on disk.
        device: where the model runs, and where its export is verified.
        is_adapter: whether an adapter has to be merged.
        is_loaded: whether the model can generate.
        folder: where the model came from, if it was a folder.
        tensors: the folder's tensors.
        renames: new names of the base's tensors, where they are not published ones.
        is_alone: whether no base is known: its files are then the folder's own.
        shards: the weight files of an export that takes the folder's tensors without loading them, or empty.
    """

    model: torch.nn.Module
    processor: Any
    base: Base | None
    device: str
    is_adapter: bool
    is_loaded: bool = True
    is_alone: bool = False
    folder: Path | None = None
    tensors: Mapping[str, TensorInfo] = field(default_factory=dict)
    renames: Mapping[str, str] = field(default_factory=dict)
    shards: tuple[Shard, ...] = ()

    @property
    def plain(self) -> PreTrainedModel:
        """The transformers model itself, without wrappers (DDP, `torch.compile`, PEFT)."""
        return base_model(self.model)

    def __str__(self) -> str:
        kind = "adapter" if self.is_adapter else "model"
        if self.folder is not None:
            return f"{kind} {self.folder}"
        return f"live {kind} ({type(self.plain).__name__}, {str(self.plain.dtype).removeprefix('torch.')})"


@dataclass(frozen=True, kw_only=True)
class ExportPlan:
    """The source of an export, the storage of its weights, and the defaults in its configs."""

    source: Source
    storage: Storage
    defaults: InferenceDefaults

    @property
    def base_folder(self) -> Path | None:
        """The folder whose files are carried: the base's, or the source's own; None where there is neither."""
        return None if self.source.base is None else self.source.base.path

    @property
    def known_base(self) -> Path | None:
        """The base's folder, None where no base is known."""
        return None if self.source.is_alone else self.base_folder

    @cached_property
    def stored(self) -> Mapping[str, str]:
        """The dtypes of the base's floating-point tensors, as torch names them, by their names in the export."""
        tensors = {} if self.source.base is None else self.source.base.tensors
        return {
            self.source.renames.get(name, name): FLOAT_NAMES[self.storage.dtype or info.dtype]
            for name, info in tensors.items()
            if info.dtype in FLOAT_NAMES
        }

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the export: the one asked for, else that of most of the base's tensors, else the model's own.

        TRL loads a model given by name in float32 unless told otherwise: a bfloat16 base would double in size.
        """
        import torch

        names = [self.storage.dtype_name] if self.storage.dtype_name else list(self.stored.values())
        own: torch.dtype = self.source.plain.dtype
        return getattr(torch, max(set(names), key=names.count)) if names else own


def plan_export(
    source: Trainer | torch.nn.Module | str | os.PathLike[str],
    storage: Storage,
    *,
    base: Path | None = None,
    processing_class: Any = None,
    overrides: Mapping[str, Any] | None = None,
    device: str = "cpu",
    load: bool = True,
) -> ExportPlan:
    """Open what is exported, and decide how.

    Args:
        source: a trainer, a model, or a folder with a full model or an adapter.
        storage: how the weights are to be stored.
        base: the base's folder; by default the one that the model or adapter names.
        processing_class: the processor or tokenizer; by default the trainer's, the folder's or the base's.
        overrides: keys for `generation_config.json` that win over the base's.
        device: where a folder is loaded.
        load: load a folder's model, if there is memory for it, although its weights can be taken from its files.

    Raises:
        CheckpointError: a folder that holds no model, or whose model cannot be loaded.
        UnsupportedError: see `refuse_unsupported`.
    """
    if isinstance(source, (str, os.PathLike)):
        opened = _open_folder(Path(source), storage, base, processing_class, device=device, load=load)
    else:
        opened = _open_live(source, storage, base, processing_class)
    folder = None if opened.base is None else opened.base.path
    defaults = capture_model_defaults(opened.model, base=folder, overrides=overrides)
    return ExportPlan(source=opened, storage=storage, defaults=defaults)


def refuse_unsupported(model: torch.nn.Module) -> None:
    """Raise for models that cannot be exported; the callback calls this before training.

    Raises:
        UnsupportedError: FSDP1, or an adapter that cannot be merged.
    """
    if is_fsdp1(model):
        raise UnsupportedError(
            "the model is wrapped by FSDP1, which cannot be exported live; set `fsdp_version: 2` in the accelerate "
            "config, or save a full checkpoint with trainer.save_model() and export that folder"
        )
    refuse_unmergeable(model)


def _open_live(source: Any, storage: Storage, base: Path | None, processing_class: Any) -> Source:
    is_trainer = hasattr(source, "model") and hasattr(source, "processing_class")
    model = source.model if is_trainer else source
    refuse_unsupported(model)
    origin = base or base_folder(model)
    known = None if origin is None else open_base(open_checkpoint(origin))
    return Source(
        model=model,
        processor=_processor(processing_class, source.processing_class if is_trainer else None, origin),
        base=known,
        device=str(base_model(model).device),
        is_adapter=is_adapted(model),
        renames={} if known is None else storage.renames(known.tensors, known.config.get("model_type")),
    )


def _open_folder(
    folder: Path, storage: Storage, base: Path | None, processing_class: Any, *, device: str, load: bool
) -> Source:
    """Open a folder. Headers come first: a file that is damaged or cut off is named before anything is loaded."""
    checkpoint = open_checkpoint(folder)
    is_adapter = checkpoint.kind is Kind.ADAPTER
    origin = base or (base_of_adapter(folder) if is_adapter else recorded_base(folder) or folder)
    known = open_base(checkpoint if origin == folder else open_checkpoint(origin))
    tensors = known.tensors if origin == folder else checkpoint.tensors()
    refuse_unloadable(folder, origin)
    renames = storage.renames(known.tensors, known.config.get("model_type"))
    shards: Sequence[Shard] = ()
    if tensors and known.tensors and not is_adapter:
        size = storage.max_shard_size
        shards = plan_copy(folder, tensors, known, names=renames, dtype=storage.dtype, max_shard_size=size) or ()
    is_streamed = is_adapter or bool(shards)
    fits = not is_streamed or (load and why_too_large(known.tensors if is_adapter else tensors, device) is None)
    model, own = _load(folder, base, known, device) if fits else _empty(folder, origin if is_adapter else folder)
    refuse_unsupported(model)
    return Source(
        model=model,
        processor=_processor(processing_class, own, origin),
        base=known,
        device=device,
        is_adapter=is_adapter,
        is_loaded=fits,
        is_alone=base is None and origin == folder,
        folder=folder,
        tensors=tensors,
        renames=renames,
        shards=tuple(shards),
    )


def _processor(given: Any, own: Any, base: Path | None) -> Any:
    processor = given if given is not None else own
    return processor if base is None else whole_processor(processor, base)


def _load(folder: Path, base: Path | None, known: Base, device: str) -> tuple[torch.nn.Module, Any]:
    with _named_if_unloadable(folder):
        model, processor, report = load_model(folder, device=device, base=base)
    report = without_the_bases(report, known)
    if not report.is_clean:
        raise InputError(
            f"{folder}: its weights do not fit its config ({loads_whole(report).detail}); nothing was exported"
        )
    return model, processor


def _empty(folder: Path, origin: Path) -> tuple[torch.nn.Module, Any]:
    """Build the model of `origin` from its configs alone, on the meta device, and open the folder's processor."""
    with _named_if_unloadable(folder):
        return model_without_weights(origin), processor_of(folder)


@contextmanager
def _named_if_unloadable(folder: Path) -> Iterator[None]:
    """Turn what the libraries raise about a folder into one error that names it."""
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise CheckpointError(f"{folder}: cannot be loaded ({named(error)})") from error
