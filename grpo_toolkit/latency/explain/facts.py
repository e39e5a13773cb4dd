"""The audit without a clock: a model's files, its settings, and what it was seen to do.

On a GPU a lost KV cache can take the same time as a working one, because launching kernels takes longer than running
them. So the first layer of an explanation asks no clock: it reads the files, the loaded model and the lengths of its
forwards.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG, Kind
from grpo_toolkit.checkpoint.pixel_limits import known_pixel_limits
from grpo_toolkit.doctor.diagnose import diagnose_model
from grpo_toolkit.doctor.parse import read_folder
from grpo_toolkit.doctor.parsed_folder import PREPROCESSOR, PROCESSOR, Folder
from grpo_toolkit.doctor.planned_files import DiskFiles
from grpo_toolkit.latency.rows.row import Proof
from grpo_toolkit.model.kv_cache import is_checkpointing
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    import torch

    from grpo_toolkit.doctor.findings import Finding
    from grpo_toolkit.latency.engines.pool import Source
    from grpo_toolkit.latency.engines.protocol import Answer, EngineFacts, Evidence, Options
    from grpo_toolkit.model.hardware.model_sizes import ModelSizes

_OFF_DEVICE: Final = ("cpu", "disk", "meta")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """The settings for running a model that its files, or the live model, declare.

    Attributes:
        is_adapter: an adapter that is not merged.
        eos_token_ids: what ends an answer, sorted; () where nothing is said.
        pixel_limits: smallest and largest number of pixels of an image, None where the processor has no such limits.
        cache_implementation: of the generation defaults.
        is_training: train mode, or gradient checkpointing in train mode.
        findings: what the doctor says.
    """

    is_adapter: bool = False
    eos_token_ids: tuple[int, ...] = ()
    pixel_limits: tuple[int, int] | None = None
    cache_implementation: str | None = None
    is_training: bool = False
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The facts about an arm that need no clock.

    Attributes:
        path: its folder; empty for a live model without one.
        options: how it is run.
        declared: what its files say.
        dtype, attn_implementation: of the loaded model; `places` where accelerate put its modules.
        proof: input lengths, cache and runs of the vision tower of one short answer.
        prompt_tokens, image_tokens: of each request.
        output_tokens: of each answer, with the model's own end of sequence.
        think_tokens: of all answers together.
        capped: answers that ended at the cap.
        patches: image patches that the vision tower was given for the first request.
        sizes: for the physics; None where the engine shows none.
    """

    path: str
    options: Options
    declared: Declared
    dtype: str
    attn_implementation: str | None
    places: tuple[str, ...]
    proof: Proof
    prompt_tokens: tuple[int, ...]
    image_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    think_tokens: int = 0
    capped: int = 0
    patches: int = 0
    sizes: ModelSizes | None = None

    @property
    def cache_implementation(self) -> str:
        """The implementation of the cache that `generate` uses."""
        return self.options.cache_implementation or self.declared.cache_implementation or "dynamic"

    @property
    def is_static(self) -> bool:
        """Return whether the cache has one size, which a compiled decode step is built for."""
        return "static" in self.cache_implementation

    @property
    def forgets(self) -> bool:
        """Return whether one token is fed a step on top of an empty cache, so that the text is wrong."""
        steps = self.proof.step_lengths
        return self.proof.is_cached is False and len(steps) > 1 and all(length == 1 for length in steps[1:])

    @property
    def recomputes(self) -> bool:
        """Return whether every step is fed the whole sequence."""
        return self.proof.is_cached is False and not self.forgets

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """The ids that end an answer."""
        return tuple(sorted(self.options.eos_token_ids or self.declared.eos_token_ids))

    @property
    def pixel_limits(self) -> tuple[int | None, int | None] | None:
        """The smallest and largest number of pixels of an image."""
        if self.options.min_pixels is None and self.options.max_pixels is None:
            return self.declared.pixel_limits
        low, high = self.declared.pixel_limits or (None, None)
        return self.options.min_pixels or low, self.options.max_pixels or high

    @property
    def off_device(self) -> tuple[str, ...]:
        """The places of weights that are not on the device: "cpu", "disk"."""
        return tuple(place for place in self.places if place in _OFF_DEVICE and place != self.options.device)

    @property
    def is_training(self) -> bool:
        """Return whether the model runs in the state that training left it in."""
        return self.options.training or self.declared.is_training

    def finding(self, *codes: str) -> Finding | None:
        """Return the doctor's first finding of these codes."""
        return next((finding for finding in self.declared.findings if finding.code in codes), None)


def declared_by(source: Source, base: Path | None) -> Declared:
    """Return what a source says of itself: a live model by its settings, a folder by its files."""
    if source.model is not None:
        return declared_by_model(source.model, source.processor)
    assert source.path is not None
    return declared_by_files(source.path, base)


def declared_by_files(path: Path, base: Path | None) -> Declared:
    """Return what a folder declares; of an adapter, what its base does, which is what runs.

    Raises:
        CheckpointError: no model folder, or an adapter whose base is not here.
    """
    findings = diagnose_model(path, base=base).findings
    folder = read_folder(DiskFiles(path))
    said = read_folder(DiskFiles(base_of_adapter(path))) if folder.kind is Kind.ADAPTER else folder
    implementation = said.get(GENERATION_CONFIG, "cache_implementation")
    return Declared(
        is_adapter=folder.kind is Kind.ADAPTER,
        eos_token_ids=_ids(
            said.get(GENERATION_CONFIG, "eos_token_id"),
            said.get(CONFIG, "eos_token_id"),
            said.get(CONFIG, "text_config", "eos_token_id"),
        ),
        pixel_limits=_limits(folder) or _limits(said),
        cache_implementation=implementation if isinstance(implementation, str) else None,
        findings=findings,
    )


def _limits(folder: Folder) -> tuple[int, int] | None:
    nested = folder.get(PROCESSOR, "image_processor")
    return known_pixel_limits(folder.objects.get(PREPROCESSOR, nested))


def _ids(*values: Any) -> tuple[int, ...]:
    for value in values:
        ids = value if isinstance(value, (list, tuple)) else [value]
        if ids and all(type(item) is int for item in ids):
            return tuple(sorted(ids))
    return ()


def declared_by_model(model: torch.nn.Module, processor: Any) -> Declared:
    """Return what a live model declares, and the state that it is in."""
    inner = base_model(model)
    config = inner.generation_config
    return Declared(
        is_adapter=any(
            hasattr(module, "lora_A") and not getattr(module, "merged", False) for module in model.modules()
        ),
        eos_token_ids=_ids(getattr(config, "eos_token_id", None), getattr(inner.config, "eos_token_id", None)),
        pixel_limits=known_pixel_limits(processor),
        cache_implementation=getattr(config, "cache_implementation", None),
        is_training=model.training or (is_checkpointing(model) and any(m.training for m in model.modules())),
    )


def facts_of(
    path: str,
    options: Options,
    declared: Declared,
    engine: EngineFacts,
    evidence: Evidence | None,
    answers: Sequence[Answer],
) -> Facts:
    """Put together what was declared, loaded and seen.

    Args:
        path, options: of the arm.
        declared: by its files or its live model.
        engine: what the engine says of the loaded model.
        evidence: of one short answer.
        answers: to every request, ended by the model itself.
    """
    lines = [answer.timeline for answer in answers]
    return Facts(
        path=path,
        options=options,
        declared=declared,
        dtype=engine.dtype,
        attn_implementation=engine.attn_implementation,
        places=tuple(engine.places),
        proof=Proof() if evidence is None else evidence.proof,
        prompt_tokens=tuple(line.prompt_tokens for line in lines),
        image_tokens=tuple(line.image_tokens or 0 for line in lines),
        output_tokens=tuple(line.output_tokens for line in lines),
        think_tokens=sum(line.think_tokens or 0 for line in lines),
        capped=sum(bool(line.is_capped) for line in lines),
        patches=0 if evidence is None else evidence.patches,
        sizes=engine.sizes,
    )


def mean(values: Iterable[int]) -> float:
    """Return the mean of token counts; 0 where there are none."""
    return statistics.fmean(list(values) or [0])
