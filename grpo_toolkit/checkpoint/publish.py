"""A folder takes the place of another, in one step where the kernel can: its name is the old or the new one, whole."""

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


def make_folder(folder: Path) -> None:
    """Make a folder, and those above it that are missing; each is on the disk before something is made in it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def replace_folder(staging: Path, output_dir: Path) -> None:
    """Give a staged folder its name on the disk; where that fails, what was there before has it again."""
    import shutil

    if output_dir.exists() and exchange(staging, output_dir):
        try:
            sync_folder(output_dir.parent)
        except OSError:
            exchange(staging, output_dir)
            raise
        return  # what was published before is now the staging folder, which its owner removes
    previous = None
    if output_dir.exists():
        previous = staging.with_name(staging.name.replace(".staging-", ".previous-"))
        output_dir.rename(previous)
    try:
        staging.rename(output_dir)
        sync_folder(output_dir.parent)
    except OSError:
        if not staging.exists():
            output_dir.rename(staging)
        if previous is not None:
            previous.rename(output_dir)
        raise
    if previous is not None:
        shutil.rmtree(previous, ignore_errors=True)


def sync_folder(folder: Path) -> None:
    """Flush a folder's list of names to the disk: what was made, renamed or removed in it."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
