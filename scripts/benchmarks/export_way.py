"""The way of a trainer's model through export: the modules that are entered, in order.

    python -m scripts.benchmarks.export_way [ROOT]

Each function counts once, where it is first called: as someone reads who follows the calls. The way comes back where
it enters a room (a name at the package's top) or a module that it had left. ROOT is another checkout, whose package
is followed instead, to compare.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.util import module_from_spec, spec_from_file_location
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scripts.models.tiny_bases import build_qwen2_5_vl
from scripts.models.tiny_training import grpo_trainer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import FrameType


class Way:
    """A profiler that lists the modules of a package whose functions are called, each at its first call."""

    def __init__(self, package: Path) -> None:
        self.package = str(package)
        self.modules: list[str] = []
        self._seen: set[object] = set()

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """Note a function of the package at its first call."""
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.package) and code not in self._seen:
            self._seen.add(code)
            self.modules.append(".".join(Path(code.co_filename).relative_to(self.package).with_suffix("").parts))


def times_back(names: Sequence[str]) -> int:
    """Return how often a way enters something again that it had left."""
    entered = [name for name, _ in groupby(names)]
    return len(entered) - len(set(entered))


def import_package(folder: Path) -> None:
    """Import the package that lies in a folder, under the folder's name, whatever else has that name."""
    spec = spec_from_file_location(folder.name, folder.resolve() / "__init__.py")
    if spec is None or spec.loader is None:
        raise ImportError(f"{folder}: no package")
    sys.modules[folder.name] = module_from_spec(spec)
    spec.loader.exec_module(sys.modules[folder.name])


def main() -> int:
    """Train two steps, export twice, and print the second way and how often it came back."""
    for root in sys.argv[1:]:
        import_package(Path(root, "grpo_toolkit"))
    import grpo_toolkit

    package = Path(grpo_toolkit.__file__).resolve().parent
    way = Way(package)
    with tempfile.TemporaryDirectory() as folder:
        trainer = grpo_trainer(str(build_qwen2_5_vl(Path(folder, "base"))), Path(folder, "out"), logging_steps=99)
        trainer.train()
        grpo_toolkit.export_model(trainer, Path(folder, "first"))  # imports are no part of the way
        sys.setprofile(way)
        try:
            grpo_toolkit.export_model(trainer, Path(folder, "second"))
        finally:
            sys.setprofile(None)
    rooms = [module.partition(".")[0] for module in way.modules]
    print(*(module for module, _ in groupby(way.modules)), sep="\n")
    print(f"{package}: {len(set(rooms))} rooms, {times_back(rooms)} times back to one that was left")
    print(f"{package}: {len(set(way.modules))} modules, {times_back(way.modules)} times back to one that was left")
    return 0


if __name__ == "__main__":
    sys.exit(main())
