"""From a dataset's name to rows that GRPO can train on: `prompt` (chat messages), `image` or `images` (RGB), `answer`
(text) and `answer_type`, where the dataset has one or is a known one.

`digits` is embedded. The datasets of `layouts.py` are read as they are published. Any other name goes to
`datasets.load_dataset` all the same: a Hub name, a folder saved with `save_to_disk`, or a folder of parquet files,
with columns under their usual names, or named with `--prompt_column`, `--image_column` and `--answer_column`. The
other columns stay, for rewards of one's own.

Nothing is ever cut: a prompt that is too long, image tokens included, is left out, and so is a row without a question,
an image or an answer. Their number is logged.
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit import InputError
from grpo_vlm.data.columns import conversation, read_columns
from grpo_vlm.data.hold_out import hold_out, shared
from grpo_vlm.data.image_sizes import decoded, pixel_limits, undecoded
from grpo_vlm.data.layouts import LAYOUTS, Layout, Question, find_layout, text_columns
from grpo_vlm.data.prompt_lengths import Longest, fit_boxes, longest_prompt, measure

if TYPE_CHECKING:
    from collections.abc import Iterable

    from datasets import Dataset

    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.data.prompt_lengths import Measured


@dataclass(frozen=True, kw_only=True)
class Splits:
    """The rows to train on, and those only to measure on.

    Attributes:
        train, held_out: in the row form.
        longest: of the prompts that are trained on; None where they were loaded without a processor.
        shared_images: how many rows held out show an image that is trained on.
        held_out_pictures: of each row held out, the digests of its images.
    """

    train: Dataset
    held_out: Dataset
    longest: Longest | None
    shared_images: int
    held_out_pictures: list[tuple[str, ...]]


def load_splits(arguments: RecipeArguments, *, seed: int, processor: Any = None) -> Splits:
    """Load, check and reshape the dataset.

    Args:
        arguments (`RecipeArguments`):
            Which dataset, and how much of it.
        seed (`int`):
            Of the rows that are held out where the dataset has no split for it.
        processor (*optional*):
            The model's: says how large it sees images and how long prompts are. Without it nothing is left out for
            its length, and boxes stay in the frame of the original image.

    Raises:
        InputError: it cannot be found, has no such split, or lacks a column.
    """
    if arguments.held_out_size < 1:
        raise InputError(f"--held_out_size {arguments.held_out_size}: at least one row must be held out")
    if not arguments.dataset_name:
        raise InputError("no dataset: pass --dataset_name with a Hub name or a folder (or `digits`)")
    splits = _digits() if arguments.dataset_name == "digits" else _load(arguments)
    test_split = arguments.dataset_test_split
    if test_split not in splits and test_split != type(arguments).dataset_test_split:
        raise InputError(
            f"dataset {arguments.dataset_name}: no split {test_split!r} (--dataset_test_split); it has "
            f"{', '.join(splits)}; without the setting training rows are held out where there is no split 'test'"
        )
    train, measured = _reshape(splits, arguments.dataset_train_split, arguments, processor)
    if test_split in splits:
        held_out, measured_out = _reshape(splits, test_split, arguments, processor)
    else:  # none published: hold some of the training rows out
        chosen = set(_choose(measured, arguments, seed=seed))
        held_out, measured_out = _select(train, measured, chosen)
        train, measured = _select(train, measured, set(range(len(train))) - chosen)
    asked, measured_out = _select(held_out, measured_out, range(min(arguments.held_out_size, len(held_out))))
    if test_split not in splits:
        why = "show an image of the rows held out, more than --held_out_size"
        _say_left_out(f"dataset {arguments.dataset_name}", arguments.dataset_train_split, held_out, asked, why)
    limited = arguments.min_pixels is not None or arguments.max_pixels is not None
    limits = pixel_limits(processor) if limited else None
    pictures_out = [row.pictures for row in measured_out]
    return Splits(
        train=decoded(train, limits),
        held_out=decoded(asked, limits),
        longest=None if processor is None else longest_prompt(train, measured, processor),
        shared_images=shared(pictures_out, [row.pictures for row in measured]),
        held_out_pictures=pictures_out,
    )


def named_layout(arguments: RecipeArguments) -> Layout | None:
    """Return the known layout of the dataset; None for the digits and for datasets with plain columns.

    Raises:
        InputError: there is no layout of the name that was given.
    """
    name = find_layout(str(arguments.dataset_name), arguments.dataset_layout)
    if name is not None and name not in LAYOUTS:
        raise InputError(f"--dataset_layout {name}: there are {', '.join(LAYOUTS)}")
    return None if name is None else LAYOUTS[name]


def _digits() -> dict[str, Dataset]:
    from grpo_vlm.data.digits import load_digits_split

    return {"train": load_digits_split("train"), "test": load_digits_split("held_out")}


def _load(arguments: RecipeArguments) -> dict[str, Dataset]:
    from datasets import Dataset, DatasetDict, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    name = str(arguments.dataset_name)
    folder = Path(name)
    files = _json_files(folder)
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            loaded = load_from_disk(name)
        elif files:  # One by one: the splits of VLM-R1 have columns of their own.
            return {split: _load_json(files[split]) for split in files}
        else:
            loaded = load_dataset(name, name=arguments.dataset_config)
    # What `datasets` raises for unknown names, no network, unreadable files.
    except (OSError, ValueError, DatasetGenerationError) as error:
        raise InputError(
            f"dataset {name}: cannot be loaded ({_reason(error)}); pass a Hub name or a local folder"
        ) from error
    if isinstance(loaded, Dataset):
        return {arguments.dataset_train_split: loaded}
    assert isinstance(loaded, DatasetDict)
    return dict(loaded)


def _json_files(path: Path) -> dict[str, list[Path]]:
    """Return the splits of a file, or of a folder of JSONL files, by name; none where it is neither.

    VLM-R1 trains on `refcoco_train.jsonl` and evaluates on `refcoco_val.json`, an array. The `metadata.jsonl` beside
    pictures is read by `datasets`, with the pictures.
    """
    if path.suffix in (".json", ".jsonl"):
        return {"train": [path]}
    lines = [file for file in sorted(path.glob("*.jsonl")) if file.name != "metadata.jsonl"]
    arrays = [file for file in sorted(path.glob("*.json")) if lines and file.with_suffix(".jsonl") not in lines]
    held_out = [file for file in (*lines, *arrays) if "val" in file.stem or "test" in file.stem]
    train = [file for file in lines if file not in held_out]
    splits = {"train": train or held_out, "test": held_out if train else []}
    return {split: files for split, files in splits.items() if files}


def _load_json(files: list[Path]) -> Dataset:
    """Load the rows of files with the same columns.

    Raises:
        InputError: a file is empty, or no JSON.
    """
    from datasets import load_dataset
    from datasets.exceptions import DatasetGenerationError

    for file in files:
        if file.stat().st_size == 0:
            raise InputError(f"{file}: is empty; expected a row of JSON in each line, or an array of rows")
    try:
        return load_dataset("json", data_files=[str(file) for file in files], split="train")
    except (ValueError, DatasetGenerationError) as error:
        names = ", ".join(map(str, files))
        raise InputError(
            f"{names}: cannot be read ({_reason(error)}); expected a row of JSON in each line, or an array of rows"
        ) from error


def _reason(error: Exception) -> str:
    """Return the first line that says something; of a failed generation only the cause does."""
    lines = f"{error}\n{error.__cause__ or ''}".splitlines()
    says = [line.strip() for line in lines if line.strip() and "error occurred while generating" not in line]
    return says[0] if says else type(error).__name__


def _reshape(
    splits: dict[str, Dataset], split: str, arguments: RecipeArguments, processor: Any
) -> tuple[Dataset, list[Measured]]:
    """Return one split in the row form, and what its rows measure. No image is decoded for it.

    Raises:
        InputError: no such split, a column is missing, an image cannot be read, or no row is left.
    """
    name = f"dataset {arguments.dataset_name}"
    if split not in splits:
        raise InputError(f"{name}: no split {split!r}; it has {', '.join(splits)}; choose with --dataset_train_split")
    rows = splits[split]
    if arguments.dataset_name != "digits":
        layout = named_layout(arguments)
        read = read_columns(rows, arguments) if layout is None else _read(rows, layout, arguments)
        whole = _whole(read)
        _say_left_out(name, split, read, whole, "lack a question, an image or an answer")
        if len(whole) == 0:
            raise InputError(f"{name}: split {split!r} has no row with a question, an image and an answer")
        rows = _with_pictures(whole, arguments)
    measured = measure(rows, processor, every_length=arguments.max_prompt_length is not None)
    fitting = [index for index, row in enumerate(measured) if row.fits(arguments.max_prompt_length)]
    if len(fitting) == 0:
        raise InputError(
            f"{name}: no prompt of split {split!r} has {arguments.max_prompt_length} tokens or fewer, its image "
            "included; raise --max_prompt_length or lower --max_pixels"
        )
    short, measured = _select(rows, measured, fitting)
    _say_left_out(name, split, rows, short, "have too long a prompt or too narrow an image")
    limits = pixel_limits(processor)
    return short if limits is None else fit_boxes(short, measured, limits), measured


def _choose(measured: list[Measured], arguments: RecipeArguments, *, seed: int) -> list[int]:
    """Choose training rows to hold out: a tenth, but no more than are asked for.

    Where all rows belong together by their images, they are any rows: `Splits.shared_images` then tells.

    Raises:
        InputError: there is but one row.
    """
    if len(measured) < 2:
        raise InputError(f"dataset {arguments.dataset_name}: one row, of which none can be held out")
    size = min(arguments.held_out_size, max(1, len(measured) // 10))
    chosen = hold_out([row.pictures for row in measured], size=size, seed=seed)
    return chosen or random.Random(seed).sample(range(len(measured)), size)


def _select(rows: Dataset, measured: list[Measured], chosen: Iterable[int]) -> tuple[Dataset, list[Measured]]:
    order = sorted(chosen)
    if len(order) == len(rows):
        return rows, measured
    return rows.select(order), [measured[index] for index in order]


def _read(rows: Dataset, layout: Layout, arguments: RecipeArguments) -> Dataset:
    """Read a dataset of a known layout."""
    columns = text_columns(layout, rows.column_names)
    if columns is None or layout.image_column not in rows.column_names:
        wanted = " or ".join(", ".join((layout.image_column, *texts)) for texts in layout.text_columns)
        raise InputError(
            f"dataset {arguments.dataset_name}: its layout has the columns {wanted}; "
            f"found {', '.join(rows.column_names)}"
        )
    rows = rows.select_columns([layout.image_column, *columns])
    if layout.image_column != "image":
        rows = rows.rename_column(layout.image_column, "image")

    def read(*values: Any) -> dict[str, Any]:
        *texts, index = values
        try:
            known = None not in texts
            question = layout.read(*texts) if known else Question(text="", answer="", answer_type="text")
            prompt = conversation(question.text, instruction=layout.instruction)
        except (AttributeError, TypeError, ValueError) as error:  # what reading a value of another kind ends in
            raise InputError(
                f"dataset {arguments.dataset_name}: row {index} (from 0): its {' and '.join(columns)} are not as its "
                f"layout has them ({error})"
            ) from error
        return {"prompt": prompt, "answer": question.answer, "answer_type": question.answer_type}

    options = {"input_columns": list(columns), "remove_columns": list(columns), "with_indices": True}
    return rows.map(read, **options, desc="reading rows")


def _with_pictures(rows: Dataset, arguments: RecipeArguments) -> Dataset:
    """Return images as bytes or a path, which is looked up in `--image_folder`."""
    from datasets import Image, List, Value

    kind = rows.features["image"]
    several = isinstance(kind, List)
    one = kind.feature if several else kind
    paths = isinstance(one, Value) and "string" in one.dtype
    if not (paths or isinstance(one, Image) or one == Value("binary") or _has_parts(one)):
        raise InputError(
            f"dataset {arguments.dataset_name}: its images are {kind}; expected images, or paths of images, one or a "
            "list of them; name the right column with --image_column"
        )
    if paths:
        folder = Path(arguments.image_folder or "")
        rows = rows.map(_in_folder, input_columns=["image"], fn_kwargs={"folder": str(folder)}, desc="finding images")
    return undecoded(rows.rename_column("image", "images") if several else rows)


def _has_parts(kind: Any) -> bool:
    """Return whether it is an Image by its content, as in parquet files that do not say so."""
    return isinstance(kind, dict) and set(kind) == {"bytes", "path"}


def _in_folder(image: str | list[str], *, folder: str) -> dict[str, Any]:
    paths = [Path(folder, one) for one in (image if isinstance(image, list) else [image])]
    for path in paths:
        if not path.is_file():
            raise InputError(f"image {path}: no such file; name the folder that paths are relative to: --image_folder")
    return {"image": [str(path) for path in paths] if isinstance(image, list) else str(paths[0])}


def _whole(rows: Dataset) -> Dataset:
    """Keep the rows with a question, an image and an answer. No image is decoded for it."""

    def are_whole(prompts: Any, images: Any, answers: Any) -> list[bool]:
        return [
            prompt.is_valid and len(prompt) > 0 and _is_there(image) and bool((answer.as_py() or "").strip())
            for prompt, image, answer in zip(prompts, images, answers, strict=True)
        ]

    looked_at = rows.with_format("arrow")
    options = {"batched": True, "input_columns": ["prompt", "image", "answer"], "desc": "looking for whole rows"}
    return looked_at.filter(are_whole, **options).with_format(None)


def _is_there(image: Any) -> bool:
    """Return whether there is an image as Arrow has it, or a list of images."""
    import pyarrow

    if not image.is_valid:
        return False
    if isinstance(image, pyarrow.ListScalar):
        return len(image) > 0 and all(_is_there(one) for one in image)
    return not isinstance(image, pyarrow.StructScalar) or any(part.is_valid for part in image.values())


def _say_left_out(name: str, split: str, before: Dataset, after: Dataset, why: str) -> None:
    if len(after) < len(before) and os.environ.get("RANK", "0") == "0":
        print(f"{name}: {len(before) - len(after)} of {len(before)} rows of {split!r} {why}; left out")
