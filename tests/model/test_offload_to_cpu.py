"""A training parked on the CPU: everything it holds is found, and comes back bit for bit."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.memory import free_bytes
from grpo_toolkit.model.offload_to_cpu import movable, parked

if TYPE_CHECKING:
    from pathlib import Path


def trained(folder: Path, device: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model, _, _ = load_model(folder, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def test_on_a_cpu_there_is_nothing_to_move(qwen: Path) -> None:
    model, optimizer = trained(qwen, "cpu")
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    with parked(model, optimizer) as freed:
        assert freed == 0
        assert [parameter.data_ptr() for parameter in model.parameters()] == pointers


def test_everything_that_a_training_holds_has_a_place(qwen: Path) -> None:
    model, optimizer = trained(qwen, "cpu")
    places = movable(model, optimizer)
    count = sum(1 for _ in model.parameters())
    # Values, gradients and AdamW's step and two moments; then the buffers.
    assert len(places) == 5 * count + sum(1 for _ in model.buffers())
    for tensor in places:
        tensor.data = tensor.data.clone() + 1
    assert all(bool((parameter.grad == 2).all()) for parameter in model.parameters())
    state = optimizer.state[next(model.parameters())]
    assert float(state["step"]) == 2.0
    assert len(movable(model, object())) == 2 * count + sum(1 for _ in model.buffers())


def test_tensors_that_are_views_of_one_another_stay(qwen: Path) -> None:
    model, _ = trained(qwen, "cpu")
    assert movable(model)
    first, second = (parameter for _, parameter in zip(range(2), model.parameters(), strict=False))
    flat = torch.zeros(first.numel() + second.numel())
    first.grad, second.grad = flat[: first.numel()].view_as(first), flat[first.numel() :].view_as(second)
    assert movable(model) == []


def test_there_is_memory() -> None:
    free = free_bytes("cpu")
    assert free is not None
    assert free > 1e8


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_is_empty_meanwhile_and_full_again(qwen: Path) -> None:
    model, optimizer = trained(qwen, "cuda")
    before = [tensor.clone().cpu() for tensor in movable(model, optimizer)]
    held = torch.cuda.memory_allocated()
    with parked(model, optimizer) as freed:
        assert freed > 0.9 * held
        assert torch.cuda.memory_allocated() < 0.1 * held
        assert not any(parameter.is_cuda for parameter in model.parameters())
    after = movable(model, optimizer)
    assert all(parameter.is_cuda for parameter in model.parameters())
    assert all(torch.equal(one, other.cpu()) for one, other in zip(before, after, strict=True))
    optimizer.step()
