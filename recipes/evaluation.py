"""Ask a model about rows of a dataset, greedily, and count the right answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from answers import extract_answer
from grpo_toolkit import inference_ready

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from datasets import Dataset


def held_out_accuracy(model: Any, processor: Any, rows: Dataset, *, max_new_tokens: int) -> float:
    """Share of rows (0 to 1) whose one answer block holds the reference answer."""
    answers = generate_answers(model, processor, rows, max_new_tokens=max_new_tokens)
    return sum(found == wanted.strip() for found, wanted in zip(answers, rows["answer"], strict=True)) / len(rows)


def generate_answers(
    model: Any, processor: Any, rows: Dataset, *, max_new_tokens: int, batch_size: int = 50
) -> list[str | None]:
    """The model's greedy answer to every row; None where it gave none, or more than one.

    The model may be in the middle of training: `inference_ready` switches the KV cache on and gradient
    checkpointing off for the time being, and puts everything back, the random state included. Under several
    processes every rank answers every row, so that sharded models can take part in the forwards they need.
    """
    import torch

    answers: list[str | None] = []
    with inference_ready(model), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            inputs = model_inputs(batch, processor).to(model.device)
            greedy = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
            tokens = model.generate(**inputs, **greedy, max_new_tokens=max_new_tokens)
            texts = processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            answers += [extract_answer(text) for text in texts]
    return answers


def model_inputs(
    rows: Sequence[Mapping[str, Any]], processor: Any, *, completions: Sequence[str] | None = None
) -> Any:
    """A batch of rows in the chat format, padded on the left; `completions` are appended, to learn from."""
    from trl.data_utils import prepare_multimodal_messages

    images = [row["images"] if "images" in row else [row["image"]] for row in rows]
    texts = [
        processor.apply_chat_template(
            prepare_multimodal_messages(row["prompt"], images=pictures), tokenize=False, add_generation_prompt=True
        )
        for row, pictures in zip(rows, images, strict=True)
    ]
    if completions is not None:
        texts = [text + completion for text, completion in zip(texts, completions, strict=True)]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
