"""Rows that are read once: the same rows, no two readers with the same objects, and nothing stale."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from torch.utils.data import DataLoader

from grpo_toolkit import InputError, rows_once
from grpo_toolkit.model.inputs.kept import Kept
from tests.support.images import noise

pytestmark = pytest.mark.stack


def dataset(count: int = 4) -> Any:
    columns = {
        "prompt": [[{"role": "user", "content": f"What is number {index}?"}] for index in range(count)],
        "image": [noise(index, (20, 30)) for index in range(count)],
        "boxes": [[index, index + 1] for index in range(count)],
    }
    return Dataset.from_dict(columns)


class Decodings:
    """Counts the images that Pillow opens."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        opening = Image.open

        def opened(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return opening(*args, **kwargs)

        monkeypatch.setattr(Image, "open", opened)


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Image.Image):
        return (one.mode, one.size, one.tobytes()) == (other.mode, other.size, other.tobytes())
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, (list, tuple)):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, (torch.Tensor, np.ndarray)):
        return one.dtype == other.dtype and bool((one == other).all())
    return type(one) is type(other) and one == other


def batches(rows: Any) -> list[Any]:
    """Return what a data loader of TRL reads in two steps of two micro-batches: rollouts twice, rows three times."""
    order = [0, 0, 0, 2, 2, 2] * 2 + [1, 1, 1, 3, 3, 3] * 2
    sampler: Any = [order[start : start + 6] for start in range(0, 24, 6)]
    return list(DataLoader(rows, batch_sampler=sampler, collate_fn=list))


def test_a_loader_reads_each_row_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = dataset()
    expected = batches(rows)
    decodings = Decodings(monkeypatch)
    found = batches(rows_once(rows))
    assert same(found, expected)
    assert decodings.count == 4
    assert len({id(row["image"]) for batch in found for row in batch}) == 24


def test_nobody_can_spoil_a_row() -> None:
    rows, once = dataset(), rows_once(dataset())
    for _ in range(2):
        for row in (once[1], *once.__getitems__([1, 1])):
            assert same(row, rows[1])
            row["image"].paste((0, 0, 0), (0, 0, 10, 10))
            row["prompt"].append("more")
            row["boxes"][0] = 9


@pytest.mark.parametrize("form", ["torch", "numpy"])
def test_in_the_formats_of_the_dataset(form: str) -> None:
    rows = dataset().select_columns(["boxes"]).with_format(form)
    once = rows_once(rows)
    for _ in range(2):
        assert same(once[2], rows[2])
        assert same(once.__getitems__([3, 0, 3]), rows.__getitems__([3, 0, 3]))
        assert same(once[1:3], rows[1:3])
        assert same(list(once["boxes"]), list(rows["boxes"]))


def test_through_a_transform_and_anew_after_another() -> None:
    asked: list[int] = []

    def doubled(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        asked.append(len(batch["boxes"]))
        return {"boxes": [[2 * number for number in boxes] for boxes in batch["boxes"]]}

    once = rows_once(dataset().with_transform(doubled))
    assert [row["boxes"] for row in once.__getitems__([1, 1, 3])] == [[2, 4], [2, 4], [6, 8]]
    assert once.__getitems__([3]) == [{"boxes": [6, 8]}]
    assert asked == [2]
    assert once.with_format(None)[1]["boxes"] == [1, 2]  # a copy
    once.set_transform(lambda batch: {"boxes": [[0] for _ in batch["boxes"]]})
    assert once.__getitems__([1]) == [{"boxes": [0]}]


def test_what_is_made_of_it_reads_for_itself() -> None:
    once = rows_once(dataset())
    assert same(once[0], dataset()[0])
    assert once.select([3, 0])[0]["boxes"] == [3, 4]
    assert once.map(lambda row: {"boxes": [9]})[0]["boxes"] == [9]
    assert once.shuffle(seed=0)[0]["boxes"] == dataset().shuffle(seed=0)[0]["boxes"]
    assert once.rename_column("boxes", "box")[0]["box"] == [0, 1]
    assert same(rows_once(once)[0], once[0])
    other = copy.copy(once)
    other.set_format(columns=["boxes"])
    assert (list(other[0]), list(once[0])) == (["boxes"], ["prompt", "image", "boxes"])
    again = pickle.loads(pickle.dumps(once))  # as to a worker of a data loader
    assert again.rows_kept.bytes == 0
    assert same(again[0], once[0])
    assert isinstance(once, Dataset)
    assert type(dataset()) is Dataset


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    once: Any = rows_once(dataset(), max_bytes=2 * 20 * 30 * 3 + 300)
    decodings = Decodings(monkeypatch)
    for _ in range(2):
        for index in (0, 1, 0, 1, 2):
            assert same(once[index]["boxes"], [index, index + 1])
            assert once.rows_kept.bytes <= once.rows_kept.max_bytes
    assert decodings.count == 3 + 3  # each of them made the one leave that was used longest ago


def test_what_cannot_be_copied_is_read_anew() -> None:
    class Decoder:
        pass

    once = rows_once(dataset().with_transform(lambda batch: {"video": [Decoder() for _ in batch["boxes"]]}))
    first, second, third = (*once.__getitems__([0, 0]), once[0])
    assert len({id(row["video"]) for row in (first, second, third)}) == 3


def test_something_else_is_refused() -> None:
    with pytest.raises(InputError, match=r"takes a datasets\.Dataset, not a list"):
        rows_once([{"prompt": "?"}])  # type: ignore[arg-type]


def test_kept_values_leave_in_the_order_of_their_use() -> None:
    kept: Kept[str] = Kept(10)
    for name, size in (("a", 4), ("b", 4)):
        kept.put(name, name, size)
    assert kept.get("a") == "a"
    kept.put("c", "c", 4)
    assert (kept.get("a"), kept.get("b"), kept.get("c"), kept.bytes) == ("a", None, "c", 8)
    kept.put("c", "larger", 6)
    assert (kept.get("c"), kept.bytes) == ("larger", 10)
    kept.put("c", "too large", 11)
    assert (kept.get("c"), kept.bytes) == (None, 4)
