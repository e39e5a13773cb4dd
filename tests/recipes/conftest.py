"""A data set that several of the recipe's tests plan and train with."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def geometry(tmp_path: Path) -> Path:
    """Return the folder of four rows in the layout of geometry3k, to train on and to hold out."""
    from tests.recipes.test_data import picture, write_parquet

    folder = tmp_path / "geometry3k"
    for split, mode in (("train", "RGB"), ("test", "L")):
        columns = {"images": [[picture(mode=mode)]] * 4, "problem": ["<image>Find x."] * 4, "answer": ["3"] * 4}
        write_parquet(folder, columns, split=split, several=True)
    return folder
