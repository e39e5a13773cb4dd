"""Warnings from the curves that tell early that a GRPO run learns nothing, each with what to change.

Every rule looks at the mean of one logged metric over the last logs, because single steps of GRPO jump about. A rule
speaks again only after a while, and never stops a run: whoever watches decides.
"""

from __future__ import annotations

import operator
from collections import defaultdict, deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from grpo_vlm.training.screen import above_bar

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import TrainerControl, TrainerState
    from trl import GRPOConfig

WINDOW = 10
"""Logs over which a metric is averaged, and before which nothing is logged."""

FLAT_GROUPS = 0.8
"""Share of groups with the same reward for every completion, beyond which too few teach anything."""

SILENCE = 50
"""Logs for which a rule that has spoken keeps silent."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A limit of a metric: where its mean over the window is beyond `limit`, `advice` is logged.

    Attributes:
        ways: what to change further, so that nothing is advised that the training arguments have already.
        in_flat_groups: given only where most groups have one reward, too.
    """

    metric: str
    beyond: Callable[[float, float], bool]
    limit: float
    advice: str
    ways: Callable[[GRPOConfig], list[str]] = lambda training: []
    in_flat_groups: bool = False


def wider_sampling(training: GRPOConfig) -> list[str]:
    """Return what would let the completions of a group differ more."""
    return [
        *(["raise --temperature towards 1"] if training.temperature < 1 else []),
        *(["raise --top_p to 1"] if training.top_p < 1 else []),
        *(["leave --top_k out"] if training.top_k else []),
        "if it fell during training, lower --learning_rate",
    ]


RULES = (
    Rule(
        metric="frac_reward_zero_std",
        beyond=operator.gt,
        limit=FLAT_GROUPS,
        advice="of the groups have the same reward for every completion and teach nothing. Where the reward is low "
        "the task is too hard: easier rows, a larger model, more --num_generations. Where it is high, it is learnt: "
        "harder rows, or stop",
    ),
    Rule(
        metric="unique_in_group",
        beyond=operator.lt,
        limit=0.3,
        advice="of a group's completions differ, and most groups have one reward: sampling is too narrow",
        ways=wider_sampling,
        in_flat_groups=True,  # Short answers are often the same, and teach as long as rewards differ.
    ),
    Rule(
        metric="completions/clipped_ratio",
        beyond=operator.gt,
        limit=0.3,
        advice="of the completions end at --max_completion_length without an answer. Raise it, or ask for shorter "
        "thoughts",
    ),
    Rule(
        metric="entropy",
        beyond=operator.lt,
        limit=0.02,
        advice="nats a token: the policy has become nearly deterministic and explores no more. Lower --learning_rate, "
        "raise --temperature, or --entropy_coef 0.001",
    ),
    Rule(
        metric="rewards/format_reward/mean",
        beyond=operator.lt,
        limit=0.05,
        advice="of the completions have the form <think>...</think><answer>...</answer>: no answer can be found to "
        "pay for. Check the prompt and the chat template, or start from a model that follows it",
    ),
)


class HealthCallback(TrainerCallback):
    """A callback that applies `RULES` to every log, and warns when held-out accuracy falls."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self._recent: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=WINDOW))
        self._silent_until: dict[str, int] = defaultdict(int)
        self._logs = 0
        self._best_accuracy = 0.0

    def on_log(
        self,
        args: GRPOConfig,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None:
            return
        accuracy = logs.get("eval_accuracy")
        if accuracy is not None:
            self._look_at_accuracy(accuracy, state.global_step)
            return
        self._logs += 1
        for rule in RULES:
            value = logs.get(rule.metric)
            if value is None:
                continue
            recent = self._recent[rule.metric]
            recent.append(float(value))
            average = sum(recent) / len(recent)
            ready = len(recent) == WINDOW and self._logs >= self._silent_until[rule.metric]
            if ready and rule.beyond(average, rule.limit) and (self._groups_are_flat() or not rule.in_flat_groups):
                self._silent_until[rule.metric] = self._logs + SILENCE
                amount = f"{average:.3f}" if rule.metric == "entropy" else f"{average:.0%}"
                advice = "; ".join([rule.advice, *rule.ways(args)])
                self._warn(f"step {state.global_step}: {rule.metric} is {average:.2f}: {amount} {advice}.")

    def _groups_are_flat(self) -> bool:
        recent = self._recent["frac_reward_zero_std"]
        return len(recent) > 0 and sum(recent) / len(recent) > FLAT_GROUPS

    def _look_at_accuracy(self, accuracy: float, step: int) -> None:
        # With a hundred rows, ten points are two standard errors of a difference.
        if accuracy < self._best_accuracy - 0.1:
            self._warn(
                f"step {step}: eval_accuracy is {accuracy:.1%}, after {self._best_accuracy:.1%}: the policy gets "
                "worse. Lower --learning_rate; the best checkpoint is kept with --load_best_model_at_end true."
            )
        self._best_accuracy = max(self._best_accuracy, accuracy)

    def _warn(self, text: str) -> None:
        self.warnings.append(text)
        above_bar(f"health: {text}")
