"""The inputs and logits behind an answer: what the processor gave the model, and the logits of its first tokens.

Two models that are to be the same are compared by it: the numbers say how far apart they are, which equal tokens do
not. It travels between processes as a safetensors file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch

LOGIT_STEPS: Final = 16
"""The number of tokens whose logits are kept of an answer: at a vocabulary of 152,000 those are 10 MB."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """The inputs and first logits of one answer.

    Attributes:
        inputs: the processor's tensors by name (`input_ids`, `pixel_values`, ...), as it made them.
        logits: shape (tokens, vocabulary), float32: of the first `LOGIT_STEPS` tokens, before any sampling setting.
    """

    inputs: Mapping[str, torch.Tensor]
    logits: torch.Tensor


def collect(inputs: Mapping[str, torch.Tensor], logits: Sequence[torch.Tensor]) -> Evidence:
    """Keep a request's inputs and what `generate` gave as logits (each of shape (1, vocabulary)), on the CPU."""
    import torch

    return Evidence(inputs=inputs, logits=torch.stack([step[0].float().cpu() for step in logits[:LOGIT_STEPS]]))


def write_evidence(evidence: Evidence, path: Path) -> None:
    """Store it as a file for another process."""
    from safetensors.torch import save_file

    tensors = {f"inputs.{name}": tensor for name, tensor in evidence.inputs.items()} | {"logits": evidence.logits}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


def read_evidence(path: Path) -> Evidence:
    """Read what `write_evidence` wrote."""
    from safetensors.torch import load_file

    tensors = load_file(path)
    logits = tensors.pop("logits")
    return Evidence(inputs={name.removeprefix("inputs."): tensor for name, tensor in tensors.items()}, logits=logits)
