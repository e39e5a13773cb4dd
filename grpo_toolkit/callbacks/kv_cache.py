"""The callback that keeps the KV cache where it belongs."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from grpo_toolkit.callbacks.guard import GuardedCallback
from grpo_toolkit.model.attention.cudnn_gradients import GradientsWithoutCudnn, loses_gradients
from grpo_toolkit.model.attention.decode_without_cudnn import DecodeWithoutCudnn, plans_per_length
from grpo_toolkit.model.cache_probe import Decoding, RolloutWatch
from grpo_toolkit.model.kv_cache import (
    disable_cache_for_training,
    enable_cache_for_generation,
    is_checkpointing,
    leave_training,
    set_cache_flags,
)
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.merge_guard import guard_merges
from grpo_toolkit.model.rollouts.rollouts import rollouts_of
from grpo_toolkit.model.rotary_buffers import restore_positions
from grpo_toolkit.model.saving.generation_edits import note_values, put_back_token_ids
from grpo_toolkit.model.saving.processor_hook import hook_processor
from grpo_toolkit.model.saving.save_hook import capture_model_defaults, install_save_hook, remember_plain_state

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults

logger = logging.getLogger(__name__)


class KVCacheCallback(GuardedCallback):
    """A callback that keeps the KV cache off in the training forward, on in rollouts, on in every saved file.

    A saved model is also to mean what was trained: rotary frequencies that loading has rounded (see `buffers`) are
    computed again before the first step, and an adapter that is merged into the live base and taken out again, as TRL
    does for vLLM, leaves that base as it was (see `model/merge_guard.py`). Where a GPU's attention kernel is found to
    return NaN gradients at some lengths, steps of such lengths use another, under `torch_compile` all steps (see
    `model/attention/cudnn_gradients.py`).

    Saves load wherever their base loads: config, tokenizer and processor have its forms, with what training changed.
    Where a backend writes no model folder (FSDP's `SHARDED_STATE_DICT`), nothing is added to what it writes.

    Args:
        generation_overrides: keys for `generation_config.json` in every save that win over the base's.
        cudnn_decoding: whether rollouts may decode with cuDNN's attention; None (the default) keeps them off it on
            Hopper GPUs, where it plans anew for every length.
        portable_saves: write config, tokenizer and processor of every save as the base has them, with what training
            changed, so that what loads the base loads the save; False for the forms of the transformers that saves.
        strict: raise at the end of training if a promise could not be kept.

    Attributes:
        defaults: the inference defaults that every save carries.
        decoding: how the first rollout of the last training was seen to decode, or None where it was not seen: vLLM
            does not run the trainer's model.
    """

    def __init__(
        self,
        *,
        generation_overrides: Mapping[str, Any] | None = None,
        cudnn_decoding: bool | None = None,
        portable_saves: bool = True,
        strict: bool = False,
    ) -> None:
        super().__init__(strict=strict)
        self.generation_overrides = generation_overrides
        self.cudnn_decoding = cudnn_decoding
        self.portable_saves = portable_saves
        self.defaults: InferenceDefaults | None = None
        self.decoding: Decoding | None = None
        self._watch: RolloutWatch | None = None
        self._without_cudnn: DecodeWithoutCudnn | None = None
        self._gradients: GradientsWithoutCudnn | None = None

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Capture the base's defaults and hook the saves, before `Trainer.__init__` sets `use_cache` to False."""
        with self._guarded("hooking the saves"):
            self._attach(args, kwargs["model"], kwargs.get("processing_class"))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        model = kwargs["model"]
        with self._guarded("hooking the saves"):
            if self.defaults is None:  # added with trainer.add_callback(), after on_init_end
                self._attach(args, model, kwargs.get("processing_class"))
        with self._guarded("setting the cache for training"):
            remember_plain_state(model)
            note_values(base_model(model), token_ids_alone=True)
            if is_checkpointing(model):
                disable_cache_for_training(model)
            if enable_cache_for_generation(model) and state.is_world_process_zero:
                logger.warning(
                    "grpo_toolkit: %s; rollouts would have run without a cache. It is on now, and will be in every "
                    "save",
                    self._source_of_no_cache(),
                )
        with self._guarded("guarding the adapter's base"):
            guard_merges(model)
        # Where it cannot be done (a class that is not built from its config alone), an export's verification decides.
        with self._guarded("computing the rotary positions again", is_vital=False):
            restore_positions(model, args, state)
        self._let_go()
        self.decoding = None
        # Hooks would make torch.compile stop and start at every forward.
        if not args.torch_compile:
            with self._guarded("watching the rollouts"):
                self._watch = RolloutWatch(model)
                wanted = self.cudnn_decoding
                if plans_per_length(base_model(model).device) if wanted is None else not wanted:
                    self._without_cudnn = DecodeWithoutCudnn(model)
        with self._guarded("keeping gradients off a kernel that loses them"):
            self._keep_gradients(args, model, is_first=state.is_world_process_zero)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Let every attention kernel in again after a micro-batch's backward pass."""
        if self._gradients is not None:
            self._gradients.end_of_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Print a warning after the first step if its rollout decoded without a cache."""
        if self._gradients is not None:
            self._gradients.end_of_step()
        if self._watch is None:
            return
        self.decoding = self._watch.seen
        rollouts = rollouts_of(kwargs["model"])
        if rollouts is not None and rollouts.count:  # of modules of their own, where nothing is watched
            self.decoding = Decoding.CACHED
        self._watch.close()
        self._watch = None
        if self.decoding not in (None, Decoding.CACHED) and state.is_world_process_zero:
            logger.warning(
                "grpo_toolkit: the first rollout decoded %s; look for use_cache=False in generation_kwargs or in your "
                "own call of generate",
                self.decoding.value,
            )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as its user expects it: configs as the base had them, eval mode, no checkpointing."""
        model = kwargs["model"]
        self._let_go()
        with self._guarded("putting the cache back"):
            if self.defaults is not None:
                set_cache_flags(base_model(model).config, dict.fromkeys(self.defaults.cache_levels, True))
                put_back_token_ids(base_model(model), self.defaults, kwargs.get("processing_class"))
            leave_training(model)
        with self._guarded("keeping the adapter's base as it was"):
            guard = guard_merges(model)
            if guard is not None:
                guard.check()
        self._raise_if_strict()

    def _source_of_no_cache(self) -> str:
        """Return where the model's `use_cache=False` came from: the base's file, or whoever loaded it."""
        defaults = self.defaults
        if defaults is None or defaults.folder is None:
            return "this model's generation config says use_cache=False, and there is no base on disk to compare with"
        if defaults.repairs:
            return f"this base was saved with use_cache=false in {defaults.repairs[-1].file} ({defaults.source})"
        return (
            "this model's generation config says use_cache=False, and its base's files do not "
            f"({defaults.source}): the trainer or script passed it to from_pretrained, or set it after loading"
        )

    def _let_go(self) -> None:
        for hooks in (self._watch, self._without_cudnn, self._gradients):
            if hooks is not None:
                hooks.close()
        self._watch = self._without_cudnn = self._gradients = None

    def _keep_gradients(self, args: TrainingArguments, model: torch.nn.Module, *, is_first: bool) -> None:
        """Guard the training if this GPU's attention loses gradients in the dtype that it computes in."""
        import torch

        inner = base_model(model)
        dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else inner.dtype
        if not loses_gradients(inner.device, dtype):
            return
        self._gradients = GradientsWithoutCudnn(model, is_compiled=args.torch_compile)
        if is_first:
            logger.warning(
                "grpo_toolkit: cuDNN's attention returns NaN gradients on this GPU for padded batches of some lengths "
                "(pytorch#196678); %s use another kernel",
                "all steps of this compiled training" if args.torch_compile else "steps of such lengths",
            )

    def _attach(self, args: TrainingArguments, model: torch.nn.Module, processing_class: Any) -> None:
        overrides = dict(self.generation_overrides or {})
        generation_config = getattr(base_model(model), "generation_config", None)
        if getattr(args, "eos_token", None) and generation_config is not None:  # asked for by SFTConfig, set by TRL
            overrides.setdefault("eos_token_id", generation_config.eos_token_id)
        self.defaults = capture_model_defaults(model, overrides=overrides)
        install_save_hook(model, self.defaults, portable=self.portable_saves)
        if processing_class is not None:
            hook_processor(processing_class, self.defaults.folder if self.portable_saves else None)
