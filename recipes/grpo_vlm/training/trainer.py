"""TRL's trainer with an evaluation that counts the held-out rows answered right.

`GRPOTrainer.evaluate` samples groups and scores them as in training: its loss says nothing of quality, its mean
reward mixes the rewards and the luck of sampling. Here the model answers each row once, greedily, and `eval_accuracy`
is the share that is right; with `metric_for_best_model: eval_accuracy` and `load_best_model_at_end` the best model is
the one that is exported.
"""

from __future__ import annotations

import functools
import sys
import time
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from grpo_toolkit import FastRolloutCallback
from grpo_vlm.rewards.rewards import completion_text
from grpo_vlm.training.evaluation import held_out_accuracy
from grpo_vlm.training.screen import above_bar

if TYPE_CHECKING:
    from collections.abc import Sequence

    from datasets import Dataset

    from grpo_vlm.rewards.rewards import Completion, RewardFunction


class AccuracyTrainer(GRPOTrainer):
    """A `GRPOTrainer` whose `evaluate` measures held-out accuracy, and whose vLLM sees the prompts it trains on.

    With `packed_vision` the model is evaluated as it is trained with `PackedVisionCallback`, before, in and after the
    training alike, so that accuracies differ by what was learnt alone. While its `FastRolloutCallback` has rollouts go
    the fast way, so do the answers of an evaluation.
    """

    def __init__(self, *args: Any, packed_vision: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._packed_vision = packed_vision
        callbacks = self.callback_handler.callbacks
        self._fast = next((one for one in callbacks if isinstance(one, FastRolloutCallback)), None)
        image_token = getattr(self.processing_class, "image_token", None)
        if self.use_vllm and image_token is not None:
            # TRL bans it from its own rollouts alone; a completion with one in it stops the training forward.
            self.vllm_generation.generation_kwargs.setdefault("bad_words", [image_token])

    def _generate_single_turn(self, prompt_ids: list[list[int]], images: Any, *args: Any, **kwargs: Any) -> Any:
        if self.use_vllm and self.vllm_mode == "colocate" and images is not None:
            # vLLM writes out each image's tokens itself. Given prompts in which they are written out already, it does
            # it again, and answers to another prompt (huggingface/trl#6294). Its server finds images by their tokens.
            image_token_id = self.processing_class.image_token_id
            prompt_ids = [one_token_an_image(ids, image_token_id) for ids in prompt_ids]
        return super()._generate_single_turn(prompt_ids, images, *args, **kwargs)

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

    @property
    def is_sharded(self) -> bool:
        """Return whether no process holds all weights: they come together in forwards that all processes must take."""
        return self.is_fsdp_enabled or self._zero_stage == 3

    def accuracy(self, rows: Dataset, *, direct: bool = False) -> float:
        """Return the share of rows answered right; with `direct` asked for the answer alone, without a thought."""
        with ExitStack() as stack:
            model = self.model
            if self._zero_stage == 3:
                gathered = unwrap_model_for_generation(
                    self.model_wrapped,
                    self.accelerator,
                    gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                    gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
                )
                model = stack.enter_context(gathered)
            return held_out_accuracy(
                model,
                self.processing_class,
                rows,
                max_new_tokens=self.args.max_completion_length,
                direct=direct,
                packed_vision=self._packed_vision,
                fast_batch=None if self._fast is None else self._fast.batch,
                accelerator=None if self.is_sharded else self.accelerator,
            )

    @property
    def _zero_stage(self) -> int:
        return int(getattr(self.args.deepspeed_plugin, "zero_stage", 0))


def one_token_an_image(token_ids: Sequence[int], image_token_id: int) -> list[int]:
    """Return the prompt with each run of image tokens as one."""
    before = [None, *token_ids]
    return [token for token, last in zip(token_ids, before, strict=False) if not token == last == image_token_id]


def measure(trainer: AccuracyTrainer, rows: Dataset, when: str, *, direct: bool = False) -> float:
    """Measure held-out accuracy and print it."""
    accuracy = trainer.accuracy(rows, direct=direct)
    tell(trainer, accuracy, rows, when)
    return accuracy


def tell(trainer: AccuracyTrainer, accuracy: float, rows: Dataset, when: str, *, note: str = "") -> None:
    """Print a held-out accuracy, once for all processes."""
    if trainer.is_world_process_zero():
        above_bar(f"{'accuracy':<12}{accuracy:.1%} of {len(rows)} held-out rows {when}{note}", file=sys.stdout)


def with_group_health(reward: RewardFunction, *, num_generations: int) -> RewardFunction:
    """Wrap a reward function to log how many different completions a group has (`unique_in_group`, 0 to 1).

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
    """Return the mean share of different completions in a group, from 1 / num_generations (all the same) to 1."""
    texts = [completion_text(completion) for completion in completions]
    groups = [texts[start : start + num_generations] for start in range(0, len(texts), num_generations)]
    return sum(len(set(group)) / len(group) for group in groups) / len(groups)
