"""Drawn pictures, and what a model is asked about them where nobody says what to ask.

Verification, the latency lab and LatencyCallback draw here, so that none of them leaves a vision-language model's eyes
out. A picture at the pixel limit is among them: that is where a processor has to shrink, and where many raise.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.pixel_limits import known_pixel_limits
from grpo_toolkit.model.cache_probe import vision_tower
from grpo_toolkit.model.generation.chat_inputs import image_messages, prepare_inputs
from grpo_toolkit.model.generation.request import Request, plain_request
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

_SIZES: Final = ((112, 84), (84, 168))
_SIDE: Final = 28
_MOST_ASKED: Final = 1280 * _SIDE * _SIDE
"""The most pixels of a picture that a model is asked about: 1,280 tokens of Qwen2.5-VL."""


@dataclass(frozen=True, kw_only=True)
class Sight:
    """The eyes of a model and of its processor, as far as they can be asked.

    Attributes:
        has_tower: the model has a vision tower, known by its name.
        takes_pictures: the processor has an image side.
        limits: its fewest and most pixels of a picture; None where it has none.
        why_not: why no picture can be put into a prompt; empty where one can.
    """

    has_tower: bool = False
    takes_pictures: bool = False
    limits: tuple[int, int] | None = None
    why_not: str = ""


def sight_of(processor: Any, model: torch.nn.Module) -> Sight:
    """Return what can be asked of a model and its processor."""
    images = getattr(processor, "image_processor", None)
    has_template = getattr(processor, "chat_template", None) is not None
    return Sight(
        has_tower=vision_tower(base_model(model)) is not None,
        takes_pictures=images is not None,
        limits=None if images is None else known_pixel_limits(images),
        why_not="" if has_template else "the processor has no chat template that says where a picture goes",
    )


def made_up_requests(sight: Sight) -> list[Request]:
    """Return a question in words and, for a model that sees, questions about drawn pictures."""
    return [plain_request(), *(request for request in picture_requests(sight) if request.max_new_tokens)]


def requests_to(model: torch.nn.Module, processor: Any) -> list[Request]:
    """Return made-up requests to a model at hand, without pictures that its processor refuses.

    An export of it has the same processor, and there verification says so.
    """
    made_up, has_place = made_up_requests(sight_of(processor, model)), places_pictures(processor)
    return [
        request for request in made_up if not request.images or (has_place and _is_taken(request, processor, model))
    ]


def places_pictures(processor: Any) -> bool:
    """Return whether a chat template gives a picture a token of its own.

    One of a text model may well print a message's parts as they are, words about an image among them.
    """
    asked = _question(_SIZES[0], 0, None)
    try:
        with_one, without = (
            processor.apply_chat_template(image_messages(request), tokenize=False, add_generation_prompt=True)
            for request in (asked, replace(asked, images=[]))
        )
    except Exception:  # a template may raise anything
        return False
    tokens = getattr(processor, "tokenizer", processor).get_added_vocab()
    return any(with_one.count(token) > without.count(token) for token in tokens)


def _is_taken(request: Request, processor: Any, model: torch.nn.Module) -> bool:
    """Return whether a processor makes a prompt of a picture, and its tokenizer leaves the picture's tokens in it."""
    try:
        inputs = prepare_inputs(processor, [request])
    except Exception:  # a processor or its template may raise anything
        return False
    place = getattr(base_model(model).config, "image_token_id", None)
    return place is None or bool((inputs["input_ids"] == place).any())


def picture_requests(sight: Sight) -> list[Request]:
    """Return questions about drawn pictures of several sizes, the last one above the pixel limit; none to the blind.

    Where the limit is too high for a model to be asked about such a picture, the processor alone is: the request has
    no new tokens.
    """
    if not sight.takes_pictures or sight.why_not:
        return []
    sizes = list(_SIZES)
    if sight.limits is not None:
        side = (math.isqrt(max(sight.limits[1], 1)) // _SIDE + 1) * _SIDE
        sizes.append((side, side))
    return [_question(size, number, sight.limits) for number, size in enumerate(sizes)]


def _question(size: tuple[int, int], number: int, limits: tuple[int, int] | None) -> Request:
    is_asked = len(_SIZES) > number or limits is None or limits[1] <= _MOST_ASKED
    return question(size, f"question {number}", max_new_tokens=8 if is_asked else 0)


def question(size: tuple[int, int], name: str, *, max_new_tokens: int = 16) -> Request:
    """Return a question about a picture that is drawn from a name."""
    messages = [{"role": "user", "content": "What is the main colour of this picture?"}]
    return Request(messages=messages, images=[draw(size, name)], max_new_tokens=max_new_tokens)


def draw(size: tuple[int, int], name: str) -> Image:
    """Draw patches of random colours, from a name: nothing that two pictures share, and quick to write.

    A large picture has large patches with sharp edges: soft ones take seconds to pack into a file.
    """
    from PIL import Image

    is_large = size[0] * size[1] > _MOST_ASKED
    small = (8, 8) if is_large else (max(size[0] // 14, 1), max(size[1] // 14, 1))
    noise = random.Random(f"picture {name}").randbytes(small[0] * small[1] * 3)
    picture = Image.frombytes("RGB", small, noise)
    return picture.resize(size, Image.Resampling.NEAREST) if is_large else picture.resize(size)
