"""Every model that leaves GRPO training is ready for inference.

    from grpo_toolkit import ExportCallback, KVCacheCallback, LatencyCallback

    trainer = GRPOTrainer(..., callbacks=[KVCacheCallback(), ExportCallback("out/export"), LatencyCallback()])
    trainer.train()

The names below are imported when they are first used, so `import grpo_toolkit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_toolkit.ahead import DecodeAhead
    from grpo_toolkit.cache import inference_ready
    from grpo_toolkit.callbacks import (
        ExportCallback,
        FastRolloutCallback,
        KVCacheCallback,
        LatencyCallback,
        ResumeGuardCallback,
    )
    from grpo_toolkit.distributed import unsharded_models
    from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
    from grpo_toolkit.doctor.findings import Diagnosis, Finding
    from grpo_toolkit.doctor.repair import RepairResult, repair_checkpoint, undo_repair
    from grpo_toolkit.errors import (
        CheckpointError,
        GateError,
        GrpoToolkitError,
        InputError,
        OutOfMemoryError,
        OutputExistsError,
        PeerError,
        ResumeError,
        UnsupportedError,
        VerificationError,
        WorkerError,
    )
    from grpo_toolkit.export import ExportResult, export_model
    from grpo_toolkit.inference import Request
    from grpo_toolkit.latency.arms import Arm
    from grpo_toolkit.latency.compare import Comparison, compare_latency
    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.latency.explain import explain_latency
    from grpo_toolkit.latency.measure import measure_latency
    from grpo_toolkit.latency.row import ExplanationRow, LatencyRow
    from grpo_toolkit.latency.tune import tune_latency
    from grpo_toolkit.latency.tuned import Tuning
    from grpo_toolkit.merge.merge import MergeResult, merge_adapter
    from grpo_toolkit.verify import VerificationResult, verify_export
    from grpo_toolkit.whole import last_whole_checkpoint

_MODULES = {
    "Arm": "latency.arms",
    "CheckpointError": "errors",
    "Comparison": "latency.compare",
    "DecodeAhead": "ahead",
    "Diagnosis": "doctor.findings",
    "ExplanationRow": "latency.row",
    "ExportCallback": "callbacks",
    "ExportResult": "export",
    "FastRolloutCallback": "callbacks",
    "Finding": "doctor.findings",
    "GateError": "errors",
    "GrpoToolkitError": "errors",
    "InputError": "errors",
    "KVCacheCallback": "callbacks",
    "LatencyCallback": "callbacks",
    "LatencyRow": "latency.row",
    "MergeResult": "merge.merge",
    "Options": "latency.engines.protocol",
    "OutOfMemoryError": "errors",
    "OutputExistsError": "errors",
    "PeerError": "errors",
    "RepairResult": "doctor.repair",
    "Request": "inference",
    "ResumeError": "errors",
    "ResumeGuardCallback": "callbacks",
    "Tuning": "latency.tuned",
    "UnsupportedError": "errors",
    "VerificationError": "errors",
    "VerificationResult": "verify",
    "WorkerError": "errors",
    "compare_latency": "latency.compare",
    "diagnose_checkpoint": "doctor.diagnose",
    "explain_latency": "latency.explain",
    "export_model": "export",
    "inference_ready": "cache",
    "last_whole_checkpoint": "whole",
    "measure_latency": "latency.measure",
    "merge_adapter": "merge.merge",
    "repair_checkpoint": "doctor.repair",
    "tune_latency": "latency.tune",
    "undo_repair": "doctor.repair",
    "unsharded_models": "distributed",
    "verify_export": "verify",
}

__all__ = [
    "Arm",
    "CheckpointError",
    "Comparison",
    "DecodeAhead",
    "Diagnosis",
    "ExplanationRow",
    "ExportCallback",
    "ExportResult",
    "FastRolloutCallback",
    "Finding",
    "GateError",
    "GrpoToolkitError",
    "InputError",
    "KVCacheCallback",
    "LatencyCallback",
    "LatencyRow",
    "MergeResult",
    "Options",
    "OutOfMemoryError",
    "OutputExistsError",
    "PeerError",
    "RepairResult",
    "Request",
    "ResumeError",
    "ResumeGuardCallback",
    "Tuning",
    "UnsupportedError",
    "VerificationError",
    "VerificationResult",
    "WorkerError",
    "compare_latency",
    "diagnose_checkpoint",
    "explain_latency",
    "export_model",
    "inference_ready",
    "last_whole_checkpoint",
    "measure_latency",
    "merge_adapter",
    "repair_checkpoint",
    "tune_latency",
    "undo_repair",
    "unsharded_models",
    "verify_export",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module 'grpo_toolkit' has no attribute {name!r}")
    return getattr(import_module(f"grpo_toolkit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
