"""The values that a user set in `model.generation_config`, told apart from those that trainers left for rollouts.

Trainers align the ids of pad, bos and eos with the tokenizer before a training begins, and a save must not carry that:
the base's own are right for whoever loads it. A script may also set them on purpose when the training has ended
(open-r1 does, so that answers end), and that must be saved. So the values that stand when a training begins are taken
as the trainer's, and when it ends those that nobody touched become the base's again; every other difference was set by
someone, and wins.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.json_files import ABSENT, JsonObject

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults

logger = logging.getLogger(__name__)

TOKEN_IDS: Final = ("pad_token_id", "bos_token_id", "eos_token_id")
_KNOWN: Final = "_grpo_toolkit_generation_config"
_SAID: Final = "_grpo_toolkit_generation_said"
_NEVER: Final = frozenset({"use_cache", "transformers_version"})


def note_values(model: PreTrainedModel, *, token_ids_alone: bool = False) -> None:
    """Take the values that stand now as nobody's choice; of a training that begins the token ids alone."""
    values = _values(model)
    known = vars(model).get(_KNOWN, {}) if token_ids_alone else values
    setattr(model, _KNOWN, {**known, **{name: values.get(name) for name in TOKEN_IDS}})


def edits(model: PreTrainedModel) -> JsonObject:
    """Return what was set in the model's generation config on purpose: all that differs from what was noted."""
    known = vars(model).get(_KNOWN)
    if known is None:
        return {}
    return {
        name: value
        for name, value in _values(model).items()
        if name not in _NEVER and not name.startswith("_") and value != known.get(name)
    }


def put_back_token_ids(model: PreTrainedModel, defaults: InferenceDefaults, processing_class: Any) -> None:
    """Give the ids that a trainer aligned for its rollouts, and nobody set since, the base's values again."""
    if getattr(model, "generation_config", None) is None or defaults.generation is ABSENT or _KNOWN not in vars(model):
        return
    chosen = edits(model)
    for name in TOKEN_IDS:
        if name not in chosen:
            setattr(model.generation_config, name, defaults.generation.get(name))
    note = {name: value for name, value in _values(model).items() if name not in chosen}
    setattr(model, _KNOWN, {**vars(model)[_KNOWN], **{name: note[name] for name in TOKEN_IDS if name in note}})
    eos = getattr(getattr(processing_class, "tokenizer", processing_class), "eos_token_id", None)
    if "eos_token_id" not in chosen and eos is not None and eos not in _listed(note.get("eos_token_id")):
        logger.warning(
            "grpo_toolkit: eos_token_id in generation_config.json is the base's, %s, and the tokenizer's %s is not "
            "among them: answers that were trained to end with it will not. If they are to, set "
            "model.generation_config.eos_token_id after the training, or generation_overrides before it",
            note.get("eos_token_id"),
            eos,
        )


def say_token_ids(model: PreTrainedModel, defaults: InferenceDefaults) -> None:
    """Say once of each id that was set on purpose that it is what a save carries."""
    said: set[str] = vars(model).setdefault(_SAID, set())
    for name, value in edits(model).items():
        base = None if defaults.generation is ABSENT else defaults.generation.get(name)
        line = f"{name} in generation_config.json is {value}, as set since the training began; the base has {base}"
        if name in TOKEN_IDS and value != base and line not in said:
            said.add(line)
            logger.warning("grpo_toolkit: %s", line)


def _values(model: PreTrainedModel) -> JsonObject:
    generation_config = getattr(model, "generation_config", None)  # a reward model has none
    return {} if generation_config is None else dict(generation_config.to_dict())


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
