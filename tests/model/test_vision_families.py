"""The vision towers of the installed transformers: none splits by segments any more, and all give what they gave."""

from __future__ import annotations

import importlib
import inspect
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from grpo_toolkit.model.attention.packed_vision import packed_vision
from grpo_toolkit.model.attention.vision_towers import asks_by_name, is_attention_class
from tests.support.training import v5_only

if TYPE_CHECKING:
    from collections.abc import Callable

SMALL = {
    "depth": 2, "num_hidden_layers": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48, "num_heads": 2,
    "num_attention_heads": 2, "num_key_value_heads": 2, "out_hidden_size": 32, "text_hidden_size": 32, "head_dim": 16,
    "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1], "num_position_embeddings": 64,
    "attention_head_dim": 16,
}  # fmt: skip
GRID = [[1, 4, 8], [1, 8, 4], [1, 4, 8], [1, 2, 4]]
"""Four images, of which the third is the first."""


def _modeling(family: str) -> Any:
    return importlib.import_module(f"transformers.models.{family}.modeling_{family}")


def _sources() -> dict[str, str]:
    paths = (Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")
    return {path.parent.name: path.read_text() for path in paths if path.stem == f"modeling_{path.parent.name}"}


LOOPING = sorted(family for family, source in _sources().items() if "cu_seqlens[1:] - cu_seqlens[:-1]" in source)


def _layers_that_split(family: str) -> set[str]:
    """Names of the classes whose forward splits its rows by `cu_seqlens`, by their source."""
    found = set()
    for name, kind in vars(_modeling(family)).items():
        if inspect.isclass(kind) and kind.__module__ == _modeling(family).__name__ and "forward" in vars(kind):
            source = inspect.getsource(inspect.unwrap(kind.forward))
            if "cu_seqlens[1:] - cu_seqlens[:-1]" in source and ".split(" in source:
                found.add(name)
    return found


@v5_only
@pytest.mark.parametrize("family", LOOPING)
def test_every_layer_that_splits_by_segments_is_reached(family: str) -> None:
    kinds = [getattr(_modeling(family), name) for name in _layers_that_split(family)]
    assert [kind.__name__ for kind in kinds if not (is_attention_class(kind) and asks_by_name(kind))] == []


@v5_only
def test_the_families_that_split_by_segments_are_many() -> None:
    assert len([family for family in LOOPING if _layers_that_split(family)]) >= 20
    assert {"qwen2_vl", "qwen2_5_vl", "qwen3_vl", "glm4v"} <= set(LOOPING)


def _tower_class(family: str) -> Any:
    kinds = [
        kind
        for kind in vars(_modeling(family)).values()
        if inspect.isclass(kind)
        and kind.__module__ == _modeling(family).__name__
        and issubclass(kind, transformers.PreTrainedModel)
        and "grid_thw" in inspect.signature(inspect.unwrap(kind.forward)).parameters
    ]
    return kinds[-1] if kinds else None


def _build_tower(family: str) -> tuple[Any, Callable[[], Any]]:
    """A tiny tower of a family, and what runs it on the four images of `GRID`."""
    kind = _tower_class(family)
    if kind is None:
        pytest.skip("its tower takes no grid")
    known = set(inspect.signature(kind.config_class).parameters)
    try:
        config = kind.config_class(**{name: value for name, value in SMALL.items() if name in known})
        torch.manual_seed(0)
        tower = kind(config).eval()
    except (ValueError, IndexError) as error:
        pytest.skip(f"not built from these few numbers: {error}")
    with torch.no_grad():  # far enough from zero for attention to matter
        for parameter in tower.parameters():
            scale = 0.5 if parameter.ndim == 1 else parameter[0].numel() ** -0.5
            parameter.copy_(torch.randn_like(parameter) * scale)
    grid = torch.tensor(GRID)
    sizes = grid.prod(-1).tolist()
    extra = {"merge_sizes": torch.full((4,), 2)} if family == "video_llama_3" else {}
    side, channels = config.patch_size, getattr(config, "in_channels", None) or getattr(config, "num_channels", 3)
    times = getattr(config, "temporal_patch_size", 1) or 1
    for shape in ((channels * times * side**2,), (channels, side, side), (channels * side**2,), (2 * 3 * side**2,)):
        images = [torch.randn(size, *shape) for size in sizes]
        images[2] = images[0].clone()
        run = partial(tower, torch.cat(images), grid_thw=grid, **extra)
        try:
            run()
        except (RuntimeError, ValueError, TypeError):
            continue
        return tower, run
    pytest.skip("takes patches of another shape")


def _tensors(output: Any) -> list[torch.Tensor]:
    if isinstance(output, torch.Tensor):
        return [output]
    parts = output.values() if isinstance(output, dict) else output
    return [tensor for part in parts if part is not None for tensor in _tensors(part)]


@v5_only
@pytest.mark.parametrize("family", LOOPING)
def test_towers_of_every_family_make_one_call_a_layer(family: str, calls: list[torch.Size]) -> None:
    tower, run = _build_tower(family)
    layers = sum(is_attention_class(type(module)) for module in tower.modules())
    calls.clear()
    before = _tensors(run())
    split = len(calls)
    with packed_vision(tower) as packing:
        run()  # copies that can't be told apart in this family's output are encoded again, once
        calls.clear()
        after = _tensors(run())
    assert (packing.layers, len(calls)) == (layers, layers)
    assert split >= 4 * layers
    for found, expected in zip(after, before, strict=True):
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert tower.config._attn_implementation == "sdpa"
