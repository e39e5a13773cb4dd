"""The model, the device and the settings of a training, as far as a step's time depends on them."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from grpo_toolkit.model.attention.vision_towers import find_towers
from grpo_toolkit.model.hardware.data_sheets import data_sheet
from grpo_toolkit.model.hardware.environment import probe_hardware
from grpo_toolkit.model.hardware.model_sizes import live_sizes
from grpo_toolkit.model.kv_cache import is_checkpointing
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.step_time.clock import CudaStamps
from grpo_toolkit.step_time.seen import Settings
from grpo_toolkit.step_time.work import Machine, Model

if TYPE_CHECKING:
    import torch

    from grpo_toolkit.step_time.seams.notes import StepNotes

ACTIVATION_BYTES: float = 34.0
"""Bytes that a layer's activations take for each token and unit of width, in 16 bits and without the attention's
matrix (Korthikanti et al. 2022, arXiv:2205.05198, section 4.1); twice as many in 32 bits."""


def model_of(model: torch.nn.Module, *, compute_dtype: torch.dtype) -> Model | None:
    """Return what is known of a model's cost; None where its shape is not known or its weights are elsewhere."""
    sizes = live_sizes(model)
    if sizes is None or not sizes.decode_parameters:
        return None
    towers = [tower.module for tower in find_towers(model)]
    return Model(
        sizes=sizes,
        element_bytes=min(compute_dtype.itemsize, sizes.element_bytes or compute_dtype.itemsize),
        trained=sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad),
        tower_trains=any(parameter.requires_grad for tower in towers for parameter in tower.parameters()),
        is_checkpointing=is_checkpointing(model),
    )


@functools.cache
def machine_of(device: torch.device, dtype: torch.dtype) -> Machine | None:
    """Measure a device, once in a process: 2 GiB and some milliseconds on a GPU, a second on a CPU.

    Where a GPU has no room for it, its data sheet counts; None for one that is not in the table.
    """
    import torch

    try:
        found = probe_hardware(device, dtype)
    except torch.cuda.OutOfMemoryError:
        torch.cuda.empty_cache()
        sheet = data_sheet(torch.cuda.get_device_name(device))
        if sheet is None:
            return None
        return Machine(flops_per_s=sheet.bfloat16_flops_per_s, bandwidth_bytes_per_s=sheet.bandwidth_bytes_per_s)
    return Machine(flops_per_s=found["flops_per_s"], bandwidth_bytes_per_s=found["bandwidth_bytes_per_s"])


def compute_dtype(model: torch.nn.Module, args: Any) -> torch.dtype:
    """Return the dtype that matrix products are computed in: that of mixed precision, or else of the weights."""
    import torch

    if getattr(args, "bf16", False):
        return torch.bfloat16
    if getattr(args, "fp16", False):
        return torch.float16
    dtype: torch.dtype = base_model(model).dtype
    return dtype


def stamps_of_device(device: torch.device) -> CudaStamps | None:
    """Return what marks time on a device; None where the host waits for it anyway."""
    return CudaStamps() if device.type == "cuda" else None


def settings_of(model: torch.nn.Module, args: Any, known: Model | None, *, tokens: int) -> Settings:
    """Return what a training was asked for, and the memory that it has taken so far.

    Args:
        model: in training.
        args: the `TrainingArguments`.
        known: of the model's cost.
        tokens: of a micro-batch.
    """
    import torch

    device = base_model(model).device
    peak = total = None
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        total = torch.cuda.get_device_properties(device).total_memory
    activations = None
    if known is not None:
        sizes = known.sizes
        width = sizes.heads * sizes.head_dim
        activations = sizes.layers * tokens * width * ACTIVATION_BYTES * compute_dtype(model, args).itemsize / 2
    return Settings(
        accumulation=args.gradient_accumulation_steps,
        batch_size=args.per_device_train_batch_size,
        workers=args.dataloader_num_workers,
        is_checkpointing=is_checkpointing(model),
        activations_bytes=activations,
        peak_bytes=peak,
        total_bytes=total,
        is_packed=bool(getattr(args, "packing", False) or getattr(args, "padding_free", False)),
    )


def largest_forward(notes: StepNotes) -> int:
    """Return the tokens of the largest micro-batch."""
    return max((one.rows * one.length for one in notes.forwards if one.phase == "forward"), default=0)
