"""Latency scalars for TensorBoard, in the folder that the trainer's writer wrote to.

The trainer's callback closes its writer before ours is asked: a second file in the same folder is read as one run.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from grpo_toolkit.reporting.trackers.metrics import scalars

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from grpo_toolkit.latency.rows.review import Visit


def writer_folder(args: TrainingArguments) -> Path | None:
    """Return the folder of the newest events of the trainer's writer, None where there are none."""
    named = [os.environ.get("TENSORBOARD_LOGGING_DIR"), getattr(args, "logging_dir", None)]
    places = [Path(place).expanduser() for place in named if place] + [Path(args.output_dir, "runs")]
    events = [file for place in places if place.is_dir() for file in place.rglob("events.out.tfevents.*")]
    return max(events, key=lambda file: file.stat().st_mtime).parent if events else None


def log_visit(folder: Path, visit: Visit) -> None:
    """Append one export's scalars."""
    from torch.utils.tensorboard import SummaryWriter

    with SummaryWriter(log_dir=str(folder), filename_suffix=".latency") as writer:
        for name, value in scalars(visit).items():
            writer.add_scalar(name, value, visit.step)
