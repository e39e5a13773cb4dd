"""A cause of slow steps: a rule that sees it, and its cure; and the mean step that rules are given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from grpo_toolkit.step_time.seen import RolloutSeen, Seen, VisionSeen
    from grpo_toolkit.step_time.work import Machine

DOCS: Final = "docs/benchmarks/training.md"

PACKED: Final = "PackedVisionCallback()"
FAST: Final = "FastRolloutCallback()"

PADDING: Final = 0.3
"""The share of padding in the tokens from which on it is a cause."""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """The mean step: seconds of phases and their parts, and what physics asks for.

    `busy_s`: of each rank, the seconds until the ranks meet: rows, images, rollouts, rewards.
    """

    wall_s: float
    phases_s: dict[str, float]
    parts_s: dict[str, float] = field(default_factory=dict)
    floors_s: dict[str, float] = field(default_factory=dict)
    decode_steps: float = 0.0
    rollouts: float = 0.0
    machine: Machine | None = None
    busy_s: dict[int, float] = field(default_factory=dict)

    def seconds(self, name: str) -> float:
        """Return the seconds of a phase or of a part."""
        return self.phases_s.get(name, 0.0) if "/" not in name else self.parts_s.get(name, 0.0)

    def share(self, phase: str) -> float:
        """Return a phase's share of the step."""
        return self.seconds(phase) / self.wall_s if self.wall_s > 0 else 0.0


@dataclass(frozen=True, kw_only=True)
class Found:
    """The finding of a rule: its evidence, and the seconds that a cure saves, by phase or part; None: not known."""

    evidence: str
    savings_s: dict[str, float] | None = None
    cure: str | None = None
    line: str | None = None


Rule = Callable[["Seen", Mean], "Found | None"]


@dataclass(frozen=True, kw_only=True)
class Cause:
    """One cause.

    Attributes:
        name: stable, in kebab-case.
        title: in a few words.
        rule: tells whether it is there, what shows it, and what it costs.
        cure, line: what to do, and the line of code or setting for it.
        link: where it is described.
    """

    name: str
    title: str
    rule: Rule
    cure: str
    line: str = ""
    link: str = DOCS


def plain_rollout(seen: Seen) -> RolloutSeen | None:
    """Return the rollouts, if they were made by a `generate` of this process."""
    rollout = seen.rollout
    return rollout if rollout is not None and rollout.engine in ("generate", "fast") and rollout.rows else None


def vision_in(seen: Seen) -> VisionSeen | None:
    """Return what the vision tower did, if there was an image."""
    return seen.vision if seen.vision is not None and seen.vision.images else None
