"""Python code that a folder names: it is never run, and not asked for either."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.doctor.findings import Fault, Severity, WholeFile, rule
from grpo_toolkit.doctor.parsed_folder import PREPROCESSOR, PROCESSOR, TOKENIZER_CONFIG, VIDEO_PREPROCESSOR

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.doctor.parsed_folder import Folder

_FILES: Final = (CONFIG, TOKENIZER_CONFIG, PREPROCESSOR, PROCESSOR, VIDEO_PREPROCESSOR)


def _modules(auto_map: Any) -> set[str]:
    """Return the files of code that an `auto_map` names in its own folder; another repository's are `repo--module`."""
    values = auto_map.values() if isinstance(auto_map, dict) else ()
    names = [name for value in values for name in (value if isinstance(value, list) else [value])]
    return {
        f"{name.split('.')[0]}.py"
        for name in names
        if isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w{0,99}(\.\w{1,100}){1,8}", name)
    }


def _missing(folder: Folder, file: str) -> list[str]:
    return sorted(name for name in _modules(folder.get(file, "auto_map")) if not folder.has(name))


@rule(
    Severity.UNLOADABLE,
    "code that is named and not here",
    effect="the class lies in Python files that the trainer did not copy: loading fails, also with trust_remote_code",
    evidence="https://github.com/NVIDIA-NeMo/Automodel/issues/794",
    mend="the base's files of code, copied and not run",
)
def code_missing(folder: Folder) -> Iterator[Fault]:
    if folder.family is not None:
        return  # transformers has the class itself, and prefers it
    base = folder.base
    for file in _FILES:
        missing = _missing(folder, file)
        if not missing:
            continue
        # What is named imports others beside it.
        others = [] if base is None else [n for n in sorted(base.entries) if n.endswith(".py") and base.has(n)]
        is_there = base is not None and all(base.has(name) for name in missing)
        yield Fault(
            file=file,
            key="auto_map",
            found=f"{', '.join(missing[:4])} {'is' if len(missing) == 1 else 'are'} not in the folder",
            expected="the base's files of code" + ("" if base is not None else "; pass --base to take them"),
            remedies=tuple(WholeFile(file=name, content=None) for name in others if not folder.has(name))
            if is_there
            else (),
        )


@rule(
    Severity.NOTE,
    "code in the folder",
    effect="the config names Python code to run when the model is loaded; it was not run, and not judged",
    evidence="https://huggingface.co/docs/transformers/custom_models",
)
def remote_code(folder: Folder) -> Iterator[Fault]:
    for file in _FILES:
        value = folder.get(file, "auto_map")
        if value is not ABSENT and (folder.family is not None or not _missing(folder, file)):
            yield Fault(file=file, key="auto_map", found=value, expected="a look at that code before it is trusted")
