"""The kind of a folder, and of what lies one step down or up where it is nothing itself.

Every command that is given a folder looks around in the same way, so that where one finds something, all do. Standard
library only; names are listed, nothing is opened, links that leave the folder are not followed.
"""

from __future__ import annotations

import itertools
import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.file_names import ADAPTER_CONFIG, CONFIG, MANIFEST, WEIGHTS, WEIGHTS_INDEX, Kind
from grpo_toolkit.checkpoint.folders.layouts import VERL, Layout, layout_of

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

_DEPTH: Final = 3  # verl's shards lie in RUN/global_step_N/actor
_MOST_FOLDERS: Final = 300
_MOST_NAMES: Final = 20_000
_CHECKPOINT: Final = re.compile(r"checkpoint-[0-9]")
_NOT_ASKED_FOR: Final = ("critic", "ref", "optimizer", "optim", "optimizer_0")


@dataclass(frozen=True, kw_only=True)
class Place:
    """A folder that holds something: a model, an adapter, or shards in some layout."""

    path: Path
    kind: Kind
    layout: Layout | None = None

    @property
    def what(self) -> str:
        """Return what it is, in the field's words."""
        return self.kind.value if self.layout is None else self.layout.name

    @property
    def command(self) -> str:
        """Return the command that turns shards into a model; empty for what is one."""
        folder, parent = (shlex.quote(str(path)) for path in (self.path, self.path.parent))
        return "" if self.layout is None else self.layout.convert.format(folder=folder, parent=parent)


def kind_of(names: Collection[str], layout: Layout | None) -> Kind | None:
    """Return what a folder of these names is; shards count only where no safetensors file is beside them."""
    if ADAPTER_CONFIG in names:
        return Kind.ADAPTER
    if layout is not None and not any(name.endswith(".safetensors") for name in names):
        return layout.kind
    return Kind.MODEL if CONFIG in names or any(name in names for name in _WHOLE_WEIGHTS) else None


# As accelerate and DeepSpeed write them, without a config: still a model, if none that can be loaded.
_WHOLE_WEIGHTS: Final = (WEIGHTS, WEIGHTS_INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json")


def look_at(path: Path) -> Place | None:
    """Return what a folder itself is, or None."""
    names = names_in(path)
    layout = layout_of(path.name, names, names_in(path.parent)) if names else None
    kind = kind_of(names, layout)
    return None if kind is None else Place(path=path, kind=kind, layout=None if kind in _WHOLE else layout)


_WHOLE: Final = (Kind.MODEL, Kind.ADAPTER)


def look_below(path: Path) -> list[Place]:
    """Return what lies in the folders of a folder: the nearest first, of one depth the newest."""
    found: list[Place] = []
    level, asked = [path], 0
    for _ in range(_DEPTH):
        children = [child for folder in level for child in _folders(folder)][: _MOST_FOLDERS - asked]
        asked += len(children)
        places = [(child, look_at(child)) for child in children]
        found += [place for _, place in places if place is not None]
        level = [child for child, place in places if place is None]
    return sorted(found, key=lambda place: place.path.name in _NOT_ASKED_FOR)


def look_above(path: Path) -> Place | None:
    """Return the shards to which a folder belongs that lies beside or between them, or None.

    verl saves config and tokenizer in `huggingface/` beside the shards; NeMo-RL's shards lie in `policy/weights`.
    """
    for folder in itertools.islice(Path(os.path.abspath(path)).parents, 2):  # noqa: PTH100 - links stay as given
        layout = layout_of(folder.name, names_in(folder), names_in(folder.parent))
        is_beside = layout is VERL and path.name == "huggingface"
        is_between = layout is not None and "policy" in layout.holds
        if layout is not None and (is_beside or is_between):
            return Place(path=folder, kind=layout.kind, layout=layout)
    return None


def look_around(path: Path) -> list[Place]:
    """Return what a folder is; where it is nothing itself, what lies above it or, failing that, below."""
    here, above = look_at(path), look_above(path)
    if above is not None and (here is None or here.layout is not None):
        return [above]
    return look_below(path) if here is None else [here]


def models_below(path: Path) -> list[Path]:
    """Return the models and adapters in the folders of a folder that is nothing itself, by name."""
    if look_at(path) is not None:
        return []
    places = look_below(path)
    if any(place.layout is not None for place in places):
        return []
    return sorted(place.path for place in places)


def around(path: Path) -> str:
    """Return the end of a message about a folder that is not what was asked for: what lies around it, what to do."""
    shards = shards_of(path)
    if shards is not None:
        return f"; {shards.path} holds {shards.what}: {shards.command}"
    places = [place for place in look_around(path) if place.path != path]
    adapters = [place for place in places if place.kind is Kind.ADAPTER]
    if len(adapters) > 1 and len(adapters) == len(places) and len({place.path.parent for place in places}) == 1:
        names = sorted(place.path.name for place in adapters)
        return f"; it holds the adapters {', '.join(names[:8])}: pass one's folder (export, merge: or --adapter-name)"
    meant = [place.path for place in places] or [child for child in _folders(path) if _CHECKPOINT.match(child.name)]
    exported = [child for child in _folders(path) if (child / MANIFEST).is_file()]  # is verified, so it is told too
    told = dict.fromkeys(map(str, (*meant[:1], *exported[:1])))
    return f"; did you mean {' or '.join(told)}?" if told else ""


def shards_of(path: Path) -> Place | None:
    """Return the shards that a folder is, holds or belongs to; None for a model, an adapter, or nothing."""
    first = next(iter(look_around(path)), None)
    if first is not None and first.kind is Kind.MODEL and first.path == path and not has_weights(names_in(path)):
        first = look_above(path)
    return first if first is not None and first.layout is not None else None


def has_weights(names: Collection[str]) -> bool:
    """Return whether files of weights in a form that some reader knows are among the names of a folder."""
    return any(name.endswith(_WEIGHTS) for name in names)


_WEIGHTS: Final = (".safetensors", ".bin", ".gguf", ".h5", ".msgpack", ".pt", ".pth")


def _folders(path: Path) -> Iterator[Path]:
    """Yield the sub-folders, the highest number first; none that is a link or hidden."""
    try:
        with os.scandir(path) as scan:
            names = [
                entry.name
                for entry in itertools.islice(scan, _MOST_NAMES)
                if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
            ]
    except (OSError, ValueError):
        return
    for name in sorted(names, key=_newest_first):
        yield path / name


def _newest_first(name: str) -> tuple[int, str]:
    numbers = re.findall(r"[0-9]{1,12}", name)
    return (-int(numbers[-1]) if numbers else 0), name


def names_in(path: Path) -> frozenset[str]:
    """Return the names in a folder; none where it cannot be listed."""
    try:
        with os.scandir(path) as scan:
            return frozenset(entry.name for entry in itertools.islice(scan, _MOST_NAMES))
    except (OSError, ValueError):
        return frozenset()
