"""The findings of the doctor, their severities, and the register of rules that give them.

A rule is a small pure function from a `Folder` to faults, registered as data by the decorator `rule`. Everything that
is the same for all its faults (code, severity, effect, evidence) stands in the decorator, so the manual's page of
findings is made from the rules and cannot differ from them.
"""

from __future__ import annotations

import enum
import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.json_files import ABSENT, Absent
from grpo_toolkit.checkpoint.short_repr import HtmlTable, ShortRepr
from grpo_toolkit.doctor.readers import ALL, Reader, concerns, in_words
from grpo_toolkit.doctor.tensor_changes import TensorChanges

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping
    from pathlib import Path

    from grpo_toolkit.doctor.parsed_folder import Folder


class Severity(enum.Enum):
    """The severity of a finding, worst first."""

    UNLOADABLE = "unloadable"  # some supported library cannot load the folder
    WRONG = "wrong"  # it loads, and says or does something else than it should
    SLOW = "slow"  # it answers right, but more slowly than its base
    WASTEFUL = "wasteful"  # more memory or disk than needed, or time where no reader of today asks for it
    NOTE = "note"  # worth knowing; the folder counts as clean

    @property
    def rank(self) -> int:
        """The place in the order of severities, 0 for the worst."""
        return list(Severity).index(self)


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A key of a JSON file, set to `value` or, where that is ABSENT, deleted; `path` leads to it."""

    file: str
    path: tuple[str, ...]
    value: Any


@dataclass(frozen=True, kw_only=True)
class WholeFile:
    """A whole file: written with `content` (JSON), copied from the base (`content` None), or removed (ABSENT)."""

    file: str
    content: Mapping[str, Any] | Absent | None


@dataclass(frozen=True, kw_only=True)
class Unmark:
    """A file without its byte-order mark."""

    file: str


Remedy = Edit | WholeFile | Unmark | TensorChanges


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A fault that a rule found at one place; `remedies` repair it, and are empty where nothing can."""

    file: str
    key: str = ""
    found: Any = ABSENT
    expected: str
    remedies: tuple[Remedy, ...] = ()
    fails: str = ""
    """The readers that fail (`readers.py`), where they are others than the rule's."""


@dataclass(frozen=True, kw_only=True)
class Rule:
    """A kind of fault that the doctor knows.

    Attributes:
        code: stable name in kebab-case.
        severity: how bad it is.
        title: the fault in a few words.
        effect: what it does to whoever uses the folder.
        evidence: a link to where it was reported or where the mechanism can be read.
        mend: how it is repaired, in a few words; empty where it cannot be.
        needs_base: whether it can only be judged beside the base.
        fails: the readers that fail, as `readers.py` writes them.
        check: the function.
    """

    code: str
    severity: Severity
    title: str
    effect: str
    evidence: str
    mend: str
    needs_base: bool
    fails: str
    check: Callable[[Folder], Iterable[Fault]]

    def to_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity.value,
            "title": self.title,
            "effect": self.effect,
            "evidence": self.evidence,
            "repair": self.mend or None,
            "needs_base": self.needs_base,
            "readers": in_words(self.fails),
        }


RULES: Final[dict[str, Rule]] = {}
"""Every rule by its code, in the order in which a plan of repairs takes them."""


def rule(
    severity: Severity,
    title: str,
    *,
    effect: str,
    evidence: str,
    mend: str = "",
    needs_base: bool = False,
    fails: str = ALL,
) -> Callable[[Callable[[Folder], Iterable[Fault]]], Callable[[Folder], Iterable[Fault]]]:
    """Register a function as a rule; its name with dashes is the rule's code."""

    def register(check: Callable[[Folder], Iterable[Fault]]) -> Callable[[Folder], Iterable[Fault]]:
        code = check.__name__.replace("_", "-")
        assert code not in RULES, f"two rules are called {code}"
        RULES[code] = Rule(
            code=code,
            severity=severity,
            title=title,
            effect=effect,
            evidence=evidence,
            mend=mend,
            needs_base=needs_base,
            fails=fails,
            check=check,
        )
        return check

    return register


@dataclass(frozen=True, kw_only=True, repr=False)
class Finding(ShortRepr):
    """A fault of a folder.

    Attributes:
        code, severity, title, effect, evidence: of the rule.
        file: name in the folder; empty where it is about the folder as a whole.
        key: dotted path in a JSON file, or a tensor's name; empty where it is about the whole file.
        found: the value found, shortened, as JSON would show it; ABSENT where there is none.
        expected: what should be there, in words or as JSON.
        repairable: whether `repair` mends it.
        remedies: how.
        fails: the readers that fail.
    """

    code: str
    severity: Severity
    title: str
    file: str
    key: str
    found: Any
    expected: str
    effect: str
    evidence: str
    repairable: bool
    remedies: tuple[Remedy, ...] = ()
    fails: str = ALL

    def concerns(self, reader: Reader | None) -> bool:
        """Return whether this reader fails; some supported reader does always."""
        return reader is None or concerns(self.fails, reader)

    @property
    def needs_rewriting(self) -> bool:
        """Return whether its repair rewrites weights."""
        return any(isinstance(remedy, TensorChanges) for remedy in self.remedies)

    def to_json(self) -> dict[str, Any]:
        return {
            "code": self.code,
            "severity": self.severity.value,
            "file": self.file,
            "key": self.key,
            "found": show(self.found),
            "expected": self.expected,
            "effect": self.effect,
            "evidence": self.evidence,
            "repairable": self.repairable,
            "rewrites_weights": self.needs_rewriting,
            "readers": in_words(self.fails),
        }


@dataclass(frozen=True, kw_only=True, repr=False)
class Diagnosis(HtmlTable):
    """The findings of the doctor in one folder.

    Attributes:
        path: the folder.
        kind: its content ("full model", "adapter", "sharded FSDP checkpoint", "DeepSpeed ZeRO checkpoint").
        facts: more that was recognised: trainer checkpoint, dialect, size.
        base: the base folder it was compared with, or None.
        findings: those that concern the reader first, worst first.
        not_judged: codes of the rules that need a base where there is none.
        base_name: the base that the folder's files name where it was not found; empty where they name none.
        reader: who is judged for, or None for every reader.
        installed: the transformers that is installed beside us, or None.
    """

    path: Path
    kind: str
    facts: tuple[str, ...]
    base: Path | None
    findings: tuple[Finding, ...]
    not_judged: tuple[str, ...]
    base_name: str = ""
    reader: Reader | None = None
    installed: Reader | None = None

    @property
    def is_clean(self) -> bool:
        """Return whether nothing worse than a note was found that concerns the reader."""
        return all(finding.severity is Severity.NOTE for finding in self.judged)

    @property
    def judged(self) -> tuple[Finding, ...]:
        """The findings that concern the reader who is judged for."""
        return tuple(finding for finding in self.findings if finding.concerns(self.reader))

    def to_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "kind": self.kind,
            "facts": list(self.facts),
            "base": None if self.base is None else str(self.base),
            "clean": self.is_clean,
            "reader": None if self.reader is None else str(self.reader),
            "findings": [
                {**finding.to_json(), "concerns": finding.concerns(self.reader or self.installed)}
                for finding in self.findings
            ],
            "not_judged": list(self.not_judged),
            "base_name": self.base_name,
        }

    def table_rows(self) -> list[dict[str, object]]:
        return [
            {
                "severity": finding.severity.value,
                "finding": finding.code,
                "file": finding.file,
                "key": finding.key,
                "found": show(finding.found),
                "expected": finding.expected,
                "effect": finding.effect,
            }
            for finding in self.findings
        ]


@dataclass(frozen=True, kw_only=True, repr=False)
class RunDiagnosis(HtmlTable):
    """The findings of the doctor in every checkpoint of a run.

    Attributes:
        path: the run's folder.
        diagnoses: oldest checkpoint first, then the folder itself where it holds a model too.
        empty: a line for each checkpoint that holds nothing to examine.
    """

    path: Path
    diagnoses: tuple[Diagnosis, ...]
    empty: tuple[str, ...] = ()

    @property
    def is_clean(self) -> bool:
        """Return whether nothing worse than a note was found in any of them."""
        return all(diagnosis.is_clean for diagnosis in self.diagnoses)

    def to_json(self) -> dict[str, Any]:
        """Return the run as one object; each finding names its checkpoint."""
        return {
            "path": str(self.path),
            "kind": "run",
            "clean": self.is_clean,
            "checkpoints": [
                {**diagnosis.to_json(), "findings": len(diagnosis.findings)} for diagnosis in self.diagnoses
            ],
            "empty": list(self.empty),
            "findings": [
                {"checkpoint": diagnosis.path.name, **finding.to_json()}
                for diagnosis in self.diagnoses
                for finding in diagnosis.findings
            ],
        }

    def table_rows(self) -> list[dict[str, object]]:
        return [
            {"checkpoint": diagnosis.path.name, **row}
            for diagnosis in self.diagnoses
            for row in diagnosis.table_rows()
        ]


_SAYS_NO_NUMBER: Final = re.compile(r"NaN|Infinity|\\u|[0-9]{16}")


def show(value: Any, *, limit: int = 100) -> Any:
    """Return a value from an untrusted file in a form that is safe to print and to put into JSON: short and finite."""
    if value is None or isinstance(value, bool):
        return value
    if value is ABSENT:
        return "absent"
    if isinstance(value, (int, float)) and math.isfinite(value) and abs(value) < 2**63:
        return value
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    if not isinstance(value, (str, int, float)) and len(text) <= limit and not _SAYS_NO_NUMBER.search(text):
        return json.loads(text)
    plain = "".join(sign if sign.isprintable() else ascii(sign)[1:-1] for sign in text[: limit + 1])
    return plain if len(plain) <= limit else plain[: limit - 3] + "..."
