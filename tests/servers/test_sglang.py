"""Exports of ours in a real SGLang, and the endpoint engine against it. Needs SGLang (no GPU: see sglang_on_cpu)."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.errors import WorkerError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.bench.workload import made_up
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.endpoint import EndpointEngine
from grpo_toolkit.latency.engines.endpoint_stream import answer_of
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.load import load_model, load_processor
from scripts.benchmarks.ports import free_port
from tests.support.model_servers import build_adapter, model_server
from tests.support.models import build_qwen2_5_vl

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("sglang") is None, reason="needs SGLang"),
    pytest.mark.timeout(900),
]
LANGUAGE_MODULES = ["q_proj", "v_proj"]
"""Names that no module of the vision tower has; SGLang wants names, not a pattern."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_qwen2_5_vl(tmp_path_factory.mktemp("sglang") / "base", head_dim=32)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return build_adapter(base, LANGUAGE_MODULES)


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path) -> Path:
    """The export of the adapter."""
    folder = base.with_name("merged")
    export_model(adapter, folder, base=base)
    return folder


def sglang_server(folder: Path, *flags: str) -> AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]:
    import torch

    port = free_port()
    launch = (
        ["-m", "sglang.launch_server"]
        if torch.cuda.is_available()
        else [str(Path(__file__).with_name("sglang_on_cpu.py"))]
    )
    command = [sys.executable, *launch, "--model-path", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--dtype", "float32", "--disable-cuda-graph", "--context-length", "1024", "--enable-cache-report"]
    return model_server([*command, *flags], port=port, log=folder.with_name(f"{port}.log"), is_asked_to_end=False)


@pytest.fixture(scope="module")
def served(merged: Path) -> Iterator[str]:
    with sglang_server(merged) as (url, _):
        yield url


@pytest.fixture(scope="module")
def engine(served: str) -> Iterator[EndpointEngine]:
    with EndpointEngine(served) as found:
        yield found


@pytest.fixture(params=["text", "image"])
def question(request: pytest.FixtureRequest, image_request: Request) -> Request:
    images = image_request.images if request.param == "image" else []
    return replace(image_request, images=images, max_new_tokens=24)


@pytest.mark.parametrize("image_tokens", [None, 16])
@pytest.mark.parametrize("size", [1, 2])
def test_a_fixed_request_has_exactly_as_many_tokens(
    engine: EndpointEngine, merged: Path, image_tokens: int | None, size: int
) -> None:
    processor = load_processor(merged)
    traffic = made_up(processor, prompt_tokens=240, image_tokens=image_tokens, max_new_tokens=9, batch_size=size)
    answer = engine.ask(traffic.batch(0), Options())
    # The server counts the prompt as we did, its image included, and counts and names the tokens that it sent.
    assert answer.timeline.prompt_tokens == 240
    assert answer.timeline.output_lengths == [9] * size
    assert [len(tokens) for tokens in answer.tokens] == [9] * size
    assert [len(times) for times in answer.timeline.streams_s] == [9] * size
    assert answer.timeline.token_times_s == sorted(answer.timeline.token_times_s)
    assert answer.timeline.is_capped is True


@pytest.mark.parametrize("exact", [True, False])
def test_an_export_says_the_same_in_sglang_as_in_transformers(
    engine: EndpointEngine, merged: Path, question: Request, exact: bool
) -> None:
    asked = replace(question, exact=exact)
    model, processor, _ = load_model(merged)
    expected = generate(model, processor, asked)
    answer = engine.ask([asked], Options())
    assert answer.tokens == [expected.tokens]
    assert answer.timeline.prompt_tokens == expected.prompt_tokens


@pytest.mark.parametrize("compat", ["all", "v5"])
def test_an_export_of_a_base_that_transformers_5_wrote_says_the_same(
    base: Path, tmp_path: Path, image_request: Request, compat: str
) -> None:
    written, export = tmp_path / "written", tmp_path / "export"
    model, processor, _ = load_model(base)
    model.save_pretrained(written)
    processor.save_pretrained(written)
    export_model(written, export, compat=compat)
    questions = [replace(image_request, images=images, max_new_tokens=24) for images in ((), image_request.images)]
    with sglang_server(export) as (url, _), EndpointEngine(url) as engine:
        for question in questions:
            expected = generate(model, processor, question).tokens
            assert engine.ask([question], Options()).tokens == [expected]


def test_sglang_decodes_by_the_generation_config_of_the_export(engine: EndpointEngine, question: Request) -> None:
    """Its penalty of 1.05 is on where a request asks for temperature 0 alone, or for nothing."""
    asked = replace(question, max_new_tokens=64, exact=True)
    greedy, as_configured = (engine.ask([asked], Options(sample=sample)).tokens for sample in (False, True))
    body = engine._body(asked, Options())
    assert (body.pop("temperature"), body.pop("repetition_penalty")) == (0.0, 1.0)
    cold = engine._stream(body | {"temperature": 0.0}, 0.0)
    assert [cold.all_tokens] == as_configured != greedy


def test_no_request_is_answered_from_what_another_left_in_the_cache(engine: EndpointEngine, question: Request) -> None:
    """SGLang keeps every prompt; the salt of each request keeps it from being found."""

    def cached(body: dict[str, Any]) -> int:
        answer = engine._client.post(f"{engine.url}/chat/completions", json=body | {"stream_options": None} | whole)
        return int((answer.json()["usage"]["prompt_tokens_details"] or {}).get("cached_tokens", 0))

    whole = {"stream": False}
    bodies = [engine._body(question, Options()) for _ in range(2)]
    assert [cached(body) for body in bodies] == [0, 0]
    plain = {key: value for key, value in bodies[0].items() if key != "cache_salt"}
    cached(plain)
    assert cached(plain) > 50  # but for its last token, the whole prompt


def test_an_end_of_sequence_has_its_time_although_it_is_no_text(engine: EndpointEngine, question: Request) -> None:
    said = engine.ask([question], Options()).tokens[0]
    ends = next(place for place in range(4, len(said)) if said[place] not in said[:place])
    body = engine._body(question, Options()) | {"stop_token_ids": [said[ends]]}
    answer = answer_of([engine._stream(body, 0.0)])
    assert answer.tokens == [said[: ends + 1]]
    assert answer.timeline.output_lengths == [ends + 1]
    assert len(answer.timeline.token_times_s) == ends + 1
    assert answer.timeline.is_capped is False


def test_a_prompt_that_asks_for_thoughts_is_as_long_as_in_transformers(served: str, merged: Path) -> None:
    import sglang

    traffic = made_up(load_processor(merged), kind="natural", image_tokens=16, max_new_tokens=6, thinking=True)
    arms = [Arm(name="folder", path=merged), Arm(name="server", url=served)]
    folder, server = measure_latency(arms, traffic, rounds=2, warmup=1, roofline=False)
    assert (folder.settings.engine, server.settings.engine) == ("transformers", "openai")
    assert folder.workload.prompt_tokens == server.workload.prompt_tokens > 100
    assert server.environment == {"hardware": f"endpoint {served}", "server_version": sglang.__version__}
    assert server.proof.is_cached is None


def test_bench_of_a_folder_and_its_server(served: str, merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--new-tokens", "3", "--max-new-tokens", "4", "--rounds", "1", "--prompt-tokens", "200", "--json"]
    assert main(["bench", f"folder={merged}", f"sglang={served}", "--image-tokens", "16", *flags]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = [(row["arm"], row["workload"]["name"], row["workload"]["prompt_tokens"]) for row in rows]
    names = ["fixed", "natural", "natural_thinking"]
    assert [(arm, name) for arm, name, _ in found] == [(arm, name) for name in names for arm in ("folder", "sglang")]
    assert found[0][2] == found[1][2] == 200
    assert [row["tokens"]["output"]["median"] for row in rows[:2]] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("#nobody/nothing", [], "serves no model 'nobody/nothing', only "),
        ("", ["--max-new-tokens", "4000"], "refused a request (status 400): "),
    ],
)
def test_what_sglang_refuses_is_one_line(
    served: str, model: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", served + model, "--workload", "natural", "--rounds", "1", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_adapter_beside_its_base_says_what_its_export_says(
    base: Path, adapter: Path, merged: Path, image_request: Request
) -> None:
    """By its name alone, as SGLang lists it, it would be the base that answers."""
    model, processor, _ = load_model(merged)
    questions = [replace(image_request, images=images, max_new_tokens=24) for images in ((), image_request.images)]
    lora = ["--enable-lora", "--max-lora-rank", "8", "--lora-target-modules", *LANGUAGE_MODULES]
    lora += ["--lora-paths", f"tuned={adapter}", "--lora-backend", "torch_native"]
    with sglang_server(base, *lora) as (url, _):
        tuned, plain = (EndpointEngine(url, model=name) for name in ("tuned", str(base)))
        for question in questions:
            expected = generate(model, processor, question).tokens
            said = plain.ask([question], Options()).tokens
            assert tuned.ask([question], Options()).tokens == [expected]
            assert [plain._stream(plain._body(question, Options()) | {"model": "tuned"}, 0.0).all_tokens] == said
            assert said != [expected]


def test_a_server_that_dies_is_one_line(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(messages=[{"role": "user", "content": "What is this?"}], max_new_tokens=900, exact=True)
    with sglang_server(merged) as (url, server), EndpointEngine(url) as engine:
        engine.ask([replace(request, max_new_tokens=1)], Options())
        stream = engine._client.stream

        @contextmanager
        def and_kill(*args: Any, **kwargs: Any) -> Iterator[Any]:
            with stream(*args, **kwargs) as answer:  # its status is here, its tokens are not
                os.killpg(server.pid, signal.SIGKILL)
                yield answer

        monkeypatch.setattr(engine._client, "stream", and_kill)
        with pytest.raises(WorkerError, match=r"peer closed connection.*; the server's log may say why") as found:
            engine.ask([request], Options())
        assert "\n" not in str(found.value)
