"""The table of model families, from what pytest writes of a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from scripts.docs.families import PROMISES, read_cells, table

if TYPE_CHECKING:
    from pathlib import Path


def case_of(name: str, kept: int, trouble: str = "") -> str:
    versions = '<property name="transformers" value="5.24.0"/><property name="trl" value="1.16.0"/>'
    held = "".join(f'<property name="kept" value="{promise}"/>' for promise in PROMISES[:kept])
    name = f"test_every_promise_holds[{name}]"
    return f'<testcase name="{name}"><properties>{versions}{held}</properties>{trouble}</testcase>'


def write(file: Path, *cases: str, day: str = "2026-11-30") -> Path:
    suite = f'<testsuite timestamp="{day}T01:00:00">{"".join(cases)}</testsuite>'
    file.write_text(f"<testsuites>{suite}</testsuites>", encoding="utf-8")
    return file


FAILED = '<failure message="AssertionError:&#10; a | b">...</failure>'


def test_a_run_is_a_row_a_family(tmp_path: Path) -> None:
    first = write(
        tmp_path / "first.xml",
        case_of("llama-v5-text-full", 6),
        case_of("llama-v5-text-lora", 3, FAILED),
        case_of("llava-published-pictures-full", 5, FAILED),
        case_of("llava-published-pictures-lora", 6),
        case_of("smolvlm-v5-text-full", 0, '<skipped message="no num2words"/>'),
        '<testcase name="test_another"/>',
    )
    second = write(tmp_path / "second.xml", case_of("llama-v5-text-lora", 6), day="2026-12-01")
    cells = read_cells([first, second])
    wanted = [*cells, ("qwen2", "v5-full")]
    assert table(cells, wanted, {"llava": "slow"}).splitlines() == [
        "Run on 2026-11-30 to 2026-12-01 with transformers 5.24.0, trl 1.16.0: 3 trainings of 5 kept every promise, "
        "1 did not, 1 could not be tried. Of the matrix, 1 were not in this run.",
        "",
        "| family | v5 form, full | v5 form, LoRA | published form, full | published form, LoRA | pictures | notes |",
        "|---|---|---|---|---|---|---|",
        "| `llama` | yes | yes |  |  |  |  |",
        "| `llava` |  |  | not: checkpoint repaired | yes | yes | slow; AssertionError: a / b |",
        "| `smolvlm` | - |  |  |  |  | no num2words |",
        "| `qwen2` | not run |  |  |  |  |  |",
    ]
