"""The commit that this package runs from, where it runs from a git checkout and not from an installed release."""

from __future__ import annotations

import functools
import subprocess
from pathlib import Path
from typing import Final

_PACKAGE: Final = Path(__file__).resolve().parents[2]
_PATIENCE_S: Final = 5.0


@functools.cache
def toolkit_commit() -> str | None:
    """Return the first 12 digits of the commit, with "changed" where files differ from it; None outside a checkout.

    A release that is installed inside somebody else's checkout (a virtual environment there) is not tracked by it.
    """
    if _git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    commit = _git("rev-parse", "--short=12", "HEAD")
    return f"{commit}, changed" if commit and _git("status", "--porcelain", "--", ".") else commit


def _git(*arguments: str) -> str | None:
    """Return what git says; None where there is no git, or it fails."""
    try:
        done = subprocess.run(
            # Without the lock that "status" takes: somebody may be committing.
            ["git", "--no-optional-locks", "-C", str(_PACKAGE), *arguments],
            capture_output=True,
            text=True,
            check=True,
            timeout=_PATIENCE_S,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
