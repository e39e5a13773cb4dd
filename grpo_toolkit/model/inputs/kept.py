"""Values kept for the next time they are asked for, up to so many bytes."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Generic, TypeVar

Value = TypeVar("Value")


class UnknownValueError(Exception):
    """A value that is not kept: it cannot be told from others by its content, or may change and cannot be copied."""


class Kept(Generic[Value]):
    """The values that were used last, with at most `max_bytes` in them; a copy of this one begins empty.

    A value that has more bytes than that is not kept.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.bytes = 0
        self._values: OrderedDict[Any, tuple[Value, int]] = OrderedDict()

    def get(self, key: Any) -> Value | None:
        """Return what is kept for a key, or None."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: Value, size: int) -> None:
        """Keep a value of `size` bytes, and let go of those that were used longest ago."""
        self.bytes -= self._values.pop(key, (None, 0))[1]
        if size > self.max_bytes:
            return
        self._values[key] = value, size
        self.bytes += size
        while self.bytes > self.max_bytes:
            self.bytes -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Let go of all values."""
        self._values.clear()
        self.bytes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        # Copied and pickled with what holds it, a dataset for one, whose values are read again where they are wanted.
        return type(self), (self.max_bytes,)
