"""Settings of a loaded model that are switched for one answer and put back, and what may then go wrong."""

from __future__ import annotations

import copy
import gc
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.pixel_limits import PIXEL_LIMITS
from grpo_toolkit.errors import OutOfMemoryError, UnsupportedError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

    import torch

    from grpo_toolkit.latency.engines.protocol import Options


@contextmanager
def generation_config_changed(model: Any, changes: dict[str, Any]) -> Iterator[None]:
    """Change the model's own generation config for a while: `generate` fills what a caller leaves out from there."""
    generation_config = model.generation_config
    before = {name: getattr(generation_config, name, None) for name in changes}
    try:
        for name, value in changes.items():
            setattr(generation_config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(generation_config, name, value)


def sdpa_limited_to(backend: str) -> AbstractContextManager[None]:
    """Allow SDPA one kernel alone, or ("no_cudnn") all but cuDNN's."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    known = {
        "flash": SDPBackend.FLASH_ATTENTION,
        "efficient": SDPBackend.EFFICIENT_ATTENTION,
        "math": SDPBackend.MATH,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    allowed = [known[name] for name in known if name != "cudnn"] if backend == "no_cudnn" else [known[backend]]
    return sdpa_kernel(allowed)


def without_stored_graphs() -> AbstractContextManager[None]:
    """Compile what is compiled here, whatever lies in torch's cache on the disk.

    The keys of that cache know nothing of which SDPA kernels are allowed (torch 2.11 and 2.15): a step compiled for
    some of them would be taken for a step with others, in every later process too.
    """
    import torch._functorch.config as settings

    patched: AbstractContextManager[None] = settings.patch(enable_autograd_cache=False)
    return patched


@contextmanager
def left_in_training(model: torch.nn.Module) -> Iterator[None]:
    """Put the model in train mode with gradient checkpointing, as `train()` leaves it; put back on exit.

    Flag by flag: `gradient_checkpointing_enable` would leave hooks on the embeddings.
    """
    from torch.utils.checkpoint import checkpoint

    names = ("gradient_checkpointing", "_gradient_checkpointing_func")
    before = [
        (module, module.training, {name: vars(module).get(name) for name in names}) for module in model.modules()
    ]
    try:
        model.train()
        for module, _, _ in before:
            if hasattr(module, "gradient_checkpointing"):
                vars(module).update({names[0]: True, names[1]: partial(checkpoint, use_reentrant=False)})
        yield
    finally:
        for module, was_training, had in before:
            module.training = was_training
            for name, value in had.items():
                if value is None:  # a class's default, which the flag hid
                    vars(module).pop(name, None)
                else:
                    vars(module)[name] = value


@contextmanager
def expected_errors(what: str) -> Iterator[None]:
    """Turn what a measurement may run into, memory that is out and a kernel that is missing, into errors of ours."""
    import torch

    try:
        yield
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        message = (str(error) or type(error).__name__).splitlines()[0]
    except RuntimeError as error:
        if any(words in str(error) for words in ("No available kernel", "No viable backend")):
            raise UnsupportedError(f"no SDPA kernel of those allowed can do this: {error}") from error
        # The CPU's allocator raises no class of its own.
        if "can't allocate memory" not in str(error):
            raise
        message = str(error).splitlines()[0]
    except ValueError as error:
        # Qwen2.5-VL has no static cache in transformers 4.49 (huggingface/transformers#28981).
        if "does not support `cache_implementation" not in str(error):
            raise
        raise UnsupportedError(str(error)) from error
    else:
        return
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    raise OutOfMemoryError(f"out of memory with {what}: {message}")


def with_pixels(processor: Any, options: Options) -> Any:
    """Return a copy of a processor with the options' pixel limits, in both forms in which releases keep them."""
    limits = options.min_pixels, options.max_pixels
    if limits == (None, None):
        return processor
    processor = copy.deepcopy(processor)
    images: Any = getattr(processor, "image_processor", None)
    size: dict[str, int] = {}
    for (name, edge), value in zip(PIXEL_LIMITS.items(), limits, strict=True):
        if value is not None and images is not None:
            setattr(images, name, value)
            size[edge] = value
    if size and isinstance(getattr(images, "size", None), dict):
        images.size = {**images.size, **size}
    elif size and hasattr(images, "size"):
        for edge, value in size.items():
            setattr(images.size, edge, value)
    return processor
