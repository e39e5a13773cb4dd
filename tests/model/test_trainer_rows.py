"""Rows of other people's trainers, read as prompts with their images."""

from __future__ import annotations

import io
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image

from grpo_toolkit.model.generation.request import find_requests

if TYPE_CHECKING:
    from pathlib import Path

TURN = {"role": "user", "content": "What is this?"}
PARTS = {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What is this?"}]}


def picture() -> Image.Image:
    return Image.new("RGB", (28, 28), (200, 10, 30))


def stored(image: Image.Image) -> dict[str, Any]:
    file = io.BytesIO()
    image.save(file, format="PNG")
    return {"bytes": file.getvalue(), "path": None}


def of_trainer(rows: list[dict[str, Any]]) -> Any:
    return SimpleNamespace(train_dataloader=SimpleNamespace(dataset=rows))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [TURN], "image": picture()},
        {"prompt": [TURN], "images": [picture()]},
        {"prompt": [PARTS], "image": stored(picture())},
        {"messages": [PARTS, {"role": "assistant", "content": "A red square."}], "images": [picture()]},
        {"prompt": [{"role": "user", "content": [{"type": "image", "image": picture()}, PARTS["content"][1]]}]},
    ],
    ids=["TRL", "several", "undecoded", "SFT", "inside"],
)
def test_rows_of_every_layout_become_a_prompt_with_its_image(row: dict[str, Any]) -> None:
    [request] = find_requests(None, {"train_dataloader": of_trainer([row]).train_dataloader}, limit=4)
    assert [turn["role"] for turn in request.messages] == ["user"]
    assert [image.size for image in request.images] == [(28, 28)]
    assert all(part.get("text", "") is not None for part in request.messages[0]["content"] if isinstance(part, dict))


def test_a_row_with_a_path_is_opened_and_one_whose_image_is_elsewhere_is_left_out(tmp_path: Path) -> None:
    """VLM-R1's rows."""
    picture().save(tmp_path / "1.png")
    rows = [
        {"prompt": [PARTS], "image_path": ["elsewhere/0.png"], "solution": "red"},
        {"prompt": [PARTS], "image_path": [str(tmp_path / "1.png")], "solution": "red"},
    ]
    [request] = find_requests(None, {}, limit=4, state=of_trainer(rows))  # where 4.49 has them
    assert [image.size for image in request.images] == [(28, 28)]


def test_rows_that_hold_no_prompt_are_none() -> None:
    assert (
        find_requests(None, {"train_dataloader": of_trainer([{"input_ids": [1, 2]}]).train_dataloader}, limit=4) == []
    )
