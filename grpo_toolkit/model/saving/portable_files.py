"""The JSON files of a plain save in the forms that its base has, so that what loads the base loads the save.

A library saves in its own dialect: transformers 5 nests a published flat config, puts the image processor into another
file and names tokenizer classes that 4.x does not have. An export carries the base's own files, with what training
changed; here a trainer's own saves get the same. Their tensors keep the dtype that a resume needs, and the config says
which; `transformers_version` is that of the library that saved.
"""

from __future__ import annotations

import shutil
import tempfile
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.base_files import (
    config_changes,
    copy_files,
    declare_dtype,
    declare_version,
    is_carried,
    write_configs,
)
from grpo_toolkit.checkpoint.folders.model_folder import CONFIG, open_checkpoint
from grpo_toolkit.checkpoint.generation_defaults import with_cache_defaults
from grpo_toolkit.checkpoint.json_files import read_json
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.doctor.compat import write_older_forms
from grpo_toolkit.model.saving.processor_files import save_plainly, write_processor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grpo_toolkit.checkpoint.base_files import Change
    from grpo_toolkit.checkpoint.generation_defaults import InferenceDefaults
    from grpo_toolkit.checkpoint.json_files import JsonObject


def trained_changes(model: PreTrainedModel, base: Path, defaults: InferenceDefaults) -> tuple[Change, ...]:
    """Return the values of a model's config that training changed: the base's, as this library reads it, beside it."""
    loaded = with_cache_defaults(type(model.config).from_pretrained(base).to_dict(), defaults)
    return config_changes(loaded, with_cache_defaults(model.config.to_dict(), defaults))


def rewrite_config(model: PreTrainedModel, base: Path | None, folder: Path, defaults: InferenceDefaults) -> None:
    """Put the base's config, with what training changed, in the place of the one that the library saved.

    Where there is no base, or it is another model (a text model taken out of a VLM, quantised weights), the library's
    own stays, in forms that older versions read too. A save without a config (of an adapter) stays without. A
    checkpoint that could not be resumed so keeps the library's own as it is.
    """
    import transformers

    if not (folder / CONFIG).is_file():
        return
    own = (folder / CONFIG).read_bytes()
    saved = read_json(folder / CONFIG)
    if base is not None and _is_of_base(saved, read_json(base / CONFIG)):
        with tempfile.TemporaryDirectory(prefix="grpo-toolkit-config-") as staging:
            here = Path(staging)
            write_configs(base, here, changes=trained_changes(model, base, defaults), overrides=defaults.overrides)
            declare_dtype(here, _dtype_of(folder, model))
            declare_version(here, transformers.__version__)
            shutil.copyfile(here / CONFIG, folder / CONFIG)
    write_older_forms(folder)
    if folder.name.startswith("checkpoint-") and not _is_read_at_a_resume(folder / CONFIG):
        (folder / CONFIG).write_bytes(own)


def _is_read_at_a_resume(config: Path) -> bool:
    """Return whether a trainer can read a checkpoint's config: it does so by the base class of all configs.

    In transformers 5.24 that one fails at the rope_scaling of Llama 3, at yarn and at longrope: it looks for a
    `max_position_embeddings`, which it does not have (`PreTrainedConfig.standardize_rope_params`).
    """
    from transformers import PretrainedConfig

    try:
        PretrainedConfig.from_json_file(str(config))
    except AttributeError:
        return False
    return True


def _is_of_base(saved: JsonObject, base: JsonObject) -> bool:
    """Return whether a saved config describes the base's kind of model: also a head put on it is another."""
    same = all(saved.get(key) == base.get(key, saved.get(key)) for key in ("model_type", "architectures"))
    return same and "quantization_config" not in saved


def _dtype_of(folder: Path, model: PreTrainedModel) -> str:
    """Return torch's name of the dtype that most of the saved tensors have."""
    names = Counter(info.dtype for info in open_checkpoint(folder).tensors().values() if info.dtype in FLOAT_NAMES)
    return FLOAT_NAMES[names.most_common(1)[0][0]] if names else str(model.dtype).removeprefix("torch.")


def rewrite_processor(processor: Any, base: Path, folder: Path) -> None:
    """Put the base's tokenizer and processor files, with what training changed, in the place of the library's."""
    with tempfile.TemporaryDirectory(prefix="grpo-toolkit-processor-") as temporary:
        portable, plain = Path(temporary, "portable"), Path(temporary, "plain")
        portable.mkdir()
        save_plainly(processor, plain)
        write_processor(processor, base, portable)
        shutil.copyfile(base / CONFIG, portable / CONFIG)  # whose model type decides which forms are older ones
        write_older_forms(portable)
        (portable / CONFIG).unlink()
        for path in plain.rglob("*"):
            name = path.relative_to(plain)
            if path.is_file() and is_carried(path.name) and not (portable / name).exists():
                (folder / name).unlink(missing_ok=True)
        copy_files([path for path in portable.rglob("*") if path.is_file()], portable, folder)
