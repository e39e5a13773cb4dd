"""The register of operators, what a recipe is, and which operators and families are held out."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from scripts.benchmarks.oracle.folders import Folder


@dataclass(frozen=True)
class Mutation:
    """One change of a folder: the operator, the file, a path in it (keys of JSON, a tensor's name), and what with."""

    operator: str
    file: str = ""
    path: tuple[str, ...] = ()
    to: str = ""

    def __str__(self) -> str:
        parts = (self.operator, self.file, ".".join(self.path), self.to and f"-> {self.to}")
        return " ".join(part for part in parts if part)

    def apply(self, folder: Folder) -> Folder:
        """Return the folder with the change made; it may raise KeyError where another change took its place."""
        changed = dict(folder)
        OPERATORS[self.operator].change(changed, self)
        return changed

    def to_json(self) -> list[object]:
        return [self.operator, self.file, list(self.path), self.to]


Place = tuple[str, tuple[str, ...], str]
"""A file, a path in it, and what with."""


@dataclass(frozen=True)
class Operator:
    """A kind of change: `places` finds where it applies, `change` makes it in the folder given."""

    name: str
    places: Callable[[Folder], Iterable[Place]]
    change: Callable[[Folder, Mutation], None]


OPERATORS: Final[dict[str, Operator]] = {}


def operator(
    places: Callable[[Folder], Iterable[Place]],
) -> Callable[[Callable[[Folder, Mutation], None]], Callable[[Folder, Mutation], None]]:
    """Register a function as an operator; its name with dashes is the operator's."""

    def register(change: Callable[[Folder, Mutation], None]) -> Callable[[Folder, Mutation], None]:
        name = change.__name__.replace("_", "-")
        OPERATORS[name] = Operator(name, places, change)
        return change

    return register


def singles(folder: Folder) -> Iterator[Mutation]:
    """Yield every single mutation of a folder that changes it."""
    for name, known in OPERATORS.items():
        for file, path, to in known.places(folder):
            yield Mutation(name, file, path, to)


def by_hash(names: Iterable[str]) -> list[str]:
    """Return names in the order of their hashes, which nobody chose."""
    return sorted(names, key=lambda name: hashlib.sha256(name.encode()).hexdigest())


def held_out_operators() -> frozenset[str]:
    """Return the quarter of the operators that no rule was written for: the first by hash."""
    names = by_hash(OPERATORS)
    return frozenset(names[: len(names) // 4])


def held_out_families(families: Iterable[str]) -> frozenset[str]:
    """Return the three families that no rule was written for: the first by hash."""
    return frozenset(by_hash(families)[:3])
