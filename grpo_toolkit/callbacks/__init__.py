"""The callbacks, thin over the rest of the package.

Give them in the order of the README: a resumed or best model is put right before it is exported, and an export is
there before it is timed. All of them keep the rule that training is sacred: they do not raise into the trainer or run
a collective on one rank, and those that only look or save do not change a loss by a bit. `PackedVisionCallback` and
`FastRolloutCallback` put an equal computation in a slow one's place: it rounds otherwise, and sampled tokens differ as
any two kernels' do. What fails is reported once and training goes on; `strict=True` raises it when training has ended,
which also ends the callbacks after it.
"""

from grpo_toolkit.callbacks.export import ExportCallback
from grpo_toolkit.callbacks.fast_rollout import FastRolloutCallback
from grpo_toolkit.callbacks.kv_cache import KVCacheCallback
from grpo_toolkit.callbacks.latency import LatencyCallback
from grpo_toolkit.callbacks.packed_vision import PackedVisionCallback
from grpo_toolkit.callbacks.resume_guard import ResumeGuardCallback
from grpo_toolkit.callbacks.step_time import StepTimeCallback

__all__ = [
    "ExportCallback",
    "FastRolloutCallback",
    "KVCacheCallback",
    "LatencyCallback",
    "PackedVisionCallback",
    "ResumeGuardCallback",
    "StepTimeCallback",
]
