"""From a dataset's name to rows that GRPO can train on: `prompt` (chat messages), `image` (RGB) and `answer` (text).

`digits` is embedded. Any other name goes to `datasets.load_dataset`: a Hub name, a folder saved with
`save_to_disk`, or a folder of parquet files. Columns are found under their usual names, or named with
`--prompt_column`, `--image_column` and `--answer_column`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit import InputError

if TYPE_CHECKING:
    from datasets import Dataset

    from arguments import RecipeArguments

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


@dataclass(frozen=True, kw_only=True)
class Splits:
    """What is trained on, and what is only measured on."""

    train: Dataset
    held_out: Dataset


def load_splits(arguments: RecipeArguments, *, seed: int) -> Splits:
    """Load, check and reshape the dataset.

    Raises:
        InputError: it cannot be found, has no such split, or lacks a column.
    """
    if arguments.held_out_size < 1:
        raise InputError(f"--held_out_size {arguments.held_out_size}: at least one row must be held out")
    if arguments.dataset_name == "digits":
        from digits import load_digits_split

        held_out = load_digits_split("held_out")
        wanted = min(arguments.held_out_size, len(held_out))
        return Splits(train=load_digits_split("train"), held_out=held_out.select(range(wanted)))
    if not arguments.dataset_name:
        raise InputError("no dataset: pass --dataset_name with a Hub name or a folder (or `digits`)")
    splits = _load(arguments)
    train = _reshape(splits, arguments.dataset_train_split, arguments)
    if arguments.dataset_test_split in splits:
        held_out = _reshape(splits, arguments.dataset_test_split, arguments)
    elif len(train) < 2:
        raise InputError(f"dataset {arguments.dataset_name}: one row, of which none can be held out")
    else:  # none published: hold some of the training rows out
        parts = train.train_test_split(test_size=min(arguments.held_out_size, max(1, len(train) // 10)), seed=seed)
        train, held_out = parts["train"], parts["test"]
    return Splits(train=train, held_out=held_out.select(range(min(arguments.held_out_size, len(held_out)))))


def find_columns(names: list[str], arguments: RecipeArguments) -> dict[str, str]:
    """Which column of the dataset plays which part.

    Raises:
        InputError: a named column is not there, or none has a usual name.
    """
    columns = {}
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
        columns[part] = found
    return columns


def _load(arguments: RecipeArguments) -> dict[str, Dataset]:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

    name = str(arguments.dataset_name)
    folder = Path(name)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = load_from_disk(name)
        else:
            loaded = load_dataset(name, name=arguments.dataset_config)
    except (OSError, ValueError) as error:  # what `datasets` raises for unknown names, no network, unreadable files
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"dataset {name}: cannot be loaded ({reason}); pass a Hub name or a local folder") from error
    if isinstance(loaded, Dataset):
        return {arguments.dataset_train_split: loaded}
    assert isinstance(loaded, DatasetDict)
    return dict(loaded)


def _reshape(splits: dict[str, Dataset], split: str, arguments: RecipeArguments) -> Dataset:
    """One split, with the three columns; images are decoded when a batch asks for them.

    Rows without an image or an answer are left out, and counted.

    Raises:
        InputError: no such split, a column is missing, or no row is left.
    """
    from datasets import Image, List, Value

    name = f"dataset {arguments.dataset_name}"
    if split not in splits:
        raise InputError(f"{name}: no split {split!r}; it has {', '.join(splits)}; choose with --dataset_train_split")
    columns = find_columns(splits[split].column_names, arguments)
    # Selecting before renaming: a dataset may have a `prompt` beside the `problem` that was asked for.
    rows = splits[split].select_columns(list(columns.values()))
    rows = rows.rename_columns({theirs: ours for ours, theirs in columns.items() if theirs != ours})
    whole = rows.filter(_is_whole, input_columns=["image", "answer"], desc="looking for whole rows")
    if len(whole) < len(rows):
        print(
            f"{name}: {len(rows) - len(whole)} of {len(rows)} rows of {split!r} lack an image or an answer; left out"
        )
    if len(whole) == 0:
        raise InputError(f"{name}: split {split!r} has no row with an image and an answer")
    rows = whole.cast_column("answer", Value("string"))
    if isinstance(rows[0]["image"], list):
        rows = rows.cast_column("image", List(Image(mode="RGB"))).rename_column("image", "images")
    else:
        rows = rows.cast_column("image", Image(mode="RGB"))  # paths become pictures too
    if not isinstance(rows[0]["prompt"], str):
        return rows
    return rows.map(_conversation, desc="writing prompts", input_columns=["prompt"])


def _is_whole(image: Any, answer: Any) -> bool:
    return image not in (None, []) and answer not in (None, "")


def _conversation(question: str) -> dict[str, list[dict[str, str]]]:
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question.replace("<image>", "").strip()},
    ]
    return {"prompt": messages}
