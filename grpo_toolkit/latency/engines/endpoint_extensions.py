"""The extensions of the chat completions protocol that a server takes: each key by itself, found by asking.

vLLM 0.31 takes all of the first ones (and passes over keys that it does not know). SGLang 0.5.23 takes all but
`return_token_ids`, which it refuses in a stream; it counts the tokens of every piece instead and names all of them at
the end. `transformers serve` refuses keys that it does not know, names them, and takes a generation config.
"""

from __future__ import annotations

import json
import re
import uuid
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Callable

TOKEN_IDS: Final = "return_token_ids"
ALL_IDS: Final = "return_output_ids_in_sglext"
USAGE: Final = "stream_options.include_usage"
RUNNING_USAGE: Final = "stream_options.continuous_usage_stats"
SALT: Final = "cache_salt"
NO_PENALTY: Final = "repetition_penalty"
LEAST: Final = "min_tokens"
CONFIG: Final = "generation_config"

_INSTEAD: Final = {CONFIG: LEAST}
"""Keys that are offered only where another is refused."""

_OFFERED: Final = (TOKEN_IDS, ALL_IDS, USAGE, RUNNING_USAGE, SALT, NO_PENALTY, LEAST, CONFIG)


def with_extensions(body: dict[str, Any], taken: frozenset[str], *, exact: bool, greedy: bool) -> dict[str, Any]:
    """Return a request with all of the keys that apply to it.

    Args:
        body: the request.
        taken: the keys that the server takes.
        exact: with exactly as many tokens as it may have.
        greedy: with the most likely tokens, every penalty off.
    """
    found = dict(body)
    for key in _OFFERED:
        value = _value(key, int(body["max_tokens"]), exact=exact, greedy=greedy) if key in taken else None
        if value is not None:
            outer, _, inner = key.partition(".")
            found[outer] = {**found.get(outer, {}), inner: value} if inner else value
    return found


def _value(key: str, tokens: int, *, exact: bool, greedy: bool) -> Any:
    if key == NO_PENALTY:
        return 1.0 if greedy else None
    if key == LEAST:
        # Not ignore_eos: that says the end of sequence and goes on behind it; transformers takes the next best token.
        return tokens if exact else None
    if key == CONFIG:
        least = {"min_new_tokens": tokens} if exact else {}
        likely = {"do_sample": False, "repetition_penalty": 1.0} if greedy else {}
        return json.dumps({"max_new_tokens": tokens, **least, **likely}) if exact or greedy else None
    if key == SALT:  # else what requests have in common, the thinking instruction say, is computed once for all
        return uuid.uuid4().hex
    return True


def find_extensions(refusal: Callable[[frozenset[str]], str | None]) -> frozenset[str] | None:
    """Find the keys that a server takes: all at once, without those that it names, then each left out alone.

    Args:
        refusal: asks with these keys, and says what the server has against it, None if it answered.

    Returns:
        The keys, None where a request without any of them is refused too: they are not what it has anything against.
    """
    taken = frozenset(key for key in _OFFERED if key not in _INSTEAD)
    surely: frozenset[str] = frozenset()
    while (said := refusal(taken)) is not None:
        if not taken:
            return None
        named = frozenset(key for key in taken if _names(said, key))
        if len(named) == 1:
            surely |= named
        taken = taken - named if named else frozenset()
    for key in _OFFERED:
        if key in taken | surely or _INSTEAD.get(key) in taken or (key == RUNNING_USAGE and USAGE not in taken):
            continue
        # A refusal may repeat the whole request, and so name keys that are none of its business.
        if refusal(taken | {key}) is None:
            taken |= {key}
    return taken


def _names(said: str, key: str) -> bool:
    return any(re.search(rf"(?<!\w){part}(?!\w)", said) for part in key.split("."))
