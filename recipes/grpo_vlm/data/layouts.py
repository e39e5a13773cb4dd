"""The datasets that this recipe knows, one function each: from a row as published to a question and its answer.

| layout        | on the Hub                              | columns                                         |
|---------------|-----------------------------------------|-------------------------------------------------|
| `open_r1`     | lmms-lab/multimodal-open-r1-8k-verified | `image`, `problem`, `solution`                  |
| `clevr_count` | leonardPKU/clevr_cogen_a_train          | `image`, `problem`, `solution`                  |
| `geometry3k`  | hiyouga/geometry3k                      | `images`, `problem`, `answer`                   |
| `referring`   | VLM-R1's JSONL files, a COCO folder     | `image` (a path), and `conversations` or        |
|               |                                         | `problem` and `solution`                        |

The columns are those that published trainers read: TRL's examples/scripts/grpo_vlm.py (`open_r1`), R1-V's
open_r1/grpo.py (`clevr_count`), verl's examples/data_preprocess/geo3k.py (`geometry3k`), VLM-R1's grpo_jsonl.py
(`referring`).

A local folder of the same layout is read the same way: `--dataset_name FOLDER --dataset_layout clevr_count`. A new
dataset is a row of `LAYOUTS`, a function, and a test; or, where plain columns do, no code at all (`columns.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from grpo_vlm.rewards.answers import extract_answer, parse_box, parse_choice

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


@dataclass(frozen=True, kw_only=True)
class Question:
    """The question of a row and its right answer. `answer_type` is one of `answers.ANSWER_TYPES`."""

    text: str
    answer: str
    answer_type: str


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The form in which a dataset is published.

    Attributes:
        hub_name: its name on the Hub, where it has one.
        image_column: one image a row, or a list of them; an Image column, or paths.
        text_columns: the sets of other columns that it may have, in the order of `read`'s arguments.
        read: from the text columns of a row to its question.
        instruction: put behind each question: in which form this dataset's answers are.
        reward_funcs: the rewards that suit it, names of `rewards.REWARDS`.
    """

    hub_name: str | None = None
    image_column: str
    text_columns: tuple[tuple[str, ...], ...]
    read: Callable[..., Question]
    instruction: str
    reward_funcs: tuple[str, ...] = ("format", "accuracy")


def read_open_r1(problem: str, solution: str) -> Question:
    """Read mathematics and diagrams, verified by a teacher model, some with choices. The solution has both blocks."""
    answer = extract_answer(solution) or solution.strip()
    choice = parse_choice(answer)
    if choice is not None:
        return Question(text=problem, answer=choice, answer_type="choice")
    return Question(text=problem, answer=answer, answer_type="math")


def read_clevr_count(problem: str, solution: str) -> Question:
    """Read a count of things in a rendered scene; `<answer> 3 </answer>`."""
    return Question(text=problem, answer=extract_answer(solution) or solution.strip(), answer_type="number")


def read_geometry3k(problem: str, answer: str) -> Question:
    """Read a geometry problem with a figure; the answer is bare LaTeX."""
    return Question(text=problem, answer=answer, answer_type="math")


def read_referring(*columns: Any) -> Question:
    """Read a sentence that refers to a thing; the answer is a box in pixels of the original image.

    VLM-R1 writes its training files with `conversations` (the box a list or a text), and its evaluation files with
    `problem` and `solution`. A conversation that nobody answers has the answer "", as a text without a box does.
    """
    if len(columns) == 1:
        turns = [turn.get("value") for turn in columns[0]]
        asked, told = [*turns, "", ""][:2]
    else:
        asked, told = columns
    text = told if isinstance(told, str) else str([float(coordinate) for coordinate in told])
    box = parse_box(text)
    return Question(text=asked, answer="" if box is None else str(list(box)), answer_type="box")


LAYOUTS = {
    "open_r1": Layout(
        hub_name="lmms-lab/multimodal-open-r1-8k-verified",
        image_column="image",
        text_columns=(("problem", "solution"),),
        read=read_open_r1,
        instruction="If there are choices, answer with the letter alone.",
    ),
    "clevr_count": Layout(
        hub_name="leonardPKU/clevr_cogen_a_train",
        image_column="image",
        text_columns=(("problem", "solution"),),
        read=read_clevr_count,
        instruction="Answer with a number.",
    ),
    "geometry3k": Layout(
        hub_name="hiyouga/geometry3k",
        image_column="images",
        text_columns=(("problem", "answer"),),
        read=read_geometry3k,
        instruction="Answer with the value alone.",
    ),
    "referring": Layout(
        image_column="image",
        text_columns=(("conversations",), ("problem", "solution")),
        read=read_referring,
        instruction='Answer in JSON with one box in pixels: {"bbox_2d": [x1, y1, x2, y2]}.',
        reward_funcs=("format", "iou"),
    ),
}


def find_layout(dataset_name: str, layout: str | None) -> str | None:
    """Find the layout that is named, or that a Hub name (or a folder called so) has; None for another dataset."""
    if layout is not None:
        return layout
    last = PurePath(dataset_name).name
    for name, known in LAYOUTS.items():
        if known.hub_name is not None and known.hub_name.rpartition("/")[2] == last:
            return name
    return None


def text_columns(layout: Layout, names: Sequence[str]) -> tuple[str, ...] | None:
    """Return the one of the layout's sets of text columns that a dataset has."""
    return next((columns for columns in layout.text_columns if set(columns) <= set(names)), None)
