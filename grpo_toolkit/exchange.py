"""Two folders change places in one step, so that a reader of a name sees the old or the new one and never none."""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from pathlib import Path

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_CANNOT: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def exchange(one: Path, other: Path) -> bool:
    """Let two existing paths of one file system change places, atomically.

    Returns:
        False where the C library, the kernel or the file system cannot (Linux alone can:
        https://man7.org/linux/man-pages/man2/rename.2.html, RENAME_EXCHANGE); nothing was changed then.

    Raises:
        OSError: it can, and failed.
    """
    import ctypes  # where it is needed: its import would be a tenth of the doctor's start

    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in _CANNOT:
        return False
    raise OSError(code, os.strerror(code), str(other))
