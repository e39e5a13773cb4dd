"""The config's word on tied embeddings: at which level of it a reader looks. Standard library only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

TIE: Final = "tie_word_embeddings"


def tie_flags(config: Mapping[str, Any]) -> dict[tuple[str, ...], Any]:
    """Return `tie_word_embeddings` of each level that has it, by the path to it, the level that decides first.

    transformers 5 reads the top level (`PreTrainedModel.get_expanded_tied_weights_keys`), and where a published config
    has it in the text model's alone, its config classes take it up. transformers 4 reads the text model's
    (`get_text_config` in `tie_weights`). The two may differ: Qwen3-VL-MoE is saved with false at the top and true
    below it, a tied Qwen3.5 or Mistral 3 the other way round.
    """
    text = config.get("text_config")
    levels = {(): config, ("text_config",): text if isinstance(text, dict) else {}}
    return {place: level[TIE] for place, level in levels.items() if TIE in level}
