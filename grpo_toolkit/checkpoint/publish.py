"""The atomic publication of a folder: filled beside its place, flushed to the disk, then renamed into it.

At every moment the name leads to the whole old folder or to the whole new one; where the kernel can exchange two
names, it does so in one step.
"""

from __future__ import annotations

import errno
import os
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.model_folder import MANIFEST
from grpo_toolkit.errors import InputError, OutputExistsError

if TYPE_CHECKING:
    from collections.abc import Iterator

_AT_FDCWD: Final = -100
_RENAME_EXCHANGE: Final = 2
_CANNOT: Final = frozenset({errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP})


def exchange(one: Path, other: Path) -> bool:
    """Exchange two existing paths of one file system, atomically.

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
    """Give a staged folder its name; where that fails, the folder that was there before has it again."""
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
    """Flush a folder's list of names to the disk, so that files made, renamed or removed in it stay so."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_output(output_dir: Path, *, overwrite: bool) -> None:
    """Refuse an output folder that cannot or must not be written, before anything is done.

    Raises:
        OutputExistsError: it exists, and is not an export of ours or `overwrite` is False.
        InputError: its parent cannot be written.
    """
    target = Path(os.path.realpath(output_dir))
    # os.path.exists, unlike Path.exists before Python 3.14, also answers where a parent may not be entered.
    existing = next(folder for folder in (target, *target.parents) if os.path.exists(folder))  # noqa: PTH110
    if os.path.ismount(target):
        raise OutputExistsError(f"{output_dir}: is a mount point, which cannot be replaced; name a folder in it")
    if not existing.is_dir():
        raise OutputExistsError(f"{output_dir}: {existing} is a file, so no folder can be made there; name another")
    writable = target.parent if existing == target else existing
    if not os.access(writable, os.W_OK | os.X_OK):
        raise InputError(f"{output_dir}: no permission to write in {writable}; choose another folder or mend its mode")
    if existing == target and any(target.iterdir()):
        if not (output_dir / MANIFEST).is_file():
            raise OutputExistsError(
                f"{output_dir}: exists and is not an export of ours (no {MANIFEST} in it); "
                "name another folder or move this one away"
            )
        if not overwrite:
            raise OutputExistsError(
                f"{output_dir}: an export is there already; pass overwrite=True (--overwrite) to replace it"
            )


@contextmanager
def staged(output_dir: Path, *, overwrite: bool) -> Iterator[Path]:
    """Fill a folder beside `output_dir`, then rename it into place; on an exception nothing of it is left.

    The staging folder's name starts with a dot and ends with the owner's pid, so it never matches the
    `checkpoint-*` glob that trainers rotate. Every file is flushed to disk before the rename.
    """
    import platform
    import shutil
    import tempfile

    check_output(output_dir, overwrite=overwrite)
    output_dir = Path(os.path.realpath(output_dir))  # "." and links have no parent of their own to stage in
    make_folder(output_dir.parent)
    # The host's name keeps two machines on one file system from taking each other's exporters for dead.
    prefix = f".{output_dir.name}.staging-{platform.node()}-"
    _sweep(output_dir.parent, prefix)
    staging = Path(tempfile.mkdtemp(prefix=prefix, suffix=f"-{os.getpid()}", dir=output_dir.parent))
    try:
        yield staging
        _finish_files(staging)
        _put(staging, output_dir, overwrite=overwrite)
    except OSError as error:
        if error.errno is not None:  # a library's own OSError would lose what it says
            error.filename = error.filename or os.fspath(output_dir)  # a write that fails names no file
        raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _put(staging: Path, output_dir: Path, *, overwrite: bool) -> None:
    """Give a staged folder its name; where another is published there meanwhile, judge that one and try again."""
    for is_last in (False, True):
        check_output(output_dir, overwrite=overwrite)
        try:
            replace_folder(staging, output_dir)
        except OSError as error:
            if is_last or error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
        else:
            return


def keep_rejected(staging: Path, output_dir: Path) -> Path | None:
    """Give a staged folder that is whole, and was refused all the same, the name of its output with `.rejected`.

    It takes the place of an earlier one.

    Returns:
        Its path; None where something of another's has that name, or the disk refuses.
    """
    output_dir = Path(os.path.realpath(output_dir))
    rejected = output_dir.with_name(f"{output_dir.name}.rejected")
    try:
        check_output(rejected, overwrite=True)
        _finish_files(staging)
        replace_folder(staging, rejected)
    except (InputError, OSError):
        return None
    return rejected


def _sweep(parent: Path, prefix: str) -> None:
    """Remove staging folders whose owner is dead, and put back what it moved away and never replaced."""
    import glob
    import shutil

    published = parent / prefix[1:].partition(".staging-")[0]
    for start in (prefix.replace(".staging-", ".previous-"), prefix):
        for leftover in parent.glob(f"{glob.escape(start)}*"):
            pid = leftover.name.rpartition("-")[2]
            if not pid.isdigit() or _is_alive(int(pid)):
                continue
            if start == prefix or published.exists():
                shutil.rmtree(leftover, ignore_errors=True)
            else:
                leftover.rename(published)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _finish_files(folder: Path) -> None:
    """Give every file the mode of the umask (safetensors >= 0.8 writes 0600) and flush it to disk."""
    mode = 0o777 & ~_umask()
    for path in sorted(folder.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if os.fstat(file.fileno()).st_nlink == 1:  # a linked file's mode is its other name's, too
                    os.fchmod(file.fileno(), mode & 0o666)
                os.fsync(file.fileno())
        elif path.is_dir():
            path.chmod(mode)
            sync_folder(path)
    folder.chmod(mode)
    sync_folder(folder)


def _umask() -> int:
    # os.umask can only be read by setting it. /proc gives it without the race, where there is one.
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    current = os.umask(0o022)
    os.umask(current)
    return current
