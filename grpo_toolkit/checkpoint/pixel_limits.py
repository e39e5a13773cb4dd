"""The pixel limits of an image processor: the fewest and the most pixels of an image that a model sees.

Releases keep them as `min_pixels` and `max_pixels`, as `size.shortest_edge` and `size.longest_edge`, or under the
first two names in `size`; in a file of their own, or in a processor's under `image_processor`.
"""

from __future__ import annotations

from typing import Any, Final

from grpo_toolkit.checkpoint.json_files import ABSENT

PIXEL_LIMITS: Final = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
"""The name of each limit, and its name in `size`."""


def pixel_limits(settings: Any) -> tuple[Any, Any]:
    """Return the smallest and the largest number of pixels, each ABSENT where it is not set, of whatever type it is.

    Args:
        settings: of an image processor, or of a processor that has one: a JSON object, or the live one.
    """
    inner = _value(settings, "image_processor")
    settings = settings if inner is ABSENT else inner
    size = _value(settings, "size")
    low, high = (
        (_value(settings, name), _value(size, edge), _value(size, name)) for name, edge in PIXEL_LIMITS.items()
    )
    return _first(low), _first(high)


def known_pixel_limits(settings: Any) -> tuple[int, int] | None:
    """Return both limits where both are set to a whole number, else None."""
    low, high = pixel_limits(settings)
    return (low, high) if isinstance(low, int) and isinstance(high, int) else None


def _first(values: tuple[Any, ...]) -> Any:
    return next((value for value in values if value is not ABSENT), ABSENT)


def _value(node: Any, key: str) -> Any:
    value = node.get(key) if isinstance(node, dict) else getattr(node, key, None)
    return ABSENT if value is None else value
