"""The flags of `grpo-toolkit bench`, and the workloads and arms that they name."""

from __future__ import annotations

import argparse
import math
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.cli.shell import check_attention
from grpo_toolkit.errors import InputError

if TYPE_CHECKING:
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.model.generation.request import Request


CACHES: Final[dict[str, dict[str, Any]]] = {
    "dynamic": {"cache_implementation": "dynamic", "compiled": False},
    "static": {"cache_implementation": "static", "compiled": False},
    "static+compile": {"cache_implementation": "static", "compiled": True},
    "static+compile+ahead": {"cache_implementation": "static", "compiled": True, "ahead": True},
}
"""The values of the setting `cache`, as options."""


PACKED_VISION: Final = "one attention call a layer in its vision tower, and each distinct image of a batch once"
"""The setting `packed_vision` in words, for `--help`."""


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
    add(
        "--workload",
        choices=["fixed", "natural", "both"],
        default="both",
        help="answers of an exact length, answers that end by themselves, or both",
    )
    add("--new-tokens", type=_several, default=[64], metavar="N,...", help="tokens of each fixed answer (default 64)")
    add("--max-new-tokens", type=count, default=256, metavar="N", help="most tokens of a natural answer (default 256)")
    add(
        "--prompt-tokens",
        type=_counts,
        default=[512],
        metavar="N,...",
        help="tokens of each made-up prompt (default 512)",
    )
    add(
        "--image-tokens",
        type=_counts,
        metavar="N,...",
        help="tokens of each made-up image; 0 for none (default 256, where the model sees)",
    )
    add(
        "--batch-size",
        type=_batches,
        default=[1],
        metavar="N,...",
        help='requests at once; "max" tries 1, 2, 4, ... until memory runs out',
    )
    add(
        "--lengths",
        choices=["repeated", "new", "both"],
        default="repeated",
        help="lengths of the KV cache: the same in each round, new ones, or both",
    )
    add(
        "--thinking",
        choices=["off", "on", "both"],
        default="both",
        help="natural prompts without the instruction to think, with it, or both",
    )
    add("--prompt", help="what to ask, instead of made-up prompts")
    add("--image", type=Path, help="an image to ask about")
    add("--prompts", type=Path, metavar="FILE", help="JSON lines with prompt and image (a path), to ask in turn")
    add("--seed", type=int, default=0, help="seed of the made-up requests")
    add = parser.add_argument_group("how it is measured").add_argument
    add("--rounds", type=count, default=12, help="measured requests per model (default 12; verdicts need 6)")
    add("--precision", type=positive, metavar="PERCENT", help="go on until ratios are known to so many percent")
    add(
        "--budget",
        type=positive,
        metavar="SECONDS",
        help="seconds for each workload, warm-up included; 6 rounds are made anyway",
    )
    add("--no-control", action="store_true", help="do not time the first model against itself (A/A)")
    add("--no-roofline", action="store_true", help="do not measure the device's bandwidth")
    add = parser.add_argument_group("how it is run").add_argument
    add("--no-cache", action="store_true", help="also time every model with its KV cache off")
    add("--packed-vision", action="store_true", help=f"also time every model with {PACKED_VISION}")
    add(
        "--cache",
        type=_words,
        metavar="KIND,...",
        help="KV caches to time: dynamic, static, static+compile, static+compile+ahead",
    )
    add("--attn", type=_words, metavar="NAME,...", help="attention implementations to time: sdpa, eager, ...")
    add(
        "--sdpa", type=_words, metavar="NAME,...", help="SDPA kernels to time: flash, efficient, math, cudnn, no_cudnn"
    )
    add("--dtype", help="dtype of the weights (default: that of the files)")
    add("--sample", action="store_true", help="decode as the generation config says, not greedily")
    add("--tune", action="store_true", help="the older spelling of grpo-toolkit tune")
    add(
        "--max-tpot",
        type=float,
        metavar="MS",
        help="with --tune: try larger batches while a token takes no longer than this",
    )
    add(
        "--max-memory",
        type=float,
        metavar="GB",
        help="with --tune: try larger batches while they need no more memory than this",
    )
    add = parser.add_argument_group("what comes out").add_argument
    add(
        "--gate",
        type=_gate,
        metavar="max-slowdown=RATIO",
        help="exit 1, with the reason, if a model is slower than the first",
    )
    add("--output", type=Path, metavar="DIR", help="append the rows to DIR/latency.jsonl")


def find_arms(arguments: argparse.Namespace) -> list[Arm]:
    """Return every model in every setting that the flags name."""
    from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
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
        settings: tuple[tuple[str, list[Any] | None], ...] = (
            ("cache", arguments.cache),
            ("attn_implementation", arguments.attn),
            ("sdpa_backend", arguments.sdpa),
            ("packed_vision", [False, True] if arguments.packed_vision else None),
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


def with_setting(options: Options, setting: str, value: Any) -> Options:
    """Return the options with one setting changed: a field of theirs, or `cache`, which is several.

    Raises:
        InputError: a cache that is not known.
    """
    if setting != "cache":
        return replace(options, **{setting: value})
    if value not in CACHES:
        raise InputError(f"no cache called {value!r}; choose from {', '.join(CACHES)}")
    return replace(options, **CACHES[value])


def _word(setting: str, value: Any) -> str:
    if setting == "use_cache":
        return "" if value is None else "no_cache"
    if setting == "packed_vision":
        return setting if value else ""
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
    from grpo_toolkit.model.generation.request import requests_from_rows
    from grpo_toolkit.model.generation.request_forms import MOST, prompt_rows

    if arguments.prompts is not None:
        return requests_from_rows(prompt_rows(arguments.prompts, f"--prompts {arguments.prompts}"), limit=MOST)
    return [] if arguments.prompt is None and arguments.image is None else [asked(arguments)]


def asked(arguments: argparse.Namespace) -> Request:
    """Return the request of `--prompt` and `--image`."""
    from grpo_toolkit.model.generation.request import Request
    from grpo_toolkit.model.generation.request_forms import read_image

    images = [] if arguments.image is None else [read_image(arguments.image, "--image")]
    prompt = arguments.prompt or "Describe what you see, step by step."
    return Request(messages=[{"role": "user", "content": prompt}], images=images)


def count(text: str) -> int:
    """Return a flag's number, from 1 on."""
    try:
        value = int(text)
    except ValueError:
        value = -1
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a count")
    return value


def two_or_more(text: str) -> int:
    """Return a flag's number, from 2 on: of tokens, where the time between two is measured."""
    value = count(text)
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text!r}: it takes two")
    return value


def positive(text: str) -> float:
    """Return a flag's number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is no number above 0")
    return value


def _gate(text: str) -> str:
    from grpo_toolkit.latency.bench.gate import gate_of

    try:
        gate_of(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _several(text: str) -> list[int]:
    return [count(part) for part in text.split(",")]


def _counts(text: str) -> list[int]:
    return [0 if part == "0" else count(part) for part in text.split(",")]


def _batches(text: str) -> list[int] | list[str]:
    return ["max"] if text == "max" else _several(text)


def _words(text: str) -> list[str]:
    return text.split(",")
