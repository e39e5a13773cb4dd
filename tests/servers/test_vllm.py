"""Exports of ours in a real vLLM, and the endpoint engine against it. Needs vLLM (`vllm-cpu` will do) beside us."""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.cli import main
from grpo_toolkit.errors import WorkerError
from grpo_toolkit.export.export import export_model
from grpo_toolkit.latency.bench.measure import measure_latency
from grpo_toolkit.latency.bench.workload import made_up
from grpo_toolkit.latency.engines.arms import Arm
from grpo_toolkit.latency.engines.endpoint import EndpointEngine, _messages
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.generation.request import Request, requests_from_rows
from grpo_toolkit.model.load import load_model, load_processor
from grpo_vlm.data.digits import load_digits_split
from scripts.benchmarks.ports import free_port
from scripts.models.tiny_vlm import ensure_tiny_vlm
from tests.support.model_servers import build_adapter, model_server
from tests.support.models import build_qwen2_5_vl
from tests.support.training import LANGUAGE_QV

if TYPE_CHECKING:
    from collections.abc import Iterator
    from contextlib import AbstractContextManager

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.timeout(900),
]
ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"}
NO_PENALTY = {"temperature": 0.0, "repetition_penalty": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base with heads of a size that vLLM's attention on CPUs takes."""
    return build_qwen2_5_vl(tmp_path_factory.mktemp("vllm") / "base", head_dim=32)


@pytest.fixture(scope="module")
def adapter(base: Path) -> Path:
    return build_adapter(base, LANGUAGE_QV)


@pytest.fixture(scope="module")
def merged(base: Path, adapter: Path) -> Path:
    """The export of the adapter."""
    folder = base.with_name("merged")
    export_model(adapter, folder, base=base)
    return folder


def vllm_server(
    folder: Path, *flags: str, dtype: str = "float32"
) -> AbstractContextManager[tuple[str, subprocess.Popen[bytes]]]:
    port = free_port()
    # Not `vllm serve`: that command looks for a distribution called vllm, and vllm-cpu 0.31 is called otherwise.
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), *flags]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", dtype, "--enforce-eager"]
    command += ["--max-model-len", "1024", "--max-num-seqs", "4"]
    log = folder.with_name(f"{port}.log")
    return model_server(command, port=port, log=log, settings=ON_A_CPU, is_asked_to_end=True)


@pytest.fixture(scope="module")
def served(merged: Path) -> Iterator[str]:
    with vllm_server(merged) as (url, _):
        yield url


@pytest.fixture(scope="module")
def engine(served: str) -> Iterator[EndpointEngine]:
    with EndpointEngine(served) as found:
        yield found


@pytest.fixture(params=["text", "image"])
def question(request: pytest.FixtureRequest, image_request: Request) -> Request:
    images = image_request.images if request.param == "image" else []
    return replace(image_request, images=images, max_new_tokens=24)


def test_no_image_is_answered_from_what_was_made_of_it_before(served: str, image_request: Request) -> None:
    """Two arms on one server ask the same in every round: the second would be spared the image."""
    import httpx

    def hits() -> float:
        lines = httpx.get(served.removesuffix("/v1") + "/metrics", trust_env=False).text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:mm_cache_hits_total{"))

    before = hits()
    for _ in range(2):
        with EndpointEngine(served) as arm:
            arm.ask([image_request], Options())
    assert hits() == before
    body = {"model": arm.model, "max_tokens": 1, "messages": _messages(image_request, with_uuids=False)}
    for _ in range(2):
        assert httpx.post(f"{served}/chat/completions", json=body, trust_env=False, timeout=60).status_code == 200
    assert hits() > before  # the fault


@pytest.mark.parametrize("image_tokens", [None, 16])
@pytest.mark.parametrize("size", [1, 2])
def test_a_fixed_request_has_exactly_as_many_tokens(
    engine: EndpointEngine, merged: Path, image_tokens: int | None, size: int
) -> None:
    processor = load_processor(merged)
    traffic = made_up(processor, prompt_tokens=240, image_tokens=image_tokens, max_new_tokens=9, batch_size=size)
    answer = engine.ask(traffic.batch(0), Options())
    # The server counts the prompt as we did, its image included, and says which tokens it sent.
    assert answer.timeline.prompt_tokens == 240
    assert answer.timeline.output_lengths == [9] * size
    assert [len(tokens) for tokens in answer.tokens] == [9] * size
    assert len(answer.timeline.token_times_s) == 9 * size
    assert answer.timeline.token_times_s == sorted(answer.timeline.token_times_s)
    assert answer.timeline.is_capped is True


@pytest.mark.parametrize("exact", [True, False])
def test_an_export_says_the_same_in_vllm_as_in_transformers(
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
    with vllm_server(export) as (url, _), EndpointEngine(url) as engine:
        for question in questions:
            expected = generate(model, processor, question).tokens
            assert engine.ask([question], Options()).tokens == [expected]


def test_fp8_is_computed_in_fp8_and_says_what_it_says_in_transformers(tmp_path: Path) -> None:
    """With a model that was trained: of random weights each way to round says other things."""
    rows = [dict(row) for row in load_digits_split("held_out", size=6)]
    fp8 = tmp_path / "fp8"
    export_model(ensure_tiny_vlm(), fp8, format="fp8", dtype="bfloat16", prompts=rows)
    model, processor, _ = load_model(fp8)
    questions = requests_from_rows(rows, limit=len(rows), max_new_tokens=24)
    expected = [generate(model, processor, question).tokens for question in questions]
    with vllm_server(fp8, dtype="bfloat16") as (url, _), EndpointEngine(url) as engine:
        assert [engine.ask([question], Options()).tokens[0] for question in questions] == expected
    [log] = tmp_path.glob("*.log")
    assert "for CompressedTensorsW8A8Fp8" in log.read_text()


def test_vllm_decodes_by_the_generation_config_of_the_export(engine: EndpointEngine, question: Request) -> None:
    """Its penalty of 1.05 is on where a request asks for temperature 0 alone, or for nothing."""
    asked = replace(question, max_new_tokens=64, exact=True)
    greedy, as_configured = (engine.ask([asked], Options(sample=sample)).tokens for sample in (False, True))
    body = engine._body(asked, Options())
    assert (body.pop("temperature"), body.pop("repetition_penalty")) == (0.0, 1.0)
    cold = engine._stream(body | {"temperature": 0.0}, 0.0)
    assert list(chain.from_iterable(cold.tokens)) == as_configured[0] != greedy[0]


def test_a_prompt_that_asks_for_thoughts_is_as_long_as_in_transformers(served: str, merged: Path) -> None:
    traffic = made_up(load_processor(merged), kind="natural", image_tokens=16, max_new_tokens=6, thinking=True)
    arms = [Arm(name="folder", path=merged), Arm(name="server", url=served)]
    folder, server = measure_latency(arms, traffic, rounds=2, warmup=1, roofline=False)
    assert (folder.settings.engine, server.settings.engine) == ("transformers", "openai")
    assert folder.workload.prompt_tokens == server.workload.prompt_tokens > 100
    assert server.environment == {"hardware": f"endpoint {served}", "server_version": vllm_version()}
    assert server.proof.is_cached is None


def test_bench_of_a_folder_and_its_server(served: str, merged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--new-tokens", "3", "--max-new-tokens", "4", "--rounds", "1", "--prompt-tokens", "200", "--json"]
    assert main(["bench", f"folder={merged}", f"vllm={served}", "--image-tokens", "16", *flags]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    found = [(row["arm"], row["workload"]["name"], row["workload"]["prompt_tokens"]) for row in rows]
    names = ["fixed", "natural", "natural_thinking"]
    assert [(arm, name) for arm, name, _ in found] == [(arm, name) for name in names for arm in ("folder", "vllm")]
    assert found[0][2] == found[1][2] == 200
    assert [row["tokens"]["output"]["median"] for row in rows[:2]] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("model", "flags", "message"),
    [
        ("#nobody/nothing", [], "refused a request (status 404): The model `nobody/nothing` does not exist."),
        ("", ["--max-new-tokens", "4000"], "refused a request (status 400): max_tokens=4000 cannot be greater than"),
    ],
)
def test_what_vllm_refuses_is_one_line(
    served: str, model: str, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", served + model, "--workload", "natural", "--rounds", "1", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_an_address_without_its_version_is_one_line(served: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", served.removesuffix("/v1"), "--workload", "natural", "--rounds", "1"]) == 2
    assert f"is it {served}? Or name one" in capsys.readouterr().err


def test_an_adapter_beside_its_base_says_what_its_export_says(
    base: Path, adapter: Path, merged: Path, question: Request
) -> None:
    model, processor, _ = load_model(merged)
    lora = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapter}")
    with vllm_server(base, *lora) as (url, _):
        tuned, plain = (EndpointEngine(url, model=name) for name in ("tuned", str(base)))
        expected = generate(model, processor, question).tokens
        assert tuned.ask([question], Options()).tokens == [expected]
        assert plain.ask([question], Options()).tokens != [expected]


def test_a_server_that_dies_is_one_line(merged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = Request(messages=[{"role": "user", "content": "What is this?"}], max_new_tokens=900, exact=True)
    with vllm_server(merged) as (url, server), EndpointEngine(url) as engine:
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


def test_rollouts_of_vllm_are_of_the_prompts_that_are_trained_on(base: Path, tmp_path: Path) -> None:
    """TRL 1.16 gives vLLM prompts with the image's tokens twice: 4 nats a token, instead of what bfloat16 rounds."""
    command = [sys.executable, "-m", "tests.support.vllm_colocate", str(base), str(tmp_path / "out")]
    done = subprocess.run(command, env=os.environ | ON_A_CPU, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    steps = [row for row in json.loads(done.stdout.splitlines()[-1]) if "loss" in row]
    assert len(steps) == 2
    assert all(step["sampling/sampling_logp_difference/mean"] < 0.5 for step in steps)


def test_vllm_takes_every_flag_of_the_server_script() -> None:
    from trl.scripts.vllm_serve import build_command, make_parser
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.cli_args import make_arg_parser
    except ImportError:  # before 0.30
        from vllm.entrypoints.openai.cli_args import make_arg_parser
    script = Path(__file__).resolve().parents[2] / "recipes" / "launch" / "vllm_server.sh"
    flags = script.read_text().partition("exec trl vllm-serve")[2].replace("\\\n", " ")
    flags = flags.replace("$model", "some/model").replace("$max_pixels", "401408").replace("$max_length", "2048")
    known, rest = make_parser().parse_args_and_config(shlex.split(flags), return_remaining_strings=True)
    command = build_command(known, rest)
    parsed = make_arg_parser(FlexibleArgumentParser()).parse_args(command[command.index("serve") + 1 :])
    assert parsed.mm_processor_kwargs == {"max_pixels": 401408}
    assert parsed.limit_mm_per_prompt == {"image": 4, "video": 0}
    assert (parsed.max_model_len, parsed.logprobs_mode) == (2048, "processed_logprobs")


def vllm_version() -> str:
    import vllm

    return str(vllm.__version__)
