"""Real handwritten digits as a visual question answering dataset that needs no download.

scikit-learn ships 1,797 scans of handwritten digits (8 x 8 pixels, 17 grey levels; Alpaydin and Kaynak,
"Optical Recognition of Handwritten Digits", UCI, 1998). Each scan becomes one picture, one question, and one
answer that a rule can check: the smallest honest task for GRPO on a vision-language model. A model that
cannot see the picture is right one time in ten.

The scans are dealt once and for all into three splits that share none:

| split        | rows | who may look                                                             |
|--------------|------|--------------------------------------------------------------------------|
| `supervised` |  500 | `scripts/models/tiny_vlm.py`, to give the tiny base its eyes and its format |
| `train`      | 1000 | GRPO                                                                     |
| `held_out`   |  297 | no optimizer: accuracy before and after is measured on it                |
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset
    from PIL import Image

Split = Literal["supervised", "train", "held_out"]

QUESTION = "Which digit is shown? Think first, then answer."
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

IMAGE_SIDE = 84
"""Pixels: 6 x 6 patches of 14 pixels in Qwen2.5-VL, so 3 x 3 image tokens."""

_ROWS: dict[str, slice] = {
    "supervised": slice(0, 500),
    "train": slice(500, 1500),
    "held_out": slice(1500, 1797),
}
_DEAL_SEED = 20250219  # The one shuffle behind the three splits: another number makes other splits.
_GREY_LEVELS = 16


def load_digits_split(split: Split, *, size: int | None = None, seed: int = 0) -> Dataset:
    """Load one of the three disjoint splits in the form that TRL's `GRPOTrainer` takes for VLMs.

    Args:
        split (`str`):
            `"supervised"`, `"train"` or `"held_out"`.
        size (`int`, *optional*):
            Number of rows, drawn without replacement. All of the split, in its fixed order, by default.
        seed (`int`, *optional*, defaults to `0`):
            Chooses which `size` rows are drawn. It never moves a row from one split to another.

    Returns:
        `datasets.Dataset` with the columns `prompt` (one user message, as a conversation; the trainer
        puts the image into it), `image` (RGB, 84 x 84) and `answer` (`"0"` to `"9"`).

    Raises:
        ValueError: The split is unknown, or holds fewer than `size` rows.
    """
    import numpy as np
    from datasets import Dataset, Features, Image, Value
    from sklearn.datasets import load_digits

    if split not in _ROWS:
        raise ValueError(f"Unknown split {split!r}: expected one of {', '.join(get_args(Split))}.")
    scans = load_digits()
    rows = np.random.RandomState(_DEAL_SEED).permutation(len(scans.target))[_ROWS[split]]
    if size is not None:
        if not 0 < size <= len(rows):
            raise ValueError(f"size={size} rows asked for, but split {split!r} has 1 to {len(rows)} to give.")
        rows = np.random.RandomState(seed).permutation(rows)[:size]
    columns = {
        "prompt": [[{"role": "user", "content": QUESTION}] for _ in rows],
        "image": [render(scans.images[row]) for row in rows],
        "answer": [str(scans.target[row]) for row in rows],
    }
    message = {"role": Value("string"), "content": Value("string")}
    features = Features({"prompt": [message], "image": Image(), "answer": Value("string")})
    return Dataset.from_dict(columns, features=features)


def render(scan: np.ndarray) -> Image.Image:
    """Render one scan (8 x 8, 0 for paper to 16 for ink) as dark ink on white paper, RGB, 84 x 84 pixels."""
    import numpy as np
    from PIL import Image

    grey = np.round(255 * (1 - scan / _GREY_LEVELS)).astype(np.uint8)
    enlarged = Image.fromarray(grey).resize((IMAGE_SIDE, IMAGE_SIDE), Image.Resampling.BICUBIC)
    return enlarged.convert("RGB")


def completion_for(answer: str) -> str:
    """Return the completion that supervision teaches for an answer: a thought that names the digit, then the digit.

    The thought spells the digit out. The published repetition penalty punishes a token that comes twice, so a
    thought that wrote `7` would make the model avoid `7` as its answer.
    """
    return f"<think>The strokes look like the digit {WORDS[int(answer)]}.</think><answer>{answer}</answer>"


def corpus() -> list[str]:
    """Return every text that the task ever needs, on which the tiny model's tokenizer is trained."""
    completions = [f"assistant\n{completion_for(str(digit))}" for digit in range(len(WORDS))]
    return ["system\nYou are a helpful assistant.", f"user\n{QUESTION}", *completions]
