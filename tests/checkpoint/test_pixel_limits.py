"""Pixel limits in every form in which releases keep them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.pixel_limits import known_pixel_limits, pixel_limits


@pytest.mark.parametrize(
    ("settings", "limits"),
    [
        ({"min_pixels": 3136, "max_pixels": 12544}, (3136, 12544)),
        ({"size": {"shortest_edge": 3136, "longest_edge": 12544}}, (3136, 12544)),
        ({"size": {"min_pixels": 3136, "max_pixels": 12544}}, (3136, 12544)),
        ({"min_pixels": None, "max_pixels": 9, "size": {"shortest_edge": 1, "longest_edge": 2}}, (1, 9)),
        ({"image_processor": {"size": {"shortest_edge": 1, "longest_edge": 2}}}, (1, 2)),
        (SimpleNamespace(min_pixels=1, max_pixels=2, size={"shortest_edge": 3, "longest_edge": 4}), (1, 2)),
        (
            SimpleNamespace(image_processor=SimpleNamespace(size=SimpleNamespace(shortest_edge=1, longest_edge=2))),
            (1, 2),
        ),
        ({"size": {"shortest_edge": 336}}, (336, ABSENT)),  # as LLaVA's CLIP processor says it
        ({"size": 336, "max_pixels": "many"}, (ABSENT, "many")),
        (None, (ABSENT, ABSENT)),
        ([1], (ABSENT, ABSENT)),
    ],
)
def test_pixel_limits(settings: Any, limits: tuple[Any, Any]) -> None:
    assert pixel_limits(settings) == limits
    whole = all(isinstance(limit, int) for limit in limits)
    assert known_pixel_limits(settings) == (limits if whole else None)


def test_a_saved_and_a_live_processor_say_the_same() -> None:
    from transformers import Qwen2VLImageProcessor

    live = Qwen2VLImageProcessor(min_pixels=3136, max_pixels=12544)
    assert known_pixel_limits(live) == (3136, 12544)
    assert known_pixel_limits(live.to_dict()) == (3136, 12544)
