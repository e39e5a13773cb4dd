from __future__ import annotations

from typing import Any

import pytest
import torch


@pytest.fixture(autouse=True)
def packed_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pack segments of several lengths here too, where they would go one by one: what is tested is for a GPU."""
    monkeypatch.setattr("grpo_toolkit.model.attention.segment_attention.LOOPED_ON", ())


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[torch.Size]:
    """The shapes of the queries that SDPA is called with."""
    seen: list[torch.Size] = []
    plain = torch.nn.functional.scaled_dot_product_attention

    def counted(query: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        seen.append(query.shape)
        return plain(query, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    return seen
