"""A folder in a fresh process, with nothing of the training or of another arm in it."""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.errors import OutOfMemoryError, UnsupportedError, WorkerError
from grpo_toolkit.latency.engines.protocol import Answer, EngineFacts, Evidence, Options
from grpo_toolkit.latency.rows.row import Proof, Timeline
from grpo_toolkit.model.generation.model_process import ModelProcess, answering, read_request
from grpo_toolkit.model.hardware.model_sizes import ModelSizes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from grpo_toolkit.model.generation.request import Request


class ProcessEngine(ModelProcess):
    """A model or adapter folder, loaded in a process of its own (see `Engine`).

    Args:
        path: the folder.
        options: how it is loaded; the rest of the options come with each request.
        timeout_s: how long one answer may take, compilation included.
    """

    def __init__(self, path: Path, options: Options, *, timeout_s: float = 1800.0) -> None:
        self._facts: EngineFacts | None = None
        super().__init__(path, {"options": asdict(options)}, module=__name__, timeout_s=timeout_s)

    def facts(self) -> EngineFacts:
        """Return what was loaded; waits for it the first time, so several processes can load side by side."""
        if self._facts is None:
            facts = self._receive()
            sizes = facts.pop("sizes")
            self._facts = EngineFacts(**facts, sizes=None if sizes is None else ModelSizes(**sizes))
        return self._facts

    def ask(self, requests: Sequence[Request], options: Options) -> Answer:
        """Answer a batch, timed in the process (see `Engine.ask`)."""
        answer = self._call("ask", requests, options)
        return Answer(timeline=Timeline(**answer.pop("timeline")), **answer)

    def prove(self, requests: Sequence[Request], options: Options) -> Evidence:
        """Answer a batch under observation (see `Engine.prove`)."""
        evidence = self._call("prove", requests, options)
        # JSON has text for keys.
        rivals = [{int(token): gap for token, gap in step.items()} for step in evidence.pop("rivals")]
        return Evidence(proof=Proof(**evidence.pop("proof")), rivals=rivals, **evidence)

    def environment(self) -> dict[str, str]:
        """Return the environment of the process, now (see `Engine.environment`)."""
        return self._call("environment", (), Options())

    def probe_hardware(self) -> dict[str, float]:
        """Measure bandwidth and matrix throughput in the process (see `Engine.probe_hardware`)."""
        return self._call("probe_hardware", (), Options())

    def _call(self, what: str, requests: Sequence[Request], options: Options) -> dict[str, Any]:
        self.facts()
        written = [self._write_request(request) for request in requests]
        self._send({"do": what, "requests": written, "options": asdict(options)})
        try:
            answer = self._receive()
        except WorkerError as error:
            # What Linux does to a process when the machine's memory is gone.
            if self._process.poll() == -9:
                raise OutOfMemoryError(f"out of memory: the process was killed; {error}") from None
            raise
        if "out_of_memory" in answer:
            raise OutOfMemoryError(answer["out_of_memory"])
        if "unsupported" in answer:
            raise UnsupportedError(answer["unsupported"])
        return answer


def serve() -> None:
    """Run the process's side: load what the first line names, then do what each further line says."""
    with answering() as answer:
        setup = json.loads(sys.stdin.readline())
        engine = _load(Path(setup["path"]), _options(setup["options"]))
        # What loading made is never garbage; a collection that walks it would fall into some request.
        gc.collect()
        gc.freeze()
        answer(asdict(engine.facts()))
        for line in sys.stdin:
            message = json.loads(line)
            requests = [read_request(request) for request in message["requests"]]
            try:
                if message["do"] in ("environment", "probe_hardware"):
                    answer(getattr(engine, message["do"])())
                else:
                    answer(asdict(getattr(engine, message["do"])(requests, _options(message["options"]))))
            except OutOfMemoryError as error:
                answer({"out_of_memory": str(error)})
            except UnsupportedError as error:
                answer({"unsupported": " ".join(str(error).split())})


def _load(path: Path, options: Options) -> Any:
    import torch

    from grpo_toolkit.latency.engines.local import LocalEngine, load_as
    from grpo_toolkit.latency.engines.toggles import with_pixels

    if options.threads is not None:
        torch.set_num_threads(options.threads)
    model, processor = load_as(path, options)
    return LocalEngine(model, with_pixels(processor, options))


def _options(data: dict[str, Any]) -> Options:
    ids = data.pop("eos_token_ids")
    return Options(**data, eos_token_ids=None if ids is None else tuple(ids))
