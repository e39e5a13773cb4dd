"""The known datasets, read by `datasets` from small copies of what is published, become rows that GRPO trains on."""

from __future__ import annotations

import io
import json
from importlib import metadata
from typing import TYPE_CHECKING, Any

import pytest
from packaging.version import Version
from PIL import Image

from grpo_toolkit import InputError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)


def picture(width: int = 640, height: int = 480, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 90 if mode == "L" else (90, 120, 30))


def write_parquet(folder: Path, columns: dict[str, list[Any]], *, split: str = "train", several: bool = False) -> None:
    """As the Hub keeps it: `data/<split>-00000-of-00001.parquet` with the images' bytes inside."""
    from datasets import Dataset, Features, List, Value
    from datasets import Image as ImageFeature

    kinds = {name: Value("string") for name in columns}
    image = "images" if several else "image"
    kinds[image] = List(ImageFeature()) if several else ImageFeature()
    (folder / "data").mkdir(parents=True, exist_ok=True)
    rows = Dataset.from_dict(columns, features=Features(kinds))
    rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


@pytest.fixture
def copies(tmp_path: Path) -> dict[str, Path]:
    """A small local copy of each layout."""
    write_parquet(
        tmp_path / "multimodal-open-r1-8k-verified",
        {
            "image": [picture(), picture(mode="L"), picture()],
            "problem": ["What is the area?", "Which one?\nChoices:\n(A) 3\n(B) 4", "How long?"],
            "solution": [
                "<think>Half the base.</think>\n\n<answer>\\( \\frac{9}{2} \\)</answer>",
                "<think>Four.</think>\n\n<answer>B</answer>",
                "<think>Measure.</think>\n\n<answer>12 cm</answer>",
            ],
            "original_question": ["q"] * 3,
            "original_answer": ["a"] * 3,
        },
    )
    write_parquet(
        tmp_path / "clevr_cogen_a_train",
        {
            "image": [picture(480, 320)] * 3,
            "problem": ["How many items are there in the image?"] * 3,
            "solution": ["<answer> 3 </answer>", "<answer> 10 </answer>", "<answer> 5 </answer>"],
        },
    )
    for split in ("train", "validation", "test"):
        write_parquet(
            tmp_path / "geometry3k",
            {
                "images": [[picture(300, 200)], [picture(300, 200)]],
                "problem": ["<image>Find x.", "<image>Find the area."],
                "answer": ["2 \\sqrt { 221 }", "35"],
            },
            split=split,
            several=True,
        )
    jsonl, coco = tmp_path / "rec_jsons_processed", tmp_path / "coco" / "train2014"
    coco.mkdir(parents=True)
    jsonl.mkdir()
    for number, size in enumerate([(640, 480), (500, 375)]):
        picture(*size).save(coco / f"{number}.jpg")
    rows = [
        {
            "id": number,
            "image": f"train2014/{number}.jpg",
            "conversations": [
                {"from": "human", "value": "<image>Please provide the box of: the dog"},
                {"from": "gpt", "value": box},
            ],
        }
        for number, box in enumerate([[320.0, 240.0, 640.0, 480.0], [0.0, 0.0, 250.0, 375.0]])
    ]
    (jsonl / "refcoco_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    held_out = {"image": "train2014/1.jpg", "problem": "the cat", "solution": [50, 75, 250, 375], "dataset": "refcoco"}
    (jsonl / "refcoco_val.jsonl").write_text(json.dumps(held_out) + "\n")
    return {
        "open_r1": tmp_path / "multimodal-open-r1-8k-verified",
        "clevr_count": tmp_path / "clevr_cogen_a_train",
        "geometry3k": tmp_path / "geometry3k",
        "referring": jsonl,
    }


@pytest.fixture(scope="session")
def processors(qwen: Path) -> Any:
    from grpo_vlm.data.image_sizes import load_processor

    return lambda max_pixels=None, min_pixels=None: load_processor(
        str(qwen), min_pixels=min_pixels, max_pixels=max_pixels
    )


def load(folder: Path, processor: Any = None, **options: Any) -> Any:
    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.data.rows import load_splits

    given: dict[str, Any] = {"held_out_size": 1, **options}
    return load_splits(RecipeArguments(dataset_name=str(folder), **given), seed=0, processor=processor)


def answers(splits: Any) -> list[tuple[str, str]]:
    rows = [*splits.train, *splits.held_out]
    return sorted((row["answer"], row["answer_type"]) for row in rows)


def test_open_r1_has_formulas_and_choices(copies: dict[str, Path], processors: Any) -> None:
    splits = load(copies["open_r1"], processors())
    assert answers(splits) == [("12 cm", "math"), ("B", "choice"), ("\\( \\frac{9}{2} \\)", "math")]
    assert {row["image"].mode for row in [*splits.train, *splits.held_out]} == {"RGB"}
    asked = {row["prompt"][1]["content"] for row in [*splits.train, *splits.held_out]}
    assert "How long? If there are choices, answer with the letter alone." in asked


def test_clevr_counts(copies: dict[str, Path], processors: Any) -> None:
    assert answers(load(copies["clevr_count"], processors())) == [("10", "number"), ("3", "number"), ("5", "number")]


def test_geometry_keeps_its_test_split(copies: dict[str, Path], processors: Any) -> None:
    splits = load(copies["geometry3k"], processors(), held_out_size=5)
    assert (len(splits.train), len(splits.held_out)) == (2, 2)
    row = splits.train[0]
    assert row["images"][0].mode == "RGB"
    assert (row["answer"], row["answer_type"]) == ("2 \\sqrt { 221 }", "math")
    assert row["prompt"][1]["content"] == "Find x. Answer with the value alone."


def test_referring_boxes_are_in_the_frame_of_the_resized_image(copies: dict[str, Path], processors: Any) -> None:
    """https://github.com/om-ai-lab/VLM-R1/issues/44: the model that is right was paid nothing."""
    from grpo_vlm.rewards.rewards import iou_reward

    processor = processors(100_352)
    splits = load(
        copies["referring"],
        processor,
        dataset_layout="referring",
        image_folder=str(copies["referring"].parent / "coco"),
        max_pixels=100_352,
    )
    row = splits.train[0]
    assert row["image"].size == (364, 252)
    # What the model is told of the image is the processor's grid of 14-pixel patches, and nothing else.
    seen = processor(text=["<|image_pad|>"], images=[picture(640, 480)], return_tensors="pt")["image_grid_thw"][0]
    assert (int(seen[2]) * 14, int(seen[1]) * 14) == row["image"].size
    assert row["answer"] == "[182.0, 126.0, 364.0, 252.0]"
    right = "<think>Lower right.</think><answer>[182, 126, 364, 252]</answer>"
    assert iou_reward([right], [row["answer"]]) == [1.0]
    assert iou_reward([right], ["[320.0, 240.0, 640.0, 480.0]"])[0] < 0.01  # as it was without the conversion
    assert splits.held_out[0]["answer"] == "[36.4, 50.4, 182.0, 252.0]"


def test_paths_that_lead_nowhere_are_one_line(copies: dict[str, Path], processors: Any) -> None:
    with pytest.raises(InputError, match=r"0\.jpg: no such file; name the folder .* --image_folder"):
        load(copies["referring"], processors(), dataset_layout="referring", image_folder="/nowhere")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"dataset_layout": "clever"},
            "--dataset_layout clever: there are open_r1, clevr_count, geometry3k, referring",
        ),
        ({"dataset_layout": "referring"}, "has the columns image, conversations or image, problem, solution; found"),
        ({"max_prompt_length": 10}, "has 10 tokens or fewer, its image included"),
    ],
)
def test_wrong_layouts_and_lengths(
    copies: dict[str, Path], processors: Any, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        load(copies["geometry3k"], processors(), **options)


def test_lengths_are_the_processors_own_and_long_prompts_are_left_out(
    copies: dict[str, Path], processors: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from grpo_vlm.data.prompt_lengths import measure
    from grpo_vlm.training.evaluation import model_inputs

    processor = processors(50_176)
    splits = load(copies["open_r1"], processor)
    lengths = []
    for rows in (splits.train, splits.held_out):
        measured = [row.prompt_tokens or 0 for row in measure(rows, processor, every_length=False)]
        assert measured == [model_inputs([row], processor)["input_ids"].shape[1] for row in rows]
        lengths += measured
    kept = load(copies["open_r1"], processor, max_prompt_length=max(lengths) - 1)
    assert len(kept.train) + len(kept.held_out) == 2
    assert "have too long a prompt or too narrow an image; left out" in capsys.readouterr().out


def test_an_image_that_the_processor_would_refuse_is_left_out(tmp_path: Path, processors: Any) -> None:
    columns = {"image": [picture(2100, 10), picture(), picture()], "problem": ["?"] * 3, "solution": ["1"] * 3}
    write_parquet(tmp_path / "clevr_cogen_a_train", columns)
    splits = load(tmp_path / "clevr_cogen_a_train", processors())
    assert len(splits.train) + len(splits.held_out) == 2


def test_max_pixels_is_one_knob_for_rows_and_saved_processor(
    copies: dict[str, Path], processors: Any, tmp_path: Path
) -> None:
    from transformers import AutoProcessor

    from grpo_vlm.data.image_sizes import pixel_limits

    processor = processors(50_176)
    row = load(copies["clevr_count"], processor, max_pixels=50_176).train[0]
    assert row["image"].size == (252, 168)
    assert processor(text=["<|image_pad|>"], images=[row["image"]], return_tensors="pt")["input_ids"].shape[1] == 54
    processor.save_pretrained(tmp_path / "saved")
    limits = pixel_limits(AutoProcessor.from_pretrained(tmp_path / "saved"))
    assert limits is not None
    assert (limits.min_pixels, limits.max_pixels) == (3136, 50_176)


def test_min_pixels_goes_the_same_way(processors: Any, tmp_path: Path, qwen: Path) -> None:
    """Into the rows, the boxes in them, what the processor makes of them, and the export."""
    from grpo_toolkit import export_model
    from grpo_toolkit.model.load import load_model
    from grpo_vlm.data.image_sizes import load_processor, pixel_limits

    box = {"answer": ["[30, 20, 60, 40]"] * 3, "answer_type": ["box"] * 3}
    processor = processors(min_pixels=100_352)
    row = load(write_own(tmp_path / "own", **box), processor, min_pixels=100_352).train[0]
    assert row["image"].size == (392, 280)
    assert row["answer"] == "[196.0, 140.0, 392.0, 280.0]"
    assert processor(text=["<|image_pad|>"], images=[row["image"]], return_tensors="pt")["input_ids"].shape[1] == 140
    assert load(tmp_path / "own").train[0]["image"].size == (60, 40)
    both = processors(200_704, 100_352)
    exported = export_model(load_model(qwen)[0], tmp_path / "export", base=qwen, processing_class=both)
    limits = pixel_limits(load_processor(str(exported.path)))
    assert limits is not None
    assert (limits.min_pixels, limits.max_pixels) == (100_352, 200_704)


@pytest.mark.parametrize("max_pixels", [12_544, 50_176, 401_408, 12_845_056])
def test_what_was_resized_is_not_resized_again(max_pixels: int) -> None:
    """By the processor, after the rows: boxes would be in another image's frame."""
    from dataclasses import replace

    from grpo_vlm.data.image_sizes import PixelLimits

    limits = PixelLimits(factor=28, min_pixels=1, max_pixels=max_pixels)
    limits = replace(limits, min_pixels=limits.largest_minimum())
    for scale in range(1, 200, 3):
        for across, down in ((1, 1), (4, 3), (16, 9), (10, 27), (1, 4)):
            size = limits.fit(across * scale * 10 + 3, down * scale * 10 + 7)
            assert limits.fit(*size) == size
            assert limits.min_pixels <= size[0] * size[1] <= max_pixels


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ((401_408, 500_000), r"--min_pixels 500000: images have at most 401408 pixels .* set 1 to 356274, or raise"),
        ((401_408, 400_000), r"its sides whole squares of 28 pixels; set 1 to 356274, or raise --max_pixels"),
        (
            (None, 20_000_000),
            r"--min_pixels 20000000: images have at most 12845056 pixels \(--max_pixels, or the limit",
        ),
        ((None, 0), "--min_pixels 0: "),
        ((784, 784), r"its sides whole squares of 28 pixels; raise --max_pixels"),
    ],
)
def test_limits_that_leave_no_room_are_one_line(processors: Any, limits: tuple[int | None, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        processors(*limits)


def test_impossible_pixel_limits_are_one_line(qwen: Path, any_base: Path) -> None:
    from grpo_vlm.data.image_sizes import load_processor

    with pytest.raises(InputError, match=r"--max_pixels 784: /.* takes no image smaller than 3136 pixels"):
        load_processor(str(qwen), max_pixels=784)
    if any_base.name != "qwen2_5_vl":
        with pytest.raises(InputError, match=r"--max_pixels 100352: .* has no such limit; leave it out"):
            load_processor(str(any_base), max_pixels=100_352)
        with pytest.raises(InputError, match=r"--min_pixels 3136: .* has no such limit; leave it out"):
            load_processor(str(any_base), min_pixels=3136)


def write_own(folder: Path, **columns: list[Any]) -> Path:
    table = {"image": [picture(60, 40)] * 3, "question": ["Which colour?"] * 3, "answer": ["red"] * 3, **columns}
    write_parquet(folder, table)
    return folder


def test_other_columns_of_ones_own_data_reach_the_rewards(tmp_path: Path, processors: Any) -> None:
    from grpo_vlm.rewards.rewards import accuracy_reward

    own = write_own(
        tmp_path / "own",
        answer=["3", "3", "3"],
        answer_type=["number"] * 3,
        difficulty=["easy", "hard", "hard"],
        completions=["not for TRL's rewards, which get others by this name"] * 3,
    )
    splits = load(own, processors())
    assert set(splits.train.column_names) == {"prompt", "image", "answer", "answer_type", "difficulty"}
    assert sorted(row["difficulty"] for row in [*splits.train, *splits.held_out]) == ["easy", "hard", "hard"]
    row = splits.train[0]
    assert accuracy_reward(["<answer>3.0</answer>"], [row["answer"]], [row["answer_type"]]) == [1.0]


def test_boxes_of_ones_own_data_are_moved_too(tmp_path: Path, processors: Any) -> None:
    own = write_own(
        tmp_path / "own", image=[picture()] * 3, answer=["[320, 240, 640, 480]"] * 3, answer_type=["box"] * 3
    )
    assert load(own, processors(100_352)).train[0]["answer"] == "[182.0, 126.0, 364.0, 252.0]"
    other = write_own(tmp_path / "other", answer_type=["box"] * 3)
    with pytest.raises(InputError, match=r"answer 'red': its answer_type is box, but it is no \[x1, y1, x2, y2\]"):
        load(other, processors())


def test_a_column_answer_type_of_another_meaning_is_one_line(tmp_path: Path) -> None:
    own = write_own(tmp_path / "own", answer_type=["text", "float", "text"])
    with pytest.raises(InputError, match=r"answer_type 'float'; there are text, number, .*; rename the column"):
        load(own)


def test_a_mistyped_test_split_is_one_line(copies: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"no split 'val' \(--dataset_test_split\); it has train, validation, test;"):
        load(copies["geometry3k"], dataset_test_split="val")
    assert len(load(copies["clevr_count"]).held_out) == 1  # the default, which need not be there


def as_published(folder: Path) -> Path:
    """VLM-R1's `rec_jsons_processed`: JSONL to train on, arrays to evaluate on, and arrays of the training rows."""
    (folder / "refcoco_val.jsonl").unlink()
    held_out = {
        "image": "train2014/1.jpg",
        "problem": "the cat",
        "normal_caption": "cat",
        "solution": [50, 75, 250, 375],
    }
    for name in ("refcoco_val", "refcoco_testA"):
        (folder / f"{name}.json").write_text(json.dumps([held_out, held_out], indent=1))
    (folder / "refcoco_train.json").write_text("[]")
    return folder


def test_vlm_r1_as_it_is_published(copies: dict[str, Path]) -> None:
    folder = as_published(copies["referring"])
    options = {"dataset_layout": "referring", "image_folder": str(folder.parent / "coco"), "held_out_size": 9}
    splits = load(folder, **options)
    assert (len(splits.train), len(splits.held_out)) == (2, 4)
    assert splits.held_out[0]["answer"] == "[50.0, 75.0, 250.0, 375.0]"
    alone = load(folder / "refcoco_val.json", **options)
    assert (len(alone.train), len(alone.held_out)) == (1, 1)


def test_pictures_with_a_metadata_file_are_no_jsonl_dataset(tmp_path: Path) -> None:
    rows = [{"file_name": f"{number}.png", "question": "Which colour?", "answer": "red"} for number in range(3)]
    for row in rows:
        picture(60, 40).save(tmp_path / row["file_name"])
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    splits = load(tmp_path)
    assert len(splits.train) + len(splits.held_out) == 3
    assert splits.train[0]["image"].size == (60, 40)


def test_a_conversation_that_nobody_answers_is_left_out(
    copies: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = copies["referring"] / "refcoco_train.jsonl"
    asked = {"id": 2, "image": "train2014/1.jpg", "conversations": [{"from": "human", "value": "the dog"}]}
    options = {"dataset_layout": "referring", "image_folder": str(copies["referring"].parent / "coco")}
    silent = "".join(json.dumps(row) + "\n" for row in (asked, {**asked, "conversations": []}))
    file.write_text(file.read_text() + silent)
    assert len(load(copies["referring"], **options).train) == 2
    assert "2 of 4 rows of 'train' lack a question, an image or an answer; left out" in capsys.readouterr().out
    file.write_text(json.dumps(asked) + "\n")
    with pytest.raises(InputError, match="split 'train' has no row with a question, an image and an answer"):
        load(copies["referring"], **options)


def test_a_row_of_a_known_layout_without_a_solution_is_left_out(tmp_path: Path) -> None:
    columns = {"image": [picture(60, 40)] * 3, "problem": ["?"] * 3, "solution": ["1", None, "2"]}
    write_parquet(tmp_path / "clevr_cogen_a_train", columns)
    splits = load(tmp_path / "clevr_cogen_a_train")
    assert len(splits.train) + len(splits.held_out) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a.jsonl: is empty; expected a row of JSON in each line, or an array of rows"),
        ('{"question": "?"}\n{"question":\n', r"a.jsonl: cannot be read \(JSON parse error: .* in row 1\); expected"),
        ("\n\n", r"a.jsonl: cannot be read \(Instruction .* corresponds to no data!\); expected a row"),
    ],
)
def test_files_without_rows_are_one_line(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    for name in (tmp_path, tmp_path / "a.jsonl"):
        with pytest.raises(InputError, match=message):
            load(name)
    with pytest.raises(InputError, match=r"none.jsonl: cannot be loaded \(.*No such file"):
        load(tmp_path / "none.jsonl")


@pytest.mark.parametrize("embedded", [False, True])
def test_a_file_that_is_no_image_is_one_line(copies: dict[str, Path], processors: Any, embedded: bool) -> None:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    broken = copies["referring"].parent / "coco" / "train2014" / "1.jpg"
    broken.write_bytes(b"not a picture")
    if embedded:
        features = Features({"image": ImageFeature(), "problem": Value("string"), "solution": Value("string")})
        image = {"bytes": broken.read_bytes(), "path": None}
        rows = {"image": [image] * 2, "problem": ["?"] * 2, "solution": ["1"] * 2}
        Dataset.from_dict(rows, features=features).save_to_disk(str(broken.parent / "embedded"))
        with pytest.raises(InputError, match=r"image of row 0 \(from 0, .*\): cannot be read as an image; replace it"):
            load(broken.parent / "embedded", processors())
    else:
        with pytest.raises(InputError, match=r"image .*train2014/1\.jpg: cannot be read as an image; replace it"):
            load(
                copies["referring"],
                processors(),
                dataset_layout="referring",
                image_folder=str(broken.parents[1]),
            )


def encoded(kind: str) -> bytes:
    """A picture with something on it, so that its pixels take most of its file."""
    noise = Image.effect_noise((120, 90), 60).convert("RGB")
    buffer = io.BytesIO()
    noise.save(buffer, kind)
    return buffer.getvalue()


def damaged() -> bytes:
    """Whole by its header and its end, but not in the middle: only decoding tells."""
    whole = encoded("PNG")
    at = whole.index(b"IDAT") + 40
    return whole[:at] + bytes(64) + whole[at + 64 :]


def write_bytes(folder: Path, pictures: list[bytes]) -> Path:
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    texts = dict.fromkeys(("question", "answer"), Value("string"))
    rows = {
        "image": [{"bytes": content, "path": None} for content in pictures],
        "question": [f"What is on picture {number}?" for number in range(len(pictures))],
        "answer": ["noise"] * len(pictures),
    }
    Dataset.from_dict(rows, features=Features({"image": ImageFeature(), **texts})).save_to_disk(str(folder))
    return folder


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_an_image_that_is_cut_off_is_found_before_anything_loads(tmp_path: Path, processors: Any, kind: str) -> None:
    """Its header is good: it ended the training in its middle."""
    whole = encoded(kind)
    assert len(load(write_bytes(tmp_path / "whole", [whole] * 3), processors()).train) == 2
    for share in (0.5, 0.9):
        broken = write_bytes(tmp_path / str(share), [whole, whole, whole[: int(share * len(whole))]])
        with pytest.raises(InputError, match=r"image of row 2 \(from 0, .*\): cannot be read as an image \(.+\)"):
            load(broken, processors())


def test_an_image_with_more_behind_its_end_is_whole(tmp_path: Path, processors: Any) -> None:
    """Phones append previews and films."""
    own = write_bytes(tmp_path / "own", [encoded(kind) + bytes(500) for kind in ("JPEG", "PNG")])
    splits = load(own, processors())
    assert splits.train[0]["image"].size == (120, 90)


def test_an_image_that_is_damaged_in_its_middle_is_one_line_where_it_is_trained_on(
    tmp_path: Path, processors: Any
) -> None:
    from torch.utils.data import DataLoader

    splits = load(write_bytes(tmp_path / "own", [damaged()] * 2), processors())
    message = (
        r"^image of the row that asks 'What is on picture \d\?': cannot be read as an image \(.+\); replace it, or "
        "take its row out, and go on from the last checkpoint with --resume_from_checkpoint true$"
    )
    with pytest.raises(InputError, match=message):
        next(iter(DataLoader(splits.train, collate_fn=list)))


@pytest.mark.parametrize(
    ("pictures", "size", "sizes"),
    [
        ([["a"], ["b"], ["c"], ["d"]], 2, {2}),
        ([["a"], ["a"], ["b"], ["b"], ["c"], ["c"]], 3, {2}),  # two of a pair, and not half of another
        ([["a"], ["a"], ["b"], ["b"], ["c"], ["c"], ["c"]], 3, {3}),  # whatever comes first, three fit exactly
        ([["a", "b"], ["b", "c"], ["c"], ["d"]], 2, {1}),  # a, b and c belong together
        ([["a"], ["a"], ["a"], ["b"], ["b"]], 1, {2}),  # no group is small enough
        ([["a", "b"], ["b"], ["a"]], 2, {0}),
    ],
)
def test_no_picture_is_held_out_and_trained_on(pictures: list[list[str]], size: int, sizes: set[int]) -> None:
    from grpo_vlm.data.hold_out import hold_out, shared

    found = set()
    for seed in range(20):
        chosen = hold_out(pictures, size=size, seed=seed)
        assert chosen == hold_out(pictures, size=size, seed=seed)
        held_out = [pictures[index] for index in chosen]
        assert shared(held_out, [row for index, row in enumerate(pictures) if index not in chosen]) == 0
        found.add(len(chosen))
    assert found == sizes


def test_rows_held_out_depend_on_the_seed() -> None:
    from grpo_vlm.data.hold_out import hold_out

    pictures = [[str(index // 3)] for index in range(3000)]
    chosen = [hold_out(pictures, size=200, seed=seed) for seed in range(2)]
    assert [len(rows) for rows in chosen] == [198, 198]
    assert len(set(chosen[0]) & set(chosen[1])) < 60


def shown(rows: Any) -> set[bytes]:
    return {row["image"].tobytes() for row in rows}


@pytest.mark.parametrize("as_paths", [False, True])
def test_rows_held_out_show_no_image_that_is_trained_on(
    tmp_path: Path, processors: Any, as_paths: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """In RefCOCO an image has several expressions."""
    pictures = [encoded("PNG") for _ in range(10)]
    if as_paths:
        for number, content in enumerate(pictures):
            (tmp_path / f"{number}.png").write_bytes(content)
        rows = [
            {"image": f"{number}.png", "question": f"{count}?", "answer": "yes"}
            for count in range(3)
            for number in range(10)
        ]
        own = tmp_path / "own.jsonl"
        own.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        own = write_bytes(tmp_path / "own", pictures * 3)
    options = {"image_folder": str(tmp_path)}
    splits = load(own, processors(), held_out_size=4, **options)
    assert (len(splits.train), len(splits.held_out), splits.shared_images) == (27, 3, 0)
    assert shown(splits.train).isdisjoint(shown(splits.held_out))
    again = load(own, held_out_size=4, **options)
    assert again.held_out["answer"][:] == splits.held_out["answer"][:]
    assert shown(again.held_out) == shown(splits.held_out)
    capsys.readouterr()
    fewer = load(own, held_out_size=2, **options)
    assert (len(fewer.train), len(fewer.held_out), fewer.shared_images) == (27, 2, 0)
    assert (
        "1 of 3 rows of 'train' show an image of the rows held out, more than --held_out_" in capsys.readouterr().out
    )


def test_rows_of_one_image_are_held_out_all_the_same(tmp_path: Path) -> None:
    splits = load(write_bytes(tmp_path / "own", [encoded("PNG")] * 3))
    assert (len(splits.train), len(splits.held_out), splits.shared_images) == (2, 1, 1)


def write_shapes(folder: Path, kinds: dict[str, Any], **columns: list[Any]) -> Path:
    """Two whole rows, but for the columns given, which have the kinds given."""
    from datasets import Dataset, Features, Value
    from datasets import Image as ImageFeature

    count = len(next(iter(columns.values())))
    plain = {"question": Value("string"), "image": ImageFeature(), "answer": Value("string")}
    rows = {"question": ["?"] * count, "image": [picture(60, 40)] * count, "answer": ["red"] * count, **columns}
    Dataset.from_dict(rows, features=Features({**plain, **kinds})).save_to_disk(str(folder))
    return folder


def messages(*contents: Any, role: str = "user") -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for content in contents]


def own_kinds() -> dict[str, Any]:
    """Kinds of columns, by name."""
    from datasets import ClassLabel, Json, List, Value
    from datasets import Image as ImageFeature

    return {
        "number": Value("int64"),
        "text": Value("string"),
        "binary": Value("binary"),
        "texts": List(Value("string")),
        "numbers": List(Value("int64")),
        "mapping": {"value": Value("string")},
        "label": ClassLabel(names=["red", "blue"]),
        "anything": Json(),
        "images": List(ImageFeature()),
        "stored": {"bytes": Value("binary"), "path": Value("string")},
        "chat": List({"role": Value("string"), "content": Value("string")}),
        "parts": List({"role": Value("string"), "content": List({"type": Value("string"), "text": Value("string")})}),
        "nested": List(List({"role": Value("string"), "content": Value("string")})),
    }


@pytest.mark.parametrize(
    ("column", "kind", "values", "message"),
    [
        (
            "answer",
            "numbers",
            [None, [1, 2]],
            r"row 1 \(from 0\): its answer, column 'answer', is a list \(\[1, 2\]\); ex",
        ),
        ("answer", "mapping", [{"value": "x"}] * 2, r"row 0 \(from 0\): its answer, column 'answer', is a dict"),
        ("answer", "binary", [b"\xff"] * 2, r"row 0 \(from 0\): its answer, column 'answer', is a bytes"),
        ("answer", "anything", ["red", ["red"]], r"row 1 \(from 0\): its answer, column 'answer', is a list"),
        (
            "question",
            "texts",
            [["a", "b"]] * 2,
            r"row 0 .*: its question, column 'question', is a list, but not of mess",
        ),
        (
            "question",
            "mapping",
            [{"value": "x"}] * 2,
            r"its question, column 'question', is a dict .*; expected a text",
        ),
        ("question", "nested", [[messages("?")]] * 2, "is a list, but not of messages"),
        (
            "question",
            "chat",
            [messages("?"), messages("?", role="human")],
            r"row 1 .* whose role is 'human'; there are",
        ),
        ("question", "chat", [messages("?", role="system")] * 2, "has no message of a user"),
        ("question", "chat", [messages(None)] * 2, "has a message whose content is a NoneType"),
        (
            "question",
            "parts",
            [messages([{"type": "text", "text": "?"}])] * 2,
            r"row 0 .*: its prompt cannot be written",
        ),
        ("question", "anything", ["?", {"text": "?"}], r"row 1 .* is a dict"),
        ("image", "number", [1, 2], r"its images are Value\('int64'\); expected images, or paths .*--image_column"),
        ("image", "anything", ["a.png", ["b.png"]], r"its images are Json\(.*\); expected images, or paths"),
        (
            "image",
            "stored",
            [{"bytes": b"", "path": None}] * 2,
            r"image of row 0 .*: cannot be read as an image; replace",
        ),
        ("answer_type", "texts", [["text"]] * 2, r"answer_type List\(.*; there are text, number"),
        ("answer_type", "text", ["text", None], r"answer_type None; there are text, number"),
    ],
)
def test_what_is_no_question_image_or_answer_is_one_line(
    tmp_path: Path, processors: Any, column: str, kind: str, values: list[Any], message: str
) -> None:
    own = write_shapes(tmp_path / "own", {column: own_kinds()[kind]}, **{column: values})
    with pytest.raises(InputError, match=message) as raised:
        load(own, processors())
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("column", "kind", "values"),
    [
        ("question", "text", ["?", "?", None]),
        ("question", "number", [1, 2, None]),
        ("question", "chat", [messages("?"), messages("?"), None]),
        ("question", "chat", [messages("?"), messages("?"), []]),
        ("question", "anything", ["?", messages("?"), None]),
        ("answer", "number", [1, 2, None]),
        ("answer", "anything", ["red", 1, None]),
        ("image", "text", ["p.png", "p.png", None]),
        ("image", "texts", [["p.png"], ["p.png", "p.png"], []]),
        ("image", "texts", [["p.png"], ["p.png"], ["p.png", None]]),
        ("image", "images", [[picture()], [picture()], [picture(), None]]),
        ("image", "stored", [{"bytes": None, "path": "p.png"}, {"bytes": None, "path": "p.png"}, None]),
    ],
)
def test_rows_that_lack_something_are_left_out(
    tmp_path: Path,
    processors: Any,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    column: str,
    kind: str,
    values: list[Any],
) -> None:
    monkeypatch.chdir(tmp_path)
    picture(60, 40).save("p.png")
    own = write_shapes(tmp_path / "own", {column: own_kinds()[kind]}, **{column: values})
    splits = load(own, processors())
    assert (len(splits.train), len(splits.held_out)) == (1, 1)
    assert "1 of 3 rows of 'train' lack a question, an image or an answer; left out" in capsys.readouterr().out
    for row in (*splits.train, *splits.held_out):
        assert all(image.mode == "RGB" for image in (row["images"] if "images" in row else [row["image"]]))
        assert isinstance(row["answer"], str)
        assert row["prompt"][-1]["role"] == "user"


def test_labels_are_answered_by_their_names(tmp_path: Path) -> None:
    """As an ImageFolder has them; their numbers are nothing that a model could say."""
    splits = load(write_shapes(tmp_path / "own", {"answer": own_kinds()["label"]}, answer=[0, 1, -1]))
    assert sorted(row["answer"] for row in (*splits.train, *splits.held_out)) == ["blue", "red"]


def test_one_column_does_not_play_two_parts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"column 'answer' is both prompt and answer; name another with --prompt_col"):
        load(write_own(tmp_path / "own"), prompt_column="answer")


def test_a_known_layout_with_other_values_is_one_line(copies: dict[str, Path]) -> None:
    file = copies["referring"] / "refcoco_train.jsonl"
    row = json.loads(file.read_text().splitlines()[0])
    row["conversations"][1]["value"] = ["left", "right"]
    file.write_text(json.dumps(row) + "\n")
    with pytest.raises(
        InputError, match=r"row 0 \(from 0\): its conversations are not as its layout has them \(could not"
    ):
        load(copies["referring"], dataset_layout="referring", image_folder=str(copies["referring"].parent / "coco"))


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is decoded from now on."""
    from grpo_vlm.data import image_sizes

    seen: list[Any] = []

    def counted(picture: Any) -> Any:
        seen.append(picture)
        return decode(picture)

    decode = image_sizes.decode
    monkeypatch.setattr(image_sizes, "decode", counted)
    return seen


def image_rows(count: int) -> Any:
    from datasets import Dataset

    from grpo_vlm.data.image_sizes import PixelLimits, decoded

    rows = {"image": [picture(64 + 8 * index, 64) for index in range(count)], "answer_type": ["math"] * count}
    return decoded(Dataset.from_dict(rows), PixelLimits(factor=28, min_pixels=28 * 28, max_pixels=56 * 56))


def test_an_image_is_decoded_once_for_all_readings_of_a_rollout(decodings: list[Any]) -> None:
    from grpo_toolkit import rows_once

    rows: Any = rows_once(image_rows(2))
    # As TRL reads eight micro-batches of two prompts.
    batches = [rows.__getitems__([0, 0, 0, 0, 1, 1, 1, 1]) for _ in range(8)]
    assert len(decodings) == 2
    assert all(max(row["image"].size) <= 56 for batch in batches for row in batch)


def test_answer_types_are_found_without_a_look_at_the_images(decodings: list[Any]) -> None:
    from grpo_vlm.data.columns import answer_types

    rows = image_rows(4).select([0, 2, 3])
    assert answer_types(rows) == ["math"]
    assert not decodings
    assert rows.unique("answer_type") == ["math"]  # which writes all columns anew
    assert len(decodings) == 3


def test_who_draws_into_an_image_changes_no_later_reading() -> None:
    rows = image_rows(1)
    before = rows[0]["image"].tobytes()
    rows[0]["image"].putpixel((0, 0), (0, 0, 255))
    assert rows[0]["image"].tobytes() == before


@pytest.mark.parametrize("suffix", ["jpeg", "png", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 9])
def test_sizes_are_those_of_the_picture_turned_upright(suffix: str, orientation: int) -> None:
    from PIL.ExifTags import Base

    from grpo_vlm.data.image_files import decode, look_at

    exif, file = Image.Exif(), io.BytesIO()
    exif[Base.Orientation] = orientation
    picture(64, 32).save(file, suffix, exif=exif)
    lying = {"bytes": file.getvalue(), "path": None}
    size, _ = look_at(lying, name="here")
    assert size == decode(lying).size == ((32, 64) if orientation == 6 else (64, 32))


def test_the_size_of_a_png_is_read_without_its_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import PngImagePlugin

    from grpo_vlm.data.image_files import look_at

    file = io.BytesIO()
    picture(64, 32).save(file, "png")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", lambda self: pytest.fail("decoded"))
    assert look_at({"bytes": file.getvalue(), "path": None}, name="here")[0] == (64, 32)


def write_questions(folder: Path, paths: list[Path]) -> Path:
    """A JSONL file with a question about each picture."""
    lines = [
        {"image": str(path), "question": f"How many, {number}?", "answer": "3"} for number, path in enumerate(paths)
    ]
    file = folder / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return file


def splits_of(file: Path, **settings: Any) -> Any:
    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.data.rows import load_splits

    return load_splits(RecipeArguments(dataset_name=str(file), **settings), seed=0)


def test_the_same_picture_in_several_files_is_not_held_out_and_trained_on(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}_{copy}.png" for number in range(10) for copy in range(3)]
    for number, path in enumerate(paths):
        Image.new("RGB", (64, 64), (20 * (number // 3), 9, 9)).save(path)
    splits = splits_of(write_questions(tmp_path, paths), held_out_size=3)
    trained, held_out = ({row["image"].tobytes() for row in rows} for rows in (splits.train, splits.held_out))
    assert held_out
    assert not trained & held_out


def test_a_file_that_was_cut_off_since_is_found(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.png" for number in range(3)]
    for number, path in enumerate(paths):
        Image.effect_noise((64, 64), 20 + number).save(path)
    file = write_questions(tmp_path, paths)
    splits_of(file)
    paths[1].write_bytes(paths[1].read_bytes()[:200])
    with pytest.raises(InputError, match=r"1\.png"):
        splits_of(file)


@pytest.mark.parametrize("part", ["How many?", {"text": "How many?"}, {"type": "text"}, {"type": "video"}])
def test_a_part_of_a_message_that_is_none_is_one_line(tmp_path: Path, part: Any) -> None:
    from datasets import Dataset

    content = [part] if isinstance(part, str) else [part, {"type": "image"}]
    messages = [{"role": "user", "content": content}]
    rows = Dataset.from_dict({"prompt": [messages] * 2, "image": [picture(64, 64)] * 2, "answer": ["3"] * 2})
    rows.save_to_disk(tmp_path / "rows")
    with pytest.raises(InputError, match=r"row 0 .* has a message with a part that is neither"):
        splits_of(tmp_path / "rows")


@pytest.mark.parametrize(
    ("size", "taken"),
    [((640, 480), True), ((1200, 400), True), ((30, 9000), False), ((48069, 2993), False)],
)
def test_images_that_the_processor_would_refuse_or_resize_again_are_not_taken(
    size: tuple[int, int], taken: bool
) -> None:
    from grpo_vlm.data.image_sizes import PixelLimits

    limits = PixelLimits(factor=28, min_pixels=157_616, max_pixels=200_704)
    assert limits.takes(*size) == taken
