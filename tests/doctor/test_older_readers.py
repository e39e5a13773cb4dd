"""Bases of all families as transformers 5 saves them, repaired without a base, and read by 4.57: the same logits.

It needs the environments of two stacks beside each other (`bash scripts/test newest`, `bash scripts/test middle`).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Final

import pytest
import torch

from grpo_toolkit import repair_checkpoint
from grpo_toolkit.model.load import load_model
from scripts.models.base_variants import change_json
from scripts.models.families import TEXT, VISION, build_family
from tests.support.training import v5_only

ROOT: Final = Path(__file__).resolve().parents[2]
OLDER: Final = ROOT / ".venv-middle" / "bin" / "python"
IDS: Final = [5, 9, 30, 12, 7, 44, 3, 21]

UNREAD: Final = {
    "qwen3_5": "4.57 does not know it",
    "qwen3_5_moe": "4.57 does not know it",
    "jamba": "4.57 asks for kernels of a GPU",
    "qwen3_vl_moe": "its experts are turned back beside a base alone (test_experts.py)",
    "smolvlm": "its processor asks for a package",
}
"""Families that are left out, and why."""

READER: Final = """
import json, sys, torch, transformers
from pathlib import Path
transformers.logging.set_verbosity_error()
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    sees = "vision_config" in json.loads((folder / "config.json").read_text())
    auto = transformers.AutoModelForImageTextToText if sees else transformers.AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(folder, output_loading_info=True, torch_dtype=torch.float32)
        transformers.AutoTokenizer.from_pretrained(folder)
        with torch.no_grad():
            logits = model.eval()(input_ids=torch.tensor([json.loads(sys.argv[2])])).logits
        wanted = torch.load(folder / "logits.pt")
        lost = [*info["missing_keys"], *info["mismatched_keys"]]
        gap = float((logits - wanted).abs().max() / wanted.abs().max())
        found[folder.name] = f"lost {lost[0]}" if lost else "" if gap < 1e-4 else f"{gap:.2g} apart"
    except Exception as error:
        found[folder.name] = f"{type(error).__name__}: {error}"[:200]
print(json.dumps(found))
"""


@v5_only
@pytest.mark.skipif(not OLDER.is_file(), reason="needs the environment of the middle stack beside this one")
def test_what_transformers_5_saves_answers_the_same_under_4_once_it_is_repaired(tmp_path: Path) -> None:
    families = sorted({*TEXT, *VISION} - UNREAD.keys())
    for family in families:
        folder = build_family(family, tmp_path / family)
        change_json(folder, "config.json", with_other_thetas)
        with torch.no_grad():
            logits = load_model(folder)[0].float()(input_ids=torch.tensor([IDS])).logits
        repair_checkpoint(folder, rewrite_weights=True)
        torch.save(logits, folder / "logits.pt")
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [str(OLDER), "-c", READER, str(tmp_path), json.dumps(IDS)],
        capture_output=True, text=True, env=environment, check=True, timeout=600,
    )  # fmt: skip
    found = json.loads(done.stdout.splitlines()[-1])
    assert found == dict.fromkeys(families, "")


def with_other_thetas(node: dict[str, object], *, sees: bool = False) -> None:
    """Change each rope_theta of a text model: with the one that is 4.x's default it would not matter who reads it."""
    for key, value in node.items():
        if isinstance(value, dict):
            with_other_thetas(value, sees=sees or "vision" in key)
        elif key == "rope_theta" and not sees:
            assert isinstance(value, float)
            node[key] = 50 * value
