"""Shards that trainers leave, read into a model folder that can be exported.

Pickles are opened in a process of their own: tensors with `weights_only=True`, which builds tensors and nothing else,
the metadata of FSDP's sharded state dicts by an unpickler with a closed list of classes. The process may take memory
in proportion to the files that it reads. What is read is written tensor by tensor: one whole tensor is in memory at a
time.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.base_files import carried_files, copy_files
from grpo_toolkit.checkpoint.folders.layouts import VERL
from grpo_toolkit.checkpoint.folders.lineage import recorded_base
from grpo_toolkit.checkpoint.folders.look_around import shards_of
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG
from grpo_toolkit.errors import CheckpointError, UnsupportedError, WorkerError
from grpo_toolkit.export.shards.dcp import DcpParts, dcp_folder
from grpo_toolkit.export.shards.join import join
from grpo_toolkit.export.shards.verl import VerlParts, shard_files
from grpo_toolkit.model.generation.model_process import ModelProcess, answering

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.checkpoint.folders.look_around import Place

_CONFIGS: Final = "huggingface"


@contextmanager
def as_model_folder(source: Path, *, beside: Path, base: Path | None) -> Iterator[Path]:
    """Yield a folder that holds a model or an adapter: `source` itself, or a model made of a trainer's shards.

    A LoRA's shards hold its base, too: what is made is the merge.

    Args:
        source: any folder; of a verl run the run, `global_step_N`, `actor` or `actor/huggingface`; a checkpoint with
            accelerate's FSDP shards.
        beside: the folder to publish; what is made lies beside it, and is gone afterwards.
        base: where config and tokenizer come from if the trainer saved none beside the shards.

    Raises:
        CheckpointError: shards are missing or damaged, or are not of tensors alone.
        UnsupportedError: placements that are not read here, or a LoRA whose scale is written nowhere.
    """
    shards = shards_of(source)
    if shards is None or shards.layout is None or not shards.layout.is_read:
        yield source
        return
    setup = {"files": shard_files(shards.path)} if shards.layout is VERL else {"dcp": str(dcp_folder(shards.path))}
    configs = _configs(shards, base)
    prefix = f".{beside.name}.shards-"
    with tempfile.TemporaryDirectory(prefix=prefix, dir=beside.absolute().parent) as made:
        folder = Path(made)
        named = [configs / name for name in (CONFIG, GENERATION_CONFIG) if (configs / name).is_file()]
        copy_files([*named, *carried_files(configs)], configs, folder)
        _read_in_a_process(shards.path, setup | {"folder": str(folder)})
        yield folder


def _configs(shards: Place, base: Path | None) -> Path:
    """Return the folder with the config: beside the shards, in the base, or in the base that a record names.

    Raises:
        CheckpointError: there is none.
    """
    own = next((place for place in (shards.path / _CONFIGS, shards.path) if (place / CONFIG).is_file()), None)
    found = own or base or recorded_base(shards.path)
    if found is None:
        raise CheckpointError(f"{shards.path}: no {_CONFIGS}/{CONFIG} beside the shards; pass base= (--base)")
    return found


def _read_in_a_process(shards: Path, setup: dict[str, Any]) -> None:
    with _Reader(shards, setup, module=__name__) as reader:
        try:
            reader.wait()
        except WorkerError as error:
            text = str(error)
            if "UnsupportedError: " in text:
                raise UnsupportedError(text.partition("UnsupportedError: ")[2]) from error
            raise CheckpointError(f"{shards}: its shards cannot be read: {text.partition(': ')[2]}") from error


class _Reader(ModelProcess):
    """The process that opens the pickles."""

    def wait(self) -> None:
        """Wait until every tensor is written."""
        self._receive()


def serve() -> None:
    """Serve as the process: join the shards that the first line of standard input names."""
    with answering() as answer:
        setup = json.loads(sys.stdin.readline())
        shards, folder = Path(setup["path"]), Path(setup["folder"])
        _limit_memory(sum(path.stat().st_size for path in shards.rglob("*") if path.is_file()))
        parts = DcpParts(Path(setup["dcp"])) if "dcp" in setup else VerlParts(shards, setup["files"])
        join(parts, shards, folder)
        answer({})


def _limit_memory(stored: int) -> None:
    """Let this process take no more memory than shards of that many bytes can need, where the system has such limits.

    A pickle or an archive of a stranger may unpack to far more than it is.
    """
    try:
        import resource
    except ImportError:  # Windows
        return
    limit, (_, most) = _SPARE_BYTES + _COPIES * stored, resource.getrlimit(resource.RLIMIT_DATA)
    limit = limit if most == resource.RLIM_INFINITY else min(limit, most)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))


_SPARE_BYTES: Final = 8 * 2**30
"""The memory that torch and its threads take themselves, with room."""
_COPIES: Final = 8
"""The shards are mapped, and a tensor may be there joined, in float32, as its factors' product and as written."""
