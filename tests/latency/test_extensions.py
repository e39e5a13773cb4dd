"""What a server is asked for: each extension by itself, and what only looks like a refusal."""

from __future__ import annotations

import json
import socket
import struct
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.latency.engines import endpoint
from grpo_toolkit.latency.engines.endpoint import EndpointEngine
from grpo_toolkit.latency.engines.endpoint_extensions import find_extensions, with_extensions
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.model.generation.request import Request

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.latency.engines.protocol import Answer

ALL = {
    "return_token_ids",
    "return_output_ids_in_sglext",
    "stream_options.include_usage",
    "stream_options.continuous_usage_stats",
    "cache_salt",
    "repetition_penalty",
    "min_tokens",
}
UNSAID = ALL - {"return_token_ids"}
"""What is sent to a server that does not name its tokens while it streams them."""

GENERATION_CONFIG = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False, "repetition_penalty": 1.0}


def keys_of(body: dict[str, Any]) -> set[str]:
    inner = {f"stream_options.{key}" for key in body.get("stream_options", {})}
    return (set(body) | inner) - {"model", "messages", "max_tokens", "stream", "temperature", "stream_options"}


class Choosy(BaseHTTPRequestHandler):
    """Refuses keys in one of several styles, after `trouble` that passes; answers with as many pieces as asked for."""

    refused: ClassVar[set[str]] = set()
    style: ClassVar[str] = "one"
    trouble: ClassVar[list[int | str]] = []
    resets: ClassVar[list[str]] = []
    models: ClassVar[list[dict[str, Any]]] = [{"id": "m"}]
    token_ids: ClassVar[bool] = False
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_GET(self) -> None:
        is_list = self.path.endswith("/models")
        if self.resets:
            self.resets.pop()
            self._reset()
            return
        self._send(200 if is_list else 404, json.dumps({"data": self.models} if is_list else {"detail": "Not Found"}))

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.asked.append(asked)
        trouble = self.trouble.pop(0) if self.trouble else None
        refused = sorted((keys_of(asked) | {"messages"}) & self.refused)
        if trouble == "reset":
            self._reset()
        elif trouble == "in the stream":
            error = {"object": "error", "message": "The request queue is full.", "code": 503}
            self._send(200, f"data: {json.dumps({'error': error})}\n\n")
        elif trouble is not None:
            self._send(int(trouble), json.dumps({"error": {"message": "later"}}), {"retry-after": "3"})
        elif refused:
            self._send(422 if self.style == "all" else 400, json.dumps({"detail": self._refusal(refused, asked)}))
        else:
            piece: dict[str, Any] = {"delta": {"content": "x"}} | ({"token_ids": [1]} if self.token_ids else {})
            chunks = [{"choices": [piece]}] * asked["max_tokens"]
            usage = {"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}}
            self._send(200, "".join(f"data: {json.dumps(one)}\n\n" for one in [*chunks, usage]) + "data: [DONE]\n\n")

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def _refusal(self, refused: list[str], asked: dict[str, Any]) -> str:
        leaves = [key.rpartition(".")[2] for key in refused]
        return {
            "one": f"{leaves[0]} is not supported",
            "all": f"Unexpected fields in the request: {leaves}",
            "none": "bad request",
            "echo": f"1 validation error for {leaves[0]}: 'input': {asked}",
        }[self.style]

    def _send(self, status: int, text: str, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in ({"content-type": "application/json"} | (headers or {})).items():
            self.send_header(name, value)
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@contextmanager
def choosy(**attributes: Any) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Its address, and what it has been asked so far."""
    asked: list[dict[str, Any]] = []
    handler = type("Handler", (Choosy,), attributes | {"asked": asked})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", asked
        server.shutdown()


def ask(url: str, *, exact: bool = True, sample: bool = False, model: str | None = None) -> Answer:
    with EndpointEngine(url, model=model, timeout_s=20) as engine:
        request = Request(messages=[{"role": "user", "content": "?"}], max_new_tokens=2, exact=exact)
        return engine.ask([request], Options(sample=sample))


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(endpoint.time, "sleep", found.append)
    return found


@pytest.mark.parametrize("style", ["one", "all", "none", "echo"])
@pytest.mark.parametrize(
    ("refused", "sent"),
    [
        (set(), ALL),
        ({"return_token_ids"}, UNSAID),
        ({"cache_salt"}, ALL - {"cache_salt"}),
        ({"repetition_penalty"}, ALL - {"repetition_penalty"}),
        ({"stream_options.continuous_usage_stats"}, ALL - {"stream_options.continuous_usage_stats"}),
        ({"return_token_ids", "cache_salt"}, ALL - {"return_token_ids", "cache_salt"}),
        ({"min_tokens"}, ALL - {"min_tokens"} | {"generation_config"}),
        (ALL | {"generation_config"}, set()),
    ],
)
def test_a_server_is_asked_without_the_keys_that_it_refuses_and_with_all_others(
    refused: set[str], sent: set[str], style: str
) -> None:
    with choosy(refused=refused, style=style) as (url, asked):
        assert ask(url).timeline.output_lengths == [2]
    assert keys_of(asked[-1]) == sent
    assert len(asked) <= 1 + 2 + 8  # the timed one, two at once, each key by itself


def test_a_server_that_takes_everything_is_asked_once() -> None:
    with choosy() as (url, asked):
        ask(url)
    assert [body["max_tokens"] for body in asked] == [1, 2]


def test_a_server_that_names_its_tokens_is_not_asked_to_count_them() -> None:
    with choosy(token_ids=True) as (url, asked):
        assert ask(url).tokens == [[1, 1]]
    assert keys_of(asked[-1]) == ALL - {"return_output_ids_in_sglext", "stream_options.continuous_usage_stats"}


@pytest.mark.parametrize("style", ["one", "none"])
def test_a_server_that_refuses_the_request_itself_says_so_once(style: str) -> None:
    message = {"one": "messages is not supported", "none": "bad request"}[style]
    with choosy(refused={"messages"}, style=style) as (url, asked):
        with pytest.raises(WorkerError, match=rf"refused a request \(status 400\): {message}$"):
            ask(url)
        assert [keys_of(body) for body in asked] == [ALL, set()]


@pytest.mark.parametrize("status", [401, 404, 500])
def test_what_is_no_refusal_of_keys_is_no_reason_to_leave_any_out(status: int) -> None:
    with choosy(trouble=[status]) as (url, asked):
        with pytest.raises(WorkerError, match=rf"refused a request \(status {status}\): later$"):
            ask(url)
        assert len(asked) == 1


@pytest.mark.parametrize(
    ("trouble", "waited"),
    [
        ([429], [3.0]),
        ([503, 429, 502, 503], [3.0, 3.0, 3.0, 4.0]),
        (["reset", "reset"], [0.5, 1.0]),
        (["in the stream"], [0.5]),
    ],
)
def test_a_server_that_is_busy_is_asked_again_and_loses_no_key(
    trouble: list[int | str], waited: list[float], waits: list[float]
) -> None:
    with choosy(trouble=list(trouble)) as (url, asked):
        ask(url)
    assert waits == waited
    assert all(keys_of(body) == ALL for body in asked)
    assert len(asked) == len(trouble) + 2


def test_an_address_without_its_version_says_which_it_may_be() -> None:
    with choosy(trouble=[404]) as (url, _):
        root = url.removesuffix("/v1")
        with EndpointEngine(root, model="m") as engine:
            assert engine.facts().environment == {"hardware": f"endpoint {root}"}
        with pytest.raises(WorkerError, match=rf"refused a request \(status 404\): later; is it {url}\?$"):
            ask(root, model="m")


def test_a_list_of_models_is_asked_for_again_where_the_connection_breaks(waits: list[float]) -> None:
    with choosy(resets=["once", "twice"]) as (url, asked):
        ask(url)
        assert {body["model"] for body in asked} == {"m"}
    assert waits == [0.0, 0.5]


def test_a_server_that_stays_busy_is_one_line(waits: list[float]) -> None:
    with choosy(trouble=[429] * 9) as (url, asked):
        with pytest.raises(WorkerError, match=r"is busy \(status 429\): later$"):
            ask(url)
        assert len(asked) == 5
    assert waits == [3.0, 3.0, 3.0, 4.0]


def test_what_is_sent_is_what_the_request_needs() -> None:
    body = {"max_tokens": 2}
    taken = frozenset(ALL)
    natural = with_extensions(body, taken, exact=False, greedy=True)
    assert keys_of(natural) == ALL - {"min_tokens"}
    assert natural["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert natural["repetition_penalty"] == 1.0
    sampled = with_extensions(body, taken, exact=True, greedy=False)
    assert keys_of(sampled) == ALL - {"repetition_penalty"}
    assert sampled["min_tokens"] == 2
    assert sampled["cache_salt"] != natural["cache_salt"]
    whole = with_extensions(body, frozenset({"generation_config"}), exact=True, greedy=True)
    assert json.loads(whole["generation_config"]) == GENERATION_CONFIG
    plain = with_extensions(body, frozenset({"generation_config"}), exact=False, greedy=False)
    assert plain == body == {"max_tokens": 2}


def test_keys_are_offered_by_themselves_only_once() -> None:
    asked: list[frozenset[str]] = []

    def refusal(keys: frozenset[str]) -> str | None:
        asked.append(keys)
        return "return_token_ids is not supported with streaming" if "return_token_ids" in keys else None

    assert find_extensions(refusal) == UNSAID
    assert asked == [ALL, UNSAID]


SGLANG = [
    {"id": "base", "owned_by": "sglang", "parent": None},
    {"id": "tuned", "owned_by": "sglang", "parent": "base"},
]


@pytest.mark.parametrize(
    ("name", "called"), [(None, "base"), ("base", "base"), ("tuned", "base:tuned"), ("base:tuned", "base:tuned")]
)
def test_an_adapter_of_sglang_is_called_by_its_base(name: str | None, called: str) -> None:
    with choosy(models=SGLANG) as (url, asked):
        ask(url, model=name)
    assert {body["model"] for body in asked} == {called}


@pytest.mark.parametrize("name", ["other", "base:other", "other:tuned"])
def test_a_name_that_sglang_would_answer_to_by_its_base_is_refused(name: str) -> None:
    with choosy(models=SGLANG) as (url, asked):
        with pytest.raises(InputError, match=f"serves no model '{name}', only base, tuned"):
            ask(url, model=name)
        assert asked == []


def test_another_server_may_know_models_that_it_does_not_list() -> None:
    with choosy() as (url, asked):
        ask(url, model="other")
    assert asked[-1]["model"] == "other"
