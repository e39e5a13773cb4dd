"""From a dataset's name to rows that GRPO can train on: `prompt` (chat messages), `image` (RGB) and `answer` (text).

`digits` is embedded. Any other name goes to `datasets.load_dataset`: a Hub name, a folder saved with
`save_to_disk`, or a folder of parquet files. Columns are found under their usual names, or named with
`--prompt_column`, `--image_column` and `--answer_column`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
    if arguments.dataset_name == "digits":
        from digits import load_digits_split

        held_out = load_digits_split("held_out")
        wanted = min(arguments.held_out_size, len(held_out))
        return Splits(train=load_digits_split("train"), held_out=held_out.select(range(wanted)))
    if not arguments.dataset_name:
        raise InputError("no dataset: pass --dataset_name with a Hub name or a folder (or `digits`)")
    splits = _load(arguments)
    train = _split(splits, arguments.dataset_train_split, arguments.dataset_name)
    columns = find_columns(train.column_names, arguments)
    if arguments.dataset_test_split in splits:
        held_out = splits[arguments.dataset_test_split]
    else:  # none published: hold some of the training rows out
        parts = train.train_test_split(test_size=min(arguments.held_out_size, max(1, len(train) // 10)), seed=seed)
        train, held_out = parts["train"], parts["test"]
    held_out = held_out.select(range(min(arguments.held_out_size, len(held_out))))
    return Splits(train=_reshape(train, columns), held_out=_reshape(held_out, columns))


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


def _split(splits: dict[str, Dataset], wanted: str, name: str) -> Dataset:
    if wanted not in splits:
        raise InputError(
            f"dataset {name}: no split {wanted!r}; it has {', '.join(splits)}; choose one with --dataset_train_split"
        )
    if len(splits[wanted]) == 0:
        raise InputError(f"dataset {name}: split {wanted!r} is empty")
    return splits[wanted]


def _reshape(dataset: Dataset, columns: dict[str, str]) -> Dataset:
    """To the three columns, lazily for the images: they are decoded when a batch asks for them."""
    from datasets import Image, Value

    first = dataset[0]
    if first[columns["image"]] in (None, []) or first[columns["answer"]] is None:
        raise InputError(f"the dataset's first row has no {'image' if not first[columns['image']] else 'answer'}")
    if columns["image"] == "image" and not isinstance(first["image"], list):
        dataset = dataset.cast_column("image", Image(mode="RGB"))
    renamed = dataset.rename_columns({old: new for new, old in columns.items() if new != old})
    kept = renamed.select_columns(list(USUAL_NAMES))
    if isinstance(first[columns["image"]], list):
        kept = kept.rename_column("image", "images")
    kept = kept.cast_column("answer", Value("string"))
    if not isinstance(first[columns["prompt"]], str):
        return kept
    return kept.map(_conversation, desc="writing prompts", input_columns=["prompt"])


def _conversation(question: str) -> dict[str, list[dict[str, str]]]:
    messages = [
        {"role": "system", "content": SYSTEM_PROMPT},
        {"role": "user", "content": question.replace("<image>", "").strip()},
    ]
    return {"prompt": messages}
