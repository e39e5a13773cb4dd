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
from itertools import chain
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, ClassVar

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.errors import InputError, WorkerError
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.bench.workload import made_up
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.endpoint import EndpointEngine
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.latency.rows.timeline import AT_ONCE_S
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.load import load_model, load_processor
from scripts.benchmarks.ports import free_port

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
    assert sorted(chain.from_iterable(timeline.streams_s)) == timeline.token_times_s
    tpots_s = [(times[-1] - times[0]) / 8 for times in timeline.streams_s]
    seen = [tpot for tpot in tpots_s if tpot > AT_ONCE_S]  # busy cores may hold an answer back
    assert timeline.tpot_s == (pytest.approx(median(seen)) if seen else None)


@needs_serve
def test_a_natural_request_says_what_the_folder_says(engine: EndpointEngine, qwen: Path) -> None:
    request = Request(messages=[{"role": "user", "content": "What is this?"}], max_new_tokens=12)
    answer = engine.ask([request], Options())
    assert answer.timeline.output_tokens <= 12
    assert answer.timeline.is_capped is (answer.timeline.output_tokens == 12)
    assert engine.prove([request], Options()) is None
    assert engine.probe_hardware() == {}


@needs_serve
@pytest.mark.parametrize("exact", [True, False])
def test_a_server_is_greedy_with_every_penalty_off(engine: EndpointEngine, qwen: Path, exact: bool) -> None:
    request = Request(messages=[{"role": "user", "content": "What is this?"}], max_new_tokens=64, exact=exact)
    model, processor, _ = load_model(qwen)
    assert model.generation_config.repetition_penalty == 1.05
    tokens = generate(model, processor, request).tokens
    assert engine.ask([request], Options()).texts == [processor.decode(tokens, skip_special_tokens=True)]


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
    (error,) = capsys.readouterr().err.splitlines()
    assert "refused a request (status 400)" in error


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("http://127.0.0.1:9/v1", "nothing answers there"),
        ("ftp://somewhere", "not the address of an endpoint"),
        ("http://a:b/v1", "not the address of an endpoint"),
        ("http:///v1", "not the address of an endpoint"),
    ],
)
def test_an_address_where_nothing_is(address: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        EndpointEngine(address)


def chunk(text: str, token: int | None = None) -> dict[str, Any]:
    return {"choices": [{"delta": {"content": text}} | ({} if token is None else {"token_ids": [token]})]}


def stream(*chunks: object) -> str:
    return "".join(f"data: {json.dumps(one)}\n\n" for one in chunks) + "data: [DONE]\n\n"


class Strange(BaseHTTPRequestHandler):
    """A server that answers with the page of `PAGES` that the first part of the path names."""

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
        assert asked["stream"] is True
        self._send(200, self.PAGES[name])

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
        assert "server_version" not in engine.facts().environment
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


@pytest.mark.parametrize("page", ["page", "list", "ids"])
def test_a_list_of_models_that_is_none(strange: str, page: str) -> None:
    with pytest.raises(InputError, match=r"lists no model \(status 200\)"):
        EndpointEngine(f"{strange}/{page}/v1")
