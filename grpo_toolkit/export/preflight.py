"""A look ahead, before the first step of a training, at all that can make the export after it fail.

    facts of the live model, its base and the disk -> findings, each with what to do

Nothing is gathered, drawn from the random state or written but a processor into a temporary folder, and no weight is
read: names, shapes, configs and free bytes are enough. What a finding says is so at that moment. The export is tried
at the end whatever was found.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.base_lookup import named_base
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, open_checkpoint
from grpo_toolkit.checkpoint.publish import check_output
from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
from grpo_toolkit.checkpoint.tensor_names import OUTPUT_EMBEDDINGS, is_embedding, live_name
from grpo_toolkit.checkpoint.weights.base_weights import open_base
from grpo_toolkit.checkpoint.weights.shard_plan import SPARE_BYTES
from grpo_toolkit.errors import GrpoToolkitError, named
from grpo_toolkit.export.live_adapter import adapter_state, is_adapted, refuse_resized
from grpo_toolkit.export.policy_weights import is_quantised
from grpo_toolkit.merge.adapter import adapter_of
from grpo_toolkit.merge.plan import plan_updates
from grpo_toolkit.model.generation.chat_inputs import prepare_inputs
from grpo_toolkit.model.generation.drawn_pictures import places_pictures
from grpo_toolkit.model.generation.request import plain_request
from grpo_toolkit.model.live_model import base_model, is_tied, random_state_kept
from grpo_toolkit.model.load import load_processor
from grpo_toolkit.model.saving.processor_files import part_names, processor_of, whole_processor, write_processor
from grpo_toolkit.model.saving.save_hook import base_folder, capture_model_defaults, published_names
from grpo_toolkit.model.sharding.gather import is_sharded, whole_shape
from grpo_toolkit.model.unheld_tensors import model_of_folder, unheld_groups

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    import torch

    from grpo_toolkit.checkpoint.weights.base_weights import Base

_UNMERGED: Final = "the adapter cannot be merged into its base as it is"


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A fact that will matter to the export at the end.

    Attributes:
        what: the fact.
        remedy: what to do about it; empty where the fact says it, or nothing needs doing.
        is_obstacle: the export would fail; otherwise it is only worth knowing.
    """

    what: str
    remedy: str = ""
    is_obstacle: bool = True

    def __str__(self) -> str:
        words = self.what + (f"; {self.remedy}" if self.remedy else "")
        return f"the export after this training would fail: {words}" if self.is_obstacle else words


def look_ahead(
    model: torch.nn.Module,
    output_dir: str | os.PathLike[str],
    *,
    base: str | os.PathLike[str] | None = None,
    processing_class: Any = None,
    overrides: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Iterator[Finding]:
    """Yield what can be known, before a training, of the export after it; for one process of the training alone.

    Args:
        model: the live model, PEFT-wrapped or not, sharded or not; `refuse_unsupported` has let it pass.
        output_dir: see `export_model`, like the rest.
        base: see there.
        processing_class: see there.
        overrides: see there, `generation_overrides`.
        overwrite: see there.
    """
    with random_state_kept():
        yield from _findings(model, Path(output_dir), base, processing_class, overrides, overwrite)


def _findings(
    model: Any, output_dir: Path, base: Any, processing_class: Any, overrides: Any, overwrite: bool
) -> Iterator[Finding]:
    yield from _obstacle(lambda: check_output(output_dir, overwrite=overwrite))
    opened: list[Base | None] = []
    yield from _obstacle(lambda: opened.append(_open(model, base)))
    if not opened:
        return
    [known] = opened
    folder = None if known is None else known.path
    yield from _obstacle(lambda: capture_model_defaults(model, base=folder, overrides=overrides))
    yield from _processor_findings(processing_class, known)
    size = sum(info.nbytes for info in known.tensors.values()) if known and known.tensors else _live_bytes(model)
    yield from room_findings(output_dir, size)
    if known is None:
        if is_adapted(model):
            name = getattr(base_model(model).config, "_name_or_path", None)
            yield Finding(what=f"the base {name!r} is no folder here, and {_UNMERGED}", remedy="pass base=")
        return
    config = base_model(model).config
    other_class = list(class_findings(type(base_model(model)).__name__, config.model_type, known))
    yield from other_class
    if other_class:
        return
    if is_adapted(model):
        yield from _adapter_findings(model, known)
        if (whole := model_of_folder(known.path)) is not None:
            yield from carried_findings(whole, known, is_saved=False)
    else:
        yield from name_findings(_saved_names(model, known), known)
        yield from carried_findings(model, known)
    yield from tie_findings(is_tied(model), known)


def _open(model: Any, base: Any) -> Base | None:
    folder = base_folder(model) if base is None else named_base(base)
    return None if folder is None else open_base(open_checkpoint(folder))


def _obstacle(look: Callable[[], object]) -> Iterator[Finding]:
    """Turn what a part of the export would raise into a finding."""
    try:
        look()
    except GrpoToolkitError as error:  # its message has what to do in it
        yield Finding(what=str(error))


def room_findings(output_dir: Path, nbytes: int) -> Iterator[Finding]:
    """Find whether an export of so many bytes has room where it will be written."""
    target = Path(os.path.realpath(output_dir))
    folder = next(place for place in target.parents if place.is_dir())
    needed, free = nbytes + SPARE_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        yield Finding(
            what=f"{folder} has {free / 1e9:.1f} GB free, and the export takes {needed / 1e9:.1f} GB beside what the "
            "training saves",
            remedy="make room, or name a folder on another disk",
        )


def class_findings(class_name: str, model_type: str, base: Base) -> Iterator[Finding]:
    """Find whether the live model is another kind of model than its base: the text part of a VLM, most often."""
    published = base.config.get("model_type")
    if isinstance(published, str) and published != model_type:
        names = base.config.get("architectures")
        whole = names[0] if isinstance(names, list) and names else f"a {published}"
        yield Finding(
            what=f"the model is a {class_name} ({model_type}), and its base {base.path} a {whole} ({published}), of "
            "which it is a part at most",
            remedy=f"train a {whole} (AutoModelForImageTextToText loads it, and text alone trains it too), or save "
            "the part with its tokenizer in a folder of its own and train from that",
        )


def name_findings(saved: Iterable[str], base: Base) -> Iterator[Finding]:
    """Find tensors of the live model, by the names that it is saved under, that its base does not have."""
    known = {live_name(name, base.family) for name in base.tensors}
    extra = sorted(
        name
        for name in saved
        if (live := live_name(name, base.family)) not in known and not is_embedding(live, OUTPUT_EMBEDDINGS)
    )
    if known and extra:
        yield Finding(
            what=f"{len(extra)} tensors of the model are not in {base.path} ({', '.join(extra[:3])}"
            f"{', ...' if len(extra) > 3 else ''})",
            remedy="if they were added on purpose, save the model before the training and pass its folder as base=",
        )


def carried_findings(model: torch.nn.Module, base: Base, *, is_saved: bool = True) -> Iterator[Finding]:
    """Find tensors of the base that the export does not take from the model, by the word of the loader.

    Args:
        model: of the class that is trained.
        base: its base.
        is_saved: the export is saved from the model; otherwise an adapter is merged into the base's files, all of
            which are then there.
    """
    saved = {live_name(name, base.family) for name in _saved_names(model, base)}
    rest = [live for live in base.stored if live not in saved and not is_embedding(live, OUTPUT_EMBEDDINGS)]
    if not saved or not rest:
        return
    names = sorted(base.stored[live] for live in rest)
    said = f"{len(names)} tensors in {base.path} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
    kind = type(base_model(model)).__name__
    if unheld_groups(base_model(model), base.tensors, {"": names}):
        yield Finding(
            what=f"{said} have no place in a {kind}: this training does not change them, and the export carries them "
            "as they are",
            is_obstacle=False,
        )
    elif is_saved:
        yield Finding(
            what=f"{said} have a place in a {kind}, and are not among those that are saved of this model",
            remedy="train the model as it was loaded from its base, or save it before the training and pass that "
            "folder as base=",
        )


def tie_findings(is_tied: bool | None, base: Base) -> Iterator[Finding]:
    """Find whether the live model ties its embeddings as its base does."""
    if is_tied is not None and base.tensors and is_tied is not base.is_tied:
        words = {True: "tied", False: "not tied"}
        yield Finding(
            what=f"the model's embeddings are {words[is_tied]}, those in {base.path} {words[base.is_tied]}",
            remedy="see to it that tie_word_embeddings is in the config what it is in the base's",
        )


def _processor_findings(processing_class: Any, base: Base | None) -> Iterator[Finding]:
    try:
        own = None if base is None else processor_of(base.path)
    except (OSError, ValueError, KeyError, ImportError) as error:
        yield Finding(
            what=f"the processor of {None if base is None else base.path} cannot be loaded ({named(error)})",
            remedy="mend the base's tokenizer and processor files, which the export carries",
        )
        return
    processor = processing_class if processing_class is not None else own
    if processor is None:
        yield Finding(what="there is no tokenizer to export", remedy="pass processing_class= to the trainer")
        return
    try:
        prepare_inputs(processor, [plain_request()])
    except Exception as error:  # a chat template may raise anything
        yield Finding(
            what=f"the processor cannot make a prompt of a question ({named(error)})",
            remedy="verification asks the export as it will be used: give it a chat template that can",
        )
        return
    if getattr(processor, "image_processor", None) and places_pictures(own) and not places_pictures(processor):
        yield Finding(
            is_obstacle=False,
            what="the chat template of this training places no picture: the export will have it and answer text alone",
        )
    if base is not None:
        yield from part_findings(processor, own, base.path)


def part_findings(processor: Any, own: Any, base: Path) -> Iterator[Finding]:
    """Find which parts of its processor an export takes from its base, and whether it loads as it will be written.

    Args:
        processor: the training's processor or tokenizer.
        own: the base's; None where it has none.
        base: its folder.
    """
    carried = [] if own is None else sorted(part_names(own) - part_names(processor))
    if carried:
        yield Finding(
            what=f"the training has a {type(processor).__name__} of the {type(own).__name__} in {base}: the export "
            f"carries that one's {' and '.join(carried)}",
            is_obstacle=False,
        )
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-preflight-") as temporary:
        folder = Path(temporary)
        try:
            write_processor(whole_processor(processor, base), base, folder)
            shutil.copyfile(base / CONFIG, folder / CONFIG)  # which decides the classes
            load_processor(folder)
        except Exception as error:  # a class of the user's own may raise anything
            yield Finding(
                what=f"the {type(processor).__name__} of the training cannot be loaded again once it is saved beside "
                f"{base} ({named(error)})",
                remedy="save it with save_pretrained and load that folder, until both pass; or train with the base's",
            )


def _adapter_findings(model: Any, base: Base) -> Iterator[Finding]:
    yield from _obstacle(lambda: refuse_resized(model, base))
    [active] = model.active_adapters
    # With ensure_weight_tying, copies in a file are compared, and there is no file yet.
    is_parallel = bool(getattr(base_model(model), "_tp_size", None))  # PEFT would ask the other ranks for its names
    if not is_parallel and not getattr(model.peft_config[active], "ensure_weight_tying", False):
        yield from _obstacle(lambda: plan_updates(_live_adapter(model, active), base))
    if is_quantised(model):
        method = getattr(getattr(base_model(model).config, "quantization_config", None), "quant_method", "")
        quantised = f"the policy's base is quantised ({getattr(method, 'value', method)})"
        if is_sharded(model):
            yield Finding(
                what=f"{quantised} and sharded over processes, and an export cannot be held against such a policy",
                remedy="save the adapter with trainer.save_model() and run `grpo-toolkit export` on it",
            )
        else:
            yield Finding(
                what=f"{quantised}: the export will be its adapter merged into {base.path}, which is not, and will be "
                "held against that merge. It answers otherwise than the policy in training; how far they are apart "
                "will be told",
                is_obstacle=False,
            )


def _live_adapter(model: Any, name: str) -> Any:
    """Describe the live adapter as its folder will: names and shapes, no values."""
    from peft import get_peft_model_state_dict

    # Without the tensors themselves: PEFT gathers shards where it meets some, and this is one rank alone.
    state = get_peft_model_state_dict(
        model, state_dict=_described(adapter_state(model)), adapter_name=name, save_embedding_layers=False
    )
    config = {
        key: sorted(value) if isinstance(value, set) else value
        for key, value in model.peft_config[name].to_dict().items()
    }
    tensors = {key: TensorInfo(dtype="F32", shape=tuple(tensor.shape), file="") for key, tensor in state.items()}
    return adapter_of(Path(f"adapter {name!r}"), config, tensors)


def _saved_names(model: Any, base: Base) -> list[str]:
    """Return the names that a live model's tensors are saved under: the library's own renaming, tried on no data.

    There are none where transformers 4 renames a family that has no row here: that cannot be tried without saving.
    """
    import transformers
    from packaging.version import Version

    plain = base_model(model)
    state = _described(plain.state_dict(keep_vars=True))
    if Version(transformers.__version__) < Version("5.0"):
        is_renamed = bool(getattr(plain, "_checkpoint_conversion_mapping", None))
        return [] if is_renamed and not base.family.model_types else list(state)
    from transformers.core_model_loading import revert_weight_conversion

    with published_names(plain):
        return list(revert_weight_conversion(plain, state))


def _described(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return tensors of the same names and whole shapes without any values."""
    import torch

    return {name: torch.empty(whole_shape(tensor), device="meta") for name, tensor in tensors.items()}


def _live_bytes(model: Any) -> int:
    return sum(whole_shape(p).numel() * p.element_size() for p in model.parameters())
