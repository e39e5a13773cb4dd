"""An export in forms that older versions read as well as today's.

Where the base's own files are the export's, they are what they always were. A base that transformers 5 wrote, or files
that it wrote because training changed them, no transformers 4 can load: rotary settings, the image processor, lists of
special tokens are in other places. The doctor knows these forms and what mends them; here its rules are applied to an
export before it is published.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.tensor_names import plan_renames
from grpo_toolkit.doctor.findings import RULES
from grpo_toolkit.doctor.planned_files import DiskFiles
from grpo_toolkit.doctor.repair_plan import plan_older_forms
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

COMPATIBILITIES: Final = ("all", "v5")
"""The readers of an export: every version that knows the model, or transformers 5 alone (the base's forms)."""


def check_compat(compat: str) -> None:
    """Raise for a word that is not one of `COMPATIBILITIES`.

    Raises:
        InputError: `compat` is another word.
    """
    if compat not in COMPATIBILITIES:
        raise InputError(f"compat {compat!r}: not one of {', '.join(COMPATIBILITIES)}")


def published_renames(names: Iterable[str], model_type: object, *, compat: str) -> dict[str, str]:
    """Return new names for tensors whose names are not their family's published ones, which servers expect."""
    if compat != "all" or not isinstance(model_type, str):
        return {}
    return plan_renames(names, None, model_type)


def write_older_forms(folder: Path) -> tuple[str, ...]:
    """Change the JSON files of a folder of our own until transformers 4 can read them too.

    Returns:
        A line for each thing that was changed; empty where nothing had to be.
    """
    if not (folder / CONFIG).is_file():
        return ()
    plan = plan_older_forms(DiskFiles(folder))
    for change in plan.changes:
        if change.after is None:
            (folder / change.file).unlink()
        else:
            (folder / change.file).write_bytes(change.after)
    return tuple(f"{finding.file}: {finding.title}; now: {RULES[finding.code].mend}" for finding in plan.mended)
