"""Vision towers in as few attention calls as there are layers, and each image in them once.

    with packed_vision(model) as packing:
        model.generate(...)

Three things are done to a live model, and undone on exit. Its layers that attend segment by segment make one call for
all windows and images (`segment_attention`), the tower encodes each distinct image of a call once (`distinct_images`),
and a tower that does not train gets no gradient (`frozen_tower`). Nothing of it is saved with the model.

From transformers 5 on the layers are reached through the library's own interface: a registered attention with "flash"
in its name is given all segments in one call, with their borders. For Qwen2-VL and Qwen2.5-VL in 4.49 to 4.57, layers
get a forward of ours (`qwen_forward`). Elsewhere, and where FlashAttention or eager attention was chosen, the layers
stay as they are, and `notes` says so.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.attention import qwen_forward
from grpo_toolkit.model.attention.distinct_images import DistinctImages
from grpo_toolkit.model.attention.frozen_tower import FrozenTower
from grpo_toolkit.model.attention.segment_attention import packed_attention
from grpo_toolkit.model.attention.vision_towers import Tower, asks_by_name, find_towers, has_own_forward
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

logger = logging.getLogger(__name__)

NAME: Final = "grpo_toolkit_packed_flash"
"""The attention's name. transformers makes one call for all segments where "flash" is in it."""


class VisionPacking:
    """The changes to a live model's vision towers, from its making to `close`.

    Attributes:
        layers: attention layers that make one call for all segments now.
        towers: names of the towers that they are in.
        notes: lines on what was left as it is, and why.
        images: the hooks that have towers encode each image once; they count images.
        unmarked: input embeddings of frozen towers whose outputs are no longer marked for a gradient.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = 0
        self.towers: list[str] = []
        self.notes: list[str] = []
        self.images: list[DistinctImages] = []
        self.frozen: list[FrozenTower] = []
        self._undo = ExitStack()
        try:
            self._apply(base_model(model))
        except BaseException:
            self.close()
            raise

    @property
    def unmarked(self) -> int:
        return sum(len(tower.removed) for tower in self.frozen)

    def close(self) -> None:
        """Leave the model as it was found."""
        self._undo.close()

    def summary(self) -> str:
        """Return what was done, in one line."""
        if not self.images:
            return "no vision tower to pack"
        did = [f"vision attention packed: {self.layers} layers, one call each"] if self.layers else []
        did += [f"vision attention left as it is: {note}" for note in dict.fromkeys(self.notes)]
        did.append("each distinct image encoded once")
        if self.unmarked:
            did.append("no gradient for the frozen tower")
        return "; ".join(did)

    def _apply(self, inner: Any) -> None:
        text_config = inner.config.get_text_config() if hasattr(inner.config, "get_text_config") else inner.config
        for tower in find_towers(inner):
            shared = () if tower.module is inner else (inner.config, text_config)
            packed = self._pack_layers(tower, shared=shared)
            self.layers += packed
            if packed:
                self.towers.append(tower.name)
            if _is_encoding_once(tower.module):
                continue
            images, frozen = DistinctImages(tower.module), FrozenTower(tower.module)
            self._undo.callback(images.close)
            self._undo.callback(frozen.close)
            self.images.append(images)
            self.frozen.append(frozen)

    def _pack_layers(self, tower: Tower, *, shared: tuple[Any, ...]) -> int:
        import transformers

        packed = 0
        for layer in tower.layers:
            config: Any = getattr(layer, "config", None)
            chosen = getattr(config, "_attn_implementation", "sdpa")
            if chosen == NAME:  # by this loop for a layer before, whose config it shares
                packed += 1
            elif chosen != "sdpa":
                self.notes.append(f"{chosen!r} is its attention")
            elif asks_by_name(type(layer)):
                if any(config is other for other in shared):
                    self.notes.append(f"{tower.name} has the language model's config")
                    continue
                register()
                config._attn_implementation = NAME
                self._undo.callback(partial(setattr, config, "_attn_implementation", chosen))
                packed += 1
            elif has_own_forward(type(layer)) and "forward" not in vars(layer):
                qwen_forward.install(layer)
                self._undo.callback(partial(qwen_forward.uninstall, layer))
                packed += 1
            else:
                kind = type(layer).__name__
                self.notes.append(f"transformers {transformers.__version__} gives no way to reach its {kind}")
        return packed


@contextmanager
def packed_vision(model: torch.nn.Module) -> Iterator[VisionPacking]:
    """Pack the vision towers of a live model, and put everything back on exit, also after an exception.

    Args:
        model: a transformers model or a wrapper around one (PEFT, DDP); one without a vision tower is left alone.

    Yields:
        What was done; its `summary()` is a line for a log.
    """
    packing = VisionPacking(model)
    try:
        yield packing
    finally:
        packing.close()


def register() -> None:
    """Make `NAME` known to transformers, as an attention and as a form of masks (those of "sdpa")."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    # A name without a mask form gets no mask at all: layers of the tower that attend without segments need theirs.
    AttentionMaskInterface.register(NAME, sdpa_mask)


def _is_encoding_once(tower: torch.nn.Module) -> bool:
    hooks = tower._forward_pre_hooks.values()
    return any(isinstance(getattr(hook, "__self__", None), DistinctImages) for hook in hooks)
