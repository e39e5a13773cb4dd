"""The callback that publishes the trained model."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from grpo_toolkit.callbacks.guard import GuardedCallback
from grpo_toolkit.checkpoint.publish import check_output
from grpo_toolkit.export.export import export_model
from grpo_toolkit.export.export_plan import refuse_unsupported
from grpo_toolkit.export.preflight import look_ahead
from grpo_toolkit.model.generation.request import find_requests
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.rotary_buffers import restore_positions
from grpo_toolkit.reporting.report.card_facts import CardFacts, Training, system_prompt_of, tags_of_training
from grpo_toolkit.reporting.report.model_card import write_model_card
from grpo_toolkit.reporting.report.screen_lines import export_lines
from grpo_toolkit.reporting.terminal.console import say

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Iterable, Mapping

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.export.export_result import ExportResult
    from grpo_toolkit.export.preflight import Finding
    from grpo_toolkit.model.generation.request import Request

logger = logging.getLogger(__name__)

published: WeakKeyDictionary[torch.nn.Module, ExportResult] = WeakKeyDictionary()
"""The result of each trained model's export, for the callbacks after this one."""

format_rewards: WeakKeyDictionary[torch.nn.Module, Callable[..., list[float]]] = WeakKeyDictionary()
"""The reward that each trained model's export was verified with."""


class ExportCallback(GuardedCallback):
    """A callback that exports the trained model at the end of training: merged, verified, published atomically.

    Before the first step it says what would make the export fail, and what to do about it: names, embeddings that are
    tied otherwise, an adapter's targets, the processor, quantisation, room on the disk, permission to write
    (`findings`). The export is tried at the end all the same. One that fails verification is kept as
    `<output_dir>.rejected`, with the report in it.

    It also makes sure that an export can equal the trained model at all: rotary frequencies that loading has rounded
    (see `model/rotary_buffers.py`) are computed again, as `KVCacheCallback` does.

    Args:
        output_dir: the folder to publish.
        base: the base model's folder or Hub name; by default what the model was loaded from.
        prompts: dataset rows (`prompt`, `image` or `images`) on which export and policy must give the same greedy
            tokens; by default the first rows of the evaluation dataset where an evaluation ran, or of the training
            dataset.
        num_prompts: how many of them.
        format_reward: a reward function, as trainers call it, that has to value the export's answers to them as the
            policy's.
        generation_overrides: keys for `generation_config.json` that win over the base's.
        overwrite: replace an earlier export in `output_dir`.
        strict: raise at the end of training if the export failed, on every rank.

    Raises:
        OutputExistsError: at once, if `output_dir` is there and may not be replaced.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        *,
        base: str | os.PathLike[str] | None = None,
        prompts: Iterable[Mapping[str, Any]] | None = None,
        num_prompts: int = 4,
        format_reward: Callable[..., list[float]] | None = None,
        generation_overrides: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        self.output_dir = Path(output_dir)
        self.base = base
        self.prompts = prompts
        self.num_prompts = num_prompts
        self.format_reward = format_reward
        self.generation_overrides = generation_overrides
        self.overwrite = overwrite
        self.result: ExportResult | None = None
        self.findings: tuple[Finding, ...] = ()
        check_output(self.output_dir, overwrite=overwrite)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say before training, not after it, what would make the export fail; put right what can be."""
        super().on_train_begin(args, state, control, **kwargs)
        self.result, self.findings = None, ()
        with self._guarded("the export after this training"):
            published.pop(base_model(kwargs["model"]), None)
            if state.is_world_process_zero:
                refuse_unsupported(kwargs["model"])
        if state.is_world_process_zero and not self.failures:
            with self._guarded("looking ahead to the export", is_vital=False):
                self._look_ahead(kwargs["model"], kwargs.get("processing_class"))
        # Where it cannot be done (a class that is not built from its config alone), verification has the last word.
        with self._guarded("computing the rotary positions again", is_vital=False):
            restore_positions(kwargs["model"], args, state)

    def _look_ahead(self, model: torch.nn.Module, processing_class: Any) -> None:
        for finding in look_ahead(
            model,
            self.output_dir,
            base=self.base,
            processing_class=processing_class,
            overrides=self.generation_overrides,
            overwrite=self.overwrite,
        ):
            self.findings += (finding,)
            logger.warning("grpo_toolkit: %s", finding)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        requests: list[Request] = []
        with self._guarded("finding prompts to verify the export with"):
            requests = find_requests(self.prompts, kwargs, limit=self.num_prompts, state=state)
            if state.is_world_process_zero and _sees(kwargs) and not any(request.images for request in requests):
                logger.warning(
                    "grpo_toolkit: no images were found among this trainer's rows, so the export is verified with "
                    "drawn pictures alone; pass prompts=[...] to ExportCallback, rows with `prompt` and `image`"
                )
        if self._agree():
            with self._guarded("the export"):
                facts = CardFacts(
                    training=Training.of(state.global_step, state.log_history, args),
                    system_prompt=system_prompt_of(requests[0].messages) if requests else None,
                    tags=tags_of_training(kwargs["model"], args),
                )
                self._export(kwargs["model"], kwargs.get("processing_class"), requests, facts)
        with self._guarded("showing the export"):
            if self.result is not None:
                say(*export_lines(self.result))
        self._agree()  # a barrier: the other ranks would wait for rank 0 in a collective that gives up
        self._raise_if_strict()

    def _export(
        self, model: torch.nn.Module, processing_class: Any, requests: list[Request], facts: CardFacts
    ) -> None:
        self.result = export_model(
            model,
            self.output_dir,
            base=self.base,
            processing_class=processing_class,
            requests=requests,
            format_reward=self.format_reward,
            generation_overrides=self.generation_overrides,
            overwrite=self.overwrite,
            finish=partial(write_model_card, facts=facts, name=self.output_dir.name),
        )
        if self.result is not None:
            published[base_model(model)] = self.result
        if self.format_reward is not None:
            format_rewards[base_model(model)] = self.format_reward


def _sees(kwargs: Mapping[str, Any]) -> bool:
    return hasattr(kwargs.get("processing_class"), "image_processor")
