"""The repairs against the readers: mutated folders are repaired, and each reader is asked again.

    python -m scripts.benchmarks.oracle.repaired PYTHON --part held_out --most 200

Taken are cases with which this environment's reader fails or answers otherwise, and which the doctor calls repairable
throughout. Repaired: the reader then answers as it does with the good folder.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from grpo_toolkit import repair_checkpoint
from grpo_toolkit.errors import GrpoToolkitError
from scripts.benchmarks.oracle import truth
from scripts.benchmarks.oracle.folders import read, write
from scripts.benchmarks.oracle.readers import ReaderProcess
from scripts.benchmarks.oracle.score import Examiner, Result


def is_repairable(found: Result, version: str) -> bool:
    """Return whether this reader is ill with the case, and the doctor says that it repairs all that it found."""
    return version in found.ill and bool(found.said) and all(one.repairable for one in found.said)


def ask(python: str, *, part: str, most: int) -> dict[str, Any]:
    """Repair cases and ask one environment's reader about each before and after."""
    reader = ReaderProcess(python)
    version = reader.versions["transformers"]
    kinds: dict[str, list[bool]] = defaultdict(list)
    left: list[str] = []
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-oracle-") as made:
        scratch = Path(made)
        examiner, asker = Examiner(scratch), truth.Asker(reader, scratch / "asked")
        for case, _, readers in truth.load():
            if case.is_held_out != (part == "held_out") or readers.get(version, "same") == "same":
                continue
            folder = case.build()
            if not is_repairable(examiner.examine(case, folder, readers), version):
                continue
            path = write(folder, scratch / "repaired")
            try:
                repair_checkpoint(path, base=examiner.base(case.folder), rewrite_weights=True)
                after = asker.verdict(case, {n: raw for n, raw in read(path).items() if not n.startswith(".")})
            except GrpoToolkitError as error:
                after = f"refused: {error}"
            shutil.rmtree(path)
            kinds[case.kind].append(after == "same")
            if after != "same" and part == "seen":
                left.append(f"{case} {readers[version]} -> {after}")
            if sum(map(len, kinds.values())) >= most:
                break
    reader.close()
    rates = [sum(values) / len(values) for values in kinds.values()]
    return {
        "reader": version,
        "part": part,
        "repairable": sum(map(len, kinds.values())),
        "repaired": round(sum(rates) / max(1, len(rates)), 4),
        "not_repaired": Counter({kind: values.count(False) for kind, values in kinds.items() if not all(values)}),
        "cases": left,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("python", help="the environment's interpreter")
    parser.add_argument("--part", choices=("seen", "held_out"), default="seen")
    parser.add_argument("--most", type=int, default=200, help="cases")
    args = parser.parse_args()
    print(json.dumps(ask(args.python, part=args.part, most=args.most), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
