"""A request as a model's inputs: the chat template rendered, images in their places, tensors where the model is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Sequence

    import torch

    from grpo_toolkit.model.generation.request import Request

TOKEN_TYPES: Final = "token_type_ids"


def prepare_inputs(processor: Any, requests: Sequence[Request]) -> Any:
    """Render the chat template and run the processor: a batch as tensors, several requests padded on the left.

    Text alone goes to the tokenizer: some processors (PaliGemma, GOT-OCR2) refuse to be called without a picture, and
    a policy that was trained with a VLM's tokenizer alone gets what its export's processor makes. If that makes token
    types, so does the tokenizer here: without them PaliGemma's prompt has another mask, which in transformers 5 is not
    the same with a KV cache as without.
    """
    options: dict[str, Any] = {}
    tokenizer = getattr(processor, "tokenizer", processor)
    if len(requests) > 1:
        options = {"padding": True, "padding_side": "left"}
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    chats = [image_messages(request) for request in requests]
    if not any(request.images for request in requests):
        has_own = getattr(processor, "chat_template", None) is not None  # older VLMs keep theirs with the processor
        texts = [render_chat(processor if has_own else tokenizer, messages) for messages in chats]
        if TOKEN_TYPES in getattr(processor, "model_input_names", ()):
            options["return_token_type_ids"] = True
        return tokenizer(texts, return_tensors="pt", add_special_tokens=False, **options)
    texts = [processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats]
    images = [image for request in requests for image in request.images]
    return processor(text=texts, images=images or None, return_tensors="pt", **options)


def inputs_for(model: torch.nn.Module, inputs: Any) -> Any:
    """Return a processor's output on the model's device, its pixels in the model's dtype."""
    import torch

    inner = base_model(model)
    inputs = inputs.to(inner.device)
    # Processors make float32 pixels; only some vision towers cast them (Qwen2.5-VL does, LLaVA does not).
    for name, value in inputs.items():
        if torch.is_floating_point(value):
            inputs[name] = value.to(inner.dtype)
    return inputs


def render_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    """Return the prompt as text; without a chat template, the texts one after the other.

    A processor's template gets typed parts, as it expects them, a tokenizer's plain strings.
    """
    flat = [{**message, "content": text_of(message["content"])} for message in messages]
    if getattr(tokenizer, "chat_template", None) is None:
        return "\n".join(message["content"] for message in flat)
    chat = messages if hasattr(tokenizer, "tokenizer") else flat
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True))


def text_of(content: str | list[dict[str, Any]]) -> str:
    """Return the text of a message's content, which is one or a list of parts."""
    return content if isinstance(content, str) else "".join(part.get("text", "") for part in content)


def image_messages(request: Request) -> list[dict[str, Any]]:
    """Return the messages with typed parts as contents, and an image part for each image that has none yet."""
    messages = [
        {**message, "content": [{"type": "text", "text": content}] if isinstance(content, str) else list(content)}
        for message in request.messages
        for content in [message["content"]]
    ]
    placed = sum(part.get("type") == "image" for message in messages for part in message["content"])
    for message in messages:
        if message["role"] == "user":
            message["content"] = [{"type": "image"}] * (len(request.images) - placed) + message["content"]
            break
    return messages
