"""`python -m grpo_toolkit.cli.run SCRIPT`: someone else's training script, with the callbacks in its trainer.

    accelerate launch -m grpo_toolkit.cli.run trl.scripts.grpo --model_name_or_path ... --output_dir out

For scripts that cannot be edited: a command of a library, a file in an image. The script runs as it would by itself;
whichever `transformers.Trainer` it builds gets the callbacks, before its own `on_init_end`. Nothing is imported before
the script imports it, since scripts set environment variables first, and nothing stays patched when it has ended.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import inspect
import os
import runpy
import sys
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.cli.shell import EXIT_INPUT, fail
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

    Options = dict[str, dict[str, Any]]

USUAL: Final = ("KVCacheCallback", "ResumeGuardCallback", "ExportCallback")
"""The callbacks that are added unless others are named."""

_TRAINER: Final = "transformers.trainer"


def main(argv: Sequence[str] | None = None) -> int:
    """Run a script or module with callbacks in its trainers; returns 2 where there is nothing to run.

    What the script raises, or exits with, is its own.
    """
    given = build_parser().parse_args(argv)
    before = sys.argv, list(sys.path)
    try:
        options = _read_options(given.callbacks, given.callback)
        run = _runner(given.script)
    except InputError as error:
        return fail(error, EXIT_INPUT)
    sys.argv = [given.script, *given.arguments]
    try:
        with callbacks_added(options):
            run()
    finally:
        sys.argv, sys.path[:] = before
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of this command."""
    parser = argparse.ArgumentParser(
        prog="python -m grpo_toolkit.cli.run",
        description="Run a training script, with callbacks added to whichever transformers.Trainer it builds.",
    )
    parser.add_argument(
        "--callback", action="append", metavar="NAME", help=f"a callback to add (default {', '.join(USUAL)})"
    )
    parser.add_argument(
        "--callbacks", type=Path, metavar="FILE", help="a YAML file: the callbacks to add, each with its options"
    )
    parser.add_argument("script", metavar="SCRIPT_OR_MODULE", help="a Python file, or a module (trl.scripts.grpo)")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its own arguments")
    return parser


def _read_options(path: Path | None, names: Sequence[str] | None) -> Options:
    import grpo_toolkit

    if path is None:
        options: Any = {name: {} for name in names or USUAL}
    else:
        import yaml

        try:
            options = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise InputError(f"--callbacks {path}: cannot be read ({error})") from error
        if not isinstance(options, dict) or not all(isinstance(value or {}, dict) for value in options.values()):
            raise InputError(f"--callbacks {path}: expected names of callbacks, each with a mapping of its options")
    known = [name for name in grpo_toolkit.__all__ if name.endswith("Callback")]
    for name in options:
        if name not in known:
            raise InputError(f"callback {name!r}: not one of {', '.join(known)}")
    return {name: dict(value or {}) for name, value in options.items()}


def _runner(script: str) -> Callable[[], object]:
    if Path(script).is_file():
        sys.path.insert(0, str(Path(script).resolve().parent))  # as Python does for a script
        return functools.partial(runpy.run_path, script, run_name="__main__")
    try:
        found = importlib.util.find_spec(script)
    except (ImportError, ValueError):
        found = None
    if found is None:
        raise InputError(f"{script}: neither a file here nor a module that can be imported")
    return functools.partial(runpy.run_module, script, run_name="__main__", alter_sys=True)


@contextmanager
def callbacks_added(options: Options) -> Iterator[None]:
    """Add callbacks to every `transformers.Trainer` that is built inside, also if transformers is imported only there.

    Args:
        options: the keyword arguments of each callback by its name; `ExportCallback` exports to `export` in the
            trainer's output folder unless told otherwise.
    """
    undo: list[Callable[[], None]] = []
    finder = _AfterImport(_TRAINER, lambda module: undo.append(_wrap(module.Trainer, options)))
    if _TRAINER in sys.modules:
        finder.then(sys.modules[_TRAINER])
    else:
        sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        if finder in sys.meta_path:
            sys.meta_path.remove(finder)
        for step in undo:
            step()


class _AfterImport(MetaPathFinder):
    """A finder that finds nothing itself, and calls a function with one module when that has been imported."""

    def __init__(self, name: str, then: Callable[[ModuleType], object]) -> None:
        self.name = name
        self.then = then

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: ModuleType) -> None:
                del loader.exec_module
                execute(module)
                self.then(module)

            loader.exec_module = exec_module
        return spec


def _wrap(trainer_class: Any, options: Options) -> Callable[[], None]:
    """Make a trainer class add the callbacks to those that it is built with; returns what undoes it."""
    original = trainer_class.__init__
    signature = inspect.signature(original)

    @functools.wraps(original)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs)
        own = list(given.arguments.get("callbacks") or [])
        given.arguments["callbacks"] = own + _build(options, own, given.arguments.get("args"), type(self).__name__)
        original(*given.args, **given.kwargs)

    trainer_class.__init__ = init

    def undo() -> None:
        trainer_class.__init__ = original

    return undo


def _build(options: Options, own: Sequence[Any], arguments: Any, trainer: str) -> list[Any]:
    import grpo_toolkit

    there = {type(callback).__name__ for callback in own} | {getattr(one, "__name__", "") for one in own}
    added = []
    for name, settings in options.items():
        if name in there:
            continue
        if name == "ExportCallback" and "output_dir" not in settings:
            folder = getattr(arguments, "output_dir", None) or "trainer_output"  # transformers' own default
            settings = {**settings, "output_dir": Path(folder, "export")}
        added.append(getattr(grpo_toolkit, name)(**settings))
    if os.environ.get("RANK", "0") == "0":
        names = ", ".join(type(callback).__name__ for callback in added) or "nothing, it has them all"
        print(f"grpo-toolkit: added to {trainer}: {names}", file=sys.stderr)
    return added


if __name__ == "__main__":
    sys.exit(main())
