"""An OpenAI-compatible endpoint: vLLM, SGLang, `transformers serve`. Streaming chat completions, images as data URLs.

What a server says of its tokens is in `streamed`, what it can be asked in `extensions`. Nothing is known of phases,
memory or the cache.

vLLM and SGLang decode by the folder's `generation_config.json` where a request does not say otherwise
(`--generation-config`, `--sampling-defaults`): temperature 0 alone leaves Qwen2.5-VL's repetition penalty of 1.05 on,
and greedy tokens differ from the model's own.
"""

from __future__ import annotations

import base64
import io
import json
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.latency.engines.endpoint_extensions import ALL_IDS, RUNNING_USAGE, find_extensions, with_extensions
from grpo_toolkit.latency.engines.endpoint_stream import Stream, answer_of
from grpo_toolkit.latency.engines.protocol import Answer, Engine, EngineFacts, Options
from grpo_toolkit.model.generation.chat_inputs import image_messages

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    import httpx
    from PIL.Image import Image

    from grpo_toolkit.model.generation.request import Request

_Said = TypeVar("_Said")

_REFUSALS: Final = (400, 422)
"""The statuses with which a server refuses keys that it does not take."""

_BUSY: Final = (408, 429, 502, 503, 504)
"""The statuses that pass: too many requests, a queue that is full, a server that is still loading behind its proxy."""

_WAITS_S: Final = (0.5, 1.0, 2.0, 4.0)
"""Before a short request that met a busy server, or a broken connection, is sent again."""

_LONGEST_WAIT_S: Final = 30.0
"""Of what a server may ask for (`Retry-After`)."""


class _StatusError(WorkerError):
    """A refused request, with its status."""

    def __init__(self, message: str, *, status: int, said: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.status, self.said, self.wait_s = status, said, wait_s


class _BrokenError(WorkerError):
    """A connection that broke off and may hold the next time."""


class EndpointEngine(Engine):
    """An endpoint and one model there (see `Engine`).

    Args:
        url: up to the version, such as `http://localhost:8000/v1`.
        model: its name there; by default the first that the server lists.
        api_key: sent as a bearer token; by default OPENAI_API_KEY of the environment, if it is set.
        timeout_s: between two pieces of an answer.

    Raises:
        InputError: the address is none, nothing answers there, or the model is none of SGLang's, which would answer
            all the same.
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
        self._extensions: frozenset[str] | None = None
        try:
            self.model = self._model_called(model)
        except BaseException:
            self.close()
            raise

    def facts(self) -> EngineFacts:
        """Return the address, and the version where the server tells it (vLLM and SGLang do)."""
        facts = {"hardware": f"endpoint {self.url}"}
        above = self.url.rpartition("/")[0]
        root = self.url if above.endswith("/") else above  # an address without its version has nothing above it
        for page in ("/version", "/server_info"):
            answer = self._get(root + page)
            said = _json_of(answer) if answer.status_code == 200 else None
            if isinstance(said, dict) and said.get("version"):
                facts["server_version"] = str(said["version"])
                break
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
        return answer_of(streams)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _model_called(self, name: str | None) -> str:
        answer = self._get(f"{self.url}/models")
        cards = _cards_of(answer)
        self._is_vllm = any(card.get("owned_by") == "vllm" for card in cards)
        if name is None and not cards:
            hint = f"{self._hint}Or name" if self._hint else "name"
            raise InputError(f"{self.url}: lists no model (status {answer.status_code}); {hint} one: NAME=URL#MODEL")
        if name is None:
            return str(cards[0]["id"])
        return _name_for_sglang(name, cards, self.url) if _is_sglang(cards) else name

    @property
    def _hint(self) -> str:
        return "" if self.url.endswith("/v1") else f"is it {self.url}/v1? "

    def _get(self, page: str) -> httpx.Response:
        def get() -> httpx.Response:
            with self._said():  # a server may close a connection that it said it would keep
                return self._client.get(page)

        return self._patiently(get, waits_s=(0.0, *_WAITS_S[:1]))

    def _body(self, request: Request, options: Options) -> dict[str, Any]:
        body = self._plain_body(request, options)
        if self._extensions is None:
            self._extensions = self._find_extensions(body)
            body = self._plain_body(request, options)  # with images of its own
        return with_extensions(body, self._extensions, exact=request.exact, greedy=not options.sample)

    def _plain_body(self, request: Request, options: Options) -> dict[str, Any]:
        return {
            "model": self.model,
            "messages": _messages(request, with_uuids=self._is_vllm),
            "max_tokens": request.max_new_tokens,
            "stream": True,
            **({} if options.sample else {"temperature": 0.0}),
        }

    def _find_extensions(self, body: dict[str, Any]) -> frozenset[str]:
        """Find the keys that this server takes, by short requests with all that may be sent later."""
        short, refused, named = body | {"max_tokens": 1}, [], False

        def refusal(keys: frozenset[str]) -> str | None:
            nonlocal named
            try:
                asked = with_extensions(short, keys, exact=True, greedy=True)
                stream = self._patiently(partial(self._stream, asked, 0.0))
            except _StatusError as error:
                if error.status not in _REFUSALS:
                    raise
                refused.append(error)
                return error.said
            named = named or any(stream.tokens)
            return None

        found = find_extensions(refusal)
        if found is None:
            raise refused[-1]
        return found - {RUNNING_USAGE, ALL_IDS} if named else found  # it says more: no need for the server to count

    def _patiently(self, call: Callable[[], _Said], *, waits_s: Sequence[float] = _WAITS_S) -> _Said:
        """Make a short call, again where the server is busy or the connection breaks."""
        for wait_s in waits_s:
            try:
                return call()
            except _BrokenError:
                time.sleep(wait_s)
            except _StatusError as error:
                if error.status not in _BUSY:
                    raise
                time.sleep(max(wait_s, error.wait_s))
        return call()

    def _stream(self, body: dict[str, Any], start: float) -> Stream:
        found = Stream()
        with self._said(), self._client.stream("POST", f"{self.url}/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                raise self._refused(answer)
            other = ""
            for line in answer.iter_lines():
                if not line.startswith("data:"):
                    other = (other + line)[:2000]
                elif not line.endswith("[DONE]"):
                    self._take(found, json.loads(line[len("data:") :]), time.perf_counter() - start)
            if not found.ended_s:
                raise WorkerError(f"{self.url}: sent no answer (status 200): {_reason(other) or 'nothing at all'}")
        found.close()
        return found

    def _refused(self, answer: httpx.Response) -> _StatusError:
        said = answer.read().decode(errors="replace")
        status, reason = answer.status_code, _reason(said)
        wait = answer.headers.get("retry-after", "")
        wait_s = min(float(wait), _LONGEST_WAIT_S) if wait.isdecimal() else 0.0
        what = "is busy" if status in _BUSY else "refused a request"
        hint = f"; {self._hint}".rstrip() if status == 404 and self._hint else ""
        message = f"{self.url}: {what} (status {status}): {reason or 'it says no more'}{hint}"
        return _StatusError(message, status=status, said=said, wait_s=wait_s)

    def _take(self, found: Stream, chunk: dict[str, Any], moment: float) -> None:
        try:
            if chunk.get("error") or chunk.get("object") == "error":
                raise self._broke_off(chunk)
            found.add(chunk, moment)
        except (AttributeError, TypeError) as error:
            raise WorkerError(f"{self.url}: sent what is no chunk of an answer: {str(chunk)[:200]}") from error

    def _broke_off(self, chunk: dict[str, Any]) -> WorkerError:
        """Return the error that a stream sent: SGLang reports a full queue there, after the answer's status."""
        error = chunk["error"] if isinstance(chunk.get("error"), dict) else chunk
        said, status = json.dumps(chunk), error.get("code")
        message = f"{self.url}: broke off: {_reason(said)}"
        return _StatusError(message, status=status, said=said) if isinstance(status, int) else WorkerError(message)

    @contextmanager
    def _said(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise InputError(f"{self.url}: not the address of an endpoint ({error})") from error
        except httpx.ConnectError as error:
            raise InputError(f"{self.url}: nothing answers there ({error}); is the server up?") from error
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
            raise _BrokenError(f"{self.url}: {_named(error)}; the server's log may say why") from error
        except (httpx.HTTPError, ValueError) as error:
            raise WorkerError(f"{self.url}: {_named(error)}; the server's log may say why") from error


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _json_of(answer: httpx.Response) -> Any:
    try:
        return answer.json()
    except ValueError:  # a page of another kind
        return None


def _cards_of(answer: httpx.Response) -> list[dict[str, Any]]:
    """Return the models that a server lists; none where it sent another page."""
    said = _json_of(answer)
    cards = said.get("data") if isinstance(said, dict) else None
    return [card for card in cards if isinstance(card, dict) and card.get("id")] if isinstance(cards, list) else []


def _is_sglang(cards: Sequence[dict[str, Any]]) -> bool:
    return any(card.get("owned_by") == "sglang" for card in cards)


def _name_for_sglang(name: str, cards: Sequence[dict[str, Any]], url: str) -> str:
    """Return a model's name for SGLang, BASE:ADAPTER for an adapter: to other names it answers by its base."""
    parents = {str(card["id"]): card.get("parent") for card in cards}
    base, _, adapter = name.rpartition(":")
    if name not in parents and not (base in parents and adapter in parents):
        raise InputError(
            f"{url}: serves no model {name!r}, only {', '.join(parents)}; SGLang would answer all the same"
        )
    return f"{parents[name]}:{name}" if parents.get(name) else name


def _reason(text: str) -> str:
    """Return the message of a refusal, or its beginning, on one line."""
    try:
        said: Any = json.loads(text)
    except ValueError:
        said = text
    while isinstance(said, dict):
        said = next((said[key] for key in ("error", "message", "detail") if said.get(key)), str(said))
    return " ".join(str(said).split())[:400]


def _messages(request: Request, *, with_uuids: bool) -> list[dict[str, Any]]:
    images = iter(request.images)
    messages = []
    for message in image_messages(request):
        parts = [
            _image_part(next(images), with_uuid=with_uuids) if part["type"] == "image" else part
            for part in message["content"]
        ]
        is_text = all(part["type"] == "text" for part in parts)
        content: Any = "".join(str(part["text"]) for part in parts) if is_text else parts
        messages.append({**message, "content": content})
    return messages


def _image_part(image: Image, *, with_uuid: bool) -> dict[str, Any]:
    part: dict[str, Any] = {"type": "image_url", "image_url": {"url": _data_url(image)}}
    # vLLM keeps what it made of an image for whoever sends it again: the second arm of a round on the same server.
    return part | {"uuid": uuid.uuid4().hex} if with_uuid else part


def _data_url(image: Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
