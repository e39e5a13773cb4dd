"""The lines of `latency.jsonl`: one arm each, measured on one workload, with raw timelines (schema version 2).

Times in seconds, memory in bytes, throughput in tokens per second. None is "was not measured" everywhere: an engine
behind an endpoint shows no phases and no memory, a run out of memory has an `error` and no times.

    TTFT = the first token's time, from the start of preprocessing
    TPOT = (t_last - t_first) / (n - 1), None where n < 2; of a batch, see `Timeline.tpot_s`
    E2E  = the last token's time, and detokenising;  output tokens/s = output tokens of the batch / E2E
"""

from __future__ import annotations

import statistics
import uuid
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal

from grpo_toolkit.checkpoint.short_repr import ShortRepr

if TYPE_CHECKING:
    from collections.abc import Sequence

SCHEMA_VERSION: Final = 2

METRICS: Final = {"tpot_s": "per output token", "ttft_s": "to first token", "e2e_s": "end to end"}
"""The times that arms are compared by, and their names for people."""

Verdict = Literal["faster", "slower", "same", "cannot tell"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A figure over the measured requests; percentiles only where the sample is large enough (see `statistics`)."""

    n: int
    median: float
    q1: float
    q3: float
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The settings with which the arm ran; None leaves one to its files or to the library.

    `ahead`: with `DecodeAhead`; `packed_vision`: one attention call a layer in the vision tower; `eos_token_ids`,
    `min_pixels`, `max_pixels` overrule the folder's; `training`: train mode and gradient checkpointing left on, as
    after `train()`; `sample`: as the generation config says, instead of greedily.
    """

    engine: Literal["transformers", "openai"] = "transformers"
    device: str
    dtype: str
    use_cache: bool | None = None
    cache_implementation: str | None = None
    attn_implementation: str | None = None
    sdpa_backend: str | None = None
    compiled: bool = False
    ahead: bool = False
    packed_vision: bool = False
    device_map: str | None = None
    eos_token_ids: list[int] | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    training: bool = False
    sample: bool = False


@dataclass(frozen=True, kw_only=True)
class Workload:
    """The requests. `fixed`: exactly `max_new_tokens` each; `natural`: until the model's own end of sequence.

    Prompt and image tokens are medians over the requests. `thinking` None: the prompts do not say. `lengths`: whether
    every request has lengths of the KV cache that its process has not met before.
    """

    name: str
    kind: Literal["fixed", "natural"] = "fixed"
    batch_size: int = 1
    requests: int
    prompt_tokens: int
    image_tokens: int | None = None
    max_new_tokens: int
    thinking: bool | None = None
    seed: int | None = None
    lengths: Literal["repeated", "new"] = "repeated"


@dataclass(frozen=True, kw_only=True)
class Phases:
    """The parts of a request's time, in seconds. They add up to E2E: `prefill_s` ends with the first token.

    `vision_s` is the vision tower's, all its runs together; what ran before the first token is taken out of
    `prefill_s`, what ran after it (a lost cache) out of `decode_s`. With `ahead`, `detokenize_s` has the forward that
    runs after an end of sequence in it.
    """

    tokenize_s: Summary | None = None
    image_s: Summary | None = None
    transfer_s: Summary | None = None
    vision_s: Summary | None = None
    prefill_s: Summary | None = None
    decode_s: Summary | None = None
    detokenize_s: Summary | None = None


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The output tokens of a request, and the number of requests that ended at the cap.

    `at_once`: how many rounds have no TPOT because their tokens arrived at once (see `Timeline.tpot_s`).
    """

    output: Summary
    think: Summary | None = None
    answer: Summary | None = None
    capped: int = 0
    at_once: int = 0


@dataclass(frozen=True, kw_only=True)
class Memory:
    """The memory, in bytes.

    `kv_theory_bytes`: 2 x layers x KV heads x head dim x bytes x tokens x batch, at the longest request.
    """

    weights_bytes: int | None = None
    kv_theory_bytes: int | None = None
    kv_bytes: int | None = None
    peak_allocated_bytes: int | None = None
    peak_reserved_bytes: int | None = None
    peak_resident_bytes: int | None = None

    @property
    def peak_bytes(self) -> int | None:
        """The GPU allocator's peak where there is one, otherwise the process's resident peak."""
        return self.peak_resident_bytes if self.peak_allocated_bytes is None else self.peak_allocated_bytes


@dataclass(frozen=True, kw_only=True)
class Proof:
    """The observations that need no clock (see `model.cache_probe`). `step_lengths` are those of the first request."""

    is_cached: bool | None = None
    step_lengths: list[int] = field(default_factory=list)
    vision_calls: int | None = None


@dataclass(frozen=True, kw_only=True)
class Roofline:
    """The time that physics allows. MBU = floor_tpot_s / tpot_s; MFU = FLOPs of the prefill / (time x peak FLOP/s)."""

    bytes_per_step: int
    bandwidth_bytes_per_s: float
    datasheet_bytes_per_s: float | None = None
    floor_tpot_s: float
    mbu: float | None = None
    prefill_flops: float | None = None
    vision_flops: float | None = None
    peak_flops_per_s: float | None = None
    mfu: float | None = None
    gap_s: float | None = None


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """The ratio of this arm's time to another's, paired by round: the median and its 95% bootstrap interval.

    `low`, `high`: None of too few rounds for an interval. `left_out`: rounds that are no pair because the answer of
    one of the two arms arrived at once and has no TPOT.
    """

    against: str
    metric: str = "tpot_s"
    median: float
    low: float | None
    high: float | None
    pairs: int
    verdict: Verdict
    left_out: int = 0


AT_ONCE_S: Final = 5e-5
"""Seconds per token that no model needs: 20,000 tokens a second of one sequence."""


@dataclass(frozen=True, kw_only=True, repr=False)
class Timeline(ShortRepr):
    """A measured request (or batch), raw.

    `token_times_s` run from the start of preprocessing, one per step of the batch; of an endpoint, one per token where
    it says which tokens arrived (vLLM) or how many (SGLang), otherwise one per piece of text. Where sequences were
    streams of their own, these are the times of all of them, in order, and `sequence_times_s` those of each.
    `output_tokens` is of the whole batch, `output_lengths` of each of its sequences. `prompt_tokens` is the longest
    prompt, `image_tokens` those of one sequence; `is_capped`: any sequence ended at the cap.
    """

    token_times_s: list[float]
    prompt_tokens: int
    output_tokens: int
    output_lengths: list[int] = field(default_factory=list)
    sequence_times_s: list[list[float]] = field(default_factory=list)
    image_tokens: int | None = None
    think_tokens: int | None = None
    answer_tokens: int | None = None
    first_answer_s: float | None = None
    is_capped: bool | None = None
    phases_s: dict[str, float] = field(default_factory=dict)

    @property
    def ttft_s(self) -> float:
        """The time to the first token, preprocessing included; of several streams, to the first token of any."""
        return self.token_times_s[0]

    @property
    def tpot_s(self) -> float | None:
        """The time per output token of one sequence.

        Of a batch that steps together it is the longest sequence's, of several streams the median over them, each by
        its own first and last token. Where streams step together, both are the same.

        None where no sequence has two tokens, or where they arrived at once (`AT_ONCE_S`): something on the way held
        the answer back, a server with few cores or a proxy that buffers, and nothing is known of its tokens' times.
        """
        lengths = self.output_lengths or [self.output_tokens]
        if not self.sequence_times_s:
            return _tpot_s(self.token_times_s, max(lengths))
        found = [_tpot_s(times, length) for times, length in zip(self.sequence_times_s, lengths, strict=True)]
        return statistics.median(there) if (there := [tpot for tpot in found if tpot is not None]) else None

    @property
    def is_at_once(self) -> bool:
        """Return whether it has no TPOT although it has the tokens for one."""
        return self.tpot_s is None and max(self.output_lengths or [self.output_tokens]) > 1

    @property
    def streams_s(self) -> list[list[float]]:
        """The lists of token times in which a gap is one sequence's: one a stream, or one of the batch's steps."""
        return self.sequence_times_s or [self.token_times_s]

    @property
    def e2e_s(self) -> float:
        """The time until the whole text is there."""
        return self.token_times_s[-1] + self.phases_s.get("detokenize_s", 0.0)


def _tpot_s(times: Sequence[float], tokens: int) -> float | None:
    if tokens < 2:
        return None
    tpot_s = (times[-1] - times[0]) / (tokens - 1)
    return tpot_s if tpot_s > AT_ONCE_S else None


@dataclass(frozen=True, kw_only=True, repr=False)
class LatencyRow(ShortRepr):
    """A measurement of one arm: one line of `latency.jsonl`.

    Rows of one session took turns with each other and may be compared; `id` is what a replay knows a row by.
    `arm` is the name on charts (`base`, `checkpoint`, `export`, ...). `ratios` holds this arm against others of its
    session.
    """

    arm: str
    path: str
    step: int | None = None
    settings: Settings
    workload: Workload
    rounds: int
    ttft_s: Summary | None = None
    tpot_s: Summary | None = None
    e2e_s: Summary | None = None
    first_answer_s: Summary | None = None
    output_tokens_per_s: Summary | None = None
    phases: Phases = field(default_factory=Phases)
    tokens: Tokens | None = None
    memory: Memory = field(default_factory=Memory)
    proof: Proof = field(default_factory=Proof)
    roofline: Roofline | None = None
    ratios: list[Ratio] = field(default_factory=list)
    warmup_s: float | None = None
    parameters: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    timelines: list[Timeline] = field(default_factory=list)
    error: str | None = None
    measured_at: str
    session: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    kind: Literal["measurement"] = "measurement"
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A bar of a waterfall: the seconds that one cause adds to the metric.

    Attributes:
        layer: "exact" (a split that sums up), "toggled" (measured by switching this cause alone) or "unexplained".
        cause: a name of `explain.CAUSES`, or the name of a phase.
        effect_s, low_s, high_s: the effect and its 95% interval.
        predicted_s: what bandwidth and FLOPs predict, None where they say nothing.
        evidence: what was seen without a clock.
        cure, command: what to do about it.
    """

    layer: Literal["exact", "toggled", "unexplained"]
    cause: str
    effect_s: float
    low_s: float | None = None
    high_s: float | None = None
    predicted_s: float | None = None
    evidence: str = ""
    cure: str = ""
    command: str = ""


@dataclass(frozen=True, kw_only=True, repr=False)
class ExplanationRow(ShortRepr):
    """The explanation of the time of `trained` beside that of `base`: one line of `latency.jsonl`.

    `audit` is what was found without a clock, also where it cost no time here. `split` are the exact effects: they
    sum to `trained_s - base_s`. `effects` are toggled causes, largest first, and end with what is left unexplained:
    they too sum to the difference, whose 95% interval is `low_s` to `high_s` (None: too few rounds for one).
    """

    base: str
    trained: str
    metric: str
    base_s: float
    trained_s: float
    low_s: float | None = None
    high_s: float | None = None
    audit: list[Effect] = field(default_factory=list)
    split: list[Effect] = field(default_factory=list)
    effects: list[Effect] = field(default_factory=list)
    step: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    measured_at: str
    session: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    kind: Literal["explanation"] = "explanation"
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
