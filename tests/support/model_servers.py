"""Model servers as processes of their own, and the adapter that they serve."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path


@contextmanager
def model_server(
    command: Sequence[str], *, port: int, log: Path, settings: Mapping[str, str] | None = None, is_asked_to_end: bool
) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start a server; yield its address once it is healthy, and its process, which leads a group of its own.

    Args:
        command: starts it on `port` of this machine.
        port: where it listens.
        log: what it prints.
        settings: environment variables on top of ours.
        is_asked_to_end: before its group is killed.
    """
    import httpx

    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | (settings or {}), start_new_session=True
        )
    try:
        for _ in range(1200):
            time.sleep(0.5)
            assert server.poll() is None, log.read_text()[-3000:]
            try:
                if httpx.get(f"http://127.0.0.1:{port}/health", trust_env=False, timeout=60).status_code == 200:
                    break
            except httpx.TransportError:
                continue
        yield f"http://127.0.0.1:{port}/v1", server
    finally:
        try:
            if is_asked_to_end:
                server.terminate()
                server.wait(timeout=30)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(server.pid, signal.SIGKILL)
            server.wait(timeout=30)


def build_adapter(base: Path, target_modules: str | list[str]) -> Path:
    """Build an adapter whose answer is not its base's."""
    import torch
    from peft import LoraConfig, get_peft_model

    from grpo_toolkit.model.load import load_model

    model, processor, _ = load_model(base)
    torch.manual_seed(1)
    folder = base.with_name("adapter")
    settings = LoraConfig(r=8, target_modules=target_modules, init_lora_weights=False)
    get_peft_model(model, settings).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
