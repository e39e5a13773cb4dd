"""Each distinct image of a call encoded once.

A GRPO micro-batch holds copies of a prompt, and a rollout's prefill holds every copy of every prompt. The vision tower
is given the distinct images alone, and its features are repeated for the copies; their gradients are added up on the
way back. Images are equal by the bits of their patches and by their grid, wherever they stand in the batch: a rank may
hold a part of a group.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.attention.image_digests import equal_images, spans_of
from grpo_toolkit.model.attention.vision_towers import GRID, forward_parameters, takes_grid

if TYPE_CHECKING:
    import inspect

    import torch

logger = logging.getLogger(__name__)


class UnknownOutputError(Exception):
    """An output of a tower in which the rows of an image can't be told."""


@dataclass(frozen=True, kw_only=True)
class _Copies:
    """A call in which images repeat: sizes of the distinct ones in rows, and for each image which of them it is."""

    sizes: list[int]
    order: list[int]
    merge: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class DistinctImages:
    """A pair of hooks on a vision tower that let it encode each distinct image of a call once.

    Nothing is done where a call has one image, only different ones, further tensors beside patches and grid, or where
    the tower draws random numbers (dropout), which copies of an image draw each for itself.

    Attributes:
        encoded: images that the tower has encoded, and
        asked: images that it was asked for, in calls that had two or more.
    """

    def __init__(self, tower: torch.nn.Module) -> None:
        self.tower = tower
        self.encoded = self.asked = 0
        self._has_grid = takes_grid(tower)
        self._call: _Copies | None = None
        self._handles = [
            tower.register_forward_pre_hook(self._guarded_before, with_kwargs=True),
            tower.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def close(self) -> None:
        """Take the hooks off the tower."""
        for handle in self._handles:
            handle.remove()

    def _guarded_before(
        self, tower: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        try:
            return self._before(tower, args, kwargs)
        except Exception as error:  # whatever it is, the forward goes on with what it was given
            self._call = None
            self._let_go(error)
            return None

    def _before(
        self, tower: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        import torch

        self._call = None
        try:
            bound = forward_parameters(tower).bind(*args, **kwargs)
        except TypeError:  # a wrong call: the forward says so itself
            return None
        found = self._patches(bound)
        if found is None or draws_random_numbers(tower):
            return None
        name, patches, grid = found
        equal = equal_images(patches, grid)
        if equal is None:
            return None
        sizes, first = equal
        distinct = sorted(set(first))
        self.asked += len(first)
        self.encoded += len(distinct)
        if len(distinct) == len(first):
            return None
        number = {image: index for index, image in enumerate(distinct)}
        self._call = _Copies(
            sizes=[sizes[image] for image in distinct],
            order=[number[image] for image in first],
            merge=merged_patches(tower) if self._has_grid else 1,
            args=args,
            kwargs=kwargs,
        )
        bound.arguments[name] = torch.cat([patches[start:end] for start, end in spans_of(sizes, distinct)])
        if self._has_grid:
            bound.arguments[GRID] = torch.cat([grid[image : image + 1] for image in distinct])
        return bound.args, bound.kwargs

    def _after(self, tower: torch.nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        call, self._call = self._call, None
        if call is None or output is None:  # None: the forward has raised
            return None
        try:
            return repeat_for_copies(output, call.sizes, call.order, merge=call.merge)
        except Exception as error:  # the forward is made again, with all images
            self._let_go(error)
            return tower(*call.args, **call.kwargs)

    def _let_go(self, error: Exception) -> None:
        self.close()
        level = logging.INFO if isinstance(error, UnknownOutputError) else logging.WARNING
        logger.log(level, "grpo_toolkit: copies of an image are encoded each for itself from here on: %s", error)

    def _patches(self, bound: inspect.BoundArguments) -> tuple[str, torch.Tensor, torch.Tensor] | None:
        """Return name and value of the argument with the patches, and the grid; None where copies are left alone."""
        import torch

        given = {name: value for name, value in bound.arguments.items() if value is not None}
        given |= given.pop("kwargs", {})
        tensors = {name: value for name, value in given.items() if _holds_tensor(value)}
        name = next(iter(bound.arguments), "")
        patches = tensors.pop(name, None)
        grid = tensors.pop(GRID, None)
        if not isinstance(patches, torch.Tensor) or tensors:
            return None
        if not self._has_grid and patches.ndim == 4:  # [images, channels, height, width]
            grid = torch.ones(patches.shape[0], 3, dtype=torch.long, device=patches.device)
        if not isinstance(grid, torch.Tensor) or grid.ndim != 2 or grid.shape[0] < 2 or not patches.shape[0]:
            return None
        return name, patches, grid


def draws_random_numbers(tower: torch.nn.Module) -> bool:
    """Return whether a forward of the tower would drop anything at random."""
    import torch

    def rate(module: torch.nn.Module) -> Any:
        if isinstance(module, torch.nn.modules.dropout._DropoutNd):
            return module.p
        kept = vars(module)
        return max(kept.get(name) or 0 for name in ("attention_dropout", "drop_prob", "dropout_p"))

    return any(module.training and rate(module) > 0 for module in tower.modules())


def merged_patches(tower: torch.nn.Module) -> int:
    """Return how many patches a tower merges into one token of the language model; 1 where it does not say."""
    for holder in (tower, getattr(tower, "config", None)):
        size = getattr(holder, "spatial_merge_size", None)
        sides = (size, size) if isinstance(size, int) else getattr(holder, "merge_kernel_size", None)
        if sides is not None:
            return prod(sides)
    return 1


def repeat_for_copies(output: Any, sizes: list[int], order: list[int], *, merge: int) -> Any:
    """Return a tower's output for all images, from that for the distinct ones.

    Args:
        output: a tensor with the rows of all images one after the other, a tuple or list of such tensors or of one
            tensor an image, or a `ModelOutput` of these.
        sizes: rows of each distinct image.
        order: for each image, which distinct one it is.
        merge: patches that may have become one row.

    Raises:
        UnknownOutputError: the rows of an image can't be told.
    """
    import torch
    from transformers.utils import ModelOutput

    if isinstance(output, torch.Tensor):
        return _repeat_rows(output, sizes, order, merge)
    if isinstance(output, ModelOutput):
        if output.get("attentions") is not None:
            raise UnknownOutputError("attention weights were asked for")
        repeated = {
            name: repeat_for_copies(value, sizes, order, merge=merge)
            for name, value in dict.items(output)
            if value is not None
        }
        for name, value in repeated.items():
            output[name] = value
        return output
    if isinstance(output, (tuple, list)):
        if _is_one_an_image(output, sizes, merge):
            return type(output)(output[index] for index in order)
        return type(output)(repeat_for_copies(value, sizes, order, merge=merge) for value in output)
    raise UnknownOutputError(f"the vision tower returns a {type(output).__name__}")


def _repeat_rows(rows: torch.Tensor, sizes: list[int], order: list[int], merge: int) -> torch.Tensor:
    from grpo_toolkit.model.attention.gather_copies import repeat_spans

    for dim in (0, 1) if rows.ndim >= 3 and rows.shape[0] == 1 else (0,):
        for merged in (1, merge):
            if all(size % merged == 0 for size in sizes) and rows.shape[dim] == sum(sizes) // merged:
                return repeat_spans(rows, spans_of([size // merged for size in sizes], order), dim)
    raise UnknownOutputError(f"the vision tower returns {list(rows.shape)} for images of {sizes} patches")


def _is_one_an_image(parts: Any, sizes: list[int], merge: int) -> bool:
    import torch

    if len(parts) != len(sizes) or not all(isinstance(part, torch.Tensor) for part in parts):
        return False
    if len(sizes) == 1:  # one tensor for one image: its rows are all rows, and either reading gives as many of them
        raise UnknownOutputError("a list of one tensor may be one image's or one layer's")
    return all(len(part) in (size, size // merge) for part, size in zip(parts, sizes, strict=True))


def _holds_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) or (
        isinstance(value, (tuple, list)) and any(isinstance(part, torch.Tensor) for part in value)
    )
