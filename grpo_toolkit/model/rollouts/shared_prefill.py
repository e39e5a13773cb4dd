"""The prefill of a rollout, once for each distinct prompt.

GRPO samples many completions of one prompt, and TRL hands `generate` each prompt as often: of 64 rows 8 are distinct,
and 64 are prefilled, their images encoded with them. Here the distinct rows are prefilled and their KV caches copied
to the others'. The last token is left out: what follows it is where the rows part, and the library's own `generate`
goes on from there as from any cache that it is handed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.attention.image_digests import equal_images, equal_rows

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    import torch

_OF_IMAGES: Final = ("pixel_values", "image_grid_thw")
_OF_VIDEOS: Final = ("pixel_values_videos", "video_grid_thw")
"""Fields of the families that lay the patches of all images end to end, with their grids beside them."""

Part = dict[str, "torch.Tensor"]
"""The part of a batch that belongs to one row, by field."""


@dataclass(frozen=True)
class DistinctRows:
    """The rows of a batch that differ, and which of them each row is.

    Attributes:
        inputs: the distinct rows, as `generate` takes them.
        index: for each row of the batch, the number of its distinct row. int64, [batch].
    """

    inputs: dict[str, Any]
    index: torch.Tensor

    @property
    def count(self) -> int:
        """Return the number of distinct rows."""
        return int(self.inputs["input_ids"].shape[0])


def distinct_rows(config: Any, inputs: Mapping[str, torch.Tensor]) -> DistinctRows:
    """Return the distinct rows of a batch: equal in tokens, masks and images, wherever in the batch they stand.

    Where it is not known which image belongs to which row, all rows count as distinct.

    Args:
        config: the model's.
        inputs: tensors for `generate`, with `input_ids` and `attention_mask` [batch, length].
    """
    import torch

    tokens = inputs["input_ids"]
    parts = _parts(config, inputs)
    marks = None if parts is None else _marks(config, inputs)
    if parts is None or marks is None:
        return DistinctRows(dict(inputs), torch.arange(tokens.shape[0], device=tokens.device))
    first: dict[tuple[Any, ...], int] = {}
    rows = [first.setdefault(mark, row) for row, mark in enumerate(marks)]
    found = sorted(set(rows))
    number = {row: index for index, row in enumerate(found)}
    return DistinctRows(_batch(parts, found), torch.tensor([number[row] for row in rows], device=tokens.device))


def first_rows(config: Any, inputs: Mapping[str, torch.Tensor], count: int) -> dict[str, torch.Tensor] | None:
    """Return a batch's first rows with their images, or None where it is not known which these are."""
    parts = _parts(config, inputs)
    return None if parts is None else _batch(parts, range(min(count, len(parts))))


def prefill(model: Any, rows: DistinctRows) -> Any:
    """Return a cache with the distinct rows without their last token; what the model keeps of them is set for all.

    Args:
        model: with `generate`; it is left as after the prefill of the whole batch (`rope_deltas`).
        rows: with two tokens a row or more.
    """
    from transformers import DynamicCache, GenerationConfig

    length = rows.inputs["input_ids"].shape[1]
    inputs = {
        name: field[:, :-1] if field.ndim == 2 and field.shape == (rows.count, length) else field
        for name, field in rows.inputs.items()
    }
    cache = DynamicCache(config=model.config)
    # One token is chosen and not fed, so the cache holds the prompt alone. Chosen greedily, it costs no random number.
    settings = GenerationConfig(max_new_tokens=1, do_sample=False, use_cache=True, pad_token_id=0)
    model.generate(**inputs, cache=cache, generation_config=settings)
    for module in model.modules():
        deltas = vars(module).get("rope_deltas")
        if deltas is not None and deltas.shape[0] == rows.count:
            module.rope_deltas = deltas.index_select(0, rows.index.to(deltas.device))
    return cache


def _parts(config: Any, inputs: Mapping[str, torch.Tensor]) -> list[Part] | None:
    """Return what belongs to each row, or None where that is not known."""
    import torch

    tokens = inputs["input_ids"]
    batch = tokens.shape[0]
    parts: list[Part] = [{} for _ in range(batch)]
    rest = dict(inputs)
    for names, kind in ((_OF_IMAGES, "image"), (_OF_VIDEOS, "video")):
        if names[1] in rest:
            grid = rest[names[1]]
            rows = _images_of_rows(config, tokens, grid, kind)
            if rows is None or names[0] not in rest:
                return None
            patches = torch.split(rest.pop(names[0]), grid.prod(-1).tolist())
            for part, images in zip(parts, rows, strict=True):
                part[names[1]] = grid[images]
                part[names[0]] = _joined(patches[images], like=inputs[names[0]])
            del rest[names[1]]
    is_of_images = any(field.shape[:1] != (batch,) or field.shape[1:] != tokens.shape[1:] for field in rest.values())
    if is_of_images and not _has_an_image_each(config, tokens):
        return None
    for name, field in rest.items():
        if field.shape[0] != batch:
            return None
        for row, part in enumerate(parts):
            part[name] = field[row : row + 1]
    return parts


def _marks(config: Any, inputs: Mapping[str, torch.Tensor]) -> list[tuple[Any, ...]] | None:
    """Return for each row what it has in common with equal rows alone; None where the images do not fit the grid."""
    rest = dict(inputs)
    columns: list[list[Any]] = []
    for names, kind in ((_OF_IMAGES, "image"), (_OF_VIDEOS, "video")):
        if names[1] in rest:
            patches, grid = rest.pop(names[0]), rest.pop(names[1])
            rows, equal = _images_of_rows(config, inputs["input_ids"], grid, kind), equal_images(patches, grid)
            if rows is None or equal is None:
                return None
            columns.append([tuple(equal[1][images]) for images in rows])
    columns += [equal_rows(field) for field in rest.values()]
    return list(zip(*columns, strict=True))


def _images_of_rows(config: Any, tokens: torch.Tensor, grid: torch.Tensor, kind: str) -> list[slice] | None:
    """Return the images of each row, told by its number of placeholders; None where these fit no images."""
    token = getattr(config, f"{kind}_token_id", None)
    merged = getattr(getattr(config, "vision_config", None), "spatial_merge_size", None)
    if token is None or merged is None:
        return None
    sizes = (grid.prod(-1) // merged**2).tolist()
    first, rows = 0, []
    for wanted in (tokens == token).sum(-1).tolist():
        last, count = first, 0
        while count < wanted and last < len(sizes):
            count += sizes[last]
            last += 1
        if count != wanted:
            return None
        rows.append(slice(first, last))
        first = last
    return rows if first == len(sizes) else None


def _has_an_image_each(config: Any, tokens: torch.Tensor) -> bool:
    """Return whether every row shows an image: as many of them as rows are then one a row."""
    token = getattr(config, "image_token_id", None)
    token = getattr(config, "image_token_index", None) if token is None else token
    return token is not None and bool((tokens == token).any(-1).all())


def _batch(parts: Sequence[Part], rows: Collection[int]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.cat([parts[row][name] for row in rows]) for name in parts[0]}


def _joined(patches: Sequence[torch.Tensor], *, like: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.cat(list(patches)) if patches else like[:0]
