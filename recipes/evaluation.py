"""Accuracy of a model on held-out rows: greedy answers, judged by the accuracy reward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit import inference_ready
from rewards import accuracy_reward

if TYPE_CHECKING:
    from datasets import Dataset


def held_out_accuracy(
    model: Any, processor: Any, rows: Dataset, *, max_new_tokens: int, batch_size: int = 50
) -> float:
    """Share of rows (0 to 1) that the model answers right, decoding greedily.

    The model may be in the middle of training: `inference_ready` switches the KV cache on and gradient
    checkpointing off for the time being, and puts everything back, the random state included. Every rank computes
    the same rows, so that sharded models can take part in the forward passes they need.
    """
    import torch

    right = 0.0
    with inference_ready(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            inputs = processor(
                text=[_prompt(processor, row) for row in batch],
                images=[_images(row) for row in batch],
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            tokens = model.generate(
                **inputs, do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=max_new_tokens
            )
            completions = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(accuracy_reward(completions, [row["answer"] for row in batch]))
    return right / len(rows)


def _images(row: dict[str, Any]) -> list[Any]:
    return row["images"] if "images" in row else [row["image"]]


def _prompt(processor: Any, row: dict[str, Any]) -> str:
    from trl.data_utils import prepare_multimodal_messages

    messages = prepare_multimodal_messages(row["prompt"], images=_images(row))
    return str(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
