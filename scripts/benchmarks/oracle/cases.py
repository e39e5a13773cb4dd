"""The cases: which places of which good folders are mutated, singly and in pairs, chosen by hashes alone."""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from scripts.benchmarks.oracle import bases
from scripts.benchmarks.oracle.folders import Folder, digest
from scripts.benchmarks.oracle.mutations import files, keys, tensors
from scripts.benchmarks.oracle.mutations.operators import (
    OPERATORS,
    Mutation,
    held_out_families,
    held_out_operators,
    singles,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

assert all((files, keys, tensors))  # they register their operators

PLACES: Final = 2
"""Places a folder and an operator."""
PAIRS: Final = 8
"""A folder's single mutations for each pair of them."""


@dataclass(frozen=True)
class Case:
    """A good folder by its name, and what is changed in it."""

    folder: str
    mutations: tuple[Mutation, ...]

    def __str__(self) -> str:
        return f"{self.folder}: {'; '.join(map(str, self.mutations))}"

    @property
    def kind(self) -> str:
        """The operator; of a pair, "pair"."""
        return self.mutations[0].operator if len(self.mutations) == 1 else "pair"

    @property
    def is_held_out(self) -> bool:
        """Return whether no rule was written for its family or its operators."""
        family = self.folder.split("/")[0]
        operators = {made.operator for made in self.mutations}
        return family in held_out_families(bases.FAMILIES) or bool(operators & held_out_operators())

    def build(self) -> Folder:
        """Return the mutated folder.

        Raises:
            KeyError, ValueError, TypeError: the first mutation of a pair took the second one's place.
        """
        folder = bases.good_folder(self.folder)
        for made in self.mutations:
            folder = made.apply(folder)
        return folder

    def to_json(self) -> dict[str, Any]:
        return {"folder": self.folder, "mutations": [made.to_json() for made in self.mutations]}

    @staticmethod
    def from_json(content: dict[str, Any]) -> Case:
        """Return the case that a line of the truth is about."""
        made = tuple(Mutation(name, file, tuple(path), to) for name, file, path, to in content["mutations"])
        return Case(content["folder"], made)


def chosen(names: Iterable[str], *, seed: str, places: int = PLACES) -> list[Case]:
    """Return the cases of good folders in the order of their hashes, so that the first n are a fair sample of all."""
    found = []
    for name in names:
        mine = list(_of_folder(name, places))
        drawn = sorted(mine, key=lambda case: hashed(f"{seed} {case}"))
        pairs = zip(drawn[::PAIRS], drawn[1::PAIRS], strict=False)
        found += [*mine, *(Case(name, (*one.mutations, *other.mutations)) for one, other in pairs)]
    return sorted(found, key=lambda case: hashed(str(case)))


def _of_folder(name: str, places: int) -> Iterator[Case]:
    by_operator: dict[str, list[Case]] = defaultdict(list)
    for made in singles(bases.good_folder(name)):
        by_operator[made.operator].append(Case(name, (made,)))
    for operator in sorted(OPERATORS):
        yield from sorted(by_operator[operator], key=lambda case: hashed(str(case)))[:places]


def changed(case: Case) -> Folder | None:
    """Return the mutated folder, or None where nothing is changed or the pair excludes itself."""
    try:
        folder = case.build()
    except (KeyError, ValueError, TypeError, IndexError, AttributeError):
        return None
    return None if digest(folder) == digest(bases.good_folder(case.folder)) else folder


def hashed(text: str) -> str:
    """Return the hash that puts cases, operators' places and pairs in an order that nobody chose."""
    return hashlib.sha256(text.encode()).hexdigest()


def line(content: Any) -> str:
    """Return a line of a JSON-lines file."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
