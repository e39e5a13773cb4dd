"""The table of model families in docs/families.md, from a run of the matrix.

bash scripts/test families --junitxml=families.xml
python -m scripts.docs.families families.xml --write docs/families.md

Several files are one run in parts; of a cell that is in more than one of them the later file counts.
"""

from __future__ import annotations

import argparse
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scripts.docs.pages.markdown import print_or_write

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

PROMISES: Final = (
    "callbacks change no bit",
    "rollouts cached",
    "resume exact",
    "export verified",
    "doctor silent",
    "checkpoint repaired",
)
"""The promises of a cell, in the order in which the matrix tries them."""

VERSIONED: Final = ("transformers", "trl", "peft", "torch")
BEGIN: Final = "<!-- families: python -m scripts.docs.families RESULTS.xml --write docs/families.md -->"
END: Final = "<!-- end of families -->"
_CELL: Final = re.compile(r"test_every_promise_holds\[(\w+)-(\w+)-(\w+)-(\w+)\]")
_COLUMNS: Final = ("v5-full", "v5-lora", "published-full", "published-lora")
_FAMILY: Final = re.compile(r"^\| `(\w+)` \|", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """The outcome of one training with all its promises.

    Attributes:
        family: its `model_type`.
        form: of its base, "v5" or "published".
        data: "text" or "pictures".
        kind: "full" or "lora".
        kept: how many of `PROMISES` held, in their order.
        reason: of a skipped or broken cell, in the words of what refused it; empty where all is well.
        is_skipped: it could not be tried.
        day: of the run.
        versions: of the packages, by name.
    """

    family: str
    form: str
    data: str
    kind: str
    kept: int
    reason: str
    is_skipped: bool
    day: str
    versions: Mapping[str, str]

    @property
    def word(self) -> str:
        if self.is_skipped:
            return "-"
        return "yes" if self.kept == len(PROMISES) and not self.reason else f"not: {PROMISES[self.kept]}"


def column_of(cell: Any) -> str:
    """Return the column of a cell or case: what is born in transformers 5 is published in the form that it saves."""
    form = "published" if cell.data == "pictures" else cell.form
    return f"{form}-{cell.kind}"


def read_cells(files: Sequence[Path]) -> dict[tuple[str, str], Cell]:
    """Return the cells of a run, by family and column, from the files that pytest's `--junitxml` wrote."""
    cells: dict[tuple[str, str], Cell] = {}
    for file in files:
        for suite in ElementTree.parse(file).getroot().iter("testsuite"):
            day = suite.get("timestamp", "")[:10]
            for found in (_cell(case, day) for case in suite.iter("testcase")):
                if found is not None:
                    cells[found.family, column_of(found)] = found
    return cells


def _cell(case: ElementTree.Element, day: str) -> Cell | None:
    match = _CELL.fullmatch(case.get("name", ""))
    if match is None:
        return None
    family, form, data, kind = match.groups()
    properties = [(item.get("name", ""), item.get("value", "")) for item in case.iter("property")]
    trouble = next((part for name in ("failure", "error", "skipped") for part in case.iter(name)), None)
    return Cell(
        family=family,
        form=form,
        data=data,
        kind=kind,
        kept=sum(name == "kept" for name, _ in properties),
        reason="" if trouble is None else " ".join(trouble.get("message", "").split()),
        is_skipped=trouble is not None and trouble.tag == "skipped",
        day=day,
        versions={name: value for name, value in properties if name in VERSIONED},
    )


def table(
    cells: Mapping[tuple[str, str], Cell],
    wanted: Sequence[tuple[str, str]],
    notes: Mapping[str, str],
) -> str:
    """Return a run as Markdown: its day and versions, and a row a family.

    Args:
        cells: as `read_cells` returns them.
        wanted: family and column of every cell of the matrix; those that are not in the run are told.
        notes: what there is to say of a family beside its outcome.
    """
    days = sorted({cell.day for cell in cells.values()})
    versions = Counter(tuple(cell.versions.items()) for cell in cells.values() if cell.versions)
    said = "; ".join(", ".join(f"{name} {version}" for name, version in group) for group in versions)
    words = Counter(cell.word.partition(":")[0] for cell in cells.values())
    rows = [
        f"Run on {' to '.join(sorted({days[0], days[-1]}))} with {said}: {words['yes']} trainings of {len(cells)} "
        f"kept every promise, {words['not']} did not, {words['-']} could not be tried. Of the matrix, "
        f"{len(set(wanted) - cells.keys())} were not in this run.",
        "",
        "| family | v5 form, full | v5 form, LoRA | published form, full | published form, LoRA | pictures | notes |",
        "|---|---|---|---|---|---|---|",
    ]
    for family in dict.fromkeys(family for family, _ in wanted):
        own = [cells.get((family, column)) for column in _COLUMNS]
        reasons = dict.fromkeys(cell.reason for cell in own if cell is not None and cell.reason)
        remarks = "; ".join([*filter(None, [notes.get(family)]), *(_short(reason) for reason in reasons)])
        shown = (
            cell.word if cell is not None else "not run" if (family, column) in wanted else ""
            for cell, column in zip(own, _COLUMNS, strict=True)
        )
        seen = any(cell is not None and cell.data == "pictures" and cell.word == "yes" for cell in own)
        rows.append(" | ".join((f"| `{family}`", *shown, "yes" if seen else "", remarks)) + " |")
    return "\n".join(rows)


def _short(reason: str) -> str:
    return reason.replace("|", "/")[:200]


def is_current(page: str) -> bool:
    """Return whether the families of a page are those of the matrix, in its order."""
    from scripts.models.families import CASES

    return _FAMILY.findall(page) == list(dict.fromkeys(case.family for case in CASES))


def main() -> None:
    """Print the table, or write it into a page."""
    from scripts.models.families import CASES, NOTES

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="+", metavar="RESULTS.xml")
    parser.add_argument("--write", type=Path, metavar="PAGE")
    arguments = parser.parse_args()
    wanted = [(case.family, column_of(case)) for case in CASES]
    print_or_write(table(read_cells(arguments.results), wanted, NOTES), arguments.write, begin=BEGIN, end=END)


if __name__ == "__main__":
    main()
