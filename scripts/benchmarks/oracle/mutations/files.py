"""Operators on whole files: dropped, emptied, cut, renamed, moved, doubled, and laid out as other trainers do."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Final

from scripts.benchmarks.oracle.folders import ADAPTER_WEIGHTS, INDEX, WEIGHTS, to_json, weight_files
from scripts.benchmarks.oracle.mutations.operators import operator

if TYPE_CHECKING:
    from collections.abc import Iterator

    from scripts.benchmarks.oracle.folders import Folder
    from scripts.benchmarks.oracle.mutations.operators import Mutation, Place

TRAINING: Final = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin")
"""Files that a resume reads and nobody who asks the model; left alone, as no reader here resumes."""


def _files(folder: Folder) -> Iterator[Place]:
    for name in sorted(folder):
        if name not in TRAINING:
            yield name, (), ""


def _json_files(folder: Folder) -> Iterator[Place]:
    return ((name, path, to) for name, path, to in _files(folder) if name.endswith(".json"))


def _texts(folder: Folder) -> Iterator[Place]:
    return ((name, path, to) for name, path, to in _files(folder) if not name.endswith(".safetensors"))


@operator(_files)
def drop_file(folder: Folder, made: Mutation) -> None:
    del folder[made.file]


@operator(_files)
def empty_file(folder: Folder, made: Mutation) -> None:
    folder[made.file] = b"" if made.file in folder else folder[made.file]


@operator(_files)
def cut_file(folder: Folder, made: Mutation) -> None:
    raw = folder[made.file]
    folder[made.file] = raw[: len(raw) // 2]


@operator(_files)
def pad_file(folder: Folder, made: Mutation) -> None:
    folder[made.file] = folder[made.file] + b"\0" * 64


@operator(_files)
def rename_file(folder: Folder, made: Mutation) -> None:
    folder[f"{made.file}.bak"] = folder.pop(made.file)


@operator(_files)
def move_file(folder: Folder, made: Mutation) -> None:
    folder[f"model/{made.file}"] = folder.pop(made.file)


_COMPETITORS: Final = {
    WEIGHTS: ("pytorch_model.bin", "consolidated.safetensors", "model-00001-of-00001.safetensors"),
    "chat_template.json": ("chat_template.jinja",),
    "chat_template.jinja": ("chat_template.json",),
    "preprocessor_config.json": ("processor_config.json", "image_processor_config.json",
                                 "video_preprocessor_config.json"),
    "processor_config.json": ("preprocessor_config.json",),
    "config.json": ("params.json", "generation_config.json"),
    ADAPTER_WEIGHTS: ("adapter_model.bin", WEIGHTS),
    "adapter_config.json": ("config.json",),
    "tokenizer.json": ("vocab.json",),
}  # fmt: skip
"""The names beside a file's that a reader may look up first."""


def _beside(folder: Folder) -> Iterator[Place]:
    for name, others in _COMPETITORS.items():
        if name in folder:
            yield from ((name, (), other) for other in others)


@operator(_beside)
def duplicate_file(folder: Folder, made: Mutation) -> None:
    folder[made.to] = folder[made.file]


@operator(_beside)
def misname_file(folder: Folder, made: Mutation) -> None:
    folder[made.to] = folder.pop(made.file)


@operator(_json_files)
def mark_file(folder: Folder, made: Mutation) -> None:
    folder[made.file] = b"\xef\xbb\xbf" + folder[made.file]


@operator(_texts)
def recode_file(folder: Folder, made: Mutation) -> None:
    folder[made.file] = folder[made.file].decode().encode("utf-16")


@operator(_json_files)
def trail_comma(folder: Folder, made: Mutation) -> None:
    folder[made.file] = folder[made.file].rstrip().removesuffix(b"}").rstrip() + b",\n}\n"


@operator(_json_files)
def blank_json(folder: Folder, made: Mutation) -> None:
    folder[made.file] = b"{}\n" if made.file in folder else folder[made.file]


@operator(_json_files)
def list_json(folder: Folder, made: Mutation) -> None:
    folder[made.file] = to_json([json.loads(folder[made.file])])


LAYOUTS: Final = ("actor/huggingface", "checkpoint-7", "default", "weights", "global_step_7/actor/huggingface", "hf")


def _layouts(folder: Folder) -> Iterator[Place]:
    return (("", (), name) for name in LAYOUTS)


@operator(_layouts)
def nest_all(folder: Folder, made: Mutation) -> None:
    """Put everything one level down, as trainers that keep their own shards above do."""
    inner = dict(folder)
    folder.clear()
    folder.update({f"{made.to}/{name}": content for name, content in inner.items()})


def _weights_alone(folder: Folder) -> Iterator[Place]:
    if weight_files(folder):
        yield from (("", (), name) for name in ("checkpoint", "actor", "pytorch_model_fsdp_0"))


@operator(_weights_alone)
def nest_weights(folder: Folder, made: Mutation) -> None:
    for name in [*weight_files(folder), *(name for name in (INDEX,) if name in folder)]:
        folder[f"{made.to}/{name}"] = folder.pop(name)


_FOREIGN: Final = {
    "verl": {"fsdp_config.json": b'{"world_size": 2}', "model_world_size_2_rank_0.pt": b"PK\3\4" + bytes(60),
             "model_world_size_2_rank_1.pt": b"PK\3\4" + bytes(60)},
    "deepspeed": {"latest": b"global_step7", "zero_to_fp32.py": b"pass\n",
                  "global_step7/mp_rank_00_model_states.pt": b"PK\3\4" + bytes(60),
                  "global_step7/bf16_zero_pp_rank_0_mp_rank_00_optim_states.pt": b"PK\3\4" + bytes(60)},
    "fsdp": {"pytorch_model_fsdp_0/.metadata": b"\x80\4.", "pytorch_model_fsdp_0/__0_0.distcp": bytes(64)},
    "megatron": {"latest_checkpointed_iteration.txt": b"7", "iter_0000007/common.pt": b"PK\3\4" + bytes(60),
                 "iter_0000007/__0_0.distcp": bytes(64)},
}  # fmt: skip
"""Layouts that other trainers leave of a model, without numbers: nobody could load them."""


def _foreign(folder: Folder) -> Iterator[Place]:
    if WEIGHTS in folder or INDEX in folder:
        yield from (("", (), name) for name in sorted(_FOREIGN))


@operator(_foreign)
def foreign_shards(folder: Folder, made: Mutation) -> None:
    """Replace the weights by another trainer's shards."""
    for name in [*weight_files(folder), INDEX]:
        folder.pop(name, None)
    folder.update(_FOREIGN[made.to])


@operator(_foreign)
def foreign_beside(folder: Folder, made: Mutation) -> None:
    """Leave another trainer's shards beside weights that are whole."""
    folder.update(_FOREIGN[made.to])
