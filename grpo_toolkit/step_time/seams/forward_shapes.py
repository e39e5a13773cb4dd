"""The shapes of forwards, read from what they are given and return without waiting for the device."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.attention.vision_towers import forward_parameters

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch


def token_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """Return rows and tokens of a language model's forward; None where it is given neither tokens nor embeddings."""
    tokens = kwargs.get("input_ids")
    tokens = kwargs.get("inputs_embeds", args[0] if args else None) if tokens is None else tokens
    return None if tokens is None else (int(tokens.shape[0]), int(tokens.shape[1]))


def adapter_layer(model: torch.nn.Module) -> Any:
    """Return one layer of the adapter, which says whether it is switched off."""
    return next(
        (
            module
            for module in model.modules()
            if hasattr(module, "disable_adapters")
            and hasattr(module, "active_adapters")
            and hasattr(module, "base_layer")
        ),
        None,
    )


def cast_bytes(model: torch.nn.Module) -> int:
    """Return the bytes of float32 matrices that autocast makes narrower in every forward."""
    import torch

    target = torch.get_autocast_dtype(str(model.device.type))
    linear = (module.weight for module in model.modules() if isinstance(module, torch.nn.Linear))
    return sum(
        w.numel() * w.element_size() for w in {id(w): w for w in linear}.values() if w.element_size() > target.itemsize
    )


def tensors_in(output: Any) -> Iterator[torch.Tensor]:
    import torch

    values = output.values() if isinstance(output, dict) else output if isinstance(output, (tuple, list)) else [output]
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value


def named_in(output: Any, name: str) -> torch.Tensor | None:
    import torch

    found = output.get(name) if isinstance(output, dict) else None
    return found if isinstance(found, torch.Tensor) else None


def patches_in(
    module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the pixels that a tower is given, and the grid of its images where it takes one."""
    import torch

    try:
        given = forward_parameters(module).bind(*args, **kwargs).arguments
    except TypeError:
        return None, None
    first = next((value for value in given.values() if isinstance(value, torch.Tensor)), None)
    grid = given.get("grid_thw", (given.get("kwargs") or {}).get("grid_thw"))
    return first, grid if isinstance(grid, torch.Tensor) else None


def patch_rows(module: torch.nn.Module, patches: torch.Tensor, grid: torch.Tensor | None) -> int:
    """Return how many patches a tower is given: rows where it takes a grid, else by the size of images."""
    if grid is not None or patches.ndim < 4:
        return int(patches.shape[0])
    side = getattr(getattr(module, "config", None), "patch_size", None) or 1
    return int(patches.shape[0]) * (int(patches.shape[-2]) // side) * (int(patches.shape[-1]) // side)
