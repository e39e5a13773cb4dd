"""Datasets of one's own: a question, an image and an answer in columns of their own.

A question is a text, a number, or the messages of a conversation; an answer a text, a number or a label. What is
anything else is one line that names the column or the row. A row in which one of the three is null is left out, later,
with all that are not whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpo_toolkit import InputError
from grpo_vlm.rewards.answers import ANSWER_TYPES

if TYPE_CHECKING:
    from datasets import Dataset

    from grpo_vlm.arguments import RecipeArguments

SYSTEM_PROMPT = (
    "You are a helpful assistant. First think about the question, then give the answer: put the reasoning between "
    "<think> and </think>, then the answer alone between <answer> and </answer>."
)
"""For datasets other than the digits, whose tiny base was supervised on the format."""

USUAL_NAMES = {
    "prompt": ("prompt", "problem", "question", "query"),
    "image": ("image", "images"),
    "answer": ("answer", "solution", "ground_truth", "label"),
}

NOT_KEPT = ("prompt", "image", "images", "answer", "prompts", "completions")
"""Not kept where they are not the columns asked for: TRL hands rewards other things by these names."""

ROLES = ("system", "user", "assistant", "tool")
"""Whose messages TRL takes."""


def read_columns(rows: Dataset, arguments: RecipeArguments) -> Dataset:
    """Return a dataset in the row form, with its images still as they were published.

    Raises:
        InputError: a column is missing, or holds what it should not.
    """
    columns = find_columns(rows.column_names, arguments)
    # Removing before renaming: a dataset may have a `prompt` beside the `problem` that was asked for.
    rows = rows.remove_columns(
        [name for name in NOT_KEPT if name in rows.column_names and name not in columns.values()]
    )
    rows = rows.rename_columns({theirs: ours for ours, theirs in columns.items() if theirs != ours})
    rows = _with_answers(rows, str(arguments.dataset_name), column=columns["answer"])
    _check_answer_types(rows, arguments)
    return _with_prompts(rows, str(arguments.dataset_name), column=columns["prompt"])


def find_columns(names: list[str], arguments: RecipeArguments) -> dict[str, str]:
    """Find the dataset's column for each part of a row.

    Raises:
        InputError: a named column is not there, none has a usual name, or one plays two parts.
    """
    columns: dict[str, str] = {}
    for part, usual in USUAL_NAMES.items():
        named = getattr(arguments, f"{part}_column")
        if named is not None and named not in names:
            raise InputError(
                f"dataset {arguments.dataset_name}: no column {named!r} (--{part}_column); it has {', '.join(names)}"
            )
        found = named or next((name for name in usual if name in names), None)
        if found is None:
            raise InputError(
                f"dataset {arguments.dataset_name}: no {part} column (looked for {', '.join(usual)}); it has "
                f"{', '.join(names)}; name the right one with --{part}_column"
            )
        for other, taken in columns.items():
            if taken == found:
                raise InputError(
                    f"dataset {arguments.dataset_name}: column {found!r} is both {other} and {part}; name another "
                    f"with --{other}_column or --{part}_column"
                )
        columns[part] = found
    return columns


def answer_types(rows: Dataset) -> list[Any]:
    """Return the types of answers in a dataset, none where it has no such column.

    `Dataset.unique` first writes rows that were selected anew, all columns of them, and rows with a transform as it
    returns them: 79 images were decoded, resized and compressed for 27 seconds to learn that there is one type.
    """
    if "answer_type" not in rows.column_names:
        return []
    return list(rows.with_format(None).select_columns("answer_type").unique("answer_type"))


def conversation(question: str, *, instruction: str = "") -> list[dict[str, str]]:
    """Return the messages that ask a question."""
    asked = f"{question.replace('<image>', '').strip()} {instruction}".strip()
    return [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": asked}]


def _with_answers(rows: Dataset, dataset: str, *, column: str) -> Dataset:
    """Turn answers into texts. An error names the dataset, and the column as it is published."""
    from datasets import ClassLabel, Value

    kind = rows.features["answer"]
    if kind == Value("string"):
        return rows  # A cast would copy all the images.
    if isinstance(kind, Value) and "binary" not in kind.dtype:
        return rows.cast_column("answer", Value("string"))
    labels = kind.names if isinstance(kind, ClassLabel) else None
    answers = []
    for index, answer in enumerate(rows["answer"][:]):
        if not isinstance(answer, str | int | float | None):
            raise InputError(
                f"dataset {dataset}: row {index} (from 0): its answer, column {column!r}, is a "
                f"{type(answer).__name__} ({_short(answer)}); expected a text or a number: write it as a text"
            )
        if labels is not None and answer is not None:
            answer = labels[answer] if answer >= 0 else None  # -1 says that nobody labelled it
        answers.append(None if answer is None else str(answer))
    return rows.remove_columns("answer").add_column("answer", answers, feature=Value("string"))


def _check_answer_types(rows: Dataset, arguments: RecipeArguments) -> None:
    from datasets import Value

    kind = rows.features.get("answer_type")
    kinds = answer_types(rows) if kind is None or isinstance(kind, Value) else [kind]
    unknown = [repr(kind) for kind in kinds if kind not in ANSWER_TYPES]
    if unknown:
        raise InputError(
            f"dataset {arguments.dataset_name}: answer_type {', '.join(unknown)}; there are "
            f"{', '.join(ANSWER_TYPES)}; rename the column where it means something else"
        )


def _with_prompts(rows: Dataset, dataset: str, *, column: str) -> Dataset:
    """Turn questions into messages. An error names the dataset, and the column as it is published."""
    from datasets import Features, List, Value

    kind = rows.features["prompt"]
    if isinstance(kind, Value) and kind != Value("string"):
        rows = rows.cast_column("prompt", Value("string"))
    as_published = isinstance(kind, List)
    contents = str | list if as_published else str
    for index, question in enumerate(rows["prompt"][:]):
        problem = _problem(question, contents)
        if problem is not None:
            raise InputError(
                f"dataset {dataset}: row {index} (from 0): its question, column {column!r}, {problem} "
                f"({_short(question)}); expected a text, or messages with a role and a content"
            )
    if as_published:
        return rows

    def written(question: Any) -> dict[str, Any]:
        return {"prompt": conversation(question) if isinstance(question, str) else question}

    # Said, because all of the first thousand may be null.
    features = Features({**rows.features, "prompt": List({"role": Value("string"), "content": Value("string")})})
    return rows.map(written, features=features, input_columns=["prompt"], desc="writing prompts")


def _problem(question: Any, contents: Any) -> str | None:
    """Return why a value is neither null, nor a text, nor messages whose content is one of `contents`."""
    if question is None or isinstance(question, str):
        return None
    if not isinstance(question, list):
        return f"is a {type(question).__name__}"
    for message in question:
        if not isinstance(message, dict) or not {"role", "content"} <= set(message):
            return "is a list, but not of messages"
        if message["role"] not in ROLES:
            return f"has a message whose role is {message['role']!r}; there are {', '.join(ROLES)}"
        if not isinstance(message["content"], contents):
            return f"has a message whose content is a {type(message['content']).__name__}"
        if isinstance(message["content"], list) and not all(map(_is_part, message["content"])):
            return "has a message with a part that is neither {'type': 'text', 'text': ...} nor {'type': 'image'}"
    if question and all(message["role"] != "user" for message in question):
        return "has no message of a user"
    return None


def _is_part(part: Any) -> bool:
    """Return whether a value is a part of a message's content, as TRL reads it."""
    if not isinstance(part, dict):
        return False
    return part.get("type") == "image" or (part.get("type") == "text" and isinstance(part.get("text"), str))


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
