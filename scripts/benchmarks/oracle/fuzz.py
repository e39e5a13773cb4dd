"""The doctor on every single mutation of every good folder, no reader asked: nothing hostile gets through.

    python -m scripts.benchmarks.oracle.fuzz --seconds 2 --megabytes 512 --every 1

Each folder is diagnosed with its weights read, every second one beside its base, told as text and as JSON, and its
repair planned. A fault is anything raised but the toolkit's own errors, a line that cannot be printed, or a case that
takes longer or more memory than allowed; it is told by the line of code where it arose, with a seen case beside it
(those held out are never named). Seconds are the processor's, so that a busy machine finds no fault.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
from grpo_toolkit.doctor.findings import Diagnosis
from grpo_toolkit.doctor.planned_files import DiskFiles
from grpo_toolkit.doctor.repair_plan import make_plan
from grpo_toolkit.errors import GrpoToolkitError
from grpo_toolkit.reporting.terminal.diagnosis import diagnosis_lines, run_lines
from scripts.benchmarks.oracle import bases
from scripts.benchmarks.oracle.cases import Case
from scripts.benchmarks.oracle.folders import write
from scripts.benchmarks.oracle.mutations.operators import singles

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.benchmarks.oracle.folders import Folder


class Place:
    """A good folder on the disk, in which only what a mutation changes is written, and put back."""

    def __init__(self, folder: Folder, path: Path) -> None:
        self._good = folder
        self.path = write(folder, path)

    @contextlib.contextmanager
    def holding(self, made: Folder) -> Iterator[Path]:
        """Make the folder hold a mutated one for the time of a `with` block."""
        try:
            self._turn(self._good, made)
            yield self.path
        finally:
            self._turn(made, self._good)

    def _turn(self, old: Folder, new: Folder) -> None:
        for name in old.keys() - new.keys():
            (self.path / name).unlink()
        for name, content in new.items():
            if old.get(name) != content:
                (self.path / name).parent.mkdir(parents=True, exist_ok=True)
                (self.path / name).write_bytes(content)
        for folder in sorted((path for path in self.path.rglob("*") if path.is_dir()), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()


def examine(path: Path, base: Path | None) -> tuple[str, float]:
    """Return the fault of the doctor on a folder, empty where there is none, and the seconds it took."""
    begin = time.process_time()
    try:
        found = diagnose_checkpoint(path, base=base, deep=True)
        parts = [found] if isinstance(found, Diagnosis) else found.diagnoses
        lines = [*diagnosis_lines(found)] if isinstance(found, Diagnosis) else [*run_lines(parts, found.empty)]
        json.dumps(found.to_json(), allow_nan=False).encode()
        for one in parts:
            make_plan(DiskFiles(one.path), base=base, rewrite_weights=True)
        fault = "" if all(line.replace("\t", " ").isprintable() for line in lines) else "a line that is not printable"
    except GrpoToolkitError as error:  # one clear line, exit code 2
        fault = "" if str(error).isprintable() else "an error of several lines"
    except BaseException as error:  # whatever else comes out of it is the fault that is looked for
        last = traceback.extract_tb(error.__traceback__)[-1]
        fault = f"{type(error).__name__} {Path(last.filename).name}:{last.lineno}"
    return fault, time.process_time() - begin


def fuzz(names: list[str], *, every: int, seconds: float, megabytes: int) -> dict[str, Any]:
    """Examine every n-th single mutation of good folders in this process, its memory bounded."""
    faults: Counter[str] = Counter()
    seen: dict[str, str] = {}
    taken: list[float] = []
    limit = _address_space() + megabytes * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    with tempfile.TemporaryDirectory(prefix="oracle-fuzz-", dir=_shared()) as scratch:
        for name in names:
            good = bases.good_folder(name)
            place = Place(good, Path(scratch, name.replace("/", "-")))
            base = write(bases.base_folder(name), Path(scratch, f"{place.path.name}-base"))
            for number, mutation in enumerate(singles(good)):
                if number % every:
                    continue
                with place.holding(mutation.apply(good)) as path:
                    fault, lasted = examine(path, base if number // every % 2 else None)
                taken.append(lasted)
                if lasted > seconds:
                    fault = fault or f"slower than {seconds} s"
                if fault:
                    faults[fault] += 1
                    case = Case(name, (mutation,))
                    if not case.is_held_out:
                        seen.setdefault(fault, str(case))
    taken.sort()
    return {
        "cases": len(taken),
        "median_s": round(taken[len(taken) // 2], 4),
        "slowest_s": round(taken[-1], 3),
        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "faults": dict(faults),
        "seen": seen,
    }


def _address_space() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()


def _shared() -> str | None:
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=1, help="take every n-th mutation")
    parser.add_argument("--seconds", type=float, default=2)
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--names", nargs="*", default=None, help="good folders; by default all")
    args = parser.parse_args()
    names = args.names or bases.names()
    print(json.dumps(fuzz(names, every=args.every, seconds=args.seconds, megabytes=args.megabytes), indent=1))


if __name__ == "__main__":
    main()
