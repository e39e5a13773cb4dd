"""The good folders: a dozen families as each release line saves them, kept as JSON, with weights made from names.

    python -m scripts.benchmarks.oracle.bases build DIR      # in the newest environment: forms "v5" and a way for 4.x
    python -m scripts.benchmarks.oracle.bases resave DIR v4  # in an environment with 4.57, and "published" with 4.49
    python -m scripts.benchmarks.oracle.bases served DIR     # in the newest: with heads that vLLM takes on a CPU
    python -m scripts.benchmarks.oracle.bases collect DIR    # puts what is there into tests/data/oracle/bases.json

What is committed are the JSON files and the names, dtypes and shapes of tensors; `good_folder` makes the folder of it,
in the form that is asked for: whole, in two shards, as a trainer's checkpoint, as an export, as an adapter.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from scripts.benchmarks.oracle.folders import (
    ADAPTER_WEIGHTS,
    INDEX,
    WEIGHTS,
    Folder,
    Tensor,
    pack,
    random_tensor,
    read,
    to_json,
    unpack,
)  # fmt: skip

if TYPE_CHECKING:
    from collections.abc import Sequence

BASES: Final = Path(__file__).parents[3] / "tests/data/oracle/bases.json"
TEXT: Final = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "mixtral", "gpt2")
SEEING: Final = ("qwen2_5_vl", "llava", "gemma3", "paligemma", "mistral3", "qwen3_5")
FAMILIES: Final = (*TEXT, *SEEING)
DIALECTS: Final = ("published", "v4", "v5")
SERVED: Final = "served"
"""The dialect that servers are asked about: as the installed library saves them, with wider heads."""
FORMS: Final = ("full", "sharded", "checkpoint", "export", "adapter")
_CLASSES: Final = {"gemma3": "Gemma3", "paligemma": "PaliGemma", "mistral3": "Mistral3", "qwen3_5": "Qwen3_5"}
_WIDE: Final[dict[str, Any]] = {"hidden_size": 128, "head_dim": 32}
_WIDER: Final[dict[str, dict[str, Any]]] = {
    "gpt2": {"n_embd": 128, "n_head": 4},
    "qwen3_5": {
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "mrope_section": [8, 4, 4], "partial_rotary_factor": 1.0,
        },
    },
}  # fmt: skip
_TIED: Final = ("gemma2", "qwen2", "gpt2")


def build_all(folder: Path) -> None:
    """Build every family with the installed library, and beside it the form from which 4.x starts."""
    from grpo_toolkit.doctor.compat import write_older_forms
    from scripts.models.base_variants import build_vlm
    from scripts.models.families import build_family
    from scripts.models.tiny_bases import build_llava, build_qwen2_5_vl

    (folder / "v5").mkdir(parents=True)
    (folder / "old").mkdir()
    for family in FAMILIES:
        target = folder / "v5" / family
        if family == "qwen2_5_vl":
            build_qwen2_5_vl(folder / "old" / family)
            shutil.copytree(folder / "old" / family, folder / "published" / family)
            resave(folder / "old" / family, target)
            continue
        if family == "llava":
            build_llava(target)
        elif family in _CLASSES:
            build_vlm(_CLASSES[family], target)
        else:
            build_family(family, target, tie_word_embeddings=family in _TIED)
        shutil.copytree(target, folder / "old" / family)
        write_older_forms(folder / "old" / family)


def build_served(folder: Path) -> None:
    """Build every family with heads of 32, the fewest that vLLM's attention on a CPU takes.

    LLaVA is built as published: vLLM 0.31 refuses the names of its tower that transformers 5 gives a new model.
    """
    from scripts.models.families import build_family
    from scripts.models.published_forms import publish
    from scripts.models.tiny_bases import build_qwen2_5_vl

    for family in FAMILIES:
        target = folder / SERVED / family
        if family == "qwen2_5_vl":
            build_qwen2_5_vl(target, head_dim=32)
            continue
        ties = {"tie_word_embeddings": family in _TIED} if family in TEXT else {}
        build_family(family, target, **_WIDE, **_WIDER.get(family, {}), **ties)
        if family == "llava":
            publish(target)
        elif family == "qwen3_5":  # published without the taps that Qwen3-VL's tower has
            config = json.loads((target / "config.json").read_text())
            config["vision_config"]["deepstack_visual_indexes"] = []
            (target / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def resave(source: Path, target: Path) -> None:
    """Load a folder with the installed library and save it again, as a training that changes nothing would."""
    from transformers import AutoProcessor, AutoTokenizer

    from grpo_toolkit.model.load import auto_class

    auto_class(source).from_pretrained(source).save_pretrained(target)
    loader: Any = AutoProcessor if source.name in SEEING else AutoTokenizer
    loader.from_pretrained(source).save_pretrained(target)


def resave_all(folder: Path, dialect: str) -> None:
    """Save every family anew with the installed library; those that it does not know stay out."""
    for family in FAMILIES:
        target = folder / dialect / family
        if not target.exists():
            try:
                resave(folder / "old" / family, target)
            except Exception as error:
                shutil.rmtree(target, ignore_errors=True)
                print(f"{family}: {type(error).__name__}: {str(error).splitlines()[0][:200]}", file=sys.stderr)


def collect(folder: Path) -> None:
    """Put the JSON files and the tensors' names of all folders into one file; equal files stand once."""
    texts: dict[str, str] = dict(_stored()["texts"])
    found: dict[str, Any] = dict(_stored()["folders"])
    for path in sorted(folder.glob("*/*")):
        if path.parent.name not in (*DIALECTS, SERVED):
            continue
        files, tensors = {}, {}
        for name, raw in read(path).items():
            if name.endswith(".safetensors"):
                for tensor, held in unpack(raw).items():
                    tensors[tensor] = f"{held.dtype} {','.join(map(str, held.shape))}"
            elif name != INDEX:
                text = raw.decode()
                if name == "tokenizer.json":
                    text = json.dumps(json.loads(text), ensure_ascii=False, separators=(",", ":"))
                key = hashlib.sha256(text.encode()).hexdigest()[:8]
                texts[key], files[name] = text, key
        found[f"{path.name}/{path.parent.name}"] = {"files": files, "tensors": tensors}
    used = {key for entry in found.values() for key in entry["files"].values()}
    lines = [f"{json.dumps(key)}: {json.dumps(texts[key], ensure_ascii=False)}" for key in texts if key in used]
    folders = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in found.items()]
    text = '{"texts": {\n' + ",\n".join(lines) + '\n},\n"folders": {\n' + ",\n".join(folders) + "\n}}\n"
    BASES.write_text(text, encoding="utf-8")


@cache
def _stored() -> dict[str, Any]:
    content: dict[str, Any] = json.loads(BASES.read_text(encoding="utf-8"))
    return content


def names(dialects: Sequence[str] = DIALECTS) -> list[str]:
    """Return every good folder's name: family, dialect, form; forms but the whole one stand in one dialect each."""
    found = []
    for key in _stored()["folders"]:
        family, dialect = key.split("/")
        if dialect not in dialects:
            continue
        there = [one for one in dialects if f"{family}/{one}" in _stored()["folders"]]
        for number, form in enumerate(FORMS):
            chosen = int(hashlib.sha256(f"{family} {form}".encode()).hexdigest(), 16) % len(there)
            if number == 0 or there[chosen] == dialect:
                found.append(f"{key}/{form}")
    return found


def sees(name: str) -> bool:
    """Return whether a good folder's model takes pictures."""
    return name.split("/")[0] in SEEING


@cache
def base_folder(name: str) -> Folder:
    """Return the folder that a good folder was trained from: whole, in the same dialect."""
    family, dialect, _ = name.split("/")
    return _whole(f"{family}/{dialect}", trained=False)


@cache
def good_folder(name: str) -> Folder:
    """Return a good folder by its name."""
    family, dialect, form = name.split("/")
    key = f"{family}/{dialect}"
    folder = _whole(key, trained=form != "adapter")
    if form == "sharded":
        _shard(folder)
    elif form == "checkpoint":
        state = {"global_step": 7, "max_steps": 9, "log_history": [], "epoch": 0.5, "train_batch_size": 1}
        folder["trainer_state.json"] = to_json(state)
        for file in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
            folder[file] = b"PK\3\4" + bytes(60)
    elif form == "export":
        files = {file: {"sha256": hashlib.sha256(raw).hexdigest()} for file, raw in sorted(folder.items())}
        folder["grpo_toolkit.json"] = to_json({"grpo_toolkit": "0", "files": files})
    elif form == "adapter":
        return _adapter(folder, family)
    return folder


def _whole(key: str, *, trained: bool) -> Folder:
    stored = _stored()
    entry = stored["folders"][key]
    folder = {file: stored["texts"][text].encode() for file, text in entry["files"].items()}
    tensors = {}
    for name, said in entry["tensors"].items():
        dtype, _, shape = said.partition(" ")
        sizes = tuple(int(size) for size in shape.split(",") if size)
        tensors[name] = random_tensor(name, dtype, sizes, trained=trained)
    folder[WEIGHTS] = pack(tensors)
    return folder


def _shard(folder: Folder) -> None:
    held = unpack(folder.pop(WEIGHTS))
    order = sorted(held)
    parts = (order[: len(order) // 2], order[len(order) // 2 :])
    mapped = {}
    for number, part in enumerate(parts, 1):
        file = f"model-0000{number}-of-00002.safetensors"
        folder[file] = pack({name: held[name] for name in part})
        mapped.update(dict.fromkeys(part, file))
    size = sum(len(one.data) for one in held.values())
    folder[INDEX] = to_json({"metadata": {"total_size": size}, "weight_map": mapped})


_TARGETS: Final = ("q_proj", "v_proj", "qkv_proj", "c_attn")


def _adapter(whole: Folder, family: str) -> Folder:
    """Return a LoRA of rank 4 on the language model's attention, with the tokenizer beside it, as trainers save it."""
    held = unpack(whole[WEIGHTS])
    tensors: dict[str, Tensor] = {}
    targets = set()
    for name, weight in held.items():
        module = name.removesuffix(".weight")
        target = module.rpartition(".")[2]
        if target in _TARGETS and name.endswith(".weight") and not {"visual", "vision_tower"} & set(name.split(".")):
            targets.add(target)
            rows, columns = reversed(weight.shape) if family == "gpt2" else weight.shape
            inner = f"base_model.model.{_in_memory(module, family)}"
            for part, shape in (("lora_A", (4, columns)), ("lora_B", (rows, 4))):
                full = f"{inner}.{part}.weight"
                tensors[full] = random_tensor(full, "F32", shape, trained=False)
    config = {
        "base_model_name_or_path": "org/base", "bias": "none", "fan_in_fan_out": family == "gpt2",
        "inference_mode": True, "lora_alpha": 8, "lora_dropout": 0.0, "modules_to_save": None, "peft_type": "LORA",
        "r": 4, "target_modules": sorted(targets), "task_type": "CAUSAL_LM",
    }  # fmt: skip
    if family in SEEING:
        config["target_modules"] = rf".*language_model.*\.({'|'.join(sorted(targets))})"
    beside = {name: raw for name, raw in whole.items() if "token" in name or "template" in name}
    return {"adapter_config.json": to_json(config), ADAPTER_WEIGHTS: pack(tensors), **beside}


def _in_memory(module: str, family: str) -> str:
    """Return a module's path in the model of transformers since 4.52, where a stored name is an older one."""
    if family == "gpt2" and not module.startswith("transformer."):
        return f"transformer.{module}"
    if family == "qwen2_5_vl" and module.startswith("model.layers."):
        return module.replace("model.", "model.language_model.", 1)
    if module.startswith("language_model.model."):
        return module.replace("language_model.model.", "model.language_model.", 1)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("verb", choices=("build", "resave", "served", "collect"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("dialect", nargs="?", choices=DIALECTS)
    args = parser.parse_args()
    if args.verb == "build":
        build_all(args.folder)
    elif args.verb == "served":
        build_served(args.folder)
    elif args.verb == "resave":
        resave_all(args.folder, args.dialect)
    else:
        collect(args.folder)


if __name__ == "__main__":
    main()
