"""The truth: what each reader does with each case, computed by hand and committed as recipes and verdicts.

    python -m scripts.benchmarks.oracle.truth ask DIR PYTHON ... --minutes 60    # goes on where it was
    python -m scripts.benchmarks.oracle.truth collect DIR                       # adds to tests/data/oracle/truth.jsonl

With `--served`, vLLM in its environment is asked (`servers`) about the folders of its own dialect, and what it does
stands in `served.jsonl`.

Cases are asked about in the order of their hashes, so that as far as it got is a fair sample of all. The committed
file has the readers in its first line, and then a case a line: the good folder, the mutations, the hash of the mutated
folder, and what each reader does with it (null where it cannot read the good folder).
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scripts.benchmarks.oracle import bases
from scripts.benchmarks.oracle.cases import Case, changed, chosen, hashed, line
from scripts.benchmarks.oracle.folders import digest, write
from scripts.benchmarks.oracle.readers import ReaderProcess, verdict

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.benchmarks.oracle.folders import Folder

TRUTH: Final = bases.BASES.with_name("truth.jsonl")
SERVED: Final = TRUTH.with_name("served.jsonl")
SEED: Final = "7f4b6e4"
"""The commit that brought the operators and held some out; it draws the pairs."""


class Asker:
    """Asks one reader about folders that lie in memory, and remembers what it does with the good ones."""

    def __init__(self, reader: ReaderProcess, scratch: Path) -> None:
        self.reader = reader
        self._scratch = scratch
        self.answers: dict[str, dict[str, Any]] = {}
        self._steady: set[str] = set()

    @property
    def version(self) -> str:
        """The reader's transformers; of a server, its name, version and transformers ("vllm==0.31.0@5.24.0")."""
        return str(self.reader.versions["name"])

    def close(self) -> None:
        self.reader.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def right(self, name: str) -> dict[str, Any]:
        """Return what the reader does with a good folder."""
        if name not in self.answers:
            self.answers[name] = self.ask(name, bases.good_folder(name), good=True)
        return self.answers[name]

    def ask(self, name: str, folder: Folder, *, good: bool = False) -> dict[str, Any]:
        """Return what the reader does with a folder in the place of a good one."""
        path, base = self._scratch / ("good" if good else "folder"), None
        try:
            write(folder, path)
            if name.endswith("/adapter"):
                base = self._scratch / name.replace("/", "-")
                if not base.exists():
                    write(bases.base_folder(name), base)
            return self.reader.ask(path, base, sees=bases.sees(name), good=good)
        finally:
            shutil.rmtree(path, ignore_errors=True)

    def verdict(self, case: Case, folder: Folder) -> str | None:
        """Return the reader's verdict; None where it cannot read the good folder, or answers anew each time."""
        right = self.right(case.folder)
        if "fails" in right:
            return None
        said = verdict(right, self.ask(case.folder, folder))
        if said.startswith("otherwise") and case.folder not in self._steady:
            again = self.ask(case.folder, bases.good_folder(case.folder))
            if verdict(right, again) != "same":
                self.answers[case.folder] = {"fails": "answers anew each time"}
                return None
            self._steady.add(case.folder)
        return said


def ask_all(pythons: list[str], folder: Path, *, minutes: float, start: int = 0, served: bool = False) -> None:
    """Ask the readers of some environments about the cases in their order until the time is over."""
    cases = chosen(bases.names((bases.SERVED,) if served else bases.DIALECTS), seed=SEED)[start:]
    askers = [_start(python, folder, served=served) for python in pythons]
    known = [
        {entry["hash"] for entry in _lines(folder / f"{one.version}.jsonl")}
        | {key for _, key, verdicts in load(SERVED if served else TRUTH) if one.version in verdicts}
        for one in askers
    ]
    end = time.monotonic() + 60 * minutes
    for number, case in enumerate(cases):
        made = changed(case)
        if made is None:
            continue
        key = digest(made)
        for asker, told in zip(askers, known, strict=True):
            if key not in told:
                told.add(key)
                said = asker.verdict(case, made)
                with (folder / f"{asker.version}.jsonl").open("a", encoding="utf-8") as out:
                    out.write(line({**case.to_json(), "hash": key, "verdict": said}))
        if number % (10 if served else 50) == 0:
            print(number, time.ctime(), flush=True)
        if time.monotonic() > end:
            break
    for asker in askers:
        for name, right in sorted(asker.answers.items()):
            if "fails" in right:
                print(f"{asker.version} cannot read {name}: {right['fails']}", flush=True)
        asker.close()


def _start(python: str, folder: Path, *, served: bool) -> Asker:
    reader = ReaderProcess(python, module="servers" if served else "readers")
    shared = Path("/dev/shm")
    scratch = tempfile.mkdtemp(prefix=f"oracle-{reader.versions['name']}-", dir=shared if shared.is_dir() else folder)
    return Asker(reader, Path(scratch))


def _lines(file: Path) -> Iterator[Any]:
    if file.exists():
        for text in file.read_text(encoding="utf-8").splitlines():
            yield json.loads(text)


def collect(folder: Path, truth: Path = TRUTH) -> None:
    """Add the cases about which a reader was asked who can read the good folder."""
    cases = {key: case for case, key, _ in load(truth)}
    said = {key: verdicts for _, key, verdicts in load(truth)}
    for file in sorted(folder.glob("*.jsonl")):
        for entry in _lines(file):
            if entry["verdict"] is not None:
                cases.setdefault(entry["hash"], Case.from_json(entry))
                said.setdefault(entry["hash"], {})[file.stem] = entry["verdict"]
    readers = sorted({version for verdicts in said.values() for version in verdicts})
    with truth.open("w", encoding="utf-8") as out:
        out.write(line(readers))
        for key, case in sorted(cases.items(), key=lambda item: hashed(str(item[1]))):
            row = case.to_json()
            out.write(line([row["folder"], row["mutations"], key, [said[key].get(version) for version in readers]]))


def load(truth: Path = TRUTH) -> list[tuple[Case, str, dict[str, str]]]:
    """Return the committed truth: cases, the hashes of their folders, each reader's verdict by version."""
    readers, *rows = list(_lines(truth)) or [[]]
    return [
        (
            Case.from_json({"folder": name, "mutations": mutations}),
            key,
            {version: verdict for version, verdict in zip(readers, verdicts, strict=True) if verdict is not None},
        )
        for name, mutations, key, verdicts in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    ask = verbs.add_parser("ask")
    ask.add_argument("folder", type=Path)
    ask.add_argument("pythons", nargs="+", help="interpreters of the environments to ask")
    ask.add_argument("--minutes", type=float, default=60)
    ask.add_argument("--start", type=int, default=0, help="the number of the first case")
    verbs.add_parser("collect").add_argument("folder", type=Path)
    for verb in verbs.choices.values():
        verb.add_argument("--served", action="store_true", help="the environments are vLLM's")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.verb == "ask":
        ask_all(args.pythons, args.folder, minutes=args.minutes, start=args.start, served=args.served)
    else:
        collect(args.folder, SERVED if args.served else TRUTH)


if __name__ == "__main__":
    main()
