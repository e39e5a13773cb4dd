"""The open models of a measurement or an explanation, each loaded once: folders, live models, endpoints."""

from __future__ import annotations

import copy
import tempfile
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.engines.local import LocalEngine, load_as
from grpo_toolkit.latency.engines.process import ProcessEngine
from grpo_toolkit.latency.engines.toggles import with_pixels
from grpo_toolkit.model.kv_cache import inference_ready
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.protocol import Engine, Options


@dataclass(frozen=True, kw_only=True, eq=False)
class Source:
    """A model that is asked: a folder, or a live model with its processor.

    Attributes:
        path: the folder; of a live model the one that it was loaded from, if that is here.
        model, processor: of a live model.
    """

    path: Path | None
    model: torch.nn.Module | None = None
    processor: Any = None

    @property
    def name(self) -> str:
        """The name in messages and commands."""
        return str(self.path) if self.path is not None else "the live model"

    @property
    def is_dispatched(self) -> bool:
        """Return whether accelerate spread a live model over devices, or keeps some of it on disk."""
        return self.model is not None and bool(getattr(base_model(self.model), "hf_device_map", None))


class Engines(AbstractContextManager["Engines"]):
    """The models that are open, each loaded once. A context manager that closes them all.

    Args:
        isolated: for `engine`: every folder in a process of its own; else in this process, where loading is cheaper
            and kernel plans are shared.

    Attributes:
        warm: the keys (`Arm.warm_key`) of what has answered before.
        asked_s: seconds that measurements have taken so far, without the loading.
    """

    def __init__(self, *, isolated: bool = True) -> None:
        self.isolated = isolated
        self.warm: set[tuple[object, ...]] = set()
        self.asked_s = 0.0
        # The first item of a key is the place: a folder, or the id of a live model.
        self._open: dict[tuple[object, ...], Engine] = {}
        self._models: dict[tuple[object, ...], tuple[torch.nn.Module, Any]] = {}
        self._merged: dict[Path, Path] = {}
        self._folders = ExitStack()

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process that was started, and remove temporary folders."""
        with self._folders:
            while self._open:
                self._open.popitem()[1].close()
            self._models.clear()
            self._merged.clear()

    def open(self, arm: Arm) -> Engine:
        """Return the engine of an arm, started if there is none yet; arms that load alike share one."""
        if arm.engine_key not in self._open:
            self._open[arm.engine_key] = open_engine(arm)
        return self._open[arm.engine_key]

    def engine(self, source: Source, options: Options) -> Engine:
        """Return the engine of a source, loaded as the options say."""
        if source.model is not None and source.is_dispatched and options.device_map is None:
            assert source.path is not None
            source = Source(path=source.path)  # as whole as it was before accelerate spread it out
        place = id(source.model) if source.model is not None else source.path
        key = (place, *options.load_key, options.training)
        if key not in self._open:
            self._open[key] = self._opened(source, options)
        return self._open[key]

    def release(self, source: Source) -> None:
        """Close the models of a source."""
        place = id(source.model) if source.model is not None else source.path
        merged = self._merged.pop(source.path, None) if source.path is not None else None
        places = {place, source.path, merged} - {None}  # an endpoint's place is None
        for key in [key for key in self._open if key[0] in places]:
            self._open.pop(key).close()
        for key in [key for key in self._models if key[0] in places]:
            self._models.pop(key)

    def merged(self, source: Source) -> Source:
        """Merge the adapter of a source, in a temporary folder or in a copy of a live model."""
        if source.model is not None:
            copied: Any = copy.deepcopy(source.model)
            merged = copied.merge_and_unload()
            return replace(source, model=merged)
        assert source.path is not None
        if source.path not in self._merged:
            from grpo_toolkit.merge.merge import merge_adapter

            folder = Path(self._folders.enter_context(tempfile.TemporaryDirectory(prefix="grpo-toolkit-merged-")))
            self._merged[source.path] = merge_adapter(source.path, folder / "merged", allow_unchanged=True).path
        return Source(path=self._merged[source.path])

    def _opened(self, source: Source, options: Options) -> Engine:
        if source.model is not None:
            return self._open_live(source, source.model, options)
        assert source.path is not None
        if self.isolated:
            return ProcessEngine(source.path, options)
        key = (source.path, options.device, options.device_map, options.dtype, options.attn_implementation)
        if key not in self._models:
            self._models[key] = load_as(source.path, options)
        model, processor = self._models[key]
        return LocalEngine(model, with_pixels(processor, options))

    def _open_live(self, source: Source, model: torch.nn.Module, options: Options) -> Engine:
        inner = base_model(model)
        dtype = str(inner.dtype).removeprefix("torch.")
        attention = getattr(inner.config, "_attn_implementation", None)
        processor = with_pixels(source.processor, options)
        if options.dtype in (None, dtype) and options.attn_implementation in (None, attention):
            return LiveEngine(model, processor)
        if source.is_dispatched:  # accelerate lets nobody move or copy it
            return LiveEngine(self._dispatched_again(source, inner, options), processor)
        import torch

        changed = copy.deepcopy(model)
        if options.dtype is not None:
            changed = changed.to(getattr(torch, options.dtype))
        if options.attn_implementation not in (None, attention):
            base_model(changed).set_attn_implementation(options.attn_implementation)
        return LiveEngine(changed, processor)

    def _dispatched_again(self, source: Source, model: Any, options: Options) -> torch.nn.Module:
        """Load a dispatched model once more, laid out alike, in another dtype or with other attention."""
        from grpo_toolkit.model.load import NO_CODE, auto_class, dtype_argument

        assert source.path is not None, "only a model with a folder is toggled"
        settings: dict[str, Any] = {dtype_argument(): options.dtype or str(model.dtype).removeprefix("torch.")}
        if options.attn_implementation is not None:
            settings["attn_implementation"] = options.attn_implementation
        offloaded = self._folders.enter_context(tempfile.TemporaryDirectory(prefix="grpo-toolkit-offloaded-"))
        again: torch.nn.Module = auto_class(source.path).from_pretrained(
            source.path, device_map=model.hf_device_map, offload_folder=offloaded, **NO_CODE, **settings
        )
        return again.eval()


class LiveEngine(LocalEngine):
    """A live model that may be in its training state: as it stands where the options say `training`, else ready."""

    @contextmanager
    def _state(self, options: Options) -> Iterator[None]:
        if options.training:
            yield
            return
        config = base_model(self.model).generation_config
        cached = None if config is None else config.use_cache
        with inference_ready(self.model):
            if config is not None:
                config.use_cache = cached  # a lost cache is a cause of its own
            yield


def open_engine(arm: Arm) -> Engine:
    """Start what an arm names.

    Raises:
        InputError: it names nothing, or several things.
        CheckpointError: its folder is no checkpoint.
    """
    if sum(what is not None for what in (arm.url or arm.path, arm.live)) != 1:
        raise InputError(f"arm {arm.name}: name one of a folder, an endpoint or a live model")
    if arm.live is not None:
        return LocalEngine(*arm.live)
    if arm.url is not None:
        from grpo_toolkit.latency.engines.endpoint import EndpointEngine

        return EndpointEngine(arm.url, model=None if arm.path is None else str(arm.path))
    assert arm.path is not None
    return ProcessEngine(open_checkpoint(arm.path).path, arm.options)


def source_of(model: Any, processor: Any = None) -> Source:
    """Return the source of a folder, or of a live model with its processor.

    Raises:
        CheckpointError: no model folder.
        InputError: a live model without its processor.
    """
    if hasattr(model, "parameters"):
        if processor is None:
            raise InputError("a live model needs its processor (or tokenizer): pass processor=")
        named = Path(str(getattr(base_model(model).config, "_name_or_path", "") or ""))
        return Source(path=named if named.is_dir() and named.name else None, model=model, processor=processor)
    return Source(path=open_checkpoint(model).path)
