"""Every model that leaves GRPO training is ready for inference.

    from grpo_toolkit import ExportCallback, KVCacheCallback, LatencyCallback

    trainer = GRPOTrainer(..., callbacks=[KVCacheCallback(), ExportCallback("out/export"), LatencyCallback()])
    trainer.train()

The names below are imported when they are first used, so `import grpo_toolkit` costs nothing.
"""

from __future__ import annotations

from importlib import import_module, metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from grpo_toolkit.callbacks import (
        ExportCallback,
        FastRolloutCallback,
        KVCacheCallback,
        LatencyCallback,
        PackedVisionCallback,
        ResumeGuardCallback,
    )
    from grpo_toolkit.checkpoint.trainer_checkpoints import last_whole_checkpoint
    from grpo_toolkit.doctor.diagnose import diagnose_checkpoint
    from grpo_toolkit.doctor.findings import Diagnosis, Finding, RunDiagnosis
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
        TrackerError,
        UnsupportedError,
        VerificationError,
        WorkerError,
    )
    from grpo_toolkit.export.export import ExportResult, export_model
    from grpo_toolkit.export.verify import VerificationResult, verify_export
    from grpo_toolkit.latency.bench.compare import Comparison, compare_latency
    from grpo_toolkit.latency.bench.measure import measure_latency
    from grpo_toolkit.latency.engines.arms import Arm
    from grpo_toolkit.latency.engines.protocol import Options
    from grpo_toolkit.latency.explain.explanation import explain_latency
    from grpo_toolkit.latency.rows.row import ExplanationRow, LatencyRow
    from grpo_toolkit.latency.tune.tune import tune_latency
    from grpo_toolkit.latency.tune.tuning import Tuning
    from grpo_toolkit.merge.merge import MergeResult, merge_adapter
    from grpo_toolkit.model.generation.decode_ahead import DecodeAhead
    from grpo_toolkit.model.generation.request import Request
    from grpo_toolkit.model.kv_cache import inference_ready
    from grpo_toolkit.model.sharding.gather import unsharded_models
    from grpo_toolkit.reporting.report.page import write_report

_MODULES = {
    "Arm": "latency.engines.arms",
    "CheckpointError": "errors",
    "Comparison": "latency.bench.compare",
    "DecodeAhead": "model.generation.decode_ahead",
    "Diagnosis": "doctor.findings",
    "ExplanationRow": "latency.rows.row",
    "ExportCallback": "callbacks",
    "ExportResult": "export.export",
    "FastRolloutCallback": "callbacks",
    "Finding": "doctor.findings",
    "GateError": "errors",
    "GrpoToolkitError": "errors",
    "InputError": "errors",
    "KVCacheCallback": "callbacks",
    "LatencyCallback": "callbacks",
    "LatencyRow": "latency.rows.row",
    "MergeResult": "merge.merge",
    "Options": "latency.engines.protocol",
    "OutOfMemoryError": "errors",
    "OutputExistsError": "errors",
    "PackedVisionCallback": "callbacks",
    "PeerError": "errors",
    "RepairResult": "doctor.repair",
    "Request": "model.generation.request",
    "ResumeError": "errors",
    "ResumeGuardCallback": "callbacks",
    "RunDiagnosis": "doctor.findings",
    "TrackerError": "errors",
    "Tuning": "latency.tune.tuning",
    "UnsupportedError": "errors",
    "VerificationError": "errors",
    "VerificationResult": "export.verify",
    "WorkerError": "errors",
    "compare_latency": "latency.bench.compare",
    "diagnose_checkpoint": "doctor.diagnose",
    "explain_latency": "latency.explain.explanation",
    "export_model": "export.export",
    "inference_ready": "model.kv_cache",
    "last_whole_checkpoint": "checkpoint.trainer_checkpoints",
    "measure_latency": "latency.bench.measure",
    "merge_adapter": "merge.merge",
    "repair_checkpoint": "doctor.repair",
    "tune_latency": "latency.tune.tune",
    "undo_repair": "doctor.repair",
    "unsharded_models": "model.sharding.gather",
    "verify_export": "export.verify",
    "write_report": "reporting.report.page",
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
    "PackedVisionCallback",
    "PeerError",
    "RepairResult",
    "Request",
    "ResumeError",
    "ResumeGuardCallback",
    "RunDiagnosis",
    "TrackerError",
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
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return metadata.version("grpo-toolkit")
    if name not in _MODULES:
        raise AttributeError(f"module 'grpo_toolkit' has no attribute {name!r}")
    return getattr(import_module(f"grpo_toolkit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
