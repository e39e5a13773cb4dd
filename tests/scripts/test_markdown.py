"""The parts of Markdown that the pages share."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from scripts.docs.pages.markdown import print_or_write

if TYPE_CHECKING:
    from pathlib import Path

MARKERS = {"begin": "<!-- begin -->", "end": "<!-- end -->"}


def test_a_page_keeps_what_is_around_its_markers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n\n<!-- begin -->\nold\n<!-- end -->\nafter\n")
    print_or_write("new", page, **MARKERS)
    assert page.read_text() == "before\n\n<!-- begin -->\n\nnew\n\n<!-- end -->\nafter\n"
    page.write_text("without markers")
    with pytest.raises(ValueError, match=r"page.md: no <!-- begin --> \.\.\. <!-- end -->"):
        print_or_write("new", page, **MARKERS)
    assert page.read_text() == "without markers"
    print_or_write("new", None, **MARKERS)
    assert capsys.readouterr().out == "new\n"
