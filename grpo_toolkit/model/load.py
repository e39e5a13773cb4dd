"""The loading of a model and its processor from a folder, with a report of what was missing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG, Kind, open_checkpoint
from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.model.live_model import is_tied
from grpo_toolkit.model.sharding.gather import unsharded_models

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from transformers import PreTrainedModel

NO_CODE: Final = {"trust_remote_code": False}
"""Said in every call that could run a folder's code: left out, transformers asks on the terminal whether to run it."""


@dataclass(frozen=True, kw_only=True)
class LoadReport:
    """The keys that a loaded model missed, did not expect, or found in another shape.

    `tied` says whether the output embeddings are the input embeddings; None where the model does not have both.
    """

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    dtype: str = ""
    parameters: int = 0
    tied: bool | None = None

    @property
    def is_clean(self) -> bool:
        return not (self.missing or self.unexpected or self.mismatched)


def load_model(
    path: Path,
    *,
    device: str = "cpu",
    attn_implementation: str | None = None,
    base: Path | None = None,
    dtype: str = "auto",
    device_map: str | None = None,
) -> tuple[PreTrainedModel, Any, LoadReport]:
    """Load a model folder (or an adapter on its base, unmerged) with its processor.

    Args:
        path: a folder with a full model, or with an adapter.
        device: where to put it.
        attn_implementation: None leaves it to the library.
        base: for an adapter, the base's folder; by default the one that the adapter names.
        dtype: "auto" is that of its files.
        device_map: accelerate's, such as "auto"; it then decides where the model goes.

    Returns:
        The model in eval mode on `device`, its processor (or tokenizer, for a text model), and what loading said.

    Raises:
        CheckpointError: not a checkpoint, or an adapter whose base is not here.
    """
    checkpoint = open_checkpoint(path)
    if checkpoint.kind is Kind.ADAPTER:
        settings = {"attn_implementation": attn_implementation, "dtype": dtype, "device_map": device_map}
        return _load_adapter(path, device=device, base=base, settings=settings)
    extra = {"attn_implementation": attn_implementation, "device_map": device_map}
    model, info = auto_class(path).from_pretrained(
        path,
        output_loading_info=True,
        **NO_CODE,
        **{dtype_argument(): dtype},
        **{name: value for name, value in extra.items() if value is not None},
    )
    report = LoadReport(
        missing=sorted(info["missing_keys"]),
        unexpected=sorted(info["unexpected_keys"]),
        mismatched=sorted(str(key) for key in info["mismatched_keys"]),
        dtype=str(model.dtype).removeprefix("torch."),
        parameters=model.num_parameters(),
        tied=is_tied(model),
    )
    return (model if device_map else model.to(device)).eval(), load_processor(path), report


def _load_adapter(
    path: Path, *, device: str, base: Path | None, settings: Mapping[str, Any]
) -> tuple[PreTrainedModel, Any, LoadReport]:
    from peft import PeftModel, get_peft_model_state_dict

    base = base or base_of_adapter(path)
    model, processor, report = load_model(base, device=device, **settings)
    adapted = PeftModel.from_pretrained(model, path).eval()
    if not settings["device_map"]:
        adapted = adapted.to(device)
    # PEFT only warns about keys that fit nowhere, and leaves fresh random weights in their place.
    stored, wanted = set(open_checkpoint(path).tensors()), set(get_peft_model_state_dict(adapted))
    report = replace(
        report,
        missing=[*report.missing, *sorted(wanted - stored)],
        unexpected=[*report.unexpected, *sorted(stored - wanted)],
    )
    return adapted, load_processor(path) if has_processor(path) else processor, report


def has_processor(path: Path) -> bool:
    """Return whether the folder carries a tokenizer or processor of its own."""
    return any((path / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))


def load_processor(path: Path) -> Any:
    """Load the folder's processor, or its tokenizer where it has no image side."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(path, **NO_CODE)


def auto_class(path: Path) -> Any:
    """Return the Auto class that loads this folder for generation: image-text-to-text if the type has one."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    model_type = read_json(path / CONFIG).get("model_type")
    if model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return transformers.AutoModelForImageTextToText
    return transformers.AutoModelForCausalLM


def model_without_weights(path: Path) -> PreTrainedModel:
    """Build a folder's model from its configs alone, on the meta device.

    Raises:
        OSError, ValueError, KeyError, ImportError: this transformers does not know it.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig

    with unsharded_models(), torch.random.fork_rng(devices=[]), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, **NO_CODE)
        model: PreTrainedModel = auto_class(path).from_config(config, **NO_CODE)
    if (path / GENERATION_CONFIG).is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model


def dtype_argument() -> str:
    """Return the name of the argument: `dtype` since transformers 4.56, before `torch_dtype` (transformers#39782)."""
    import transformers
    from packaging.version import Version

    return "dtype" if Version(transformers.__version__) >= Version("4.56") else "torch_dtype"
