"""The endpoint engine against a real `transformers serve`, and what it says when there is none."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.inference import Request, load_processor
from grpo_toolkit.latency.arms import Arm
from grpo_toolkit.latency.engines.endpoint import EndpointEngine
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.measure import _paces, measure_latency
from grpo_toolkit.latency.row import AT_ONCE_S, Timeline
from grpo_toolkit.latency.workload import made_up
from ports import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

TRANSFORMERS = Path(sys.executable).with_name("transformers")
needs_serve = pytest.mark.skipif(
    not TRANSFORMERS.exists() or any(importlib.util.find_spec(name) is None for name in ("fastapi", "uvicorn")),
    reason="needs transformers serve",
)


@pytest.fixture(scope="module")
def served(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server of the tiny model."""
    import httpx

    port, log = free_port(), tmp_path_factory.mktemp("serve") / "log"
    command = [str(TRANSFORMERS), "serve", str(qwen), "--port", str(port), "--host", "127.0.0.1", "--device", "cpu"]
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=dict(os.environ))
        try:
            for _ in range(240):
                time.sleep(0.5)
                assert server.poll() is None, log.read_text()[-2000:]
                try:
                    httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False)
                except httpx.TransportError:
                    continue
                break
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def engine(served: str, qwen: Path) -> Iterator[EndpointEngine]:
    with EndpointEngine(served, model=str(qwen)) as found:
        yield found


@needs_serve
@pytest.mark.parametrize("image_tokens", [None, 16])
@pytest.mark.parametrize("size", [1, 2])
def test_a_fixed_request_has_exactly_as_many_tokens(
    engine: EndpointEngine, qwen: Path, image_tokens: int | None, size: int
) -> None:
    traffic = made_up(
        load_processor(qwen), prompt_tokens=240, image_tokens=image_tokens, max_new_tokens=9, batch_size=size
    )
    timeline = engine.ask(traffic.batch(0), Options()).timeline
    # The server counts the prompt as we did, its image included.
    assert timeline.prompt_tokens == 240
    assert timeline.output_lengths == [9] * size
    assert timeline.token_times_s == sorted(timeline.token_times_s)
    assert 0 < timeline.ttft_s < timeline.e2e_s
    tpot_s = (timeline.token_times_s[-1] - timeline.token_times_s[0]) / 8
    assert timeline.tpot_s == (pytest.approx(tpot_s) if tpot_s > AT_ONCE_S else None)  # busy cores may hold it back


@needs_serve
def test_a_natural_request_says_what_the_folder_says(engine: EndpointEngine, qwen: Path) -> None:
    request = Request(messages=[{"role": "user", "content": "What is this?"}], max_new_tokens=12)
    answer = engine.ask([request], Options())
    assert answer.timeline.output_tokens <= 12
    assert answer.timeline.is_capped is (answer.timeline.output_tokens == 12)
    assert engine.prove([request], Options()) is None
    assert engine.probe_hardware() == {}


@needs_serve
def test_a_folder_and_its_server_take_turns(served: str, qwen: Path) -> None:
    arms = [Arm(name="folder", path=qwen), Arm(name="server", url=served, path=qwen)]
    request = Request(messages=[{"role": "user", "content": "What is this?"}])
    folder, server = measure_latency(arms, [request], new_tokens=6, rounds=2, warmup=1, roofline=True)
    assert (folder.settings.engine, server.settings.engine) == ("transformers", "openai")
    assert folder.workload.prompt_tokens == server.workload.prompt_tokens
    assert server.proof.is_cached is None
    assert server.memory.peak_bytes is None
    assert server.roofline is None
    assert server.environment == {"hardware": f"endpoint {served}"}
    assert folder.roofline is not None


@needs_serve
def test_bench_of_an_endpoint(served: str, qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workload", "fixed", "--new-tokens", "3", "--rounds", "1", "--prompt-tokens", "200", "--json"]
    assert main(["bench", f"server={served}#{qwen}", *flags]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["arm"], row["settings"]["engine"], row["tokens"]["output"]["median"]) == ("server", "openai", 3.0)


@needs_serve
def test_a_model_that_the_server_does_not_have_is_one_line(served: str, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--workload", "fixed", "--new-tokens", "3", "--rounds", "1"]
    assert main(["bench", f"{served}#nobody/nothing", *flags]) == 2
    error = capsys.readouterr().err
    assert "refused a request (status 400)" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:9/v1", "nothing answers there"),
        ("ftp://somewhere", "not the address of an endpoint"),
        ("http://a:b/v1", "not the address of an endpoint"),
    ],
)
def test_an_address_where_nothing_is(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EndpointEngine(address)


def test_what_a_server_streams_becomes_a_timeline() -> None:
    """The pieces of vLLM with a reasoning parser, and of one that sends the markers as text."""
    from grpo_toolkit.latency.engines.endpoint import _answer, _Stream

    def taken(deltas: list[dict[str, Any]], usage: dict[str, int]) -> Any:
        engine = EndpointEngine("http://127.0.0.1:9/v1", model="m")
        stream = _Stream()
        for moment, delta in enumerate(deltas, start=1):
            engine._take(stream, {"choices": [{"delta": delta}]}, moment / 10)
        engine._take(stream, {"choices": [{"delta": {}, "finish_reason": "stop"}]}, 0.9)
        engine._take(stream, {"choices": [], "usage": usage}, 1.0)
        engine.close()
        return _answer([stream]).timeline

    usage = {"prompt_tokens": 7, "completion_tokens": 4}
    role = {"role": "assistant", "content": ""}
    parsed = taken(
        [role, {"reasoning_content": "a"}, {"reasoning_content": "b"}, {"content": "4"}, {"content": "."}], usage
    )
    assert (parsed.think_tokens, parsed.answer_tokens, parsed.first_answer_s) == (2, 2, 0.4)
    assert parsed.token_times_s == [0.2, 0.3, 0.4, 0.5]
    assert (parsed.prompt_tokens, parsed.output_tokens, parsed.is_capped) == (7, 4, False)
    marked = taken([{"content": piece} for piece in ("<think>", "</think>", "4", ".")], usage)
    assert (marked.think_tokens, marked.answer_tokens, marked.first_answer_s) == (2, 2, 0.3)
    # Fewer pieces than tokens: the time is known, the counts are not.
    merged = taken([{"content": "<think></think>"}, {"content": "4."}], usage)
    assert (merged.think_tokens, merged.answer_tokens, merged.first_answer_s) == (None, None, 0.2)
    assert merged.tpot_s == pytest.approx(0.1 / 3)


def test_every_token_that_a_server_names_has_its_time() -> None:
    """With `return_token_ids`: half a character, several tokens at once, a marker that the parser took out."""
    from grpo_toolkit.latency.engines.endpoint import _answer, _Stream

    def taken(pieces: list[tuple[dict[str, str], list[int]]]) -> Any:
        engine = EndpointEngine("http://127.0.0.1:9/v1", model="m")
        stream = _Stream()
        for moment, (delta, tokens) in enumerate(pieces, start=1):
            engine._take(stream, {"choices": [{"delta": delta, "token_ids": tokens}]}, moment / 10)
        engine.close()
        return _answer([stream])

    halves = taken([({"content": ""}, [100]), ({"content": "é"}, [8]), ({"content": " ab"}, [1, 2])])
    assert halves.tokens == [[100, 8, 1, 2]]
    assert halves.timeline.token_times_s == [0.1, 0.2, 0.3, 0.3]
    assert halves.timeline.output_lengths == [4]
    assert (halves.timeline.think_tokens, halves.texts) == (None, ["é ab"])
    parsed = taken([({}, [7]), ({"reasoning": "a"}, [1]), ({}, [9]), ({"content": "4"}, [2]), ({"content": "."}, [3])])
    assert (parsed.timeline.think_tokens, parsed.timeline.answer_tokens) == (3, 2)
    assert parsed.timeline.first_answer_s == 0.4


def test_an_answer_that_arrives_at_once_has_no_time_per_token() -> None:
    from grpo_toolkit.latency.compare import ratios

    held_back = Timeline(token_times_s=[0.5, 0.50001, 0.50002], prompt_tokens=4, output_tokens=3)
    assert held_back.tpot_s is None
    assert held_back.e2e_s == 0.50002
    streamed = Timeline(token_times_s=[0.1, 0.1003, 0.1006], prompt_tokens=4, output_tokens=3)
    assert streamed.tpot_s == pytest.approx(3e-4)

    def row(timeline: Timeline) -> Any:
        return SimpleNamespace(arm="a", timelines=[timeline] * 6)

    assert [ratio.metric for ratio in ratios(row(held_back), row(streamed))] == ["ttft_s", "e2e_s"]
    # Rounds go on until two arms are known well in the same unit of time.
    assert _paces([[streamed], [held_back]]) == [[0.1006], [0.50002]]
    assert _paces([[streamed], [streamed]]) == [[pytest.approx(3e-4)]] * 2


def chunk(text: str, token: int | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}} | ({} if token is None else {"token_ids": [token]})]}


def stream(*chunks: object) -> str:
    return "".join(f"data: {json.dumps(one)}\n\n" for one in chunks) + "data: [DONE]\n\n"


class Strange(BaseHTTPRequestHandler):
    """Answers as the first part of the path says: with a page of `PAGES`, or refusing the keys that it names."""

    PAGES: ClassVar[dict[str, str]] = {
        "error": '{"error": {"message": "out of\\nluck"}}',
        "page": "<html>welcome</html>",
        "nothing": "",
        "done": stream(),
        "null": stream(None),
        "list": stream([1]),
        "choice": stream({"choices": [None]}),
        "delta": stream({"choices": [{"delta": "x"}]}),
        "parts": stream({"choices": [{"delta": {"content": [{"text": "x"}]}}]}),
        "ids": stream({"choices": [{"delta": {"content": "x"}, "token_ids": 3}]}),
        "usage": stream(chunk("x"), {"usage": {"completion_tokens": "many"}}),
        "late": stream(chunk("x"), {"object": "error", "message": "out of luck"}),
        "nulls": stream({"error": None, "usage": None} | chunk("a", 1), chunk("b", 2)),
        "gaps": stream(chunk("a", 1), chunk("b"), {"choices": [], "usage": {"completion_tokens": 2}}),
    }

    def do_GET(self) -> None:
        name = self.path.split("/")[1]
        models = {"page": self.PAGES["page"], "list": "[1]", "ids": '{"data": [{}]}'}
        self._send(200, models.get(name, '{"data": [{"id": "m"}]}') if self.path.endswith("models") else "[1]")

    def do_POST(self) -> None:
        name = self.path.split("/")[1]
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        refused = [key for key in name.split("+") if key in asked]
        if refused:
            self._send(400, json.dumps({"error": {"message": f"what is {refused[0]}?"}}))
        elif name in self.PAGES:
            self._send(200, self.PAGES[name])
        else:
            usage = {"choices": [], "usage": {"completion_tokens": asked["max_tokens"]}}
            self._send(200, stream(*[chunk("x")] * asked["max_tokens"], usage))

    def _send(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def strange() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Strange) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def ask(url: str, *, exact: bool = False) -> Any:
    with EndpointEngine(f"{url}/v1", model="m", timeout_s=20) as engine:
        assert engine.facts().environment["server_version"] == ""
        messages = [{"role": "user", "content": "?"}]
        return engine.ask([Request(messages=messages, max_new_tokens=2, exact=exact)], Options())


@pytest.mark.parametrize(
    ("page", "message"),
    [
        ("error", "sent no answer (status 200): out of luck"),
        ("page", "sent no answer (status 200): <html>welcome</html>"),
        ("nothing", "sent no answer (status 200): nothing at all"),
        ("done", "sent no answer (status 200): nothing at all"),
        ("null", "sent what is no chunk of an answer: None"),
        ("list", "sent what is no chunk of an answer: [1]"),
        ("choice", "sent what is no chunk of an answer: {'choices': [None]}"),
        ("delta", "sent what is no chunk of an answer: {'choices': [{'delta': 'x'}]}"),
        ("parts", "sent what is no chunk of an answer: {'choices': [{'delta': {'content': [{'text': 'x'}]}}]}"),
        ("ids", "'token_ids': 3}]}"),
        ("usage", "'many'"),
        ("late", "broke off: out of luck"),
    ],
)
def test_a_strange_answer_is_one_line(strange: str, page: str, message: str) -> None:
    with pytest.raises(WorkerError) as found:
        ask(f"{strange}/{page}")
    assert message in str(found.value)
    assert "\n" not in str(found.value)


def test_what_is_null_or_missing_in_a_chunk_is_no_error(strange: str) -> None:
    nulls = ask(f"{strange}/nulls")
    assert (nulls.tokens, nulls.timeline.output_lengths, nulls.texts) == ([[1, 2]], [2], ["ab"])
    gaps = ask(f"{strange}/gaps")
    assert (gaps.tokens, gaps.timeline.output_lengths, gaps.texts) == ([], [2], ["ab"])


VLLM_ONLY = "return_token_ids+cache_salt"


@pytest.mark.parametrize(
    "refused",
    ["return_token_ids", "cache_salt", VLLM_ONLY, "repetition_penalty", f"{VLLM_ONLY}+min_tokens+generation_config"],
)
def test_a_server_that_refuses_keys_is_asked_without_them(strange: str, refused: str) -> None:
    assert ask(f"{strange}/{refused}", exact=True).timeline.output_lengths == [2]


def test_a_server_that_refuses_everything_says_so_once(strange: str) -> None:
    with pytest.raises(WorkerError, match=r"refused a request \(status 400\): what is model\?$"):
        ask(f"{strange}/model")


@pytest.mark.parametrize("page", ["page", "list", "ids"])
def test_a_list_of_models_that_is_none(strange: str, page: str) -> None:
    with pytest.raises(InputError, match=r"lists no model \(status 200\)"):
        EndpointEngine(f"{strange}/{page}/v1")
