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
    from grpo_toolkit.callbacks import ExportCallback as ExportCallback
    from grpo_toolkit.callbacks import FastRolloutCallback as FastRolloutCallback
    from grpo_toolkit.callbacks import KVCacheCallback as KVCacheCallback
    from grpo_toolkit.callbacks import LatencyCallback as LatencyCallback
    from grpo_toolkit.callbacks import PackedVisionCallback as PackedVisionCallback
    from grpo_toolkit.callbacks import ResumeGuardCallback as ResumeGuardCallback
    from grpo_toolkit.callbacks import StepTimeCallback as StepTimeCallback
    from grpo_toolkit.checkpoint.folders.trainer_checkpoints import last_whole_checkpoint as last_whole_checkpoint
    from grpo_toolkit.doctor.diagnose import diagnose_checkpoint as diagnose_checkpoint
    from grpo_toolkit.doctor.findings import Diagnosis as Diagnosis
    from grpo_toolkit.doctor.findings import Finding as Finding
    from grpo_toolkit.doctor.findings import RunDiagnosis as RunDiagnosis
    from grpo_toolkit.doctor.repair import RepairResult as RepairResult
    from grpo_toolkit.doctor.repair import repair_checkpoint as repair_checkpoint
    from grpo_toolkit.doctor.repair import undo_repair as undo_repair
    from grpo_toolkit.errors import CheckpointError as CheckpointError
    from grpo_toolkit.errors import GateError as GateError
    from grpo_toolkit.errors import GrpoToolkitError as GrpoToolkitError
    from grpo_toolkit.errors import InputError as InputError
    from grpo_toolkit.errors import OutOfMemoryError as OutOfMemoryError
    from grpo_toolkit.errors import OutputExistsError as OutputExistsError
    from grpo_toolkit.errors import PeerError as PeerError
    from grpo_toolkit.errors import ResumeError as ResumeError
    from grpo_toolkit.errors import TrackerError as TrackerError
    from grpo_toolkit.errors import UnsupportedError as UnsupportedError
    from grpo_toolkit.errors import VerificationError as VerificationError
    from grpo_toolkit.errors import WorkerError as WorkerError
    from grpo_toolkit.export.export import export_model as export_model
    from grpo_toolkit.export.export_result import ExportResult as ExportResult
    from grpo_toolkit.export.verify import VerificationResult as VerificationResult
    from grpo_toolkit.export.verify import verify_export as verify_export
    from grpo_toolkit.latency.bench.compare import Comparison as Comparison
    from grpo_toolkit.latency.bench.compare import compare_latency as compare_latency
    from grpo_toolkit.latency.bench.measure import measure_latency as measure_latency
    from grpo_toolkit.latency.engines.arms import Arm as Arm
    from grpo_toolkit.latency.engines.arms import LatencyArm as LatencyArm
    from grpo_toolkit.latency.engines.protocol import Options as Options
    from grpo_toolkit.latency.engines.protocol import RunOptions as RunOptions
    from grpo_toolkit.latency.explain.explanation import explain_latency as explain_latency
    from grpo_toolkit.latency.rows.row import ExplanationRow as ExplanationRow
    from grpo_toolkit.latency.rows.row import LatencyRow as LatencyRow
    from grpo_toolkit.latency.tune.tune import tune_latency as tune_latency
    from grpo_toolkit.latency.tune.tuning import Tuning as Tuning
    from grpo_toolkit.merge.merge import MergeResult as MergeResult
    from grpo_toolkit.merge.merge import merge_adapter as merge_adapter
    from grpo_toolkit.model.generation.decode_ahead import DecodeAhead as DecodeAhead
    from grpo_toolkit.model.generation.request import GenerationRequest as GenerationRequest
    from grpo_toolkit.model.generation.request import Request as Request
    from grpo_toolkit.model.inputs.rows_once import rows_once as rows_once
    from grpo_toolkit.model.kv_cache import inference_ready as inference_ready
    from grpo_toolkit.model.rollouts.rollout_size import RolloutSize as RolloutSize
    from grpo_toolkit.model.rollouts.rollout_size import rollout_size as rollout_size
    from grpo_toolkit.model.sharding.gather import unsharded_models as unsharded_models
    from grpo_toolkit.reporting.report.page import write_report as write_report
    from grpo_toolkit.step_time.rows import StepExplanation as StepExplanation

_MODULES = {
    "Arm": "latency.engines.arms",
    "CheckpointError": "errors",
    "Comparison": "latency.bench.compare",
    "DecodeAhead": "model.generation.decode_ahead",
    "Diagnosis": "doctor.findings",
    "ExplanationRow": "latency.rows.row",
    "ExportCallback": "callbacks",
    "ExportResult": "export.export_result",
    "FastRolloutCallback": "callbacks",
    "Finding": "doctor.findings",
    "GateError": "errors",
    "GenerationRequest": "model.generation.request",
    "GrpoToolkitError": "errors",
    "InputError": "errors",
    "KVCacheCallback": "callbacks",
    "LatencyArm": "latency.engines.arms",
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
    "RolloutSize": "model.rollouts.rollout_size",
    "RunDiagnosis": "doctor.findings",
    "RunOptions": "latency.engines.protocol",
    "StepExplanation": "step_time.rows",
    "StepTimeCallback": "callbacks",
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
    "last_whole_checkpoint": "checkpoint.folders.trainer_checkpoints",
    "measure_latency": "latency.bench.measure",
    "merge_adapter": "merge.merge",
    "repair_checkpoint": "doctor.repair",
    "rollout_size": "model.rollouts.rollout_size",
    "rows_once": "model.inputs.rows_once",
    "tune_latency": "latency.tune.tune",
    "undo_repair": "doctor.repair",
    "unsharded_models": "model.sharding.gather",
    "verify_export": "export.verify",
    "write_report": "reporting.report.page",
}
"""The module of each public name. `Arm`, `Options` and `Request` are older names of three of them."""

__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # a third of a diagnosis, where nobody asks for it

        return metadata.version("grpo-toolkit")
    if name not in _MODULES:
        raise AttributeError(f"module 'grpo_toolkit' has no attribute {name!r}")
    return getattr(import_module(f"grpo_toolkit.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
