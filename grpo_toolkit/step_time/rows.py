"""The lines of `step_time.jsonl`: one training step each, and what explains them (schema version 1).

Times in seconds, memory in bytes. None is "was not seen" everywhere. `phases_s` of a step adds up to its `wall_s`,
"other" included; `parts_s` splits phases further ("rollout/prefill").

    MFU = FLOPs that the model asks for, without recomputing / (wall time x FLOP/s of a matrix product)
    MBU = bytes that decoding must read / (time of decoding x bandwidth)
    floor = the time that physics asks for at this shape: FLOPs over FLOP/s, bytes over bandwidth
"""

from __future__ import annotations

import uuid
from dataclasses import asdict, dataclass, field
from typing import Any, Final, Literal

from grpo_toolkit.step_time.clock import OTHER

SCHEMA_VERSION: Final = 1

PHASES: Final = (
    "reading_rows",
    "image_processing",
    "texts",
    "preparing",
    "weight_sync",
    "rollout",
    "rewards",
    "old_logprobs",
    "reference_logprobs",
    "forward",
    "backward",
    "optimizer",
    "waiting_for_ranks",
    "logging",
    "evaluation",
    "saving",
    OTHER,
)
"""The phases of a step, in their order."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The work of one step in this process, by the shapes of its forwards.

    Attributes:
        rollouts: calls that generate; `rollout_rows` sequences in all of them.
        prompt_tokens: of the longest prompt, padding included.
        decode_steps: forwards that decode one token for every sequence, in all rollouts.
        forwards: forwards that are backpropagated; `forward_rows` sequences, `forward_tokens` tokens in all of them,
            padding included; `forward_patches` patches of images.
        logprob_forwards, logprob_rows, logprob_tokens: the same of forwards without a gradient.
        flops: that the model asks for, see `MFU`.
        decode_bytes: that decoding must read.
    """

    rollouts: int = 0
    rollout_rows: int = 0
    prompt_tokens: int = 0
    decode_steps: int = 0
    forwards: int = 0
    forward_rows: int = 0
    forward_tokens: int = 0
    forward_patches: int = 0
    logprob_forwards: int = 0
    logprob_rows: int = 0
    logprob_tokens: int = 0
    flops: float | None = None
    decode_bytes: float | None = None


@dataclass(frozen=True, kw_only=True)
class StepRow:
    """One step of one process; one line of `step_time.jsonl`.

    Attributes:
        step: the optimizer step, from 1.
        wall_s: from where its rows begin to be read to where the next step's do.
        phases_s: adds up to `wall_s`. Empty on a GPU's steps that were not sampled, whose phases the host can't tell.
        parts_s: parts of phases, by "phase/part"; the rewards by function.
        clock: "events": phases are the device's; "host": they are the host's, which waits for a CPU anyway.
        is_first: it compiles, plans and allocates: the first of a process, or the first whose compiled rollouts have a
            length or number of rows.
        is_close: it was looked at closely: tensors were compared, which takes some time of its own.
        floors_s: what physics asks for, by phase; None where model or device are not known. `floor_s` is their sum.
    """

    step: int
    rank: int = 0
    world_size: int = 1
    wall_s: float
    phases_s: dict[str, float] = field(default_factory=dict)
    parts_s: dict[str, float] = field(default_factory=dict)
    clock: Literal["events", "host"] = "host"
    is_first: bool = False
    is_close: bool = False
    work: Work = field(default_factory=Work)
    floors_s: dict[str, float] | None = None
    floor_s: float | None = None
    mfu: float | None = None
    mbu: float | None = None
    measured_at: str
    session: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    kind: Literal["step"] = "step"
    schema_version: int = SCHEMA_VERSION

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


NO_CURE: Final = "none here"
"""The beginning of a cure that is none: nothing can be done about it, or what could be is in place."""


@dataclass(frozen=True, kw_only=True)
class FoundCause:
    """One cause of a slow step.

    Attributes:
        cause: its name in `causes.table.CAUSES`.
        evidence: what was seen, without a clock.
        saving_s: seconds of a step that its cure is predicted to save, none of them counted for another cause too;
            None where it can't be predicted.
        savings_s: the same by phase.
        cure, line: what to do, and the line of code or setting that does it.
        link: where it is described.
    """

    cause: str
    evidence: str
    saving_s: float | None
    savings_s: dict[str, float] = field(default_factory=dict)
    cure: str
    line: str = ""
    link: str = ""

    @property
    def is_curable(self) -> bool:
        """Return whether something can be done about it."""
        return not self.cure.startswith(NO_CURE)


@dataclass(frozen=True, kw_only=True)
class TriedCure:
    """A cure that was tried after the training, on copied inputs.

    Attributes:
        line: the line of code that cures `causes`.
        predicted_s, measured_s: seconds of a step that it saves in the phases that were tried.
    """

    line: str
    causes: list[str]
    predicted_s: float
    measured_s: float


@dataclass(frozen=True, kw_only=True)
class StepExplanation:
    """The explanation of a run's steps so far: one line of `step_time.jsonl`.

    Attributes:
        step: the last one that it is about; `steps` is how many.
        wall_s, phases_s, parts_s: the mean step, of those after the first that were not looked at closely.
        floor_s, floors_s: what physics asks for.
        causes: the one that costs most first.
        unexplained_s: what is left of the time above the floor when all causes are cured.
        tried: cures that were measured beside what they were predicted to save.
        slowest_rank: where there are several processes, the one the others wait for.
    """

    step: int
    steps: int
    wall_s: float
    phases_s: dict[str, float]
    parts_s: dict[str, float] = field(default_factory=dict)
    clock: Literal["events", "host"] = "host"
    floor_s: float | None = None
    floors_s: dict[str, float] | None = None
    mfu: float | None = None
    mbu: float | None = None
    causes: list[FoundCause] = field(default_factory=list)
    unexplained_s: float | None = None
    tried: list[TriedCure] = field(default_factory=list)
    slowest_rank: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    measured_at: str
    session: str
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    kind: Literal["step_explanation"] = "step_explanation"
    schema_version: int = SCHEMA_VERSION

    @property
    def top_cause(self) -> str | None:
        """The cause to cure first; None where nothing can be done about any."""
        return next((found.cause for found in self.causes if found.is_curable), None)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)
