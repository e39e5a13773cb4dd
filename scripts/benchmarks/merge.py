"""The cost of a merge: `grpo-toolkit merge`, PEFT's load, merge and save, and `cp` take turns on the same files.

    python -m scripts.benchmarks.merge --shape 3b --rounds 3     # 7.5 GB of random weights, twice that on disk
    python -m scripts.benchmarks.merge --shape 14b --sparse --arms merge

Published shapes of Qwen2.5-VL's 3B and Qwen2.5's 14B, a rank-64 adapter on all seven projections, random weights.
Files are written tensor by tensor; no model object is made. Every arm is a process of its own, its peak the kernel's
(`ru_maxrss`). `cp` does not wait for the disk, a merge does (it is published), so `cp` is also timed with a sync.
Prints one JSON line.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
RANK = 64
SHARD_BYTES = 4 * 10**9
PEFT_ARM = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText
base, adapter, output = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(base, dtype="auto")
PeftModel.from_pretrained(model, adapter).merge_and_unload(safe_merge=True).save_pretrained(output)
"""


@dataclass(frozen=True, kw_only=True)
class Shape:
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool
    vision: bool


SHAPES = {
    "tiny": Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, vocabulary=512, tied=True, vision=False),
    "3b": Shape(
        hidden=2048, intermediate=11008, layers=36, heads=16, kv_heads=2, vocabulary=151936, tied=True, vision=True
    ),
    "14b": Shape(
        hidden=5120, intermediate=13824, layers=48, heads=40, kv_heads=8, vocabulary=152064, tied=False, vision=False
    ),
}


def projections(shape: Shape) -> dict[str, tuple[int, int]]:
    """Return outputs and inputs of the seven projections, by their names in a layer."""
    narrow = shape.hidden // shape.heads * shape.kv_heads
    sizes = [
        (shape.hidden, shape.hidden),
        (narrow, shape.hidden),
        (narrow, shape.hidden),
        (shape.hidden, shape.hidden),
    ]
    sizes += [(shape.intermediate, shape.hidden)] * 2 + [(shape.hidden, shape.intermediate)]
    places = ["self_attn"] * 4 + ["mlp"] * 3
    return {f"{place}.{name}": size for place, name, size in zip(places, SEVEN, sizes, strict=True)}


def tensors(shape: Shape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return the published names and shapes."""
    yield "model.embed_tokens.weight", (shape.vocabulary, shape.hidden)
    for layer in range(shape.layers):
        for name, size in projections(shape).items():
            yield f"model.layers.{layer}.{name}.weight", size
            if name.endswith(("q_proj", "k_proj", "v_proj")):
                yield f"model.layers.{layer}.{name}.bias", size[:1]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{layer}.{norm}.weight", (shape.hidden,)
    yield "model.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocabulary, shape.hidden)
    if shape.vision:
        yield from vision_tensors(shape.hidden)


def vision_tensors(out: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    width, inner = 1280, 3420
    yield "visual.patch_embed.proj.weight", (width, 3, 2, 14, 14)
    for block in range(32):
        here = f"visual.blocks.{block}"
        for name, rows, columns in (("attn.qkv", 3 * width, width), ("attn.proj", width, width)):
            yield from ((f"{here}.{name}.weight", (rows, columns)), (f"{here}.{name}.bias", (rows,)))
        for name, rows, columns in (
            ("gate_proj", inner, width),
            ("up_proj", inner, width),
            ("down_proj", width, inner),
        ):
            yield from ((f"{here}.mlp.{name}.weight", (rows, columns)), (f"{here}.mlp.{name}.bias", (rows,)))
        yield from ((f"{here}.norm1.weight", (width,)), (f"{here}.norm2.weight", (width,)))
    yield "visual.merger.ln_q.weight", (width,)
    for name, rows in (("mlp.0", 4 * width), ("mlp.2", out)):
        yield from ((f"visual.merger.{name}.weight", (rows, 4 * width)), (f"visual.merger.{name}.bias", (rows,)))


def write_files(base: Path, adapter: Path, shape: Shape, sparse: bool) -> None:
    write_base(base, shape, sparse=sparse)
    write_adapter(adapter, shape, base)


def write_base(folder: Path, shape: Shape, *, sparse: bool) -> None:
    """Write random bfloat16 weights in shards of 4 GB; holes in place of them if `sparse`."""
    import torch

    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config(shape)))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    for name, size in tensors(shape):
        if sum(bytes_of(s) for _, s in shards[-1]) + bytes_of(size) > SHARD_BYTES:
            shards.append([])
        shards[-1].append((name, size))
    weight_map = {}
    for number, held in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        weight_map |= {name: file for name, _ in held}
        with (folder / file).open("wb") as stream:
            stream.write(header(held, "BF16", 2))
            for _, size in held:
                if sparse:
                    stream.seek(bytes_of(size), os.SEEK_CUR)
                else:
                    stream.write((torch.randn(size) * 0.02).bfloat16().view(torch.uint8).numpy())
            stream.truncate()
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(bytes_of(s) for _, s in tensors(shape))}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def write_adapter(folder: Path, shape: Shape, base: Path) -> None:
    """Write rank 64 in float32 on every projection of the language model, as PEFT saves it under transformers 5."""
    import torch

    folder.mkdir()
    prefix = "base_model.model.model.language_model" if shape.vision else "base_model.model.model"
    held = [
        (f"{prefix}.layers.{layer}.{name}.{factor}.weight", size)
        for layer in range(shape.layers)
        for name, (out, in_) in projections(shape).items()
        for factor, size in (("lora_A", (RANK, in_)), ("lora_B", (out, RANK)))
    ]
    with (folder / "adapter_model.safetensors").open("wb") as stream:
        stream.write(header(held, "F32", 4))
        for _, size in held:
            stream.write((torch.randn(size) * 0.02).numpy())
    target = r".*(?:language_model|model)\.layers.*\.(" + "|".join(SEVEN) + ")"
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 64, "target_modules": target}
    settings["base_model_name_or_path"] = str(base)
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def header(held: list[tuple[str, tuple[int, ...]]], dtype: str, width: int) -> bytes:
    described, end = {"__metadata__": {"format": "pt"}}, 0
    for name, size in held:
        begin, end = end, end + bytes_of(size, width)
        described[name] = {"dtype": dtype, "shape": list(size), "data_offsets": [begin, end]}
    text = json.dumps(described).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(size: tuple[int, ...], width: int = 2) -> int:
    count = width
    for length in size:
        count *= length
    return count


def config(shape: Shape) -> dict[str, object]:
    text: dict[str, object] = {
        "hidden_size": shape.hidden, "intermediate_size": shape.intermediate, "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads, "num_key_value_heads": shape.kv_heads, "vocab_size": shape.vocabulary,
        "tie_word_embeddings": shape.tied, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6, "rope_theta": 1e6,
    }  # fmt: skip
    if not shape.vision:
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", **text}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    architecture = ["Qwen2_5_VLForConditionalGeneration"]
    return {
        "architectures": architecture,
        "model_type": "qwen2_5_vl",
        "vision_config": vision,
        "rope_scaling": rope,
        **text,
    }


def timed(command: list[str]) -> tuple[float, float, float]:
    """Return seconds, seconds of processor time, and peak resident GiB of one process alone."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) != 0:
        raise SystemExit(f"failed: {' '.join(command)[:300]}")
    return seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="3b")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--arms", nargs="+", default=["cp", "cp_sync", "merge", "peft"])
    parser.add_argument("--sparse", action="store_true", help="a base of holes: for the peak, where the disk is small")
    parser.add_argument("--folder", type=Path, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench-merge-", dir=arguments.folder) as temporary:
        work = Path(temporary)
        shape = SHAPES[arguments.shape]
        base, adapter, output = work / "base", work / "adapter", work / "output"
        # In a process of its own: what a parent holds counts as its children's peak until they load their program.
        writer = get_context("spawn").Process(target=write_files, args=(base, adapter, shape, arguments.sparse))
        writer.start()
        writer.join()
        commands = {
            "cp": ["cp", "-r", str(base), str(output)],
            "cp_sync": ["sh", "-c", f"cp -r '{base}' '{output}' && sync '{output}'/*"],
            "merge": [sys.executable, "-m", "grpo_toolkit.cli", "merge", str(adapter), str(output)],
            "peft": [sys.executable, "-c", PEFT_ARM, str(base), str(adapter), str(output)],
        }
        runs: dict[str, list[tuple[float, float, float]]] = {arm: [] for arm in arguments.arms}
        for _ in range(arguments.rounds):
            for arm in arguments.arms:
                os.sync()
                runs[arm].append(timed(commands[arm]))
                seconds, processor, peak = runs[arm][-1]
                print(f"{arm}: {seconds:.1f} s ({processor:.1f} s of processor), {peak:.2f} GiB", file=sys.stderr)
                shutil.rmtree(output)
        size = sum(path.stat().st_size for path in base.iterdir())
    print(json.dumps({"shape": arguments.shape, "bytes": size, "sparse": arguments.sparse} | summary(runs)))


def summary(runs: dict[str, list[tuple[float, float, float]]]) -> dict[str, object]:
    return {
        arm: {
            "seconds": [round(seconds, 1) for seconds, _, _ in taken],
            "median_s": round(statistics.median(seconds for seconds, _, _ in taken), 1),
            "processor_s": round(statistics.median(processor for _, processor, _ in taken), 1),
            "peak_gib": round(max(peak for _, _, peak in taken), 2),
        }
        for arm, taken in runs.items()
    }


if __name__ == "__main__":
    main()
