"""Models that are slow on purpose: a base, and copies of it with known causes of slowness in them.

What lies in files is written into files, what is a state is put into a live model, what is an argument is an option,
so that each cause is there as it is in the wild. For the tests and for `explain.py`.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import transformers
from packaging.version import Version

from grpo_toolkit.latency.engines.pool import Source
from grpo_toolkit.latency.engines.protocol import Options

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from grpo_toolkit.latency.engines.pool import Engines
    from grpo_toolkit.model.generation.request import Request

NEVER = 3
"""A token that is never said (it is suppressed): what should not end by itself ends there."""


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """A base and a trained model that differ by known causes. `trained` is a folder or a live model."""

    causes: tuple[str, ...]
    base: Path
    trained: Any
    processor: Any = None
    options: Options = field(default_factory=Options)


def _edit(folder: Path, file: str, **values: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text())
    path.unlink()  # it may be a hard link to the base's
    path.write_text(json.dumps(content | values))


def _wider_pixels(folder: Path) -> None:
    _edit(folder, "preprocessor_config.json", min_pixels=1_003_520, size=None)
    content = json.loads((folder / "preprocessor_config.json").read_text())
    del content["size"]
    (folder / "preprocessor_config.json").write_text(json.dumps(content))


FILES: dict[str, Callable[[Path], None]] = {
    "cache-off": lambda folder: _edit(folder, "generation_config.json", use_cache=False),
    "float32": lambda folder: _edit(folder, "config.json", torch_dtype="float32"),
    "pixel-limits": _wider_pixels,
    "static-cache": lambda folder: _edit(folder, "generation_config.json", cache_implementation="static"),
    "eos": lambda folder: _edit(folder, "generation_config.json", eos_token_id=[NEVER]),
}
OPTIONS: dict[str, Callable[[Options], Options]] = {
    "sdpa-backend": lambda options: replace(options, sdpa_backend="math"),
}
# transformers 5 takes the attention from config.json; before, only the caller says it.
if Version(transformers.__version__).major >= 5:
    FILES["attention"] = lambda folder: _edit(folder, "config.json", attn_implementation="eager")
else:
    OPTIONS["attention"] = lambda options: replace(options, attn_implementation="eager")
VISION, LANGUAGE = (
    ("model.visual", "model.language_model")
    if Version(transformers.__version__) >= Version("4.52")  # huggingface/transformers#37033 moved them
    else ("visual", "model")
)
LIVE = ("device-map", "training-state", "longer-answers")
ALL = (*FILES, *OPTIONS, *LIVE, "unmerged-adapter")


ABOUT_LENGTHS = frozenset({"eos", "longer-answers"})
"""Causes that need a base whose answers end before the cap."""


def bases(base: Path, folder: Path, request: Request, pool: Engines, *, device: str = "cpu") -> tuple[Path, Path]:
    """Return two copies of a base: one that answers up to the cap, and one that ends its answer to `request` early."""
    endless, ending = (_copied(base, folder / name) for name in ("endless", "ending"))
    config = json.loads((base / "config.json").read_text())
    # Random weights may say a placeholder; computing the answer again would then miss an image for it.
    silent = [NEVER, *(config[key] for key in ("image_token_id", "video_token_id", "vision_start_token_id"))]
    _edit(endless, "generation_config.json", eos_token_id=[NEVER], suppress_tokens=silent)
    end = early_token(endless, request, pool, device=device)
    _edit(ending, "generation_config.json", eos_token_id=[end], suppress_tokens=silent)
    return endless, ending


def seed_causes(base: Path, folder: Path, causes: tuple[str, ...], *, device: str = "cpu") -> Seeded:
    """Return a copy of `base` in `folder` with these causes, beside the base that it is compared with.

    Args:
        base: a Qwen2.5-VL folder, one of `bases`.
        folder: for what is written; weights are hard links.
        causes: of `ALL`.
        device: where live models go.
    """
    trained = _copied(base, folder / "trained")
    options = Options(device=device)
    for cause in causes:
        if cause in FILES:
            FILES[cause](trained)
        if cause in OPTIONS:
            options = OPTIONS[cause](options)
    if "unmerged-adapter" in causes:
        trained = _adapter(trained, folder / "adapter", device=device)
    live = [cause for cause in causes if cause in LIVE]
    if not live:
        return Seeded(causes=causes, base=base, trained=trained, options=options)
    model, processor = _live(trained, live, folder, device)
    return Seeded(causes=causes, base=base, trained=model, processor=processor, options=options)


def _copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target, copy_function=os.link)
    return target


def _adapter(base: Path, folder: Path, *, device: str) -> Path:
    """Write a LoRA adapter on all seven projections, with factors that are not zero."""
    import torch
    from peft import LoraConfig, get_peft_model

    from grpo_toolkit.model.load import load_model

    model, _, _ = load_model(base, device=device)
    torch.manual_seed(0)
    targets = ".*layers.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=16, target_modules=targets, init_lora_weights=False))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(0.01)
    adapted.peft_config["default"].base_model_name_or_path = str(base)
    adapted.save_pretrained(folder)
    return folder


def _live(folder: Path, causes: list[str], scratch: Path, device: str) -> tuple[Any, Any]:
    from grpo_toolkit.model.live_model import base_model
    from grpo_toolkit.model.load import auto_class, dtype_argument, load_model, load_processor

    if "device-map" in causes:
        away = "cpu" if device.startswith("cuda") else "disk"
        layers = json.loads((folder / "config.json").read_text())["num_hidden_layers"]
        placed = {VISION: device, f"{LANGUAGE}.embed_tokens": device, "lm_head": device}
        placed |= {f"{LANGUAGE}.norm": device, f"{LANGUAGE}.rotary_emb": device}
        few = max(layers // 9, 2)  # of a large model: each of them is copied for every token
        placed |= {f"{LANGUAGE}.layers.{number}": away if number < few else device for number in range(layers)}
        model = auto_class(folder).from_pretrained(
            folder, device_map=placed, offload_folder=scratch / "offloaded", **{dtype_argument(): "auto"}
        )
        processor = load_processor(folder)
    else:
        model, processor, _ = load_model(folder, device=device)
    if "longer-answers" in causes:  # other weights: what the base said is now what it says last
        base_model(model).get_submodule(f"{LANGUAGE}.norm").weight.data.neg_()
    if "training-state" in causes:
        model.gradient_checkpointing_enable()
        model.train()
    return model, processor


def early_token(base: Path, request: Request, pool: Engines, *, device: str) -> int:
    """Return a token of the base's answer, its fourth or one soon after, where the answer could end.

    Random weights soon repeat themselves; then it is the last token that is new.
    """
    options = Options(device=device)
    evidence = pool.engine(Source(path=base), options).prove(
        [replace(request, max_new_tokens=24, exact=True)], options
    )
    assert evidence is not None
    tokens = evidence.tokens[0]
    new = [index for index, token in enumerate(tokens) if tokens.index(token) == index]
    return tokens[next((index for index in new if index >= 3), new[-1])]
