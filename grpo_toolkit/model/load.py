"""The loading of a model and its processor from a folder, with a report of what was missing."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter
from grpo_toolkit.checkpoint.folders.model_folder import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    GENERATION_CONFIG,
    Kind,
    open_checkpoint,
)
from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.checkpoint.model_families import family_of
from grpo_toolkit.checkpoint.tensor_names import live_name
from grpo_toolkit.model.live_model import is_tied
from grpo_toolkit.model.sharding.gather import unsharded_models

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from grpo_toolkit.checkpoint.model_families import Family

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
    stored, live = set(open_checkpoint(path).tensors()), get_peft_model_state_dict(adapted)
    taken = _taken_under_live_names(path, stored - live.keys(), live, family_of(model.config.model_type))
    report = replace(
        report,
        missing=[*report.missing, *sorted(live.keys() - stored - set(taken.values()))],
        unexpected=[*report.unexpected, *sorted(stored - live.keys() - taken.keys())],
    )
    return adapted, joined(load_processor(path), processor) if has_processor(path) else processor, report


def _taken_under_live_names(
    path: Path, stored: set[str], live: Mapping[str, torch.Tensor], family: Family
) -> dict[str, str]:
    """Return, by their stored names, the live names of factors that PEFT has renamed as it loaded them.

    Some of its releases do so for some releases of transformers: the values say whether it was done here.
    """
    from safetensors import safe_open

    owns = {live_name(own, family): own for own in live}
    names = {name: owns[key] for name in stored if (key := live_name(name, family)) in owns}
    if not names or not (path / ADAPTER_WEIGHTS).is_file():
        return {}
    with safe_open(path / ADAPTER_WEIGHTS, framework="pt") as file:
        return {
            name: own
            for name, own in names.items()
            if tuple(file.get_slice(name).get_shape()) == tuple(live[own].shape)
            and bool((file.get_tensor(name).to(live[own]) == live[own]).all())
        }


def has_processor(path: Path) -> bool:
    """Return whether the folder carries a tokenizer or processor of its own."""
    return any((path / name).is_file() for name in ("tokenizer_config.json", "preprocessor_config.json"))


def load_processor(path: Path) -> Any:
    """Load the folder's processor, or its tokenizer where it has no image side.

    An adapter's folder may hold the tokenizer alone of a processor that its base has whole (see `joined`).
    """
    from transformers import AutoProcessor, AutoTokenizer

    if (path / ADAPTER_CONFIG).is_file() and not any((path / name).is_file() for name in _OF_IMAGES):
        return AutoTokenizer.from_pretrained(path, **NO_CODE)
    return AutoProcessor.from_pretrained(path, **NO_CODE)


_OF_IMAGES: Final = ("preprocessor_config.json", "processor_config.json")


def joined(processor: Any, original: Any) -> Any:
    """Return a whole processor with a tokenizer or image processor that stands by itself in place of its own.

    A processor that is whole itself, or has no whole one beside it, is returned as it is.
    """
    from transformers import ProcessorMixin

    if isinstance(processor, ProcessorMixin) or not isinstance(original, ProcessorMixin):
        return processor
    part = "tokenizer" if hasattr(processor, "convert_tokens_to_ids") else "image_processor"
    template = getattr(processor, "chat_template", None)
    if part == "tokenizer" and template not in (None, getattr(original.tokenizer, "chat_template", None)):
        original.chat_template = template
    setattr(original, part, processor)
    return original


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
