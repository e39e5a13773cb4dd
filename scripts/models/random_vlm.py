"""Write a Qwen2.5-VL of a published shape with random weights, in the published form, without a download.

    python -m scripts.models.random_vlm --shape qwen2.5-vl-3b OUT

Memory, speed, saving, sharding and loading of such a folder are those of the published model: tensor names,
shapes and dtype, the flat `config.json`, `preprocessor_config.json`, generation defaults, a byte-level BPE with
151,643 tokens and the special tokens at their published ids. Only what it says is noise.

No model is ever held. Tensor names and shapes follow from the shape, so each file's header is written first and
then its tensors, piece by piece, from several threads. Weights are drawn through a table of normal quantiles,
because looking up random 16-bit numbers is several times faster than drawing normal ones: the 7.5 GB of the 3B
shape take about as long as the disk needs.

The last line on standard output is the folder. It appears under its name when it is whole.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import shutil
import sys
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import NormalDist
from typing import TYPE_CHECKING

from scripts.models.tiny_vlm_files import Shape, byte_level_tokenizer, write_json, write_model_files, write_tokenizer

if TYPE_CHECKING:
    import numpy as np

SHAPES = {
    # Everything small but the vocabulary: token ids are the published ones.
    "tiny": Shape(
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        mrope_section=(2, 3, 3),
        initializer_range=0.1,  # Narrow layers start too quiet with the published 0.02.
        dtype="bfloat16",
        vision_depth=2,
        vision_hidden_size=64,
        vision_intermediate_size=128,
        vision_num_heads=4,
        fullatt_block_indexes=(1,),
    ),
    # For machines on which the 3B shape cannot be trained: its depths, head sizes, rotary sections and windows, at a
    # quarter of its widths, with weights twice as large, so that a layer passes on as much of its input as there.
    "qwen2.5-vl-3b-quarter": Shape(
        hidden_size=512,
        intermediate_size=2752,
        num_layers=36,
        num_heads=4,
        num_kv_heads=2,
        max_position_embeddings=128000,
        initializer_range=0.04,
        dtype="bfloat16",
        vision_hidden_size=320,
        vision_intermediate_size=855,
        vision_num_heads=4,
    ),
    "qwen2.5-vl-3b": Shape(
        hidden_size=2048,
        intermediate_size=11008,
        num_layers=36,
        num_heads=16,
        num_kv_heads=2,
        max_position_embeddings=128000,
        dtype="bfloat16",
    ),
    "qwen2.5-vl-7b": Shape(
        hidden_size=3584,
        intermediate_size=18944,
        num_layers=28,
        num_heads=28,
        num_kv_heads=4,
        max_position_embeddings=128000,
        tie_word_embeddings=False,
        dtype="bfloat16",
    ),
}
EMBEDDING_ROWS = dict.fromkeys(SHAPES, 151_936) | {"qwen2.5-vl-7b": 152_064}
"""As published: more than the tokenizer has tokens, for the hardware."""

BPE_TOKENS = 151_643
"""Tokens before the first special one, `<|endoftext|>`."""

SHARD_BYTES = 4_000_000_000
_PIECE = 1 << 24  # Values drawn and written at a time: 32 MB.


class OutputError(Exception):
    """An output folder that can't be written; nothing was."""


def make_random_vlm(
    shape: str, folder: Path, *, seed: int = 0, shard_bytes: int = SHARD_BYTES, threads: int | None = None
) -> Path:
    """Write the folder of one of `SHAPES`, and return it. The same seed gives the same bytes.

    Args:
        shape (`str`):
            A key of `SHAPES`.
        folder (`Path`):
            Where to; must not exist yet, or be empty.
        seed (`int`, *optional*, defaults to `0`):
            Of the weights.
        shard_bytes (`int`, *optional*):
            Size above which a file of weights is closed and the next begun.
        threads (`int`, *optional*):
            How many draw and write; the number of cores by default.

    Raises:
        OutputError: the folder has something in it, or the disk has no room.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputError(f"{folder}: exists already; name a new folder, or remove it first")
    sizes = SHAPES[shape]
    tensors = tensor_shapes(sizes, vocab_size=EMBEDDING_ROWS[shape])
    folder.parent.mkdir(parents=True, exist_ok=True)
    needed = sum(2 * math.prod(dims) for dims in tensors.values()) + 50_000_000
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise OutputError(f"{folder}: needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free there")
    stage = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        stage.chmod(0o755)
        token_ids = write_tokenizer(stage, full_size_tokenizer())
        write_model_files(stage, shape=sizes, token_ids=token_ids, vocab_size=EMBEDDING_ROWS[shape])
        write_weights(stage, tensors, std=sizes.initializer_range, seed=seed, shard_bytes=shard_bytes, threads=threads)
        stage.rename(folder)
    except BaseException:
        shutil.rmtree(stage)
        raise
    return folder


def tensor_shapes(shape: Shape, *, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Return every tensor of a published Qwen2.5-VL folder, by its published name, in the order of the files."""
    wide, narrow, head_dim = shape.hidden_size, shape.vision_hidden_size, shape.hidden_size // shape.num_heads
    kv = shape.num_kv_heads * head_dim
    merged = 4 * narrow  # 2 x 2 patches become one image token.
    layer = {
        "self_attn.q_proj": ((wide, wide), True),
        "self_attn.k_proj": ((kv, wide), True),
        "self_attn.v_proj": ((kv, wide), True),
        "self_attn.o_proj": ((wide, wide), False),
        "mlp.gate_proj": ((shape.intermediate_size, wide), False),
        "mlp.up_proj": ((shape.intermediate_size, wide), False),
        "mlp.down_proj": ((wide, shape.intermediate_size), False),
        "input_layernorm": ((wide,), False),
        "post_attention_layernorm": ((wide,), False),
    }
    block = {
        "norm1": ((narrow,), False),
        "norm2": ((narrow,), False),
        "attn.qkv": ((3 * narrow, narrow), True),
        "attn.proj": ((narrow, narrow), True),
        "mlp.gate_proj": ((shape.vision_intermediate_size, narrow), True),
        "mlp.up_proj": ((shape.vision_intermediate_size, narrow), True),
        "mlp.down_proj": ((narrow, shape.vision_intermediate_size), True),
    }
    merger = {"ln_q": ((narrow,), False), "mlp.0": ((merged, merged), True), "mlp.2": ((wide, merged), True)}
    modules: dict[str, tuple[tuple[int, ...], bool]] = {"visual.patch_embed.proj": ((narrow, 3, 2, 14, 14), False)}
    for number in range(shape.vision_depth):
        modules |= {f"visual.blocks.{number}.{name}": sizes for name, sizes in block.items()}
    modules |= {f"visual.merger.{name}": sizes for name, sizes in merger.items()}
    modules["model.embed_tokens"] = ((vocab_size, wide), False)
    for number in range(shape.num_layers):
        modules |= {f"model.layers.{number}.{name}": sizes for name, sizes in layer.items()}
    modules["model.norm"] = ((wide,), False)
    if not shape.tie_word_embeddings:
        modules["lm_head"] = ((vocab_size, wide), False)
    tensors = {}
    for name, (dims, has_bias) in modules.items():
        tensors[f"{name}.weight"] = dims
        if has_bias:
            tensors[f"{name}.bias"] = dims[:1]
    return tensors


def full_size_tokenizer() -> object:
    """Return a byte-level BPE with as many tokens as the published one: pairs of bytes, and common triples.

    Every token has a merge, so that any of them can come out of a text, and sampled tokens decode to text.
    """
    from tokenizers import models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    common = "Ġetaoinshrdlcumwfgypbvk0123456789.,-<>/()=xjqz"
    pairs = [(first, second) for first in alphabet for second in alphabet]
    missing = BPE_TOKENS - len(alphabet) - len(pairs)
    triples = [(a + b, c) for a, b, c in itertools.islice(itertools.product(common, repeat=3), missing)]
    merges = pairs + triples
    vocab = {token: number for number, token in enumerate([*alphabet, *(left + right for left, right in merges)])}
    assert len(vocab) == BPE_TOKENS
    return byte_level_tokenizer(models.BPE(vocab=vocab, merges=merges))


def write_weights(
    folder: Path,
    tensors: dict[str, tuple[int, ...]],
    *,
    std: float,
    seed: int = 0,
    shard_bytes: int = SHARD_BYTES,
    threads: int | None = None,
) -> None:
    """Write bfloat16 safetensors: norms one, biases zero, everything else normal with deviation `std`."""
    table = _normal_quantiles(std)
    shards = _split(tensors, shard_bytes=shard_bytes)
    single = len(shards) == 1
    index = {}
    with ThreadPoolExecutor(threads or os.cpu_count()) as pool:
        jobs = []
        for number, names in enumerate(shards, 1):
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            offsets = _write_header(folder / file, {name: tensors[name] for name in names})
            for name in names:
                index[name] = file
                jobs.append(pool.submit(_write_tensor, folder / file, offsets[name], name, tensors[name], table, seed))
        for job in jobs:
            job.result()
    if not single:
        total = sum(2 * math.prod(dims) for dims in tensors.values())
        write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": index})


def _split(tensors: dict[str, tuple[int, ...]], *, shard_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    size = 0
    for name, dims in tensors.items():
        if shards[-1] and size + 2 * math.prod(dims) > shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += 2 * math.prod(dims)
    return shards


def _write_header(file: Path, tensors: dict[str, tuple[int, ...]]) -> dict[str, int]:
    """Begin a safetensors file, at its full length, and return where in it each tensor belongs."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    begins = {}
    for name, dims in tensors.items():
        begins[name], end = end, end + 2 * math.prod(dims)
        entries[name] = {"dtype": "BF16", "shape": list(dims), "data_offsets": [begins[name], end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)  # Aligned, as the format asks of writers.
    with file.open("wb") as opened:
        opened.write(len(header).to_bytes(8, "little") + header)
        opened.truncate(8 + len(header) + end)
    return {name: 8 + len(header) + begin for name, begin in begins.items()}


def _write_tensor(file: Path, offset: int, name: str, dims: tuple[int, ...], table: np.ndarray, seed: int) -> None:
    import numpy as np

    # A generator of its own for each tensor: the bytes do not depend on who draws first.
    generator = np.random.Generator(np.random.SFC64([seed, zlib.crc32(name.encode())]))
    left = math.prod(dims)
    with file.open("r+b") as opened:
        opened.seek(offset)
        while left:
            count = min(left, _PIECE)
            if name.endswith(".bias"):
                values = np.zeros(count, dtype=np.uint16)
            elif len(dims) == 1:
                values = np.full(count, _bfloat16(np.ones(1, dtype=np.float32))[0])
            else:
                values = table[generator.integers(0, 1 << 16, size=count, dtype=np.uint16)]
            opened.write(values.astype("<u2", copy=False).data)
            left -= count


def _normal_quantiles(std: float) -> np.ndarray:
    """Return the 65,536 middle quantiles of a normal distribution, as the bits of bfloat16 numbers."""
    import numpy as np

    inverse = NormalDist(0.0, std).inv_cdf
    return _bfloat16(np.array([inverse((i + 0.5) / (1 << 16)) for i in range(1 << 16)], dtype=np.float32))


def _bfloat16(values: np.ndarray) -> np.ndarray:
    """Return the upper 16 bits of float32 numbers, rounded to the nearest."""
    import numpy as np

    return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16)


def main() -> None:
    """Write the folder that the flags ask for, and print it."""
    parser = argparse.ArgumentParser(description="Write a Qwen2.5-VL of a published shape with random weights.")
    parser.add_argument("out", type=Path, metavar="OUT", help="the folder to make")
    parser.add_argument("--shape", choices=sorted(SHAPES), required=True)
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default: %(default)s)")
    arguments = parser.parse_args()
    try:
        print(make_random_vlm(arguments.shape, arguments.out, seed=arguments.seed))
    except (OutputError, OSError) as error:
        print(f"random_vlm: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
