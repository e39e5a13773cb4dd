"""The callback that makes rollouts fast, where it is sure that they stay what they are."""

from __future__ import annotations

import logging
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from transformers.trainer_callback import ExportableState

from grpo_toolkit.callbacks.guard import GuardedCallback
from grpo_toolkit.errors import InputError
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.memory import free_bytes
from grpo_toolkit.model.rollouts.rollout_kl import rollout_kl
from grpo_toolkit.model.rollouts.rollout_size import needed_bytes
from grpo_toolkit.model.rollouts.rollouts import FastRollouts
from grpo_toolkit.model.rollouts.supported import why_unsupported
from grpo_toolkit.model.rollouts.trial import WANTED
from grpo_toolkit.model.rollouts.weights_copy import drops_out
from grpo_toolkit.model.sharding.ranks import exchange, world_size
from grpo_toolkit.reporting.trackers.training_scalars import TrainingScalars

if TYPE_CHECKING:
    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.model.rollouts.trial import Trial

logger = logging.getLogger(__name__)

Way = Literal["auto", "fast", "plain"]

KL_LIMIT: Final = 0.05
"""Nats a token between the policy that samples and the one that is trained, past which a warning is printed."""


KL_KEY: Final = "sampling/rollout_kl"


class FastRolloutCallback(GuardedCallback, ExportableState):  # type: ignore[misc]
    """A callback that makes rollouts faster: compiled, prefilled once a prompt, from weights that need no casting.

        trainer = GRPOTrainer(..., callbacks=[KVCacheCallback(), FastRolloutCallback()])

    Sampling stays the trainer's: its settings, its processors, its random numbers. The kernels are others, so the same
    seed draws other tokens than plain `generate` does, and the same ones every time it goes this way. A resumed
    training takes the way that its checkpoint was trained with.

    Under FSDP2 and ZeRO-3 the weights are gathered into the copy once after each optimizer step, where there is room.
    What cannot go the fast way (other attention, other caches, quantised weights, an older transformers) goes the
    plain one, and a line says why. vLLM and continuous batching are left alone.

    Args:
        way: "fast", "plain", or "auto": fast on a CUDA GPU that has room for a copy of the weights and a KV cache.
            The ranks decide together, and no clock decides.
        trial: let a clock decide after all: the first rollout of a training is made both ways, on copies of its inputs
            and with the random state kept. With "auto" the fast way is then taken if it is 1.2 times as fast on the
            first rank, also without a GPU. The trial takes as long as one plain and two fast rollouts. A resumed
            training takes the checkpoint's way.
        kl_limit: nats a token between the policy that samples and the one that is trained, past which a warning is
            printed.
        strict: raise at the end of training if a fast rollout failed.

    Attributes:
        chosen: "fast" or "plain" once a training has begun; None before.
        kl: the last measured divergence, logged as `sampling/rollout_kl`.

    Raises:
        InputError: another `way`.
    """

    def __init__(
        self, way: Way = "auto", *, trial: bool = False, kl_limit: float = KL_LIMIT, strict: bool = False
    ) -> None:
        super().__init__(strict=strict)
        if way not in get_args(Way):
            raise InputError(f"way={way!r}: it is one of {', '.join(map(repr, get_args(Way)))}")
        if trial and way != "auto":
            raise InputError(f'trial=True is for way="auto", and way is {way!r}')
        self.way = way
        self.trial = trial
        self.kl_limit = kl_limit
        self.chosen: str | None = None
        self.kl: float | None = None
        self._rollouts: FastRollouts | None = None
        self._model: Any = None
        self._told: set[str] = set()
        self._scalars = TrainingScalars()

    @property
    def batch(self) -> int | None:
        """The number of sequences that a decode step is compiled for; None where rollouts are plain now.

        In a training, greedy questions that fill such a batch go the fast way too, if they come with a
        `GenerationConfig` that has `disable_compile=True`, as rollouts do.
        """
        return None if self._rollouts is None or self.chosen != "fast" else self._rollouts.compiled_for

    def state(self) -> dict[str, Any]:
        """Return the values that `trainer_state.json` keeps: the arguments, and the way that was chosen."""
        arguments = {"way": self.way, "trial": self.trial, "kl_limit": self.kl_limit, "strict": self.strict}
        return {"args": arguments, "attributes": {"chosen": self.chosen}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Choose the way, together with the other ranks, and take over `generate` for the fast one."""
        super().on_train_begin(args, state, control, **kwargs)
        self._let_go()
        self._told.clear()
        self._scalars = TrainingScalars()
        self._model = kwargs["model"]
        reason: str | None = "the choice failed"
        with self._guarded("choosing how rollouts are made"):
            reason = self._why_plain(args, _chosen_before(state))
        # On every rank, also one that failed: the others wait for its word.
        said = [word for word in exchange(reason) if word is not None]
        self.chosen = "plain" if said else "fast"
        if said:
            self._tell(said[0] if self.way != "plain" and said[0] not in _SILENT else None, state)
        else:
            with self._guarded("taking the rollouts"):
                self._take(args, state)
            # A rank without them would not be there when the others gather weights, or agree about a trial.
            if any(exchange(None if self._rollouts is not None else "not taken")):
                self._let_go()
                self.chosen = "plain"
        if isinstance(state.stateful_callbacks, dict):
            # The trainer looks for the name at each save, also after resuming from a checkpoint that had none.
            state.stateful_callbacks.setdefault(type(self).__name__, self.state())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Mark the copy of the weights as out of date after an optimizer step."""
        if self._rollouts is not None:
            self._rollouts.mark_dirty()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the divergence to the log, and to the runs whose trackers have been handed it already."""
        if self.kl is None or logs is None or "loss" not in logs:
            return
        logs[KL_KEY] = self.kl
        if state.log_history and state.log_history[-1].get("step") == state.global_step:
            state.log_history[-1][KL_KEY] = self.kl
        if state.is_world_process_zero:
            with self._guarded("logging how far rollouts are from the policy", is_vital=False):
                self._scalars.log({KL_KEY: self.kl}, step=state.global_step)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Give `generate` back to the model, and free the memory."""
        self._let_go()
        self._raise_if_strict()

    def _why_plain(self, args: Any, before: str | None) -> str | None:
        """Return the reason why this rank's rollouts go the plain way; None where they can go the fast one."""
        if self.way == "plain":
            return "you chose it"
        if getattr(args, "use_vllm", False) or getattr(args, "use_transformers_continuous_batching", False):
            return _NOT_OURS
        if self.way == "auto" and before == "plain":
            return _AS_BEFORE
        device = base_model(self._model).device
        if self.way == "auto" and device.type != "cuda" and not self.trial:
            return _NO_GPU
        if args.fp16:
            return "float16 has no range for what layers pass on, outside of autocast"
        reason = why_unsupported(self._model)
        if reason is None and self.way == "auto" and before is None:
            reason = self._why_no_room(args, device)
        return reason

    def _why_no_room(self, args: Any, device: torch.device) -> str | None:
        free = free_bytes(str(device))
        tokens = getattr(args, "max_completion_length", None) or 256
        stage = getattr(getattr(args, "deepspeed_plugin", None), "zero_stage", 0)
        needed = needed_bytes(
            self._model,
            _computed_in(args),
            rows=_rows(args),
            new_tokens=tokens,
            shared_by=world_size() if stage in (1, 2) else 1,
        )
        if free is None or needed <= free:
            return None
        return f"they need about {needed / 1e9:.1f} GB with what training takes, and {free / 1e9:.1f} GB are free"

    def _take(self, args: Any, state: TrainerState) -> None:
        self._rollouts = FastRollouts(
            self._model,
            dtype=_computed_in(args),
            compiled_rows={_rows(args), args.per_device_eval_batch_size},
            on_failure=self._on_failure,
            on_plain=lambda reason: self._tell(f"one has {reason}", state),
            on_sampled=self._on_sampled,
            on_trial=partial(self._on_trial, state) if self.trial and _chosen_before(state) is None else None,
        )
        if not state.is_world_process_zero:
            return
        if base_model(self._model).device.type == "cuda":
            logger.warning("grpo_toolkit: the first rollout compiles its decode step, which takes up to a minute")
        if drops_out(self._model):
            logger.warning("grpo_toolkit: rollouts are sampled without the adapter's dropout, which training has")

    def _on_trial(self, state: TrainerState, found: Trial) -> None:
        if not found.is_fast_worth_it:
            self.chosen = "plain"
            self._tell(f"in a trial the fast one was {found.ratio:.2f} times as fast, not {WANTED}", state)
        elif state.is_world_process_zero:
            logger.warning("grpo_toolkit: rollouts go the fast way: in a trial it was %.2f times as fast", found.ratio)

    def _on_failure(self, error: Exception) -> None:
        self.chosen = "plain"
        with self._guarded("a fast rollout, so that rollouts are plain from here on,"):
            raise error

    def _on_sampled(self, inputs: dict[str, Any], output: torch.Tensor, scores: Any, config: Any) -> None:
        with self._guarded("measuring how far rollouts are from the policy", is_vital=False):
            self.kl = rollout_kl(self._model, inputs, output, scores, ends=config.eos_token_id)
        # A divergence that is no number is past any limit.
        if self.kl is not None and not self.kl <= self.kl_limit and "kl" not in self._told:
            self._told.add("kl")
            logger.warning(
                "grpo_toolkit: rollouts are sampled from a policy %.3f nats a token from the one that is trained "
                '(more than %.3f); compare with FastRolloutCallback(way="plain")',
                self.kl,
                self.kl_limit,
            )

    def _tell(self, reason: str | None, state: TrainerState) -> None:
        if reason is not None and reason not in self._told and state.is_world_process_zero:
            self._told.add(reason)
            logger.warning("grpo_toolkit: rollouts go the plain way: %s", reason)

    def _let_go(self) -> None:
        if self._rollouts is not None:
            self._rollouts.close()
        self._rollouts = None


_NOT_OURS: Final = "another engine makes them"
_NO_GPU: Final = "decode steps are compiled for CUDA alone"
_AS_BEFORE: Final = "the checkpoint was trained with plain ones"
_SILENT: Final = (_NOT_OURS, _NO_GPU)
"""Reasons that nobody needs to hear who asked for "auto"."""


def _chosen_before(state: TrainerState) -> str | None:
    """Return the way that the checkpoint was trained with, from its `trainer_state.json`; None without a resume.

    A second training of one process finds the first one's choice there, which was made for that one.
    """
    if state.global_step == 0:
        return None
    kept = (state.stateful_callbacks or {}).get(FastRolloutCallback.__name__)
    kept = kept[0] if isinstance(kept, list) and kept else kept
    return kept.get("attributes", {}).get("chosen") if isinstance(kept, dict) else None


def _rows(args: Any) -> int:
    """Return the number of sequences that this process generates in one rollout."""
    return int(args.per_device_train_batch_size * (getattr(args, "steps_per_generation", None) or 1))


def _computed_in(args: Any) -> torch.dtype | None:
    import torch

    return torch.bfloat16 if args.bf16 else None
