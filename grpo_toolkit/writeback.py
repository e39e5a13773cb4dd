"""What was written starts on its way to the disk at once, so that the flush at the end has little to wait for."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

_SYNC_FILE_RANGE_WRITE: Final = 2


def start_writeback(descriptor: int, offset: int, size: int) -> None:
    """Ask the kernel to begin writing a part of an open file (Linux; elsewhere nothing happens).

    It is only a hint, and proves nothing: what is to be on the disk has to be flushed all the same
    (https://man7.org/linux/man-pages/man2/sync_file_range.2.html).
    """
    call = _sync_file_range()
    if call is not None and size > 0:
        call(descriptor, offset, size, _SYNC_FILE_RANGE_WRITE)


@cache
def _sync_file_range() -> Callable[..., Any] | None:
    import ctypes

    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        call.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return call
