"""Which prompts to ask when a training has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.latency.bench.workload import requests_from_rows

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from grpo_toolkit.model.generation.generate import Request


def find_requests(
    prompts: Iterable[Mapping[str, Any]] | None, kwargs: Mapping[str, Any], *, limit: int
) -> list[Request]:
    """The prompts given, or the first rows of the trainer's own datasets; none where those cannot be indexed.

    Datasets are read by index, past the samplers: iterating a trainer's dataloader would move its random state.
    """
    if prompts is not None:
        return requests_from_rows(prompts, limit=limit)
    for name in ("eval_dataloader", "train_dataloader"):
        dataset: Any = getattr(kwargs.get(name), "dataset", None)
        if hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__") and len(dataset) and "prompt" in dataset[0]:
            return requests_from_rows((dataset[i] for i in range(min(limit, len(dataset)))), limit=limit)
    return []
