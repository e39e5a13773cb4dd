"""One protocol for everything that is timed: requests in, one timeline of token times out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self

    from grpo_toolkit.latency.rows.row import Proof, Timeline
    from grpo_toolkit.model.generation.request import Request
    from grpo_toolkit.model.hardware.model_sizes import ModelSizes

SdpaBackend = Literal["flash", "efficient", "math", "cudnn", "no_cudnn"]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """The way in which a model is loaded and run. None leaves a setting to the model's files, or to the library.

    Attributes:
        device: "cpu", "cuda", "cuda:1", ...
        device_map: accelerate's, such as "auto"; None puts the whole model on `device`.
        dtype: "float32", "bfloat16", ...; None is that of the files.
        attn_implementation: "sdpa", "eager", "flash_attention_2", ...
        min_pixels, max_pixels: of the image processor.
        threads: of torch in the model's process.
        use_cache: overrules `generation_config.use_cache`.
        cache_implementation: "dynamic", "static", ...
        compiled: with a static cache, whether decoding is compiled; the library does it on GPUs and not on CPUs.
        compile_mode: torch.compile's, of a compiled step; None is transformers' own ("reduce-overhead").
        ahead: decode with `DecodeAhead`, which checks stops a step late and keeps its static cache.
        sdpa_backend: which kernel SDPA may use; "no_cudnn" allows all but that one.
        eos_token_ids: end a natural answer at these.
        packed_vision: one attention call a layer in the vision tower, and each distinct image of a batch once, as
            `PackedVisionCallback` has it in a training; answers differ by rounding.
        training: train mode with gradient checkpointing on, as a trainer leaves its model.
        sample: decode as the generation config says (seeded), not greedily with every penalty off.
    """

    device: str = "cpu"
    device_map: str | None = None
    dtype: str | None = None
    attn_implementation: str | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    threads: int | None = None
    use_cache: bool | None = None
    cache_implementation: str | None = None
    compiled: bool | None = None
    compile_mode: str | None = None
    ahead: bool = False
    sdpa_backend: SdpaBackend | None = None
    eos_token_ids: tuple[int, ...] | None = None
    packed_vision: bool = False
    training: bool = False
    sample: bool = False

    @property
    def load_key(self) -> tuple[object, ...]:
        """The options that arms must share to share a model."""
        pixels = (self.min_pixels, self.max_pixels)
        return (self.device, self.device_map, self.dtype, self.attn_implementation, pixels, self.threads)

    @property
    def is_compiled(self) -> bool:
        """Return whether decoding runs compiled: transformers does so by itself for a static cache on a GPU."""
        wanted = self.device.startswith("cuda") if self.compiled is None else self.compiled
        return wanted and self.cache_implementation in ("static", "hybrid", "sliding_window")


Options = RunOptions
"""The older name, which is the one inside this package."""


@dataclass(frozen=True, kw_only=True)
class EngineFacts:
    """The facts that an engine tells of itself; None where it does not say.

    Attributes:
        model_type: of its config, "" behind an endpoint.
        dtype: of the weights, "" behind an endpoint.
        device: where the model is, "" behind an endpoint.
        parameters: how many.
        attn_implementation: what the library chose.
        places: where accelerate put its modules ("cuda:0", "cpu", "disk"); empty where all went to one device.
        sizes: what the roofline needs.
        environment: versions and hardware of the process that runs the model.
    """

    model_type: str = ""
    dtype: str = ""
    device: str = ""
    parameters: int | None = None
    attn_implementation: str | None = None
    places: list[str] = field(default_factory=list)
    sizes: ModelSizes | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The answer to one batch of requests: its timeline, tokens and texts.

    Attributes:
        timeline: all times.
        tokens: the output tokens of each sequence, end of sequence included; empty behind an endpoint
            that does not say.
        texts: the output text of each sequence.
        peak_allocated_bytes, peak_reserved_bytes: of the GPU's allocator, None on a CPU.
        peak_resident_bytes: of the process.
    """

    timeline: Timeline
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_resident_bytes: int | None = None


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The observations of one more answer to the same requests, with hooks on the model and without a clock.

    Attributes:
        proof: lengths, cache, runs of the vision tower.
        kv_bytes: what the KV cache held at the end.
        tokens: the output tokens of each sequence.
        patches: image patches that the vision tower was given.
        rivals: of the first sequence, per token the next best tokens and how far their logits were below its own; only
            where the request asks for them.
    """

    proof: Proof
    kv_bytes: int | None = None
    tokens: list[list[int]] = field(default_factory=list)
    patches: int = 0
    rivals: list[dict[int, float]] = field(default_factory=list)


class Engine(Protocol):
    """A model that can be asked. `close` frees what it holds; an engine is also a context manager.

    What has a body here is that of an engine which cannot be looked into.
    """

    def facts(self) -> EngineFacts:
        """Return what is running; waits until it is loaded."""

    def ask(self, requests: Sequence[Request], options: Options) -> Answer:
        """Answer a batch. Requests of one batch have the same `max_new_tokens` and `exact`.

        Raises:
            OutOfMemoryError: the batch did not fit; the engine can be asked again.
            UnsupportedError: no kernel of the SDPA backend can do it.
        """

    def prove(self, requests: Sequence[Request], options: Options) -> Evidence | None:
        """Answer a batch under observation, untimed; None where nothing can be observed."""
        return None

    def environment(self) -> dict[str, str]:
        """Return versions and hardware as in `facts`, with clocks, throttling and load as they are now."""
        return self.facts().environment

    def probe_hardware(self) -> dict[str, float]:
        """Measure bandwidth (bytes/s) and matrix throughput (FLOP/s) of the device; {} if out of reach."""
        return {}

    def close(self) -> None:
        """Free everything."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@dataclass
class Measured:
    """The results of one arm so far."""

    facts: EngineFacts = field(default_factory=EngineFacts)
    answers: list[Answer] = field(default_factory=list)
    evidence: Evidence | None = None
    hardware: dict[str, float] = field(default_factory=dict)
    warmup_s: float = 0.0
    error: str | None = None
