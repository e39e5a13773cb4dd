"""The reference folders under `tests/data`, made whole again: padded to their length, filled with real weights."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

from grpo_toolkit.checkpoint.safetensors_header import read_safetensors_header
from grpo_toolkit.checkpoint.tensor_names import plan_renames

DATA = Path(__file__).parents[1] / "data"
ROUTES = sorted(path.name for path in DATA.iterdir() if path.is_dir() and path.name[-3:].isdigit())


def unpack(name: str, target: Path) -> Path:
    """Copy a reference folder, its safetensors files padded with zeros to the length that their headers say."""
    shutil.copytree(DATA / name, target)
    for path in target.rglob("*.safetensors"):
        raw = path.read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8:])
        end = max(entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__")
        with path.open("r+b") as file:
            file.truncate(8 + length + end)
    return target


def randomize(folder: Path) -> Path:
    """Give a folder weights that depend on nothing but its names."""
    import torch
    from safetensors.torch import save_file

    path = folder / "model.safetensors"
    filled = {}
    for number, (name, info) in enumerate(sorted(read_safetensors_header(path).items())):
        torch.manual_seed(number)
        filled[name] = torch.randn(info.shape) * 0.3 if name.endswith("weight") else torch.zeros(info.shape)
    save_file(filled, path, metadata={"format": "pt"})
    return folder


def fill_at_random(folder: Path) -> Path:
    """Give an unpacked folder weights that depend on nothing but its names, and the byte tokenizer its vocabulary."""
    from scripts.models.tiny_bases import byte_tokenizer

    randomize(folder)
    model = json.loads(byte_tokenizer().backend_tokenizer.to_str())["model"]
    content = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["model"] |= {"vocab": model["vocab"], "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def fill(folder: Path, base: Path) -> Path:
    """Put the base's weights into an unpacked folder, under its own names and dtypes, and the vocabulary back."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = load_file(base / "model.safetensors")
    path = folder / "model.safetensors"
    header = read_safetensors_header(path)
    renames = plan_renames(header, frozenset(weights), "qwen2_5_vl")
    filled: dict[str, Any] = {}
    for name, info in header.items():
        known = renames.get(name, name)
        source = weights["model.embed_tokens.weight" if known == "lm_head.weight" else known]
        filled[name] = source.to({"F32": torch.float32, "BF16": torch.bfloat16}[info.dtype]).clone()
    save_file(filled, path, metadata={"format": "pt"})
    for name in ("vocab.json", "merges.txt"):
        if (folder / name).exists():
            shutil.copyfile(base / name, folder / name)
    tokenizer = folder / "tokenizer.json"
    if tokenizer.exists():
        model = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))["model"]
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        content["model"] |= {"vocab": model["vocab"], "merges": model["merges"]}
        tokenizer.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return folder


def sick_checkpoint(target: Path, base: Path) -> Path:
    """Write a checkpoint with everything to repair: edits, a new file, a file that goes, weights to rewrite."""
    return fill(unpack("trl_grpo_523", target), base)
