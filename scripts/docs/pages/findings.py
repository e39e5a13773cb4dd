"""The doctor's findings, each under an anchor that is its code, from the rules themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from grpo_toolkit.doctor.diagnose import ALL_RULES
from grpo_toolkit.doctor.findings import Severity
from grpo_toolkit.doctor.readers import in_words
from scripts.docs.pages.markdown import plain, sentence

if TYPE_CHECKING:
    from grpo_toolkit.doctor.findings import Rule

MEANINGS: Final = {
    Severity.UNLOADABLE: "Some library that should read the folder cannot load it.",
    Severity.WRONG: "The folder loads, and the model does something else than it should.",
    Severity.SLOW: "The answers are right, and slower than those of the base.",
    Severity.WASTEFUL: "The folder takes more memory or disk than it has to.",
    Severity.NOTE: "This is good to know. The folder counts as clean.",
}
INTRODUCTION: Final = """# Findings of the doctor

    grpo-toolkit doctor FOLDER --base BASE              # look
    grpo-toolkit repair FOLDER --base BASE --dry-run    # show a diff
    grpo-toolkit repair FOLDER --base BASE              # repair
    grpo-toolkit repair FOLDER --undo                   # put back what was there

The doctor prints the code of each finding: search this page for it. The base is the folder of the model that the
training began with. If you have a message of another program and no code, begin with
[Troubleshooting](../troubleshooting.md).
"""


def findings_page() -> str:
    """Return every finding: what it means, who is affected, how it is repaired, where to read more."""
    parts = [INTRODUCTION]
    for severity, meaning in MEANINGS.items():
        rules = [rule for rule in ALL_RULES if rule.severity is severity]
        parts += [f"## {severity.value.capitalize()}\n", f"{meaning}\n"]
        parts += [_finding(rule) for rule in rules]
    return "\n".join(parts)


def _finding(rule: Rule) -> str:
    affected = plain(in_words(rule.fails))
    lines = [
        f"### `{rule.code}` {{ #{rule.code} }}",
        "",
        f"**{sentence(rule.title)}** {sentence(rule.effect)}",
        "",
        f"- Affected: {affected}." + (" Found only with `--base`." if rule.needs_base else ""),
        f"- Repair: {plain(rule.mend)}." if rule.mend else "- Repair: none. The doctor can only report it.",
        f"- Read more: <{rule.evidence}>",
        "",
    ]
    return "\n".join(lines)
