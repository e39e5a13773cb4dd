"""The inference defaults of a model: its files' settings for generation, captured before training touches them.

Pure functions over JSON objects, standard library only. Three states are kept apart throughout: a key that is
absent, a key that is null, and a key that is false. For `use_cache` the rule is short: a level of the config that
has the key ends with true, a level without it ends without it. That holds for a poisoned base too (one whose files
already say false or null); the difference is then reported.
"""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT, Absent, JsonObject

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

SAMPLING: Final = frozenset({"temperature", "top_p", "top_k", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"})
"""The keys of a generation config that only sampling uses; they are invalid where `do_sample` is false."""

Level = tuple[str, ...]
"""The place of a (nested) config in its JSON: () is the top, ("text_config",) one below."""


@dataclass(frozen=True, kw_only=True)
class Repair:
    """A value that was put right: `file` and `key` (dotted), the value found and the value written."""

    file: str
    key: str
    found: Any
    written: Any

    def __str__(self) -> str:
        return f"{self.file}: {self.key} was {json.dumps(self.found)}, now {json.dumps(self.written)}"


@dataclass(frozen=True, kw_only=True)
class InferenceDefaults:
    """The settings that an inference-ready save of a model must have.

    Attributes:
        cache_levels: levels of the config that carry `use_cache` (and carry it as true).
        generation: the JSON object of `generation_config.json`, overrides applied, or ABSENT where the base has none.
        repairs: what had to be changed because the base itself was poisoned.
        folder: where the defaults were read, or None if from a live model.
    """

    cache_levels: frozenset[Level]
    generation: JsonObject | Absent
    repairs: tuple[Repair, ...] = ()
    folder: Path | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def source(self) -> str:
        """Return where the defaults were read, for messages."""
        return str(self.folder or "live model")


def capture_defaults(
    config: JsonObject,
    generation: JsonObject | Absent,
    *,
    folder: Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> InferenceDefaults:
    """Derive the defaults from a config and a generation config as the base has them."""
    found = dict(_cache_values(config))
    repairs = [
        Repair(file=CONFIG, key=".".join((*level, "use_cache")), found=value, written=True)
        for level, value in found.items()
        if value is not True
    ]
    if generation is not ABSENT:
        generation = copy.deepcopy(generation)
        value = generation.get("use_cache", ABSENT)
        if value is not ABSENT and value is not True:
            repairs.append(Repair(file=GENERATION_CONFIG, key="use_cache", found=value, written=True))
            generation["use_cache"] = True
    if overrides:
        base = {} if generation is ABSENT else generation
        if overrides.get("do_sample") is False:  # settings of sampling without sampling are refused by transformers
            base = {key: value for key, value in base.items() if key not in SAMPLING}
        generation = {**base, **overrides}
    return InferenceDefaults(
        cache_levels=frozenset(found),
        generation=generation,
        repairs=tuple(repairs),
        folder=folder,
        overrides=dict(overrides or {}),
    )


def with_cache_defaults(config: JsonObject, defaults: InferenceDefaults) -> JsonObject:
    """Return a copy of `config` whose `use_cache` is true at the base's levels and absent at every other."""
    return _with_cache(config, defaults.cache_levels, ())


def _with_cache(node: JsonObject, levels: frozenset[Level], here: Level) -> JsonObject:
    result: JsonObject = {}
    for key, value in node.items():
        if key == "use_cache":
            if here in levels:
                result[key] = True
        elif isinstance(value, dict):
            result[key] = _with_cache(value, levels, (*here, key))
        else:
            result[key] = copy.deepcopy(value)
    if here in levels:
        result.setdefault("use_cache", True)
    return result


def _cache_values(node: JsonObject, here: Level = ()) -> Iterator[tuple[Level, Any]]:
    for key, value in node.items():
        if key == "use_cache":
            yield here, value
        elif isinstance(value, dict):
            yield from _cache_values(value, (*here, key))
