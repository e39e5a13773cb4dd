"""The callback that packs the vision tower's work for the time of a training."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from grpo_toolkit.callbacks.guard import GuardedCallback
from grpo_toolkit.model.attention.packed_vision import VisionPacking
from grpo_toolkit.model.inputs.images_once import MAX_BYTES, ImagesOnce

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)


class PackedVisionCallback(GuardedCallback):
    """A callback that makes the vision tower faster: one attention call a layer, each distinct image encoded once.

    A tower without trained parameters gets no gradient either. This holds wherever the tower runs in a training:
    rollouts, log-probabilities, forward, recompute and backward, evaluation. Each part is replaced by an equal
    computation (see `grpo_toolkit.model.attention`); a part that can't be replaced stays as it is, and a log line says
    so. Before the tower, the image processor is asked for each distinct image once, with results that are the same to
    the last bit (see `grpo_toolkit.model.inputs`). Model and processor are put back at the end of training, and no
    save carries anything of it.

    Args:
        processed_bytes: the most memory, in each process, for images as the processor returns them. It should hold
            those of a rollout: 9 MB for each of 484 tokens of Qwen2.5-VL. 0 leaves the processor alone.
        strict: raise at the end of training if packing failed with an error.

    Attributes:
        packing: what is done to the model now, or None outside a training.
        images: what is done to the image processor now; None outside a training, and where there is none.
    """

    def __init__(self, *, processed_bytes: int = MAX_BYTES, strict: bool = False) -> None:
        super().__init__(strict=strict)
        self.processed_bytes = processed_bytes
        self.packing: VisionPacking | None = None
        self.images: ImagesOnce | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        self._let_go()  # after a training that was broken off
        if args.torch_compile:
            line = "vision attention left as it is: torch_compile is on, and hooks would break its graphs"
        else:
            with self._guarded("packing the vision tower"):
                self.packing = VisionPacking(kwargs["model"])
            line = None if self.packing is None else self.packing.summary()
        processor = getattr(kwargs.get("processing_class"), "image_processor", None)
        if processor is not None and self.processed_bytes > 0:
            with self._guarded("having images processed once"):
                self.images = ImagesOnce(processor, max_bytes=self.processed_bytes)
        if line is not None and state.is_world_process_zero:
            logger.info("grpo_toolkit: %s", line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Leave the model as it was found."""
        self._let_go()
        self._raise_if_strict()

    def _let_go(self) -> None:
        packing, self.packing = self.packing, None
        if packing is not None:
            with self._guarded("putting the vision tower back"):
                packing.close()
        images, self.images = self.images, None
        if images is not None:
            with self._guarded("putting the image processor back"):
                images.close()
