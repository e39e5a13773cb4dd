"""The causes for which a step is slow: one small rule each, with evidence that needs no clock, effect, cure and link.

A rule is given what was seen of a step and the mean step's seconds, and says what it saw and how many seconds of what
phase its cure would save. The seconds are predictions, from counts, bytes and FLOPs and the phase's own time; in the
order of `CAUSES` they are taken off a phase where several share it.
"""

from __future__ import annotations

from typing import Final

from grpo_toolkit.step_time.causes import kernels, rollouts, training, vision

CAUSES: Final = (*rollouts.CAUSES, *vision.CAUSES, *training.CAUSES, *kernels.CAUSES)
"""Every cause, in the order in which their savings are taken off a phase."""

BY_NAME: Final = {cause.name: cause for cause in CAUSES}
