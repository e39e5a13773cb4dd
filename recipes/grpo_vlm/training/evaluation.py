"""Ask a model about rows of a dataset, greedily, and count the right answers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit import inference_ready
from grpo_vlm.data.image_sizes import row_images
from grpo_vlm.rewards.answers import extract_answer, is_right, is_right_directly

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from accelerate import Accelerator
    from datasets import Dataset


DIRECT_PROMPT = "You are a helpful assistant. Give the answer alone, without any explanation."
"""The other prompt for a base: where it does better so than when it thinks, a later gain is repair of the prompt."""


def held_out_accuracy(
    model: Any,
    processor: Any,
    rows: Dataset,
    *,
    max_new_tokens: int,
    direct: bool = False,
    packed_vision: bool = False,
    fast_batch: int | None = None,
    accelerator: Accelerator | None = None,
) -> float:
    """Return the share of rows (0 to 1) whose one answer block holds the reference answer.

    Args:
        model, processor:
            As trained; the model may be in the middle of it.
        rows (`Dataset`):
            With `prompt`, `image` or `images`, `answer`, and optionally `answer_type`.
        max_new_tokens (`int`):
            The most tokens of an answer.
        direct (`bool`, *optional*):
            Ask for the answer alone instead, and look for it in all of the text, leniently.
        packed_vision (`bool`, *optional*):
            Run the vision tower as `PackedVisionCallback` does.
        fast_batch (`int`, *optional*):
            The batch that `FastRolloutCallback` has compiled a step for: rows are asked in such batches, as rollouts.
        accelerator (`Accelerator`, *optional*):
            Shares the rows out among its processes. Without it every process answers every row, as it must where
            the weights are sharded.
    """
    mine = rows
    if accelerator is not None and accelerator.num_processes > 1:
        # A list, not a range, and not `shard`: datasets takes no empty share of fewer rows than processes from those.
        mine = rows.select(list(range(accelerator.process_index, len(rows), accelerator.num_processes)))
    texts = generate_texts(
        model,
        processor,
        mine,
        max_new_tokens=max_new_tokens,
        direct=direct,
        packed_vision=packed_vision,
        fast_batch=fast_batch,
    )
    kinds = mine["answer_type"] if "answer_type" in mine.column_names else ["text"] * len(mine)
    right = [
        is_right_directly(text, reference, kind) if direct else is_right(extract_answer(text), reference, kind)
        for text, reference, kind in zip(texts, mine["answer"], kinds, strict=True)
    ]
    if accelerator is not None and accelerator.num_processes > 1:
        from accelerate.utils import gather_object

        right = gather_object(right)
    return sum(right) / len(rows)


def direct_prompt(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the same question, asked for the answer alone."""
    return [{"role": "system", "content": DIRECT_PROMPT}, *(turn for turn in prompt if turn["role"] != "system")]


def generate_answers(model: Any, processor: Any, rows: Dataset, *, max_new_tokens: int) -> list[str | None]:
    """Return the model's greedy answer to every row; None where it gave none, or more than one."""
    return [extract_answer(text) for text in generate_texts(model, processor, rows, max_new_tokens=max_new_tokens)]


def generate_texts(
    model: Any,
    processor: Any,
    rows: Dataset,
    *,
    max_new_tokens: int,
    direct: bool = False,
    batch_size: int = 50,
    packed_vision: bool = False,
    fast_batch: int | None = None,
) -> list[str]:
    """Return the model's greedy completion of every row.

    The model may be in the middle of training: `inference_ready` switches the KV cache on and gradient
    checkpointing off for the time being, and puts everything back, the random state included. With `fast_batch` every
    batch has so many rows, the last one by copies, which fast rollouts prefill once.
    """
    import torch

    texts: list[str] = []
    batch_size = fast_batch or batch_size
    with inference_ready(model, packed_vision=packed_vision), torch.no_grad():
        for start in range(0, len(rows), batch_size):
            batch = [rows[i] for i in range(start, min(start + batch_size, len(rows)))]
            if direct:
                batch = [{**row, "prompt": direct_prompt(row["prompt"])} for row in batch]
            filled = [*batch, *([batch[-1]] * (batch_size - len(batch) if fast_batch else 0))]
            inputs = model_inputs(filled, processor).to(model.device)
            settings = greedy_settings(model, max_new_tokens=max_new_tokens, as_rollout=fast_batch is not None)
            tokens = model.generate(**inputs, generation_config=settings)[: len(batch)]
            texts += processor.batch_decode(tokens[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return texts


def greedy_settings(model: Any, *, max_new_tokens: int, as_rollout: bool) -> Any:
    """Return the model's own settings, greedy; `as_rollout`: marked as TRL marks rollouts, which may then be fast."""
    import copy

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    settings = copy.deepcopy(getattr(inner, "module", inner).generation_config)
    settings.update(do_sample=False, temperature=None, top_p=None, top_k=None, max_new_tokens=max_new_tokens)
    if as_rollout:
        settings.update(disable_compile=True)
    return settings


def model_inputs(
    rows: Sequence[Mapping[str, Any]], processor: Any, *, completions: Sequence[str] | None = None
) -> Any:
    """Return a batch of rows in the chat format, padded on the left; `completions` are appended, to learn from."""
    from trl.data_utils import prepare_multimodal_messages

    images = [row_images(row) for row in rows]
    texts = [
        processor.apply_chat_template(
            prepare_multimodal_messages(row["prompt"], images=pictures), tokenize=False, add_generation_prompt=True
        )
        for row, pictures in zip(rows, images, strict=True)
    ]
    if completions is not None:
        texts = [text + completion for text, completion in zip(texts, completions, strict=True)]
    return processor(text=texts, images=images, padding=True, padding_side="left", return_tensors="pt")
