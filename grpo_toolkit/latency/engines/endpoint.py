"""An OpenAI-compatible endpoint: vLLM, SGLang, `transformers serve`. Streaming chat completions, images as data URLs.

A server sends pieces of text, not tokens. vLLM says which tokens a piece holds (`return_token_ids`): then every token
has its time, also one that is half a character or no text at all. Elsewhere TPOT is over the tokens that `usage`
counts, and half a character arrives with the next token. Nothing is known of phases, memory or the cache.

vLLM decodes by the folder's `generation_config.json` where a request does not say otherwise (`--generation-config`):
temperature 0 alone leaves Qwen2.5-VL's repetition penalty of 1.05 on, and greedy tokens differ from the model's own.
"""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.inputs import image_messages
from grpo_toolkit.latency.engines.markers import split_answer
from grpo_toolkit.latency.engines.protocol import Answer, EngineFacts, Evidence, Options
from grpo_toolkit.latency.row import Timeline

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from PIL.Image import Image

    from grpo_toolkit.inference import Request

_REASONING: Final = ("reasoning_content", "reasoning")
"""Keys under which servers that parse reasoning send it."""


@dataclass(frozen=True, kw_only=True)
class _Dialect:
    """Which extensions of the protocol a server takes.

    Attributes:
        streamed: keys of every streamed request.
        greedy: keys that switch penalties off.
        exact: keys for an answer of exactly so many tokens.
        is_salted: whether a request may say that what it has in common with others is computed anew.
    """

    streamed: dict[str, Any]
    greedy: dict[str, Any]
    exact: Callable[[int], dict[str, Any]]
    is_salted: bool


def _without_end(tokens: int) -> dict[str, Any]:
    # Not ignore_eos: that says the end of sequence and goes on behind it; transformers takes the next best token.
    return {"min_tokens": tokens}


def _whole_config(tokens: int) -> dict[str, Any]:
    config = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
    return {"generation_config": json.dumps(config)}


def _by_chance(tokens: int) -> dict[str, Any]:
    return {}


_USAGE: Final = {"stream_options": {"include_usage": True}}

_DIALECTS: Final = (
    _Dialect(  # vLLM, SGLang
        streamed=_USAGE | {"return_token_ids": True},
        greedy={"repetition_penalty": 1.0},
        exact=_without_end,
        is_salted=True,
    ),
    _Dialect(  # the same, where keys that are not known are refused
        streamed=_USAGE, greedy={"repetition_penalty": 1.0}, exact=_without_end, is_salted=False
    ),
    _Dialect(streamed={}, greedy={}, exact=_whole_config, is_salted=False),  # transformers serve
    _Dialect(streamed=_USAGE, greedy={}, exact=_by_chance, is_salted=False),  # the protocol alone
)
"""From the most telling down."""


@dataclass
class _Stream:
    """What one request has sent back so far; `tokens` are those of each piece, none where the server is silent."""

    pieces: list[str] = field(default_factory=list)
    tokens: list[list[int]] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    is_reasoning: list[bool] = field(default_factory=list)
    usage: dict[str, int] = field(default_factory=dict)
    finish_reason: str | None = None
    ended_s: float = 0.0

    def add(self, choice: dict[str, Any], moment: float) -> None:
        """A piece that arrived; AttributeError or TypeError if it is none."""
        delta = choice.get("delta") or {}
        self.finish_reason = choice.get("finish_reason") or self.finish_reason
        thought = next((delta[key] for key in _REASONING if delta.get(key)), None)
        text, tokens = "" + (thought or delta.get("content") or ""), list(choice.get("token_ids") or [])
        if text or tokens:
            self.pieces.append(text)
            self.tokens.append(tokens)
            self.times_s.append(moment)
            self.is_reasoning.append(thought is not None)


class EndpointEngine:
    """An endpoint and one model there (see `Engine`).

    Args:
        url: up to the version, such as `http://localhost:8000/v1`.
        model: its name there; by default the first that the server lists.
        api_key: sent as a bearer token; by default OPENAI_API_KEY of the environment, if it is set.
        timeout_s: between two pieces of an answer.

    Raises:
        InputError: the address is none, or nothing answers there.
    """

    def __init__(
        self, url: str, *, model: str | None = None, api_key: str | None = None, timeout_s: float = 600.0
    ) -> None:
        import os

        import httpx

        if not url.startswith(("http://", "https://")):
            raise InputError(f"{url}: not the address of an endpoint; it begins with http:// or https://")
        self.url = url.rstrip("/")
        key = api_key or os.environ.get("OPENAI_API_KEY")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # A proxy of the environment would be timed, too; of a local server it knows nothing.
        self._client = httpx.Client(headers=headers, timeout=timeout_s, limits=limits, trust_env=False)
        try:
            self.model = model or self._first_model()
        except BaseException:
            self.close()
            raise
        self._dialect: _Dialect | None = None

    def facts(self) -> EngineFacts:
        """Its address, and its version where it tells (vLLM does)."""
        facts = {"hardware": f"endpoint {self.url}"}
        with self._said():
            answer = self._client.get(self.url.rpartition("/")[0] + "/version")
            if answer.status_code == 200 and "json" in answer.headers.get("content-type", ""):
                said = answer.json()
                facts["server_version"] = str(said.get("version", "")) if isinstance(said, dict) else ""
        return EngineFacts(environment=facts)

    def ask(self, requests: Sequence[Request], options: Options) -> Answer:
        """Answer a batch, each request on a connection of its own, all at once."""
        bodies = [self._body(request, options) for request in requests]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(bodies)) as pool:
            streams = list(pool.map(lambda body: self._stream(body, start), bodies))
        for request, stream in zip(requests, streams, strict=True):
            said = stream.usage.get("completion_tokens")
            if request.exact and said not in (None, request.max_new_tokens):
                raise WorkerError(
                    f"{self.url}: {said} tokens where exactly {request.max_new_tokens} were asked for; is there a "
                    "max_new_tokens in the server's generation config, or does it take no min_tokens?"
                )
        return _answer(streams)

    def prove(self, requests: Sequence[Request], options: Options) -> Evidence | None:
        """None: a server cannot be looked into."""
        return None

    def environment(self) -> dict[str, str]:
        """The same as in `facts`."""
        return self.facts().environment

    def probe_hardware(self) -> dict[str, float]:
        """{}: its device is out of reach."""
        return {}

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def __enter__(self) -> EndpointEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _first_model(self) -> str:
        with self._said():
            answer = self._client.get(f"{self.url}/models")
        try:
            return str(answer.json()["data"][0]["id"])
        except (ValueError, TypeError, LookupError):  # another page, or a list of nothing
            pass
        hint = "" if self.url.endswith("/v1") else f"is it {self.url}/v1? Or "
        raise InputError(f"{self.url}: lists no model (status {answer.status_code}); {hint}name one: NAME=URL#MODEL")

    def _body(self, request: Request, options: Options) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": _messages(request),
            "max_tokens": request.max_new_tokens,
            "stream": True,
        }
        if not options.sample:
            body["temperature"] = 0.0
        if self._dialect is None:
            self._dialect = self._find_dialect(body)
        return self._dressed(body, self._dialect, exact=request.exact, greedy=not options.sample)

    def _dressed(self, body: dict[str, Any], dialect: _Dialect, *, exact: bool, greedy: bool) -> dict[str, Any]:
        extensions = dialect.exact(body["max_tokens"]) if exact else {}
        if dialect.is_salted:  # else the thinking instruction, say, would be computed once for all requests
            extensions["cache_salt"] = uuid.uuid4().hex
        return body | (dialect.greedy if greedy else {}) | extensions | dialect.streamed

    def _find_dialect(self, body: dict[str, Any]) -> _Dialect:
        """Which extensions this server takes: one short request each, with every key that may be sent later."""
        for dialect in _DIALECTS:
            short = self._dressed(body | {"max_tokens": 1}, dialect, exact=True, greedy=True)
            with self._said():
                answer = self._client.post(f"{self.url}/chat/completions", json=short)
            if answer.status_code == 200:
                return dialect
        raise WorkerError(f"{self.url}: refused a request (status {answer.status_code}): {_reason(answer.text)}")

    def _stream(self, body: dict[str, Any], start: float) -> _Stream:
        found = _Stream()
        with self._said(), self._client.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                text = answer.read().decode(errors="replace")
                raise WorkerError(f"{self.url}: refused a request (status {answer.status_code}): {_reason(text)}")
            other = ""
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    other = (other + line)[:2000]
                elif not line.endswith("[DONE]"):
                    self._take(found, json.loads(line[len("data:") :]), time.perf_counter() - start)
            if not found.ended_s:
                raise WorkerError(f"{self.url}: sent no answer (status 200): {_reason(other) or 'nothing at all'}")
        if not found.pieces:  # an end of sequence at once: that it is over is all that arrived
            found.pieces, found.tokens, found.times_s, found.is_reasoning = [""], [[]], [found.ended_s], [False]
        return found

    def _take(self, found: _Stream, chunk: dict[str, Any], moment: float) -> None:
        try:
            if chunk.get("error") or chunk.get("object") == "error":
                raise WorkerError(f"{self.url}: broke off: {_reason(json.dumps(chunk))}")
            found.ended_s = moment
            usage = chunk.get("usage") or {}
            counts = ("prompt_tokens", "completion_tokens")
            found.usage |= {name: int(usage[name]) for name in counts if usage.get(name) is not None}
            for choice in chunk.get("choices") or []:
                found.add(choice, moment)
        except (AttributeError, TypeError) as error:
            raise WorkerError(f"{self.url}: sent what is no chunk of an answer: {str(chunk)[:200]}") from error

    @contextmanager
    def _said(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.InvalidURL as error:
            raise InputError(f"{self.url}: not the address of an endpoint ({error})") from error
        except httpx.ConnectError as error:
            raise InputError(f"{self.url}: nothing answers there ({error}); is the server up?") from error
        except (httpx.HTTPError, ValueError) as error:
            raise WorkerError(f"{self.url}: {type(error).__name__}: {error}; the server's log may say why") from error


def _reason(text: str) -> str:
    """What a refusal says: the message in it, or its beginning, on one line."""
    try:
        said: Any = json.loads(text)
    except ValueError:
        said = text
    while isinstance(said, dict):
        said = next((said[key] for key in ("error", "message", "detail") if said.get(key)), str(said))
    return " ".join(str(said).split())[:400]


def _answer(streams: Sequence[_Stream]) -> Answer:
    lengths = [int(stream.usage.get("completion_tokens") or _count(stream)) for stream in streams]
    # The batch's steps are those of its longest answer; each answer's own times are merged where there are several.
    times = sorted(chain.from_iterable(_times(stream) for stream in streams))
    think = answer = first_s = None
    if len(streams) == 1:
        think, answer, first_s = _split(streams[0], lengths[0])
    tokens = [list(chain.from_iterable(stream.tokens)) for stream in streams]
    return Answer(
        timeline=Timeline(
            token_times_s=times,
            prompt_tokens=max(int(stream.usage.get("prompt_tokens") or 0) for stream in streams),
            output_tokens=sum(lengths),
            output_lengths=lengths,
            think_tokens=think,
            answer_tokens=answer,
            first_answer_s=first_s,
            is_capped=any(stream.finish_reason == "length" for stream in streams),
        ),
        tokens=tokens if [len(said) for said in tokens] == lengths else [],
        texts=["".join(stream.pieces) for stream in streams],
    )


def _count(stream: _Stream) -> int:
    return sum(max(1, len(tokens)) for tokens in stream.tokens)


def _times(stream: _Stream) -> list[float]:
    """One for each token of each piece."""
    pieces = zip(stream.times_s, stream.tokens, strict=True)
    return [moment for moment, tokens in pieces for _ in range(max(1, len(tokens)))]


def _split(stream: _Stream, tokens: int) -> tuple[int | None, int | None, float | None]:
    """Think and answer tokens (None where pieces are not tokens), and when the answer began."""
    if any(stream.is_reasoning):
        # A piece without text is a marker that the server's parser took out: it counts as thinking.
        begun, pieces = stream.is_reasoning.index(True), zip(stream.is_reasoning, stream.pieces, strict=True)
        first = next((i for i, (thinks, text) in enumerate(pieces) if i > begun and text and not thinks), None)
        think = len(stream.pieces) if first is None else first
    else:
        split = split_answer(stream.pieces)
        first, think = split.first_answer, split.think
    moment = None if first is None else stream.times_s[first]
    if len(stream.pieces) != tokens:
        return None, None, moment
    return think, tokens - think, moment


def _messages(request: Request) -> list[dict[str, Any]]:
    images = iter(request.images)
    messages = []
    for message in image_messages(request):
        parts = [
            {"type": "image_url", "image_url": {"url": _data_url(next(images))}} if part["type"] == "image" else part
            for part in message["content"]
        ]
        is_text = all(part["type"] == "text" for part in parts)
        content: Any = "".join(str(part["text"]) for part in parts) if is_text else parts
        messages.append({**message, "content": content})
    return messages


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
