"""A vLLM that cannot be had is reported in one line, before anything loads."""

from __future__ import annotations

import socket
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata, util
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from packaging.version import Version

from grpo_toolkit import InputError
from scripts.benchmarks.ports import free_port
from tests.recipes.test_plan import plan_of
from tests.recipes.test_recipe import run_recipe

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)


@contextmanager
def server(status: int | None) -> Iterator[int]:
    """The port of a server that answers every request with this status, or with no HTTP at all."""

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status is None:
                self.wfile.write(b"SSH-2.0-OpenSSH_9.7\r\n")
                return
            self.send_response(status)
            self.end_headers()

        def log_message(self, *args: Any) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Answer) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield listening.server_port
        listening.shutdown()
        thread.join()


def training(*, device: str = "cuda", **settings: Any) -> Any:
    """The part of the arguments that is looked at; a GPU is no more than its name there."""
    usual = {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": None, "vllm_server_host": "127.0.0.1"}
    usual |= {"vllm_server_port": 8000, "vllm_server_timeout": 240.0, "process_index": 0}
    return SimpleNamespace(device=torch.device(device), **(usual | settings))


@pytest.mark.parametrize(
    ("mode", "why"),
    [
        ("colocate", "on a CPU vLLM drops the weights that it has packed, and no training can reload them"),
        ("server", "on a CPU vLLM has no way to get the weights of a training without one (TRL sends them by NCCL)"),
    ],
)
def test_vllm_beside_a_training_on_a_cpu_is_refused(qwen: Path, tmp_path: Path, mode: str, why: str) -> None:
    # No dataset of this name: vLLM is looked at before any data.
    flags = ["--model_name_or_path", qwen, "--dataset_name", tmp_path / "none", "--output_dir", tmp_path / "out"]
    done = run_recipe(*flags, "--use_cpu", "true", "--bf16", "false", "--use_vllm", "true", "--vllm_mode", mode)
    assert done.returncode == 2, done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1] == (
        f"recipes/grpo.py: --use_vllm needs a GPU for the training: {why}; leave it out, --use_vllm false"
    )
    assert not (tmp_path / "out").exists()


def test_a_plan_for_another_machine_says_it_as_a_warning(qwen: Path, geometry: Path, tmp_path: Path) -> None:
    plan = plan_of(qwen, geometry, tmp_path, "--use_vllm", "true")
    assert plan.errors == ()
    assert plan.warnings[0].startswith("--use_vllm needs a GPU for the training")
    assert not any("vLLM" in text for text in plan_of(qwen, geometry, tmp_path).warnings)


@pytest.mark.skipif(util.find_spec("vllm") is not None, reason="vLLM is installed here")
def test_vllm_that_is_not_installed_is_refused() -> None:
    from grpo_vlm.planning.preflight import check_vllm

    with pytest.raises(InputError, match=r"vLLM is not installed here: pip install 'trl\[vllm\]'"):
        check_vllm(training(vllm_mode="colocate"))
    check_vllm(training(use_vllm=False, device="cpu"))


@pytest.mark.parametrize(
    ("status", "problem"),
    [
        (200, None),
        (503, None),  # a gateway before a server that is starting
        (404, "status 404, so what answers there is no vLLM server; name its place with --vllm_server_port"),
        (None, "BadStatusLine, so what answers there is no vLLM server"),
    ],
)
def test_another_at_the_servers_address_is_refused(status: int | None, problem: str | None) -> None:
    from grpo_vlm.planning.preflight import _server_problem, server_warning

    with server(status) as port:
        for arguments in (
            training(vllm_server_port=port),
            training(vllm_server_base_url=f"http://127.0.0.1:{port}"),
        ):
            found = _server_problem(arguments)
            if problem is None:
                assert found is None
            else:
                assert found is not None
                assert f"http://127.0.0.1:{port}/health: {problem}" in found
            assert server_warning(arguments) is None
            arguments.process_index = 1  # the first process alone talks to the server
            assert _server_problem(arguments) is None


def test_a_server_that_is_not_there_yet_is_a_warning() -> None:
    from grpo_vlm.planning.preflight import _server_problem, server_warning

    port = free_port()
    arguments = training(vllm_server_port=port)
    assert _server_problem(arguments) is None
    assert server_warning(arguments) == (
        f"no vLLM server at 127.0.0.1:{port} (Connection refused): start it (bash recipes/launch/vllm_server.sh) or "
        "name its place with --vllm_server_host and --vllm_server_port; the run waits 240 s for it, and then ends"
    )
    assert server_warning(training(vllm_mode="colocate")) is None


def test_a_host_that_nobody_knows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from grpo_vlm.planning.preflight import _server_problem

    problem = _server_problem(training(vllm_server_host="no-such-host.invalid"))
    assert problem is not None
    assert problem.startswith("vLLM's server: no host 'no-such-host.invalid' (")


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "http://", "http://a:b", "ftp://a"])
def test_an_address_without_a_host_or_port_is_refused(url: str) -> None:
    from grpo_vlm.planning.preflight import server_address

    with pytest.raises(InputError, match="expected http://HOST:PORT"):
        server_address(training(vllm_server_base_url=url))
    assert server_address(training(vllm_server_base_url="https://a")) == ("a", 443)
    assert server_address(training()) == ("127.0.0.1", 8000)


def test_who_is_told_that_nobody_listens_has_not_waited() -> None:
    """A port that takes connections and never answers: the look at it ends by itself."""
    from grpo_vlm.planning.preflight import _server_problem

    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert _server_problem(training(vllm_server_port=silent.getsockname()[1])) is None
