"""The workloads that the flags of `grpo-toolkit bench` name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator, Sequence

    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.model.generation.request import Request


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A workload as a function of `batch_size`; `direct` is the same without the instruction to think, or None."""

    make: Callable[..., Traffic]
    direct: Callable[..., Traffic] | None = None


def find_workloads(arguments: argparse.Namespace, given: Sequence[Request], processor: Any) -> Iterator[Workload]:
    """Yield the workloads that the flags name."""
    from grpo_toolkit.latency.bench.workload import made_up, traffic_of

    make = partial(traffic_of, given) if given else partial(made_up, processor)
    images = [{}] if given else [{"image_tokens": tokens} for tokens in _image_tokens(arguments, processor)]
    make = partial(make, seed=arguments.seed)
    if arguments.workload != "natural":
        for settings in _fixed(arguments, is_made_up=not given):
            yield from (Workload(make=partial(make, kind="fixed", **settings, **image)) for image in images)
    if arguments.workload != "fixed":
        thinking, direct = _natural(arguments, given, processor)
        for image in images:
            asked = [partial(make, **image) for make in (thinking, direct)]
            if arguments.thinking == "both":
                yield Workload(make=asked[0], direct=asked[1])
            else:
                yield Workload(make=asked[arguments.thinking == "off"])


def _natural(
    arguments: argparse.Namespace, given: Sequence[Request], processor: Any
) -> tuple[Callable[..., Traffic], Callable[..., Traffic]]:
    """Return the natural workload with the instruction to think, and without it."""
    from grpo_toolkit.latency.bench.workload import THINKING, made_up, traffic_of
    from grpo_toolkit.model.generation.thinking_instruction import find_thinking

    settings = {"kind": "natural", "max_new_tokens": arguments.max_new_tokens, "seed": arguments.seed}
    if not given:
        make = partial(made_up, processor, **settings)
        return partial(make, name="natural_thinking", thinking=True), partial(make, name="natural", thinking=False)
    own = find_thinking(given)
    thinking, direct = own if own[0] else find_thinking(given, THINKING)

    def asked(requests: Sequence[Request], *, name: str, thinking: bool, **further: Any) -> Traffic:
        return replace(traffic_of(requests, name=name, **settings, **further), thinking=thinking)

    return (
        partial(asked, thinking, name="natural_thinking", thinking=True),
        partial(asked, direct, name="natural", thinking=False),
    )


def _fixed(arguments: argparse.Namespace, *, is_made_up: bool) -> Iterator[dict[str, Any]]:
    """Yield the settings of each fixed workload: of given prompts only the length of the answer is free."""
    if not is_made_up:
        yield from ({"max_new_tokens": new_tokens} for new_tokens in arguments.new_tokens)
        return
    names = {"repeated": "fixed", "new": "fixed_new_lengths"}
    lengths = names if arguments.lengths == "both" else [arguments.lengths]
    for length, new_tokens, prompt_tokens in product(lengths, arguments.new_tokens, arguments.prompt_tokens):
        yield {
            "name": names[length],
            "lengths": length,
            "max_new_tokens": new_tokens,
            "prompt_tokens": prompt_tokens,
        }


def _image_tokens(arguments: argparse.Namespace, processor: Any) -> list[int | None]:
    from grpo_toolkit.latency.bench.workload import usual_image_tokens

    if arguments.image_tokens is None:
        return [usual_image_tokens(processor)]
    return [count or None for count in arguments.image_tokens]
