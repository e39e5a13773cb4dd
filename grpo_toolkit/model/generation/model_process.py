"""A fresh process that loads one folder and answers requests; nothing of the training can leak into it.

Verification's child is `export/verification_process.py`, the latency lab's `latency/engines/process.py`.

The parent speaks JSON lines over pipes; images travel as PNG files in a folder that both can read. The child
is started without the variables of a distributed launch, so that it is a plain single process also under
`accelerate launch`. When the parent's end of the pipe closes, whatever ended the parent, it removes that folder and
ends, at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.errors import WorkerError
from grpo_toolkit.model.generation.request import Request

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from typing_extensions import Self

_LAUNCH_VARIABLES: Final = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK")
_SCRATCH: Final = "GRPO_TOOLKIT_SCRATCH"
_CHILD: Final = "import sys; sys.path[:] = filter(None, sys.path); from {} import serve; serve()"
_LAUNCH_PREFIXES: Final = ("MASTER_", "ACCELERATE_", "FSDP_", "TORCHELASTIC_", "ROLE_", "CCL_", "DEEPSPEED_")


class ModelProcess:
    """A process that runs the `serve` of a module of ours and speaks JSON lines with it. Use as a context manager.

    Args:
        path: the model or adapter folder.
        setup: the first line that it is sent.
        module: whose `serve` it runs.
        timeout_s: how long one answer may take.

    Raises:
        WorkerError: the process failed or went silent; the message ends with the last lines of its log.
    """

    python: Sequence[str] = (sys.executable,)
    """The command that the process is started with."""

    def __init__(self, path: Path, setup: dict[str, Any], *, module: str, timeout_s: float = 1800.0) -> None:
        self.path = path
        self.timeout_s = timeout_s
        self._scratch = Path(tempfile.mkdtemp(prefix="grpo-toolkit-worker-"))
        self._log = (self._scratch / "log").open("w+b")
        self._process = subprocess.Popen(
            # Not `-m`: that puts the user's current folder first on the path, where any queue.py would be imported.
            [*self.python, "-c", _CHILD.format(module)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=worker_environment() | {_SCRATCH: str(self._scratch)},
            text=True,
            # A signal to the whole group (Ctrl-C, a scheduler's SIGTERM) must leave the one that tidies up.
            start_new_session=True,
        )
        self._answers: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read_answers, daemon=True)
        self._reader.start()
        self._images = 0
        try:
            self._send({"path": str(path), **setup})
        except WorkerError:
            self.close()
            raise

    def _write_request(self, request: Request) -> dict[str, Any]:
        """Return the request as JSON; its images go into files that both sides can read."""
        images = []
        for image in request.images:
            file = self._scratch / f"{self._images}.png"
            self._images += 1
            image.save(file)
            images.append(str(file))
        return {
            "messages": [dict(message) for message in request.messages],
            "images": images,
            "max_new_tokens": request.max_new_tokens,
            "exact": request.exact,
            "use_cache": request.use_cache,
            "with_rivals": request.with_rivals,
            "forced": list(request.forced),
        }

    def close(self) -> None:
        """End the process (at once, if it does not end by itself) and remove what was left for it.

        Someone who interrupts does not want to wait for the answer that the process is making.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # closing flushes what a dead process never read
            self._process.stdin.close()
        is_interrupted = isinstance(sys.exc_info()[1], KeyboardInterrupt)
        try:
            self._process.wait(timeout=0 if is_interrupted else 10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()
        self._log.close()
        shutil.rmtree(self._scratch, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._failed("ended") from None

    def _receive(self) -> dict[str, Any]:
        try:
            line = self._answers.get(timeout=self.timeout_s)
        except queue.Empty:
            raise self._failed(f"did not answer within {self.timeout_s:g} s") from None
        if line is None:
            raise self._failed("ended")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerError(f"{self.path}: {answer['error']}")
        return answer

    def _read_answers(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def _failed(self, what: str) -> WorkerError:
        self._process.kill()
        code = self._process.wait()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-5:]
        return WorkerError(f"{self.path}: the process that loads it {what} (exit code {code}): " + " | ".join(tail))


def worker_environment() -> dict[str, str]:
    """Return this process's environment without what a distributed launcher put there."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCH_VARIABLES and not name.startswith(_LAUNCH_PREFIXES)
    }
    # The package may be imported from a checkout that only the parent's sys.path knows.
    root = str(Path(__file__).resolve().parents[3])
    kept["PYTHONPATH"] = os.pathsep.join(filter(None, [root, kept.get("PYTHONPATH")]))
    kept["TOKENIZERS_PARALLELISM"] = "false"
    return kept


def _end_with_the_parent() -> None:
    """Wait, in a child, for its standard input to have no writer any more; then remove its folder and end."""
    import select

    if not hasattr(select, "poll"):  # Windows: it ends when it reads the end of its input
        return
    poll = select.poll()
    poll.register(0, 0)  # no event but those that are always reported: hang-up and error
    poll.poll()
    shutil.rmtree(os.environ.get(_SCRATCH, ""), ignore_errors=True)
    os._exit(0)


@contextlib.contextmanager
def answering() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Yield a child's function to answer with; an error inside is answered, too, before it is raised."""
    # Libraries print to stdout; answers go to a private copy of it, and everything else to the log.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    parent_ends = threading.Thread(target=_end_with_the_parent, daemon=True)
    parent_ends.start()

    def answer(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    try:
        yield answer
    except Exception as error:
        answer({"error": " ".join(f"{type(error).__name__}: {error}".split())})
        raise
    parent_ends.join()  # or the interpreter could end before the folder is gone


def read_request(message: dict[str, Any]) -> Request:
    """Read a request as `ModelProcess` wrote it."""
    from PIL import Image

    images = [Image.open(file).convert("RGB") for file in message.pop("images")]
    return Request(images=images, **message)
