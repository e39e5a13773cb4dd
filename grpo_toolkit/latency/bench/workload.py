"""The workloads: the same requests for every arm, round by round.

Two kinds, because each hides what the other shows. *Fixed* asks for exactly so many tokens: speed alone. *Natural*
lets the model end by itself, under a cap: a model that learnt to think longer is slower at the same speed.

A request is made from its number and a seed, so all arms hear the same, and no two requests are alike: a server's
prefix cache would otherwise answer the second from the first.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Final, Literal

from grpo_toolkit.checkpoint.pixel_limits import pixel_limits
from grpo_toolkit.errors import InputError
from grpo_toolkit.model.generation.chat_inputs import image_messages, render_chat, text_of
from grpo_toolkit.model.generation.drawn_pictures import draw
from grpo_toolkit.model.generation.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

THINKING: Final = (
    "You are a helpful assistant. First think about the question, then give the answer: put the reasoning between "
    "<think> and </think>, then the answer alone between <answer> and </answer>."
)
"""The instruction of the recipe's prompts, as a system message."""

QUESTIONS: Final = (
    "What is the main colour of this picture?",
    "Describe what you see in two sentences.",
    "How many large patches can you count, and where are they?",
    "Which half of the picture is brighter, the left or the right?",
    "Is there any text in this picture? If so, what does it say?",
    "What could this be a photograph of? Give three guesses.",
    "Compare the top left corner with the bottom right corner.",
    "If you had to give this picture a title, what would it be?",
)
_WORDS: Final = tuple(
    "river stone paper light garden window copper winter letter market silver island engine forest pocket "  # noqa: SIM905
    "violet ladder summer carbon mirror planet harbor candle bridge meadow signal velvet timber anchor beacon".split()
)
_STRAIGHT_GUESSES: Final = 6

MADE_UP_PROMPT_TOKENS: Final = 512
MADE_UP_IMAGE_TOKENS: Final = 256
"""The size of requests where nobody says what to ask."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """The requests of a measurement.

    Attributes:
        name: on charts.
        kind: "fixed" (exactly `max_new_tokens`) or "natural" (until the model ends).
        make: the request of a number; numbers below zero warm up.
        max_new_tokens: the length, or the cap.
        batch_size: requests that are asked at once.
        thinking: whether the prompts ask for reasoning; None: they do not say.
        seed: what the requests were made from.
        lengths: "new": every round has lengths of the KV cache that were not met before.
    """

    name: str
    kind: Literal["fixed", "natural"]
    make: Callable[[int], Request]
    max_new_tokens: int
    batch_size: int = 1
    thinking: bool | None = None
    seed: int | None = None
    lengths: Literal["repeated", "new"] = "repeated"

    def batch(self, turn: int) -> list[Request]:
        """Return the requests of one turn; turns below zero warm up."""
        made = (self.make(turn * self.batch_size + place) for place in range(self.batch_size))
        exact = self.kind == "fixed"
        return [replace(request, max_new_tokens=self.max_new_tokens, exact=exact) for request in made]


def traffic_of(
    requests: Sequence[Request],
    *,
    name: str | None = None,
    kind: Literal["fixed", "natural"] = "fixed",
    max_new_tokens: int,
    batch_size: int = 1,
    thinking: bool | None = None,
    seed: int = 0,
) -> Traffic:
    """Return traffic of the given requests, one after the other and then again.

    Each begins with a number of its own (six digits, so that its length stays the same); a natural request only where
    it is asked again.

    Raises:
        InputError: no requests, or nothing to generate.
    """
    if not requests or max_new_tokens < 1 or batch_size < 1:
        raise InputError("a workload needs at least one request, one new token and a batch of one")
    pool = [_with_thinking(request) for request in requests] if thinking else list(requests)

    def make(number: int) -> Request:
        again, place = divmod(number, len(pool))
        if again == 0 and kind == "natural":
            return pool[place]
        return _marked(pool[place], f"{random.Random(f'mark {seed} {number}').randrange(10**6):06d}")

    return Traffic(
        name=name or kind, kind=kind, make=make, max_new_tokens=max_new_tokens, batch_size=batch_size,
        thinking=thinking, seed=seed,
    )  # fmt: skip


def made_up(
    processor: Any,
    *,
    name: str | None = None,
    kind: Literal["fixed", "natural"] = "fixed",
    prompt_tokens: int = 256,
    image_tokens: int | None = None,
    max_new_tokens: int,
    batch_size: int = 1,
    thinking: bool | None = None,
    seed: int = 0,
    lengths: Literal["repeated", "new"] = "repeated",
) -> Traffic:
    """Make traffic up from a seed.

    Fixed: random words, cut to a prompt of exactly `prompt_tokens` in all (template and image included). Natural:
    everyday questions. Both about an image of their own where `image_tokens` are asked for.

    Args:
        processor: whose tokens are counted; None (nothing but an endpoint is known) counts four characters a token.
        name: on charts; by default the kind.
        kind: fixed or natural.
        prompt_tokens: length of a fixed prompt; where `lengths` are new, of the shortest.
        image_tokens: tokens of the image; None asks without one.
        max_new_tokens: the length, or the cap.
        batch_size: requests that are asked at once.
        thinking: put the thinking instruction in front.
        seed: of everything.
        lengths: "new" makes each prompt `max_new_tokens` longer than the one before.

    Raises:
        InputError: an image of so many tokens cannot be made, or does not fit into the prompt.
    """
    size = None if image_tokens is None else image_size(processor, image_tokens)

    def make(number: int) -> Request:
        images = [] if size is None else [draw(size, f"{seed} {number}")]
        if kind == "natural":
            question = QUESTIONS[number % len(QUESTIONS)]
            text = question if 0 <= number < len(QUESTIONS) else f"{_words(seed, number, 3)}: {question}"
            request = Request(messages=[{"role": "user", "content": text}], images=images)
            return _with_thinking(request) if thinking else request
        turn = number // batch_size
        wanted = prompt_tokens + (max_new_tokens * (turn + 1) if lengths == "new" and turn >= 0 else 0)
        empty = Request(messages=[{"role": "user", "content": ""}], images=images)
        empty = _with_thinking(empty) if thinking else empty
        words = _words(seed, number, wanted + 8)
        return _fit(empty, words, wanted, processor, image_tokens)

    make(0)  # what cannot be made is said before any model is loaded
    return Traffic(
        name=name or kind, kind=kind, make=make, max_new_tokens=max_new_tokens, batch_size=batch_size,
        thinking=bool(thinking), seed=seed, lengths=lengths,
    )  # fmt: skip


def image_size(processor: Any, tokens: int) -> tuple[int, int]:
    """Return width and height of an image of so many tokens, as near to a square as possible.

    Where every image becomes the same number of tokens (LLaVA), any size does.

    Raises:
        InputError: the model's pixel limits do not allow it.
    """
    images = getattr(processor, "image_processor", None)
    merge = getattr(images, "merge_size", None)
    if images is None:
        if processor is None:  # an endpoint: 28 pixels a side, as Qwen2.5-VL has it
            return _nearest_square(tokens, 28)
        raise InputError("this model takes no images; leave the image tokens out")
    if merge is None:
        return 336, 336
    width, height = _nearest_square(tokens, images.patch_size * merge)
    low, high = pixel_limits(images)
    low, high = low if isinstance(low, int) else 0, high if isinstance(high, int) else float("inf")
    if tokens < 1 or not low <= width * height <= high or max(width, height) > 200 * min(width, height):
        raise InputError(
            f"no image of this model has {tokens} tokens ({width} x {height} pixels; {low} to {high} pixels are "
            "allowed, and sides up to 200 to 1); ask for another number"
        )
    return width, height


def _nearest_square(tokens: int, side: int) -> tuple[int, int]:
    rows = next((rows for rows in range(int(max(tokens, 1) ** 0.5), 0, -1) if tokens % rows == 0), 1)
    return tokens // rows * side, rows * side


def _fit(empty: Request, words: str, wanted: int, processor: Any, image_tokens: int | None) -> Request:
    """Return the request with as many of the words as make it exactly that long, if any number does."""

    def filled(count: int) -> Request:
        *before, last = empty.messages
        return replace(empty, messages=[*before, {**last, "content": words[:count]}])

    def excess(count: int) -> int:
        return count_tokens(filled(count), processor, image_tokens) - wanted

    low, high = 0, len(words)
    under, over = excess(low), excess(high)
    if under > 0:
        raise InputError(
            f"a prompt of {wanted} tokens has no room for its template and image ({wanted + under}); ask for more"
        )
    if over <= 0:
        low, under = high, over
    guesses = 0
    while high - low > 1 and under < 0:
        # Words have much the same letters per token: a straight line soon hits the length, halves do in the end.
        share = under / (under - over) if guesses < _STRAIGHT_GUESSES else 0.5
        middle = min(max(low + round((high - low) * share), low + 1), high - 1)
        found, guesses = excess(middle), guesses + 1
        if found <= 0:
            low, under = middle, found
        else:
            high, over = middle, found
    near = (count for count in range(low - 1, max(low - 24, -1), -1) if excess(count) == 0)
    return filled(low if under == 0 else next(near, low))


def usual_image_tokens(processor: Any) -> int | None:
    """Return the image tokens of a made-up request: `MADE_UP_IMAGE_TOKENS` where the processor takes images."""
    return MADE_UP_IMAGE_TOKENS if hasattr(processor, "image_processor") else None


def count_tokens(request: Request, processor: Any, image_tokens: int | None = None) -> int:
    """Count the tokens of a prompt, its template and images included."""
    images = len(request.images) * (image_tokens or 0)
    messages = image_messages(request)
    if processor is None:
        return images + sum(len(text_of(message["content"])) for message in messages) // 4
    if not hasattr(processor, "image_processor"):
        return len(processor(render_chat(processor, messages), add_special_tokens=False)["input_ids"])
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return len(processor.tokenizer(text)["input_ids"]) - len(request.images) + images


def _words(seed: int, number: int, count: int) -> str:
    return " ".join(random.Random(f"words {seed} {number}").choices(_WORDS, k=count))


def _with_thinking(request: Request) -> Request:
    return replace(request, messages=[{"role": "system", "content": THINKING}, *request.messages])


def _marked(request: Request, number: str) -> Request:
    messages = [dict(message) for message in request.messages]
    for message in messages:
        if message["role"] == "user":
            content = message["content"]
            mark = f"Request {number}. "
            message["content"] = (
                mark + content if isinstance(content, str) else [{"type": "text", "text": mark}, *content]
            )
            break
    return replace(request, messages=messages)
