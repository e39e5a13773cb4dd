"""Real two-step GRPO trainings on the tiny models, where the stack can run them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import transformers
from packaging.version import Version

from scripts.models import tiny_training
from scripts.models.tiny_training import LANGUAGE_Q, LANGUAGE_QV, length_reward, rows

if TYPE_CHECKING:
    from pathlib import Path

__all__ = [
    "FORGETS_IN_TRAINING",
    "LANGUAGE_Q",
    "LANGUAGE_QV",
    "forgets_in_training",
    "grpo_trainer",
    "length_reward",
    "nested_config_only",
    "rows",
    "v5_only",
]

v5_only = pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.0"), reason="about what transformers 5 does"
)
nested_config_only = pytest.mark.skipif(
    Version(transformers.__version__) < Version("4.52"), reason="Qwen2.5-VL's config is flat in 4.49"
)
FORGETS_IN_TRAINING = Version("4.50") <= Version(transformers.__version__) < Version("5.24")
"""True where checkpointed layers in training throw the cache away, also where no gradient is wanted."""

forgets_in_training = pytest.mark.skipif(
    not FORGETS_IN_TRAINING, reason="the checkpointed layers of 4.49, and of 5.24 and later, keep their cache"
)


def grpo_trainer(model: Any, output_dir: Path, callbacks: list[Any] | None = None, **options: Any) -> Any:
    """Build the trainer of scripts/models/tiny_training.py; skip the test where TRL has none for images."""
    import trl

    if Version(trl.__version__) < Version("1.0"):
        pytest.skip("this stack's GRPOTrainer takes no images; test_vlm_r1.py has the trainer of its users")
    return tiny_training.grpo_trainer(model, output_dir, callbacks, **options)
