"""TRL's trainer with an evaluation that says what one wants to know: how many held-out rows are answered right.

`GRPOTrainer.evaluate` samples groups and scores them as in training: its loss says nothing of quality, its mean
reward mixes the rewards and the luck of sampling. Here the model answers each row once, greedily, and `eval_accuracy`
is the share that is right; with `metric_for_best_model: eval_accuracy` and `load_best_model_at_end` the best model is
the one that is exported.
"""

from __future__ import annotations

import functools
import time
from typing import TYPE_CHECKING, Any

from trl import GRPOTrainer

from evaluation import held_out_accuracy
from rewards import completion_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

    from rewards import Completion, RewardFunction


class AccuracyTrainer(GRPOTrainer):
    """`GRPOTrainer` whose `evaluate` measures accuracy on the held-out rows."""

    def evaluate(
        self,
        eval_dataset: Dataset | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        rows = eval_dataset if eval_dataset is not None else self.eval_dataset
        began = time.perf_counter()
        metrics = {f"{metric_key_prefix}_accuracy": self.accuracy(rows)}
        metrics[f"{metric_key_prefix}_runtime"] = time.perf_counter() - began
        # GRPOTrainer's own log would average and clear the metrics of the training steps since the last log.
        super(GRPOTrainer, self).log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def accuracy(self, rows: Dataset, *, direct: bool = False) -> float:
        """Share of rows answered right; with `direct` asked for the answer alone, without a thought."""
        sharded = self.is_fsdp_enabled or getattr(self.args.deepspeed_plugin, "zero_stage", 0) == 3
        return held_out_accuracy(
            self.model,
            self.processing_class,
            rows,
            max_new_tokens=self.args.max_completion_length,
            direct=direct,
            # Sharded weights come together in every forward, so that all processes must take the same steps.
            accelerator=None if sharded else self.accelerator,
        )


def with_group_health(reward: RewardFunction, *, num_generations: int) -> RewardFunction:
    """The reward function, which also logs how many different completions a group has (`unique_in_group`, 0 to 1).

    Groups of equal completions have equal rewards, and teach nothing. TRL logs the equal rewards; whether it is the
    sampling that is too narrow, or the task too easy or hard, only the completions tell.
    """

    @functools.wraps(reward)
    def rewarded(completions: list[Completion], log_metric: Any = None, **kwargs: Any) -> list[float]:
        # A process may hold parts of groups where its batch is no multiple of the group's size.
        if log_metric is not None and len(completions) % num_generations == 0:
            log_metric("unique_in_group", unique_in_group(completions, num_generations=num_generations))
        return reward(completions=completions, log_metric=log_metric, **kwargs)

    return rewarded


def unique_in_group(completions: Sequence[Completion], *, num_generations: int) -> float:
    """Mean share of different completions in a group: 1 where all differ, 1 / num_generations where none does."""
    texts = [completion_text(completion) for completion in completions]
    groups = [texts[start : start + num_generations] for start in range(0, len(texts), num_generations)]
    return sum(len(set(group)) / len(group) for group in groups) / len(groups)
