"""The facts of an export's page that only a training knows, kept in the export's manifest.

A page is written again from the command line, long after the trainer is gone: what it said of the training must not
be lost by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

KEY: Final = "card"
"""The manifest's key."""

_SHOWN_KEYS: Final = ("reward", "reward_std", "completions/mean_length", "loss")
_SHOWN_SETTINGS: Final = (
    "learning_rate",
    "num_generations",
    "max_completion_length",
    "temperature",
    "beta",
    "loss_type",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
)


@dataclass(frozen=True, kw_only=True)
class Training:
    """The figures of a training on its card.

    Attributes:
        steps: how many there were.
        values: first and last value of what TRL logs: rewards, each reward function's mean, evaluations.
        settings: the training arguments that say most about a GRPO run.
    """

    steps: int
    values: Mapping[str, tuple[float, float]]
    settings: Mapping[str, str | float] = field(default_factory=dict)

    @classmethod
    def of(cls, steps: int, log_history: Sequence[Mapping[str, Any]], args: Any = None) -> Training:
        """Read them from a trainer's state and its arguments."""
        logged = dict.fromkeys(key for row in log_history for key in row)
        rewards = [key for key in logged if key.startswith("rewards/") and key.endswith("/mean")]
        scores = [key for key in logged if key.startswith("eval_") and key.endswith(("accuracy", "reward"))]
        values = {}
        for key in ("reward", *rewards, *scores, *_SHOWN_KEYS[1:]):
            found = [float(row[key]) for row in log_history if isinstance(row.get(key), (int, float))]
            if found:
                values[key] = (found[0], found[-1])
        named = {name: getattr(args, name, None) for name in _SHOWN_SETTINGS}
        settings = {name: value for name, value in named.items() if isinstance(value, (int, float, str))}
        return cls(steps=steps, values=values, settings=settings)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Everything on an export's page that its files do not say; None or empty is left out of the page.

    Attributes:
        training: what the trainer logged.
        results: figures before and after the training by name, such as held-out accuracy (0 to 1).
        system_prompt: the system message that the model was trained with.
        repository: the name on the Hub, once it is there.
        tags: what the trainer says of itself (TRL's are "trl" and the method), for the Hub's metadata.
    """

    training: Training | None = None
    results: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    system_prompt: str | None = None
    repository: str | None = None
    tags: tuple[str, ...] = ()

    def over(self, kept: CardFacts) -> CardFacts:
        """Return these facts, and the kept ones where these say nothing."""
        return replace(
            self,
            training=self.training or kept.training,
            results={**kept.results, **self.results},
            system_prompt=self.system_prompt or kept.system_prompt,
            repository=self.repository or kept.repository,
            tags=self.tags or kept.tags,
        )

    def to_json(self) -> dict[str, Any]:
        training = None
        if self.training is not None:
            values = {name: list(pair) for name, pair in self.training.values.items()}
            training = {"steps": self.training.steps, "values": values, "settings": dict(self.training.settings)}
        return {
            "training": training,
            "results": {name: list(pair) for name, pair in self.results.items()},
            "system_prompt": self.system_prompt,
            "repository": self.repository,
            "tags": list(self.tags),
        }


def kept_facts(manifest: Mapping[str, Any]) -> CardFacts:
    """Return the facts that a manifest keeps; what is not in the form of `to_json` is left out."""
    kept = manifest.get(KEY)
    if not isinstance(kept, Mapping):
        return CardFacts()
    training = kept.get("training")
    found = None
    if isinstance(training, Mapping) and isinstance(training.get("steps"), int):
        settings = training.get("settings")
        found = Training(
            steps=training["steps"],
            values=_pairs(training.get("values")),
            settings=dict(settings) if isinstance(settings, Mapping) else {},
        )
    texts = {name: kept.get(name) for name in ("system_prompt", "repository")}
    return CardFacts(
        training=found,
        results=_pairs(kept.get("results")),
        tags=_texts(kept.get("tags")),
        **{name: text for name, text in texts.items() if isinstance(text, str)},
    )


def _pairs(values: object) -> dict[str, tuple[float, float]]:
    if not isinstance(values, Mapping):
        return {}
    return {
        str(name): (float(pair[0]), float(pair[1]))
        for name, pair in values.items()
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(value, (int, float)) for value in pair)
    }


def _texts(values: object) -> tuple[str, ...]:
    return tuple(value for value in values if isinstance(value, str)) if isinstance(values, list) else ()


def tags_of_training(model: torch.nn.Module, args: Any) -> tuple[str, ...]:
    """Return the tags that TRL's trainers put on a live model, or those of TRL's arguments where none are there.

    Trainers of others that are made of TRL's pass its `__init__` over (ms-swift), and take its arguments all the same.
    """
    tags = _texts(getattr(base_model(model), "model_tags", None))
    of_trl = (kind.__name__ for kind in type(args).__mro__ if kind.__module__.partition(".")[0] == "trl")
    method = next((name.removesuffix("Config") for name in of_trl if name.removesuffix("Config").isupper()), None)
    return tags or (() if method is None else ("trl", method.lower()))


def tags_of_folder(folder: Path) -> tuple[str, ...]:
    """Return the tags that a trainer has put into the page of a save; PEFT's own are of adapters, and left out."""
    import yaml
    from huggingface_hub import ModelCard
    from peft import PeftType

    try:
        card = ModelCard.load(folder / "README.md")
    except (OSError, ValueError, TypeError, yaml.YAMLError):  # none, or not in the Hub's form
        return ()
    of_peft = {"transformers", *(kind.value.lower() for kind in PeftType)}
    return tuple(tag for tag in _texts(card.data.tags) if ":" not in tag and tag not in of_peft)


def system_prompt_of(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the text of a conversation's system message, None where there is none."""
    for message in messages:
        if message.get("role") == "system":
            content = message.get("content")
            if isinstance(content, str):
                return content
            return "".join(str(part.get("text", "")) for part in content or ())
    return None
