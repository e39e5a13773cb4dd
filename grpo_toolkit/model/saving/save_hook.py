"""The save hook: whoever calls `save_pretrained`, the files get inference defaults.

Trainer checkpoints, `save_model`, Hub pushes and a user's own call all end in the model's `save_pretrained`, in every
distributed backend. So the hook sits there, on the instance: for the duration of one save the configs say what an
inference-ready folder must say, and afterwards they are what training needs. When the library has written them, the
config becomes the base's own with what training changed (`portable_files.py`), and only then is pushed what the call
was to push (`push_after.py`). The processing class is saved by a call of its own, with a hook of its own
(`processor_hook.py`).
"""

from __future__ import annotations

import copy
import inspect
import logging
import tempfile
import types
from contextlib import ExitStack, contextmanager
from functools import reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.base_lookup import find_base
from grpo_toolkit.checkpoint.folders.lineage import record_base
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, GENERATION_CONFIG
from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults, capture_defaults
from grpo_toolkit.checkpoint.json_files import ABSENT, Absent, JsonObject, read_json
from grpo_toolkit.errors import InputError
from grpo_toolkit.model.kv_cache import cache_flags, set_cache_flags
from grpo_toolkit.model.live_model import base_model, config_levels
from grpo_toolkit.model.saving.generation_edits import edits, note_values, say_token_ids
from grpo_toolkit.model.saving.portable_files import rewrite_config
from grpo_toolkit.model.saving.processor_files import save_plainly
from grpo_toolkit.model.saving.push_after import take_push
from grpo_toolkit.model.saving.transposed_experts import turned_back

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    import torch
    from transformers import GenerationConfig, PreTrainedModel

logger = logging.getLogger(__name__)

_DEFAULTS = "_grpo_toolkit_defaults"
_PORTABLE = "_grpo_toolkit_portable"
_PLAIN_STATE = "_grpo_toolkit_plain_state"


def capture_model_defaults(
    model: torch.nn.Module,
    *,
    base: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> InferenceDefaults:
    """Return the inference defaults of a live model: its base folder's, or a snapshot where there is none.

    The base folder is the truth because by the time a callback first sees the model, TRL has already rewritten
    `pad_token_id`. It is read through the model's own config class, so that the levels are those of this
    transformers version: a published flat Qwen2.5-VL config has `use_cache` at the top, which 5.x loads into
    `text_config`.

    Args:
        model: a transformers model or a wrapper around one.
        base: folder or Hub name of the base; by default the one the model was loaded from.
        overrides: keys for `generation_config.json` that win over the base's, and over what was set in the live model
            on purpose.
    """
    inner = base_model(model)
    folder = base_folder(inner, base)
    if folder is None:
        config = _snapshot_config(inner)
    else:
        config = type(inner.config).from_pretrained(folder).to_dict()
    if folder is not None and (folder / GENERATION_CONFIG).is_file():
        generation: JsonObject | Absent = read_json(folder / GENERATION_CONFIG)
    else:
        generation = _snapshot_generation(inner)
    chosen = {**edits(inner), **(overrides or {})}
    defaults = capture_defaults(config, generation, folder=folder, overrides=chosen)
    if overrides:
        _check_overrides(defaults)
    return defaults


def _check_overrides(defaults: InferenceDefaults) -> None:
    # Found out now rather than in the middle of training, where an invalid config would cost a checkpoint.
    try:
        config = generation_config_of(defaults)
        assert config is not None
        with tempfile.TemporaryDirectory(prefix="grpo-toolkit-overrides-") as folder:
            config.save_pretrained(folder)
    except (ValueError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"generation_overrides {dict(defaults.overrides)} do not fit the base: {reason}") from error


def base_folder(model: torch.nn.Module, base: str | Path | None = None) -> Path | None:
    """Return the local folder that a live model was loaded from (or `base`, if given), or None."""
    config = base_model(model).config
    name = str(base) if base is not None else getattr(config, "_name_or_path", None)
    return find_base(name, revision=getattr(config, "_commit_hash", None) if base is None else None)


def _snapshot_config(model: PreTrainedModel) -> JsonObject:
    # A level counts if it is true or its class declares the key; a false that the class knows nothing of was put
    # there by Trainer.__init__ (transformers >= 5) before we were attached.
    config: JsonObject = model.config.to_dict()
    for level, node in config_levels(model.config):
        if vars(node).get("use_cache") is not True and "use_cache" not in inspect.signature(type(node)).parameters:
            reduce(lambda parent, name: parent[name], level, config).pop("use_cache", None)
    return config


def _snapshot_generation(model: PreTrainedModel) -> JsonObject | Absent:
    # Without a generation_config.json the library derives one from the model config, `use_cache` included: a value
    # that is not true came from there, and nobody chose it.
    if getattr(model, "generation_config", None) is None:
        return ABSENT
    generation: JsonObject = model.generation_config.to_diff_dict()
    if generation.get("use_cache") is not True:
        generation.pop("use_cache", None)
    generation.pop("transformers_version", None)
    return generation


def install_save_hook(model: torch.nn.Module, defaults: InferenceDefaults, *, portable: bool = True) -> None:
    """Make every later `save_pretrained` of this model write `defaults`; installing again replaces them.

    Args:
        model: a transformers model or a wrapper around one.
        defaults: as `capture_model_defaults` returned them.
        portable: also write the config in the base's own form, so that what loads the base loads the save; False for
            the form of the library that saves.

    What a user changes in `model.generation_config` after this is written as well, and wins, `use_cache` excepted; of
    the token ids, which trainers align for their rollouts, what is changed after a training has begun
    (`generation_edits.py`).

    The hook is an instance attribute holding a bound method, so a deep copy gets a hook of its own, bound to the copy,
    and a pickled model loads and saves plainly.
    """
    inner = base_model(model)
    setattr(inner, _DEFAULTS, defaults)
    setattr(inner, _PORTABLE, portable)
    note_values(inner)
    inner.save_pretrained = types.MethodType(save_pretrained, inner)


def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """Do `PreTrainedModel.save_pretrained` with inference defaults in the files (bound to a model by the hook).

    The name is the method's own: pickling a bound method stores its name, and unpickling looks it up on the class.
    """
    arguments = _named_arguments(self, args, kwargs)
    is_portable, is_written = self.__dict__[_PORTABLE], arguments.get("is_main_process", True)
    push = take_push(arguments["save_directory"], arguments) if is_portable and is_written else None
    with ExitStack() as ours:
        try:
            if arguments.get("state_dict") is not None:
                arguments["state_dict"] = tied_again(self, arguments["state_dict"])
            ours.enter_context(inference_defaults(self, self.__dict__[_DEFAULTS]))
            say_token_ids(self, self.__dict__[_DEFAULTS])
            ours.enter_context(published_names(self))
        except Exception as error:  # a checkpoint without our defaults is better than none
            ours.close()
            logger.error(
                "grpo_toolkit: preparing a save failed (%s: %s); its files say what the trainer's configs say",
                type(error).__name__,
                error,
            )
        saved = type(self).save_pretrained(self, **arguments)
    if is_portable and is_written:
        _make_portable(self, Path(arguments["save_directory"]))
    if is_written:
        _record_base(self, Path(arguments["save_directory"]))
    if push is not None:
        push.upload(tags=getattr(self, "model_tags", None) or ())
    return saved


def _record_base(model: PreTrainedModel, folder: Path) -> None:
    """Write the base's name beside the weights; a checkpoint without it is still one."""
    name = getattr(model.config, "_name_or_path", None)
    if not name or not folder.is_dir():
        return
    try:
        is_here = Path(name).is_dir()
        record_base(
            folder,
            str(Path(name).resolve()) if is_here else str(name),
            revision=None if is_here else getattr(model.config, "_commit_hash", None),
        )
    except OSError as error:
        logger.warning("grpo_toolkit: the base's name could not be written into %s (%s)", folder, error)


def _named_arguments(model: PreTrainedModel, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    from transformers import PreTrainedModel

    signature = inspect.signature(type(model).save_pretrained)
    if "save_directory" not in signature.parameters:  # a subclass that passes on whatever it gets
        signature = inspect.signature(PreTrainedModel.save_pretrained)
    named = dict(signature.bind(model, *args, **kwargs).arguments)
    others = named.pop("kwargs", {})
    del named["self"]
    return {**named, **others}


def _make_portable(model: PreTrainedModel, folder: Path) -> None:
    defaults: InferenceDefaults = model.__dict__[_DEFAULTS]
    try:
        rewrite_config(model, defaults.folder, folder, defaults)
    except Exception as error:  # the library's own files are there
        logger.error(
            "grpo_toolkit: %s is in this library's form, which older versions may not load (%s: %s)",
            folder / CONFIG,
            type(error).__name__,
            error,
        )


def saved_state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return the live tensors that a trainer saves of a model: all, or of a PEFT model those that it trains."""
    if hasattr(model, "peft_config"):
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return dict(base_model(model).state_dict(keep_vars=True))


def tied_again(model: torch.nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a gathered state dict in which tied names share one tensor, so that saving stores them once.

    FSDP2's full state dict and DeepSpeed's copy for saving clone every name by itself: `lm_head` then comes out of a
    checkpoint a second time, untied.
    """
    owner: dict[int, str] = {}
    named = model.named_parameters(remove_duplicate=False)
    first = {name: owner.setdefault(id(parameter), name) for name, parameter in named}
    return {name: state_dict.get(first.get(name, name), tensor) for name, tensor in state_dict.items()}


@contextmanager
def published_names(model: PreTrainedModel, *, turned: bool = False) -> Iterator[None]:
    """Save under the names that the weights were loaded from, also under ZeRO-3.

    Args:
        model: the model that is saved.
        turned: transpose experts, too, that are published the other way round (`transposed_experts.py`): an export's,
            not a checkpoint's, whose shapes a trainer that resumes takes as they are.

    transformers >= 5 undoes on saving the renamings of loading. Its loader keeps those that matched something, its
    ZeRO-3 loader keeps all of them (`integrations/deepspeed.py`): undoing one that never applied turns `model.layers`
    into `model.model.layers`, which transformers 4.x, vLLM and SGLang do not know.
    """
    conversions = getattr(model, "_weight_conversions", None)
    used = [one for one in conversions or () if not hasattr(one, "was_used") or one.was_used()]
    if not used:
        yield
        return
    try:
        model._weight_conversions = turned_back(used, model, base_folder(model)) if turned else used
        yield
    finally:
        model._weight_conversions = conversions


@contextmanager
def inference_defaults(model: PreTrainedModel, defaults: InferenceDefaults) -> Iterator[None]:
    """Put `defaults` into the model's configs, and put back on exit what they held before."""
    flags, generation_config = cache_flags(model.config), getattr(model, "generation_config", None)
    chosen = edits(model)
    try:
        set_cache_flags(model.config, dict.fromkeys(defaults.cache_levels, True))
        if defaults.generation is not ABSENT and generation_config is not None:
            model.generation_config = generation_config_of(defaults)
            for name, value in chosen.items():
                setattr(model.generation_config, name, value)
        yield
    finally:
        if generation_config is not None:
            model.generation_config = generation_config
        set_cache_flags(model.config, flags)


def generation_config_of(defaults: InferenceDefaults) -> GenerationConfig | None:
    """Return the defaults as a `GenerationConfig`, or None where the base has no `generation_config.json`."""
    from transformers import GenerationConfig

    if defaults.generation is ABSENT:
        return None
    return GenerationConfig.from_dict(copy.deepcopy(defaults.generation))


def remember_plain_state(model: torch.nn.Module) -> None:
    """Note the configs as the trainer left them, before we change anything: its saves would have held that."""
    inner = base_model(model)
    generation_config = copy.deepcopy(getattr(inner, "generation_config", None))
    setattr(inner, _PLAIN_STATE, (cache_flags(inner.config), generation_config))


def save_as_plain_trainer(
    model: torch.nn.Module,
    folder: Path,
    processing_class: Any = None,
    *,
    weights: dict[str, torch.Tensor] | None = None,
) -> None:
    """Save a model as the same trainer would have without us, to measure what that costs.

    Args:
        model: the live model, PEFT-wrapped or not.
        folder: where to.
        processing_class: the processor or tokenizer to save with it.
        weights: its gathered `saved_state` if it is sharded.
    """
    inner = base_model(model)
    flags, generation_config = cache_flags(inner.config), getattr(inner, "generation_config", None)
    plain_flags, plain_generation_config = vars(inner).get(_PLAIN_STATE, (flags, generation_config))
    try:
        set_cache_flags(inner.config, plain_flags)
        inner.generation_config = plain_generation_config
        plain_save: Any = type(model)  # the class's own method, past the hook on the instance
        plain_save.save_pretrained(model, folder, state_dict=weights)
    finally:
        set_cache_flags(inner.config, flags)
        inner.generation_config = generation_config
    if processing_class is not None:
        save_plainly(processing_class, folder)
