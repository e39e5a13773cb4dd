"""Figures of a training that callbacks measure themselves, in the runs that the trainer opened.

A trainer hands its log to its own trackers before it hands it to the callbacks that a user gave it: what these add is
in `log_history` and in no run. So they log it, one row for each of the trainer's, on the axis `train/global_step`.
TensorBoard's writer belongs to the trainer's callback, which lends it to nobody.
"""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TYPE_CHECKING

from grpo_toolkit.model.live_model import random_state_kept
from grpo_toolkit.reporting.trackers import trackio, wandb_run
from grpo_toolkit.reporting.trackers.bounded_calls import Breaker
from grpo_toolkit.reporting.trackers.metrics import STEP_METRIC

if TYPE_CHECKING:
    from collections.abc import Mapping

logger = logging.getLogger(__name__)


class TrainingScalars:
    """The figures of one training on their way to W&B and Trackio, for the main process.

    A tracker that fails is left alone from there on, with one warning.
    """

    def __init__(self) -> None:
        self._breakers = {"W&B": Breaker(), "Trackio": Breaker()}

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        """Log figures by their keys into the runs that are open in this process."""
        row = {**values, STEP_METRIC: step}
        run = wandb_run.active_run()
        with random_state_kept():
            if run is not None:
                self._breakers["W&B"].call("scalars", partial(run.log, row))
            if trackio.open_run() is not None:
                self._breakers["Trackio"].call("scalars", partial(sys.modules["trackio"].log, row))
        for name, breaker in self._breakers.items():
            if (news := breaker.news()) is not None:
                logger.warning("grpo_toolkit: %s takes no %s (%s)", name, ", ".join(values), news)
