"""The facts of an export's page that only a training knows, kept in the export's manifest.

A page is written again from the command line, long after the trainer is gone: what it said of the training must not
be lost by that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

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
    """

    training: Training | None = None
    results: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    system_prompt: str | None = None
    repository: str | None = None

    def over(self, kept: CardFacts) -> CardFacts:
        """Return these facts, and the kept ones where these say nothing."""
        return replace(
            self,
            training=self.training or kept.training,
            results={**kept.results, **self.results},
            system_prompt=self.system_prompt or kept.system_prompt,
            repository=self.repository or kept.repository,
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


def system_prompt_of(messages: Sequence[Mapping[str, Any]]) -> str | None:
    """Return the text of a conversation's system message, None where there is none."""
    for message in messages:
        if message.get("role") == "system":
            content = message.get("content")
            if isinstance(content, str):
                return content
            return "".join(str(part.get("text", "")) for part in content or ())
    return None
