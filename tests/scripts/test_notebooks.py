"""The notebook of the manual: it has no outputs in the repository, is a page of the site, and does what it says."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from scripts.docs.pages.notebooks import SLOW_AFTER_GRPO, cells_of, code_of, notebook_page, slow_after_grpo_page
from tests.support.warm import run_python

if TYPE_CHECKING:
    from pathlib import Path

WHAT_CAME_OUT = """
import json, sys

found = {
    "steps": steps,
    "codes": [finding.code for finding in diagnosis.findings],
    "audit": [effect.cause for effect in explanation.audit],
    "causes": [effect.cause for effect in explanation.effects],
    "mended": [finding.code for finding in repair.plan.mended],
    "is_clean": left.is_clean,
    "steps_after": steps_after,
    "is_left": work.exists(),
}
with open(sys.argv[1], "w") as file:
    json.dump(found, file)
"""


def test_the_notebook_does_what_it_says(tmp_path: Path) -> None:
    program, results = tmp_path / "notebook.py", tmp_path / "results.json"
    program.write_text(code_of(SLOW_AFTER_GRPO) + WHAT_CAME_OUT, encoding="utf-8")
    done = run_python([program, results], cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(results.read_text(encoding="utf-8"))
    first = found["steps"]["base"][0]
    cached = [first, 1, 1, 1, 1]
    assert found["steps"] == {"base": cached, "trained": [first + step for step in range(5)]}
    assert found["codes"] == ["generation-cache-off", "config-cache-off-latent"]
    assert found["audit"] == ["cache-off"]
    assert found["causes"] == ["cache-off", "unexplained"]
    assert sorted(found["mended"]) == sorted(found["codes"])
    assert found["is_clean"]
    assert found["steps_after"] == {"base": cached, "trained": cached}
    assert not found["is_left"]


def test_the_notebook_is_kept_without_outputs() -> None:
    cells = json.loads(SLOW_AFTER_GRPO.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert [(cell["outputs"], cell["execution_count"]) for cell in code] == [([], None)] * len(code)
    assert len({cell["id"] for cell in cells}) == len(cells)


def test_the_notebook_is_a_page() -> None:
    page = slow_after_grpo_page()
    assert page.startswith("# My model got slow after GRPO\n\nThis page is a notebook: [slow_after_grpo.ipynb](")
    assert page.count("```python\n") == sum(kind == "code" for kind, _ in cells_of(SLOW_AFTER_GRPO))


def test_a_notebook_without_a_title_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "markdown", "source": ["no ", "title"]}]}), encoding="utf-8")
    with pytest.raises(ValueError, match="has no title"):
        notebook_page(path)
