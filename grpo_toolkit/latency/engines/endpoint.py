"""An OpenAI-compatible endpoint: vLLM, SGLang, `transformers serve`. Streaming chat completions, images as data URLs.

A server sends pieces of text, not tokens. Where it says how many tokens there were (`usage`), TPOT is over those; a
token that is half a character arrives with the next one. Nothing is known of phases, memory or the cache.
"""

from __future__ import annotations

import base64
import io
import json
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.inputs import image_messages
from grpo_toolkit.latency.engines.markers import split_answer
from grpo_toolkit.latency.engines.protocol import Answer, EngineFacts, Evidence, Options
from grpo_toolkit.latency.row import Timeline

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from PIL.Image import Image

    from grpo_toolkit.inference import Request

_REASONING: Final = ("reasoning_content", "reasoning")
"""Keys under which servers that parse reasoning send it."""


@dataclass
class _Stream:
    """What one request has sent back so far."""

    pieces: list[str] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    is_reasoning: list[bool] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    finish_reason: str | None = None
    ended_s: float = 0.0


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
        self._dialect: dict[str, Any] | None = None

    def facts(self) -> EngineFacts:
        """Its address, and its version where it tells (vLLM does)."""
        facts = {"hardware": f"endpoint {self.url}"}
        with self._said():
            answer = self._client.get(self.url.rpartition("/")[0] + "/version")
            if answer.status_code == 200 and "json" in answer.headers.get("content-type", ""):
                facts["server_version"] = str(answer.json().get("version", ""))
        return EngineFacts(environment=facts)

    def ask(self, requests: Sequence[Request], options: Options) -> Answer:
        """Answer a batch, each request on a connection of its own, all at once."""
        bodies = [self._body(request, options) for request in requests]
        start = time.perf_counter()
        with ThreadPoolExecutor(len(bodies)) as pool:
            streams = list(pool.map(lambda body: self._stream(body, start), bodies))
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
        listed = answer.json().get("data", []) if answer.status_code == 200 else []
        if not listed:
            raise InputError(f"{self.url}: lists no model (status {answer.status_code}); name one: NAME=URL#MODEL")
        return str(listed[0]["id"])

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
        always: dict[str, Any] = self._dialect["always"]
        return body | (self._exactly(request) if request.exact else {}) | always

    def _exactly(self, request: Request) -> dict[str, Any]:
        assert self._dialect is not None
        if self._dialect["name"] == "transformers":
            # It knows no ignore_eos, but takes a whole generation config.
            cap = request.max_new_tokens
            config = {"max_new_tokens": cap, "min_new_tokens": cap, "do_sample": False}
            return {"generation_config": json.dumps(config)}
        return {"ignore_eos": True}

    def _find_dialect(self, body: dict[str, Any]) -> dict[str, Any]:
        """Which extensions this server takes: one short request each, from the most telling down."""
        usage = {"stream_options": {"include_usage": True}}
        for name, always, extra in (
            ("vllm", usage, {"ignore_eos": True}),
            ("transformers", {}, {"generation_config": '{"max_new_tokens": 1}'}),
        ):
            with self._said():
                answer = self._client.post(
                    f"{self.url}/chat/completions", json=body | always | extra | {"max_tokens": 1, "stream": False}
                )
            if answer.status_code == 200:
                return {"name": name, "always": always}
        raise WorkerError(f"{self.url}: refused a request (status {answer.status_code}): {answer.text[:300]}")

    def _stream(self, body: dict[str, Any], start: float) -> _Stream:
        found = _Stream()
        with self._said(), self._client.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise WorkerError(f"{self.url}: status {answer.status_code}: {answer.read()[:300].decode()}")
            for line in answer.iter_lines():
                if not line.startswith("data:") or line.endswith("[DONE]"):
                    continue
                self._take(found, json.loads(line[len("data:") :]), time.perf_counter() - start)
        if not found.pieces:  # an end of sequence at once: that it is over is all that arrived
            found.pieces, found.times_s, found.is_reasoning = [""], [found.ended_s], [False]
        return found

    def _take(self, found: _Stream, chunk: dict[str, Any], moment: float) -> None:
        if "error" in chunk:
            raise WorkerError(f"{self.url}: {chunk['error']}")
        found.ended_s = moment
        found.usage = chunk.get("usage") or found.usage
        for choice in chunk.get("choices") or []:
            delta = choice.get("delta") or {}
            found.finish_reason = choice.get("finish_reason") or found.finish_reason
            thought = next((delta[key] for key in _REASONING if delta.get(key)), None)
            text = thought or delta.get("content")
            if text:
                found.pieces.append(text)
                found.times_s.append(moment)
                found.is_reasoning.append(thought is not None)

    @contextmanager
    def _said(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.ConnectError as error:
            raise InputError(f"{self.url}: nothing answers there ({error}); is the server up?") from error
        except (httpx.HTTPError, ValueError) as error:
            raise WorkerError(f"{self.url}: {type(error).__name__}: {error}") from error


def _answer(streams: Sequence[_Stream]) -> Answer:
    lengths = [int(stream.usage.get("completion_tokens") or len(stream.pieces)) for stream in streams]
    # The batch's steps are those of its longest answer; each answer's own times are merged where there are several.
    times = streams[0].times_s if len(streams) == 1 else sorted(t for stream in streams for t in stream.times_s)
    think = answer = first_s = None
    if len(streams) == 1:
        think, answer, first_s = _split(streams[0], lengths[0])
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
        texts=["".join(stream.pieces) for stream in streams],
    )


def _split(stream: _Stream, tokens: int) -> tuple[int | None, int | None, float | None]:
    """Think and answer tokens (None where pieces are not tokens), and when the answer began."""
    if any(stream.is_reasoning):
        first = next((i for i, thinks in enumerate(stream.is_reasoning) if not thinks), None)
        think = sum(stream.is_reasoning)
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
