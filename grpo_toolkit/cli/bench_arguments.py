"""The flags of `grpo-toolkit bench`, and the workloads and arms that they name."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.cli.shell import check_attention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from grpo_toolkit.latency.bench.sweep import Setting
    from grpo_toolkit.latency.bench.workload import Traffic
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.model.generation.request import Request


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `bench`; several values, with commas between, are measured one after the other."""
    add = parser.add_argument
    add(
        "models",
        nargs="+",
        metavar="[NAME=]MODEL",
        help="folders, endpoints (http://host:8000/v1[#MODEL]), or rows measured before",
    )
    add = parser.add_argument_group("what is asked").add_argument
    add("--workload", choices=["fixed", "natural", "both"], default="both", help="exact lengths, live ends, or both")
    add("--new-tokens", type=_counts, default=[64], metavar="N,...", help="of each fixed answer (default 64)")
    add("--max-new-tokens", type=count, default=256, metavar="N", help="the cap of natural answers (default 256)")
    add("--prompt-tokens", type=_counts, default=[512], metavar="N,...", help="of each made-up prompt (default 512)")
    add("--image-tokens", type=_counts, metavar="N,...", help="of each made-up image; 0: none (default 256, if any)")
    add("--batch-size", type=_batches, default=[1], metavar="N,...", help='or "max": 1, 2, 4, ... until out of memory')
    add(
        "--lengths",
        choices=["repeated", "new", "both"],
        default="repeated",
        help="of the KV cache, from round to round",
    )
    add(
        "--thinking",
        choices=["off", "on", "both"],
        default="both",
        help="instruction in natural prompts (default both)",
    )
    add("--prompt", help="what to ask, instead of made-up prompts")
    add("--image", type=Path, help="an image to ask about")
    add("--prompts", type=Path, metavar="FILE", help="JSON lines with prompt and image (a path), to ask in turn")
    add("--seed", type=int, default=0, help="of made-up requests")
    add = parser.add_argument_group("how it is measured").add_argument
    add("--rounds", type=int, default=12, help="measured requests per model (default 12; verdicts need 6)")
    add("--precision", type=float, metavar="PERCENT", help="go on until ratios are known to so many percent")
    add("--budget", type=float, metavar="SECONDS", help="per workload, warm-up included; 6 rounds are made anyway")
    add("--no-control", action="store_true", help="leave out the first model against itself (A/A)")
    add("--no-roofline", action="store_true", help="do not measure the device's bandwidth")
    add = parser.add_argument_group("how it is run").add_argument
    add("--no-cache", action="store_true", help="also time every model with its KV cache off")
    add("--cache", type=_words, metavar="KIND,...", help="dynamic, static, static+compile, static+compile+ahead")
    add("--attn", type=_words, metavar="NAME,...", help="attention implementations: sdpa, eager, ...")
    add("--sdpa", type=_words, metavar="NAME,...", help="SDPA kernels: flash, efficient, math, cudnn, no_cudnn")
    add("--dtype", help="of the weights (default: that of the files)")
    add("--sample", action="store_true", help="decode as the generation config says, not greedily")
    add("--tune", action="store_true", help="the older spelling of grpo-toolkit tune")
    add("--max-tpot", type=float, metavar="MS", help="with --tune: batches as long as a token takes no longer")
    add("--max-memory", type=float, metavar="GB", help="with --tune: batches as long as they need no more memory")
    add = parser.add_argument_group("what comes out").add_argument
    add("--gate", metavar="max-slowdown=RATIO", help="exit 1, with the reason, if a model is slower than the first")
    add("--output", type=Path, metavar="DIR", help="append the rows to DIR/latency.jsonl")


def find_workloads(
    arguments: argparse.Namespace, given: Sequence[Request], processor: Any
) -> Iterator[Callable[[int], Traffic]]:
    """Yield the workloads that the flags name, as functions of the batch size."""
    if arguments.workload != "natural":
        yield from _fixed(arguments, given, processor)
    if arguments.workload != "fixed":
        yield from _natural(arguments, given, processor)


def _fixed(
    arguments: argparse.Namespace, given: Sequence[Request], processor: Any
) -> Iterator[Callable[[int], Traffic]]:
    from grpo_toolkit.latency.bench.workload import made_up

    if given:
        for new_tokens in arguments.new_tokens:
            yield partial(
                _named, given=given, kind="fixed", max_new_tokens=new_tokens, thinking=None, seed=arguments.seed
            )
        return
    lengths = ["repeated", "new"] if arguments.lengths == "both" else [arguments.lengths]
    sizes = (lengths, arguments.new_tokens, arguments.prompt_tokens, _image_tokens(arguments, processor))
    for length, new_tokens, prompt_tokens, image_tokens in product(*sizes):

        def make(
            size: int,
            length: Any = length,
            new_tokens: int = new_tokens,
            prompt_tokens: int = prompt_tokens,
            image_tokens: int | None = image_tokens,
        ) -> Traffic:
            name = "fixed" if length == "repeated" else "fixed_new_lengths"
            traffic = made_up(
                processor,
                prompt_tokens=prompt_tokens,
                image_tokens=image_tokens,
                max_new_tokens=new_tokens,
                batch_size=size,
                lengths=length,
                seed=arguments.seed,
            )
            return replace(traffic, name=name)

        yield make


def _natural(
    arguments: argparse.Namespace, given: Sequence[Request], processor: Any
) -> Iterator[Callable[[int], Traffic]]:
    from grpo_toolkit.latency.bench.workload import made_up

    cap = arguments.max_new_tokens
    for thinking in {"off": [False], "on": [True], "both": [False, True]}[arguments.thinking]:
        if given:
            yield partial(
                _named, given=given, kind="natural", max_new_tokens=cap, thinking=thinking, seed=arguments.seed
            )
            continue
        for image_tokens in _image_tokens(arguments, processor):

            def make(size: int, thinking: bool = thinking, image_tokens: int | None = image_tokens) -> Traffic:
                traffic = made_up(
                    processor,
                    kind="natural",
                    image_tokens=image_tokens,
                    max_new_tokens=cap,
                    batch_size=size,
                    thinking=thinking,
                    seed=arguments.seed,
                )
                return replace(traffic, name="natural_thinking" if thinking else "natural")

            yield make


def _named(
    size: int, *, given: Sequence[Request], kind: Any, max_new_tokens: int, thinking: bool | None, seed: int
) -> Traffic:
    from grpo_toolkit.latency.bench.workload import traffic_of

    traffic = traffic_of(
        given, kind=kind, max_new_tokens=max_new_tokens, batch_size=size, thinking=thinking, seed=seed
    )
    return replace(traffic, name=f"{kind}_thinking" if thinking else kind)


def _image_tokens(arguments: argparse.Namespace, processor: Any) -> list[int | None]:
    from grpo_toolkit.latency.bench.workload import MADE_UP_IMAGE_TOKENS

    if arguments.image_tokens is None:
        return [MADE_UP_IMAGE_TOKENS if hasattr(processor, "image_processor") else None]
    return [count or None for count in arguments.image_tokens]


def find_arms(arguments: argparse.Namespace) -> list[Arm]:
    """Return every model in every setting that the flags name."""
    from grpo_toolkit.checkpoint.model_folder import open_checkpoint
    from grpo_toolkit.latency.bench.sweep import with_setting
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.protocol import Options

    check_attention(arguments.attn or ())
    plain = Options(device=arguments.device, dtype=arguments.dtype, sample=arguments.sample)
    arms = []
    for item in arguments.models:
        name, place = named_model(item)
        if place.startswith(("http://", "https://")):
            url, _, model = place.partition("#")
            arms.append(Arm(name=name, url=url, path=Path(model) if model else None, options=plain))
            continue
        open_checkpoint(Path(place))
        chosen = [("", plain)]
        settings: tuple[tuple[Setting, list[Any] | None], ...] = (
            ("cache", arguments.cache),
            ("attn_implementation", arguments.attn),
            ("sdpa_backend", arguments.sdpa),
            ("use_cache", [None, False] if arguments.no_cache else None),
        )
        for setting, values in settings:
            if values is not None:
                chosen = [
                    (f"{so_far}_{_word(setting, value)}" if _word(setting, value) else so_far, found)
                    for so_far, options in chosen
                    for value in values
                    for found in [with_setting(options, setting, value)]
                ]
        arms += [Arm(name=f"{name}{suffix}", path=Path(place), options=options) for suffix, options in chosen]
    return arms


def _word(setting: str, value: Any) -> str:
    if setting == "use_cache":
        return "" if value is None else "no_cache"
    return str(value).replace("+", "_")


def named_model(item: str) -> tuple[str, str]:
    """Split `NAME=MODEL`; without a name it is the folder's own, or the address's host."""
    name, equals, place = item.partition("=")
    if equals and os.sep not in name:
        return name, place
    if item.startswith(("http://", "https://")):
        address = item.partition("://")[2]
        return address.partition("#")[2] or address.partition("/")[0].replace(".", "_"), item
    return Path(item).resolve().name, item


def given_requests(arguments: argparse.Namespace) -> list[Request]:
    """Return the requests of `--prompt`, `--image` and `--prompts`; none where prompts are made up."""
    from grpo_toolkit.model.generation.request import Request, requests_from_rows
    from grpo_toolkit.model.generation.request_forms import MOST, prompt_rows, read_image

    if arguments.prompts is not None:
        return requests_from_rows(prompt_rows(arguments.prompts, f"--prompts {arguments.prompts}"), limit=MOST)
    if arguments.prompt is None and arguments.image is None:
        return []
    images = [] if arguments.image is None else [read_image(arguments.image, "--image")]
    prompt = arguments.prompt or "Describe what you see, step by step."
    return [Request(messages=[{"role": "user", "content": prompt}], images=images)]


def count(text: str) -> int:
    """Return a flag's number, from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return value


def _counts(text: str) -> list[int]:
    return [0 if part == "0" else count(part) for part in text.split(",")]


def _batches(text: str) -> list[int] | list[str]:
    return ["max"] if text == "max" else [count(part) for part in text.split(",")]


def _words(text: str) -> list[str]:
    return text.split(",")
