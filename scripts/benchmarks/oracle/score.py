"""The doctor's score against the committed truth.

    python -m scripts.benchmarks.oracle.score                # seen and held out, as one JSON object; no case is named
    python -m scripts.benchmarks.oracle.score --show         # and the seen cases that were missed or alarmed
    python -m scripts.benchmarks.oracle.score --without cast-all cast-tensor    # without some kinds of mutations
    python -m scripts.benchmarks.oracle.score --served       # of the folders about which vLLM was asked

A case is ill if a reader fails with it or answers otherwise. Found: a serious finding that the good folder does not
have concerns such a reader and names the file and the key. A false alarm: such a finding, for one of the readers that
were asked, where all of them answer as before. Right reader: exactly the readers that are ill are concerned. Rates are
means of the rates by kind of mutation.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.doctor.findings import Diagnosis, Finding
from grpo_toolkit.doctor.readers import ALL, Reader, concerns
from grpo_toolkit.errors import CheckpointError
from scripts.benchmarks.oracle import bases, truth
from scripts.benchmarks.oracle.folders import digest, write

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from scripts.benchmarks.oracle.cases import Case
    from scripts.benchmarks.oracle.folders import Folder
    from scripts.benchmarks.oracle.mutations.operators import Mutation

SERIOUS: Final = ("unloadable", "wrong", "slow")


@dataclass(frozen=True)
class Said:
    """A serious thing that the doctor says: its code, whom it concerns, all its text, whether it can be repaired."""

    code: str
    fails: str
    text: str
    repairable: bool

    def names(self, made: Mutation) -> bool:
        """Return whether it names the file and the key that were changed; of a file put elsewhere, either name."""
        files = {Path(made.file).name, *([Path(made.to).name] if "." in Path(made.to).name[1:] else [])}
        key = made.path[-1] if made.path else ""
        parts = {key, ".".join(key.split(".")[-2:])} if "." in key else {key}
        return any(file in self.text for file in files) and any(part in self.text for part in parts)


@dataclass(frozen=True)
class Result:
    """A case, what its readers do, and what the doctor says about it."""

    case: Case
    readers: dict[str, str]
    said: tuple[Said, ...]

    @property
    def ill(self) -> set[str]:
        """The readers that fail or answer otherwise."""
        return {version for version, verdict in self.readers.items() if verdict != "same"}

    def concerned(self, said: Iterable[Said]) -> set[str]:
        """Return those of the readers that were asked whom findings concern."""
        return {version for version in self.readers for one in said if concerns(one.fails, reader(version))}

    @property
    def is_found(self) -> bool:
        named = [one for one in self.said if any(one.names(made) for made in self.case.mutations)]
        return bool(self.concerned(named) & self.ill)

    @property
    def is_alarm(self) -> bool:
        return not self.ill and bool(self.concerned(self.said))

    @property
    def is_right(self) -> bool:
        return self.concerned(self.said) == self.ill


def reader(version: str) -> Reader:
    """Return the reader that a column of the truth is about: "5.24.0", "vllm==0.31.0@5.24.0"."""
    name, _, numbers = version.rpartition("==")
    own, _, beside = numbers.partition("@")
    return Reader(name or "transformers", _numbers(own), _numbers(beside or own))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def findings(folder: Path, base: Path | None) -> list[Said]:
    """Return what the doctor says about a folder; what it cannot examine it says in one line."""
    try:
        diagnosis = diagnose_checkpoint(folder, base=base, deep=True)
    except CheckpointError as error:
        return [Said("refused", ALL, str(error).replace(str(folder), ""), repairable=False)]
    diagnoses = [diagnosis] if isinstance(diagnosis, Diagnosis) else diagnosis.diagnoses
    return [_said(found) for one in diagnoses for found in one.findings if found.severity.value in SERIOUS]


def _said(found: Finding) -> Said:
    text = f"{found.file} {found.key} {json.dumps(found.found, default=str)} {found.expected}"
    return Said(found.code, found.fails, text, found.repairable)


class Examiner:
    """Asks the doctor about mutated folders, beside the base that their model was trained from."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self.base = cache(self._base)
        self._before = cache(self._good)

    def _base(self, name: str) -> Path:
        family, dialect, _ = name.split("/")
        path = self._scratch / f"base-{family}-{dialect}"
        return path if path.exists() else write(bases.base_folder(name), path)

    def _good(self, name: str) -> frozenset[tuple[str, str]]:
        path = write(bases.good_folder(name), self._scratch / "good" / name.replace("/", "-"))
        return frozenset((one.code, one.text) for one in findings(path, self.base(name)))

    def examine(self, case: Case, made: Folder, readers: dict[str, str]) -> Result:
        """Return what is said about a mutated folder that is not said about the good one."""
        before = self._before(case.folder)
        with tempfile.TemporaryDirectory(dir=self._scratch) as path:
            said = findings(write(made, Path(path, "folder")), self.base(case.folder))
        return Result(case, readers, tuple(one for one in said if (one.code, one.text) not in before))


def results(*, every: int = 1, told: Path = truth.TRUTH) -> list[Result]:
    """Examine every n-th case of a committed truth.

    Raises:
        AssertionError: a recipe no longer gives the folder that the readers were asked about.
    """
    found = []
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-oracle-") as made:
        examiner = Examiner(Path(made))
        for case, recorded, readers in truth.load(told)[::every]:
            folder = case.build()
            assert digest(folder) == recorded, case
            found.append(examiner.examine(case, folder, readers))
    return found


def score(found: list[Result]) -> dict[str, Any]:
    """Return the rates, macro-averaged by kind of mutation, and over all cases."""
    ill = [one for one in found if one.ill]
    well = [one for one in found if not one.ill]
    seen = [one for one in ill if one.is_found]
    return {
        "cases": len(found),
        "ill": len(ill),
        "recall": _macro(ill, lambda one: one.is_found),
        "recall_of_all": _mean([one.is_found for one in ill]),
        "something_said": _mean([bool(one.concerned(one.said) & one.ill) for one in ill]),
        "false_alarms": _macro(well, lambda one: one.is_alarm),
        "false_alarms_of_all": _mean([one.is_alarm for one in well]),
        "right_reader": _macro(seen, lambda one: one.is_right),
    }


def _macro(found: list[Result], holds: Callable[[Result], bool]) -> float | None:
    kinds: dict[str, list[bool]] = defaultdict(list)
    for one in found:
        kinds[one.case.kind].append(holds(one))
    return _mean([sum(values) / len(values) for values in kinds.values()])


def _mean(values: list[bool] | list[float]) -> float | None:
    return round(sum(values) / len(values), 4) if values else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--every", type=int, default=1, help="take every n-th case")
    parser.add_argument("--without", nargs="+", default=(), metavar="KIND", help="kinds of mutations to leave out")
    parser.add_argument("--served", action="store_true", help="by what vLLM does, not transformers")
    parser.add_argument("--show", action="store_true", help="name the seen cases that were missed or are false alarms")
    args = parser.parse_args()
    told = results(every=args.every, told=truth.SERVED if args.served else truth.TRUTH)
    found = [one for one in told if one.case.kind not in args.without]
    parts = {
        "seen": [one for one in found if not one.case.is_held_out],
        "held_out": [one for one in found if one.case.is_held_out],
    }
    report: dict[str, Any] = {name: score(part) for name, part in parts.items()}
    if args.show:
        part = parts["seen"]
        missed = [one for one in part if one.ill and not one.is_found]
        alarms = [one for one in part if one.is_alarm]
        report["missed"] = [f"{one.case} {one.readers} {sorted({s.code for s in one.said})}" for one in missed]
        report["alarms"] = [f"{one.case} {sorted({s.code for s in one.said})}" for one in alarms]
        report["by_kind"] = {
            "missed": Counter(one.case.kind for one in missed), "alarms": Counter(one.case.kind for one in alarms)
        }  # fmt: skip
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
