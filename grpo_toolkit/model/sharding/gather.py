"""The weights of a model that is sharded over several processes, found and gathered.

`gather` goes tensor by tensor, so that no rank ever holds more than one whole tensor beside rank 0's copy on the CPU.
It asks the parameters rather than the engine: a ZeRO-3 run whose DeepSpeed config does not gather on save
(`stage3_gather_16bit_weights_on_model_save: false`), or an FSDP2 run with sharded state dicts, gives up its weights
all the same. Every function here that says *collective* has to be called on all ranks.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from grpo_toolkit.model.sharding.ranks import rank

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch


def is_sharded(model: torch.nn.Module) -> bool:
    """Return whether this process holds only a part of the weights: FSDP1, FSDP2 (DTensors), ZeRO-3 (`ds_id`)."""
    return is_fsdp1(model) or any(hasattr(p, "ds_id") or hasattr(p, "device_mesh") for p in model.parameters())


def whole_shape(tensor: torch.Tensor) -> torch.Size:
    """Return the shape of the whole tensor, also where this process holds a part of it."""
    shape: torch.Size = getattr(tensor, "ds_shape", tensor.shape)  # a DTensor's own is that of the whole
    return shape


def own_part(tensor: Any) -> Any:
    """Return the part of a tensor that this process holds."""
    if hasattr(tensor, "ds_tensor"):
        return tensor.ds_tensor
    return tensor.to_local() if hasattr(tensor, "device_mesh") else tensor


def is_fsdp1(model: torch.nn.Module) -> bool:
    """Return whether any part of the model is wrapped by the first FSDP, which flattens its parameters."""
    return any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())


def gather(tensors: Mapping[str, torch.Tensor], *, dtype: torch.dtype | None = None) -> dict[str, torch.Tensor]:
    """Return full tensors on the CPU of rank 0, {} on the others; collective where the tensors are sharded.

    Args:
        tensors: live parameters and buffers by name, `model.state_dict(keep_vars=True)` or a part of it.
        dtype: what floating-point tensors become; None leaves them.

    Returns:
        The tensors, detached. Names that shared one parameter share one tensor again: saving finds ties by that.
    """
    live = {id(tensor): tensor for tensor in tensors.values()}  # once each, on every rank alike
    is_main = rank() == 0
    whole: dict[int, torch.Tensor] = {}
    for key, tensor in live.items():
        with unsharded(tensor) as full:
            if is_main:
                whole[key] = full.detach().to("cpu", dtype if full.is_floating_point() else None)
    return {name: whole[id(tensor)] for name, tensor in tensors.items()} if is_main else {}


@contextmanager
def unsharded_models() -> Iterator[None]:
    """Build models unsharded inside: under ZeRO-3 transformers shares out every one that it builds.

    For one that is only counted or compared with (`torch.device("meta")`): a whole one in every process is what
    ZeRO-3 is used against.
    """
    from transformers.integrations import deepspeed

    reference = deepspeed._hf_deepspeed_config_weak_ref  # transformers sets it in public functions, and reads it here
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        deepspeed._hf_deepspeed_config_weak_ref = reference


@contextmanager
def unsharded(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Give the whole of one tensor on every rank; collective where it is sharded and nobody has gathered it."""
    if hasattr(tensor, "ds_id"):
        import deepspeed
        from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

        if cast("Any", tensor).ds_status is ZeroParamStatus.AVAILABLE:  # inside of TRL's gathering, say
            yield tensor.detach().clone()  # its memory goes to others when that ends
            return

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor.detach().clone()  # the parameter is emptied again on exit
    elif hasattr(tensor, "device_mesh"):
        yield cast("Any", tensor).full_tensor()
    else:
        yield tensor
