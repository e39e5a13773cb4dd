"""The process in which an export is loaded and generates."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.model.generation.drawn_pictures import Sight, sight_of
from grpo_toolkit.model.generation.evidence import read_evidence, write_evidence
from grpo_toolkit.model.generation.generate import Record
from grpo_toolkit.model.generation.model_process import ModelProcess, answering, read_request
from grpo_toolkit.model.load import LoadReport

if TYPE_CHECKING:
    from grpo_toolkit.model.generation.request import Request


class Worker(ModelProcess):
    """A folder, loaded in a process of its own, that answers one request at a time.

    Args:
        path: the model or adapter folder.
        device: "cpu", "cuda", "cuda:1", ...
        attn_implementation: None leaves it to the library.
        timeout_s: how long one answer may take.

    Raises:
        WorkerError: the process failed or went silent; the message ends with the last lines of its log.
    """

    def __init__(
        self,
        path: Path,
        *,
        device: str = "cpu",
        attn_implementation: str | None = None,
        timeout_s: float = 1800.0,
    ) -> None:
        self._report: LoadReport | None = None
        self._sight = Sight()
        setup = {"device": device, "attn_implementation": attn_implementation}
        super().__init__(path, setup, module=__name__, timeout_s=timeout_s)

    @property
    def report(self) -> LoadReport:
        """Return the report of loading; the first call waits for it, so several processes can load side by side."""
        if self._report is None:
            answer = self._receive()
            sight = answer.pop("sight")
            limits = sight.pop("limits")
            self._sight = Sight(**sight, limits=None if limits is None else (limits[0], limits[1]))
            self._report = LoadReport(**answer)
        return self._report

    @property
    def sight(self) -> Sight:
        """Return what the loaded model and its processor have to see with."""
        _ = self.report
        return self._sight

    def generate(self, request: Request) -> Record:
        """Answer one request in the process."""
        _ = self.report
        evidence = self._scratch / "evidence" if request.with_evidence else None
        self._send(self._write_request(request) | {"evidence": None if evidence is None else str(evidence)})
        answer = self._receive()
        # JSON has text for keys.
        rivals = [{int(token): gap for token, gap in step.items()} for step in answer.pop("rivals")]
        return Record(**answer, rivals=rivals, evidence=None if evidence is None else read_evidence(evidence))


def serve() -> None:
    """Serve as the process: load what the first line of standard input names, then answer a request a line."""
    with answering() as answer:
        from grpo_toolkit.model.generation.generate import generate
        from grpo_toolkit.model.load import load_model

        setup = json.loads(sys.stdin.readline())
        model, processor, report = load_model(
            Path(setup["path"]), device=setup["device"], attn_implementation=setup["attn_implementation"]
        )
        answer(asdict(report) | {"sight": asdict(sight_of(processor, model))})
        for line in sys.stdin:
            message = json.loads(line)
            evidence = message.pop("evidence")
            request = replace(read_request(message), with_evidence=evidence is not None)
            record = generate(model, processor, request)
            if record.evidence is not None:
                write_evidence(record.evidence, Path(evidence))
            answer(record.to_json())
