from __future__ import annotations

import os
import tempfile
from pathlib import Path

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
# Processes that tests start import the package, the recipes and the helpers of this checkout, as the tests do.
os.environ["PYTHONPATH"] = os.pathsep.join(
    [
        *map(str, (Path(__file__).parents[1], Path(__file__).parents[1] / "recipes")),
        *filter(None, [os.environ.get("PYTHONPATH")]),
    ]
)

from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.model.generation.model_process import ModelProcess
from grpo_toolkit.model.generation.request import Request
from tests.support.faulty import sick_checkpoint
from tests.support.models import BUILDERS, build_qwen2_5_vl
from tests.support.publications import Publication, build_publications
from tests.support.warm import python

if TYPE_CHECKING:
    from collections.abc import Iterator


LONGEST = (
    "recipes/test_recipe.py", "reporting/test_tracker_outages.py", "model/test_distributed.py",
    "crashes/test_system_calls.py", "callbacks/test_callbacks.py", "reporting/test_wandb.py", "export/test_export.py",
    "cli/test_cli.py", "latency/test_tune.py", "model/test_distributed_adapter.py", "recipes/test_health.py",
    "recipes/test_sharded.py",
)  # fmt: skip
"""Files of minutes or most of one. They start first: a process that began one last would be waited for."""


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out unread what `-m stack` would leave out: older stacks need not be able to import it."""
    if config.option.markexpr != "stack" or not collection_path.name.startswith("test_"):
        return None
    return None if "pytest.mark.stack" in collection_path.read_text(encoding="utf-8") else True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    def place(item: pytest.Item) -> int:
        file = f"{item.path.parent.name}/{item.path.name}"
        return LONGEST.index(file) if file in LONGEST else len(LONGEST)

    items.sort(key=place)


class ForkedPython:
    """A stand-in for `ModelProcess.python`: see warm.py, whose server starts when a test first needs it."""

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
    """Return the folders that are published under faults, by name."""
    return build_publications(qwen, tmp_path_factory.mktemp("publications"))


@pytest.fixture
def publication(request: pytest.FixtureRequest, publications: dict[str, Publication], tmp_path: Path) -> Publication:
    """The publication that the test names."""
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
