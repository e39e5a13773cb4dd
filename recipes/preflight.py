"""What must be right before any weights load: the model, the output folder, permissions. Nothing is written here."""

from __future__ import annotations

import os
from pathlib import Path

from grpo_toolkit import CheckpointError, InputError, OutputExistsError

MARKER = "grpo_recipe.json"
"""Written into output_dir by the recipe: a folder that has it is ours to train into again."""


def check_versions() -> None:
    """The package supports older stacks; this recipe needs a TRL that never samples image tokens.

    TRL 1.0 may put an image placeholder into a completion, which then matches no image features and stops training.
    """
    import trl
    from packaging.version import Version

    if Version(trl.__version__) < Version("1.16"):
        raise InputError(f"this recipe needs trl >= 1.16, found {trl.__version__}: pip install -U 'trl>=1.16'")


def check_model(name: str | None) -> None:
    """A local model folder must be a whole model; a Hub name is left to the Hub."""
    if not name:
        raise InputError("no model: pass --model_name_or_path with a Hub name or a folder (or `tiny`)")
    folder = Path(name)
    if not folder.exists():
        if folder.is_absolute() or name.startswith(".") or name.count("/") > 1:
            raise CheckpointError(f"model {name}: no such folder")
        from transformers import AutoConfig

        try:  # a few kilobytes, and the name is known to be right before anything large is fetched
            AutoConfig.from_pretrained(name)
        except (OSError, ValueError) as error:
            reason = str(error).strip().splitlines()[0]
            raise CheckpointError(f"model {name}: neither a folder nor to be had from the Hub ({reason})") from error
        return
    if not folder.is_dir() or not (folder / "config.json").is_file():
        is_adapter = (folder / "adapter_config.json").is_file()
        hint = "; it is an adapter: merge it first (grpo-toolkit export)" if is_adapter else ""
        raise CheckpointError(f"model {name}: no config.json there, so it is no model folder{hint}")
    if not any(folder.glob("*.safetensors")) and not any(folder.glob("*.bin")):
        raise CheckpointError(f"model {name}: config.json but no weights (*.safetensors)")


def check_output(output_dir: str | None) -> None:
    """The output folder is new, empty, or one that this recipe made."""
    if not output_dir:
        raise InputError("no output folder: pass --output_dir")
    folder = Path(output_dir)
    if folder.exists() and not folder.is_dir():
        raise OutputExistsError(f"output_dir {folder}: is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MARKER).is_file():
        raise OutputExistsError(
            f"output_dir {folder}: exists and was not made by this recipe (no {MARKER} in it); "
            "choose another with --output_dir, or move it away"
        )
    existing = folder if folder.is_dir() else next(parent for parent in folder.absolute().parents if parent.exists())
    if not existing.is_dir():
        raise InputError(f"output_dir {folder}: {existing} is a file, so no folder can be made in it")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise InputError(f"output_dir {folder}: no permission to write in {existing}; choose another folder")
