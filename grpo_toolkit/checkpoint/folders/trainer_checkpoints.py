"""The checkpoints of a run, and the newest of them that is complete.

A trainer's saves are not crash-safe: a run that is killed while saving leaves a half-written newest checkpoint, on
which `resume_from_checkpoint=True` stops although the one before it is good. Completeness is checked without opening
a pickle: by headers, by the files that a format writes last, and by the directory at the end of every zip that
`torch.save` writes. Standard library only.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Final

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.errors import CheckpointError

TRAINER_STATE: Final = "trainer_state.json"
_CHECKPOINT: Final = re.compile(r"checkpoint-([0-9]{1,12})")
_TORCH_SAVED: Final = (".pt", ".pth", ".bin")
_FSDP_SHARDS: Final = ("pytorch_model_fsdp_0", "optimizer_0")
_FSDP_WEIGHTS: Final = "pytorch_model_fsdp.bin"
_DEEPSPEED_LATEST: Final = "latest"


def checkpoints_in(path: Path) -> list[Path]:
    """Return the checkpoint folders of a run, oldest first; none for a folder that is no run."""
    try:
        with os.scandir(path) as scan:
            found = [
                (int(match.group(1)), Path(path, entry.name))
                for entry in scan
                for match in [_CHECKPOINT.fullmatch(entry.name)]
                if match and entry.is_dir()
            ]
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be listed ({error})") from error
    return [folder for _, folder in sorted(found)]


def last_whole_checkpoint(output_dir: str | os.PathLike[str]) -> tuple[Path | None, tuple[str, ...]]:
    """Find the newest complete checkpoint of a run.

    Returns:
        The folder (None where there is none), and one line for each newer checkpoint that was passed over.
    """
    run = Path(output_dir)
    skipped: list[str] = []
    for path in reversed(checkpoints_in(run) if run.is_dir() else []):
        reason = why_not_whole(path)
        if reason is None:
            return path, tuple(skipped)
        skipped.append(f"{path}: {reason}")
    return None, tuple(skipped)


def why_not_whole(checkpoint: Path) -> str | None:
    """Return the reason why a trainer checkpoint cannot be resumed from, or None if it can.

    Its state must be readable and all of its parts there. Full checkpoints, adapters, FSDP's full and sharded state
    dicts and DeepSpeed's folders are known.
    """
    try:
        state = read_json(checkpoint / TRAINER_STATE)
        if not isinstance(state.get("global_step"), int):
            return f"{TRAINER_STATE} has no global_step"
        reason = _why_weights_are_not_whole(checkpoint)
    except CheckpointError as error:
        return str(error)
    return reason or _first_cut_off(checkpoint)


def _why_weights_are_not_whole(checkpoint: Path) -> str | None:
    shards = [checkpoint / name for name in _FSDP_SHARDS if (checkpoint / name).is_dir()]
    if shards:  # torch.distributed.checkpoint writes its metadata after every rank has written its shard
        return next((f"{path.name} has no .metadata" for path in shards if not (path / ".metadata").is_file()), None)
    if (checkpoint / _DEEPSPEED_LATEST).is_file():  # written after the folder that it names
        return _why_deepspeed_is_not_whole(checkpoint)
    if any(checkpoint.glob("global_step*")):
        return f"DeepSpeed's file `{_DEEPSPEED_LATEST}` is missing"
    if (checkpoint / _FSDP_WEIGHTS).is_file():
        return None
    return None if open_checkpoint(checkpoint).tensors() else "no weights"


def _why_deepspeed_is_not_whole(checkpoint: Path) -> str | None:
    name = (checkpoint / _DEEPSPEED_LATEST).read_text(encoding="utf-8", errors="replace")[:256].strip()
    if name != Path(name).name or not (checkpoint / name).is_dir():
        return f"`{_DEEPSPEED_LATEST}` names {name!r}, which is not in the folder"
    ranks = len(list(checkpoint.glob("rng_state_*.pth"))) or 1
    states = len(list((checkpoint / name).glob("*_optim_states.pt")))
    return None if states >= ranks else f"{name} has the optimizer of {states} ranks, and {ranks} trained"


def _first_cut_off(checkpoint: Path) -> str | None:
    import zipfile  # with all that compresses: the doctor, which asks about other things, is there before it

    files = sorted(path for path in checkpoint.rglob("*") if path.suffix in _TORCH_SAVED and path.is_file())
    cut_off = next((path for path in files if not zipfile.is_zipfile(path)), None)
    return None if cut_off is None else f"{cut_off.relative_to(checkpoint)} is cut off"
