"""Commands that publish a folder, each with two sources that give different ones under the same name."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING

from grpo_toolkit.cli import main
from tests.support.steps import content

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = "model.safetensors"


@dataclass(frozen=True)
class Publication:
    """A pair of sources of one command, which publish different folders under one name."""

    command: tuple[str, ...]
    old: Path
    new: Path
    options: tuple[str, ...] = ()

    def publish(self, source: Path, output: Path, *options: str) -> int:
        return main([*self.command, str(source), str(output), *self.options, *options])


def build_publications(base: Path, folder: Path) -> dict[str, Publication]:
    """Prepare a merge, an export of a full checkpoint, and one of an adapter; none of them verified."""
    from tests.merge.test_merge import make_adapter

    base = shutil.copytree(base, folder / "base")
    template = json.loads((base / "chat_template.json").read_text())["chat_template"]
    (base / "chat_template.json").unlink()
    (base / "chat_template.jinja").write_text(template)
    (base / "additional_chat_templates").mkdir()  # a folder in the folder
    (base / "additional_chat_templates" / "short.jinja").write_text("{{ messages[0]['content'] }}")
    adapters = [
        make_adapter(base, folder / "a", target_modules=["q_proj"]),
        make_adapter(base, folder / "b", target_modules=["v_proj"]),
    ]
    trained = [train(base, folder / "c", 0.01), train(base, folder / "d", 0.02)]
    unverified = ("--base", str(base), "--no-verify", "--quiet")
    return {
        "merge": Publication(("merge",), *adapters, options=("--quiet",)),
        "export": Publication(("export",), *trained, options=unverified),
        "export_of_an_adapter": Publication(("export",), *adapters, options=unverified),
    }


def train(base: Path, folder: Path, step: float) -> Path:
    """Write a full checkpoint: the base with every weight moved by `step`."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(base, folder)
    weights = {name: tensor + step for name, tensor in load_file(base / WEIGHTS).items()}
    save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def plain(folder: Path) -> dict[str, bytes]:
    """Return a published folder's content without what differs from run to run."""
    found = content(folder)
    manifest = json.loads(found.pop("grpo_toolkit.json"))
    return {**found, "grpo_toolkit.json": json.dumps(manifest["files"]).encode()}
