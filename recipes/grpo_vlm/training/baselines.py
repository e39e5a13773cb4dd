"""The share of held-out rows that the base answers right, measured before training and kept for a resume.

Where the weights are sharded they first come together when training begins, and a resumed run then has its
checkpoint's in them. So what was measured of the base lies in output_dir, beside what it was measured on.
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from grpo_vlm.training.trainer import measure, tell

if TYPE_CHECKING:
    from collections.abc import Mapping

    from datasets import Dataset
    from transformers import TrainerControl, TrainerState, TrainingArguments
    from trl import GRPOConfig, ModelConfig

    from grpo_vlm.arguments import RecipeArguments
    from grpo_vlm.data.rows import Splits
    from grpo_vlm.training.trainer import AccuracyTrainer

FILE_NAME = "baselines.json"

ALONE = "asked for the answer alone"
AFTER = "after training"


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The shares of held-out rows answered right; `direct_accuracy` is for the answer alone, None if not asked."""

    accuracy: float
    direct_accuracy: float | None = None


class Baselines(TrainerCallback):
    """A callback that measures the base before training, or reads what an earlier start measured.

    `take` measures it before training; where weights are sharded, or rollouts may be fast, this is added to the
    trainer as a callback instead, and does so when training begins. A run that goes on from a checkpoint takes what
    was measured of the base on the same (`measured_on`, see `conditions`). Where that is not known and weights are
    sharded, it can but measure the checkpoint, whose name is then in `checkpoint_name`.
    """

    def __init__(
        self,
        trainer: AccuracyTrainer,
        rows: Dataset,
        *,
        direct: bool,
        measured_on: Mapping[str, Any],
        checkpoint: str | None = None,
    ) -> None:
        self.figures = Figures(accuracy=0.0)
        self.checkpoint_name: str | None = None
        self._trainer, self._rows, self._direct = trainer, rows, direct
        self._measured_on = dict(measured_on)
        self._checkpoint = None if checkpoint is None else Path(checkpoint).resolve()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.take(loaded=self._checkpoint)

    def take(self, *, loaded: Path | None = None) -> None:
        """Read or measure the figures. `loaded` is the checkpoint that the model has its weights from, if any."""
        known = self._known()
        if known is not None:
            self.figures = known
            self._say(known)
        elif loaded is not None:
            self.checkpoint_name = loaded.name
            self.figures = self._measure(f"of {loaded.name}, as the base's on these rows is not known")
        else:
            self.figures = self._measure("before training")
        folder = Path(self._trainer.args.output_dir)
        # What is there may say more: a direct accuracy that this run was not asked for.
        is_there = known is not None and (folder / FILE_NAME).is_file()
        if self.checkpoint_name is None and not is_there and self._trainer.is_world_process_zero():
            write_baselines(folder, self.figures, measured_on=self._measured_on)

    def _measure(self, when: str) -> Figures:
        direct_accuracy = None
        if self._direct:
            direct_accuracy = measure(self._trainer, self._rows, f"{when}, {ALONE}", direct=True)
        return Figures(accuracy=measure(self._trainer, self._rows, when), direct_accuracy=direct_accuracy)

    def _known(self) -> Figures | None:
        """Return in every process what the main one finds: measuring is for all of them or for none."""
        from accelerate.utils import broadcast_object_list

        found = None
        if self._checkpoint is not None and self._trainer.is_world_process_zero():
            found = read_baselines(self._checkpoint.parent, measured_on=self._measured_on, direct=self._direct)
        known: Figures | None = broadcast_object_list([found])[0]
        return known

    def _say(self, known: Figures) -> None:
        note = ", as measured when the run began"
        if known.direct_accuracy is not None:
            tell(self._trainer, known.direct_accuracy, self._rows, f"before training, {ALONE}", note=note)
        tell(self._trainer, known.accuracy, self._rows, "before training", note=note)


class AfterTraining(TrainerCallback):
    """A callback that measures held-out accuracy once the training is over, while rollouts still go its way.

    `trainer` is set once there is one. `accuracy` stays None where measuring failed: the export goes first then. It is
    printed when it is known only if `is_told`: the story of the run has it at its end.
    """

    def __init__(self, rows: Dataset, *, is_told: bool) -> None:
        self.trainer: Any = None
        self.accuracy: float | None = None
        self._rows, self._is_told = rows, is_told

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        try:
            self.accuracy = self._measure()
        except Exception as error:  # an export is worth more than a figure, which is measured again after it
            print(f"{'accuracy':<12}{AFTER}: {error}; tried again at the end", file=sys.stderr, flush=True)

    def figure(self) -> float:
        """Return the accuracy, measured now if it was not."""
        return self._measure() if self.accuracy is None else self.accuracy

    def _measure(self) -> float:
        accuracy: float = self.trainer.accuracy(self._rows)
        if self._is_told:
            tell(self.trainer, accuracy, self._rows, AFTER)
        return accuracy


def conditions(
    recipe: RecipeArguments, training: GRPOConfig, model: ModelConfig, splits: Splits
) -> dict[str, str | int | bool | None]:
    """Return what an accuracy depends on: the model as it is loaded, the rows, and what an answer may be."""
    rows = splits.held_out
    texts = [name for name in ("prompt", "answer", "answer_type") if name in rows.column_names]
    digest = hashlib.sha256()
    for row, pictures in zip(rows.select_columns(texts), splits.held_out_pictures, strict=True):
        digest.update(json.dumps([row, pictures]).encode())
    return {
        "model": str(model.model_name_or_path),
        "revision": model.model_revision,
        "dtype": str(model.dtype),
        "load_in_4bit": model.load_in_4bit,
        "load_in_8bit": model.load_in_8bit,
        "rows": len(rows),
        "content": digest.hexdigest(),
        "min_pixels": recipe.min_pixels,
        "max_pixels": recipe.max_pixels,
        "max_completion_length": training.max_completion_length,
    }


def write_baselines(folder: Path, figures: Figures, *, measured_on: Mapping[str, Any]) -> None:
    """Write the figures into the folder, whole or not at all."""
    unfinished = folder / f"{FILE_NAME}.unfinished"
    content = {**asdict(figures), "measured_on": dict(measured_on)}
    unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    unfinished.replace(folder / FILE_NAME)


def read_baselines(folder: Path, *, measured_on: Mapping[str, Any], direct: bool) -> Figures | None:
    """Return the folder's figures; None without any, for other conditions, or without a direct one that is wanted."""
    try:
        content = json.loads((folder / FILE_NAME).read_text(encoding="utf-8"))
        figures = Figures(
            accuracy=float(content["accuracy"]),
            direct_accuracy=float(content["direct_accuracy"]) if direct else None,
        )
    except (OSError, ValueError, TypeError, KeyError):  # no such file, not JSON, or not ours
        return None
    return figures if content.get("measured_on") == measured_on else None
