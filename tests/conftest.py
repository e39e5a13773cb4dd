from __future__ import annotations

import os
import tempfile

# Before any import of torch, transformers or wandb: two cores thrash easily, and no test touches the network.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["WANDB_MODE"] = "offline"
os.environ["WANDB_SILENT"] = "true"
# DeepSpeed compiles on its first start and waits for ever for the lock of a process that was killed meanwhile: what a
# killed run leaves in the user's folder must not hang the next.
if "TORCH_EXTENSIONS_DIR" not in os.environ:
    compiled = tempfile.TemporaryDirectory(prefix="grpo-toolkit-extensions-")
    os.environ["TORCH_EXTENSIONS_DIR"] = compiled.name

from typing import TYPE_CHECKING

import pytest

from faulty import sick_checkpoint
from grpo_toolkit.inference import Request
from grpo_toolkit.worker import ModelProcess
from models import BUILDERS, build_qwen2_5_vl
from publications import Publication, build_publications
from warm import python

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


LONGEST = (
    "test_recipe.py", "test_tracker_outages.py", "test_distributed.py", "test_syscall_faults.py", "test_callbacks.py",
    "test_wandb.py", "test_export.py", "test_cli.py", "test_tune.py", "test_distributed_adapter.py",
    "test_recipe_health.py", "test_recipe_sharded.py",
)  # fmt: skip
"""Files of minutes or most of one. They start first: a process that began one last would be waited for."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


class ForkedPython:
    """In place of `ModelProcess.python`: see warm.py, whose server starts when a test first needs it."""

    def __get__(self, instance: object, owner: object) -> list[str]:
        return python()


@pytest.fixture(scope="session", autouse=True)
def forked_workers() -> None:
    ModelProcess.python = ForkedPython()  # type: ignore[assignment]


@pytest.fixture
def fresh_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The processes that load models start from nothing, as they do for a user."""
    monkeypatch.setattr(ModelProcess, "python", python(fresh=True))


@pytest.fixture(scope="session")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Qwen2.5-VL base in published form."""
    return build_qwen2_5_vl(tmp_path_factory.mktemp("bases") / "qwen2_5_vl")


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in bfloat16, for checkpoints that are mended; a module with another `base` says so."""
    return build_qwen2_5_vl(tmp_path_factory.mktemp("bases") / "base", dtype="bfloat16")


@pytest.fixture(scope="session")
def sick(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of `base` with everything to mend; copied before it is changed."""
    return sick_checkpoint(tmp_path_factory.mktemp("sick") / "sick", base)


@pytest.fixture(scope="session", params=sorted(BUILDERS))
def any_base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base of each family in turn."""
    return BUILDERS[request.param](tmp_path_factory.mktemp("bases") / request.param)


@pytest.fixture(scope="session")
def publications(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Publication]:
    """What is published under faults, by name."""
    return build_publications(qwen, tmp_path_factory.mktemp("publications"))


@pytest.fixture
def publication(request: pytest.FixtureRequest, publications: dict[str, Publication], tmp_path: Path) -> Publication:
    """The one that the test names."""
    # What a killed process leaves of its temporary files stays in here.
    (tmp_path / "temporary").mkdir()
    os.environ["TMPDIR"] = str(tmp_path / "temporary")
    return publications[request.param]


@pytest.fixture(autouse=True)
def unchanged_environment() -> Iterator[None]:
    """Put `os.environ` back: `TrainingArguments(bf16=True)` leaves ACCELERATE_MIXED_PRECISION in it, for instance,
    and every later training of the process would run under autocast."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def image_request() -> Request:
    from PIL import Image

    return Request(
        messages=[{"role": "user", "content": "What is this?"}],
        images=[Image.new("RGB", (56, 56), (90, 120, 30))],
        max_new_tokens=8,
    )
