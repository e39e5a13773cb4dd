"""The tables of stacks and backends, from the tests themselves."""

from __future__ import annotations

from datetime import date

import pytest

from scripts.benchmarks.two_processes import KINDS
from scripts.docs.pages.markdown import ROOT
from scripts.docs.support import CLAIMS, PARTS, Claim, dated, is_current, runs_on, tables, tried_kinds


def test_the_page_is_current() -> None:
    page = (ROOT / "docs" / "support.md").read_text(encoding="utf-8")
    assert is_current(page), "python -m scripts.docs.support --write docs/support.md"
    assert not is_current(page.replace("4.57.*", "4.58.*"))


def test_the_tables_are_dated() -> None:
    assert dated("x").startswith(f'Written on {date.today()}. "newest" was then transformers ')


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.title)
def test_every_claim_has_kinds(claim: Claim) -> None:
    assert set(tried_kinds(claim)) - set(KINDS) == set()
    assert list(tried_kinds(claim))


def test_a_test_that_is_gone_is_an_error() -> None:
    with pytest.raises(ValueError, match="no test_of_nothing"):
        list(tried_kinds(Claim(title="x", file="model/test_distributed.py", function="test_of_nothing")))


def test_every_file_of_a_part_is_there() -> None:
    assert [file for files in PARTS.values() for file in files if not (ROOT / "tests" / file).is_file()] == []


def test_a_file_that_leaves_itself_out_does_not_run() -> None:
    examples = ROOT / "tests" / "callbacks" / "test_trl_examples.py"  # marked, and of TRL 1.16 alone
    assert [runs_on(examples, stack) for stack in ("newest", "middle", "oldest")] == [True, False, False]
    assert "| examples of TRL 1.16 | yes | not run | not run |" in tables()
