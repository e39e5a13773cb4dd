"""A PEFT adapter as data: its options, each decided, and its tensors by the module they belong to.

What an option changes in the merged weights is either computed or refused by name; nothing is passed over. Read off
PEFT 0.21's `LoraConfig` and `save_pretrained` (https://github.com/huggingface/peft/tree/v0.21.2/src/peft); older
versions write a subset of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.look_around import around
from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, ADAPTER_WEIGHTS
from grpo_toolkit.checkpoint.json_files import JsonObject, read_json
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES, TensorInfo, read_safetensors_header
from grpo_toolkit.errors import CheckpointError, InputError, UnsupportedError

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping

# Read here: they decide what is computed.
_COMPUTED: Final = frozenset(
    {
        "peft_type", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "use_dora", "fan_in_fan_out",
        "lora_bias", "bias", "modules_to_save", "target_modules", "target_parameters", "exclude_modules",
        "layers_to_transform", "layers_pattern", "init_lora_weights", "ensure_weight_tying", "base_model_name_or_path",
        "revision",
    }
)  # fmt: skip
# How it was trained, or by what: the merged weights are the same whatever they say.
_HARMLESS: Final = frozenset(
    {
        "task_type", "auto_mapping", "peft_version", "inference_mode", "lora_dropout", "megatron_core",
        "qalora_group_size", "runtime_config", "eva_config", "corda_config", "lora_ga_config", "loftq_config",
        # Labels and settings of training that ms-swift, Unsloth and others add; PEFT drops them when it loads.
        "swift_type", "lora_dtype", "lr_ratio", "lorap_lr_ratio", "loraplus_lr_ratio", "lorap_emb_lr", "unsloth_fixed",
    }
)  # fmt: skip
# What they compute is no low-rank sum on the base's own weights, or not for every token.
_REFUSED: Final = {
    "megatron_config": "it adapts Megatron's parallel layers",
    "trainable_token_indices": "single rows of the embeddings were trained",
    "layer_replication": "its model has other layers than the base",
    "alora_invocation_tokens": "an activated LoRA applies to some tokens only, so it has no merged form",
    "use_qalora": "its factors work on pooled inputs",
    "monteclora_config": "its weights are sampled",
    "use_bdlora": "its factors are block-diagonal",
    "arrow_config": "it routes between adapters",
    "kasa_config": "it truncates the base's weights",
    "velora_config": "its factors carry state of their own",
}
# These move a part of the base's weights into the factors when the adapter is made, and again whenever it is loaded.
_INIT_CHANGES_BASE: Final = ("pissa", "olora", "corda", "loftq", "lora_ga")

_NUMBERS: Final = ("r", "lora_alpha")
_PATTERNS: Final = ("rank_pattern", "alpha_pattern")
_LISTS: Final = ("target_modules", "exclude_modules", "modules_to_save", "target_parameters", "layers_pattern")
_FACTOR: Final = re.compile(
    r"(?P<module>.+)\.(?P<kind>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?P<leaf>weight|bias))?"
)


@dataclass(frozen=True, kw_only=True)
class Module:
    """The tensors that an adapter holds for one module.

    Attributes:
        name: the module's name as the adapter spells it, without PEFT's prefix and wrappers.
        depth: how many of PEFT's parameter wrappers lie around it (`.base_layer`), for stacked experts.
        factors: tensor names by kind: `lora_A`, `lora_B`, `lora_B.bias`, `lora_embedding_A`, `lora_magnitude_vector`.
    """

    name: str
    depth: int
    factors: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """An adapter folder that was read and can be merged; `open_adapter` makes one."""

    path: Path
    config: JsonObject
    tensors: Mapping[str, TensorInfo]
    modules: tuple[Module, ...]
    replaced: Mapping[str, str]
    """Whole tensors that take the base's place (`modules_to_save`, trained biases): tensor name by model name."""

    @property
    def weights(self) -> Path:
        return self.path / ADAPTER_WEIGHTS

    def alpha(self, name: str) -> float:
        """Return `lora_alpha`, or what `alpha_pattern` says for this module or parameter."""
        return float(_by_pattern(self.config.get("alpha_pattern"), name, self.config.get("lora_alpha", 8)))

    def rank(self, name: str) -> int:
        """Return `r`, or what `rank_pattern` says for this module or parameter."""
        return int(_by_pattern(self.config.get("rank_pattern"), name, self.config.get("r", 8)))

    def targets(self, name: str) -> bool:
        """Return whether the config asks for an adapter on the module of this name (as the adapter spells names)."""
        config = self.config
        if _matches(config.get("exclude_modules"), name):
            return False
        if any(re.match(rf"(^|.*\.){module}($|\..*)", name) for module in config.get("modules_to_save") or ()):
            return False
        if not _matches(config.get("target_modules"), name):
            return False
        layers = config.get("layers_to_transform")
        if layers is None or layers == []:
            return True
        patterns = config.get("layers_pattern") or r"[^.]*"
        patterns = [patterns] if isinstance(patterns, str) else patterns
        found = next((m for p in patterns if (m := re.match(rf"(?:^|.*?\.){p}\.(\d+)\.", name))), None)
        return found is not None and int(found[1]) in ([layers] if isinstance(layers, int) else layers)


def find_adapter(path: str | os.PathLike[str], name: str | None = None) -> Path:
    """Return the folder of one adapter: `path` itself, or the folder in it that PEFT saves a named adapter in.

    Raises:
        InputError: no adapter there, or several and none was named.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: not a folder; expected one with {ADAPTER_CONFIG}")
    found = {child.name: child for child in sorted(folder.iterdir()) if (child / ADAPTER_CONFIG).is_file()}
    if (folder / ADAPTER_CONFIG).is_file():
        found = {"default": folder, **found}
        name = name or "default"
    if not found:
        what = f"{folder}: no {ADAPTER_CONFIG} in it or in a folder of it, so this is no adapter"
        raise CheckpointError(what + around(folder))
    if name is None and len(found) == 1:
        return next(iter(found.values()))
    if name is None:
        raise InputError(f"{folder}: holds {len(found)} adapters ({', '.join(found)}); name one (--adapter-name)")
    if name not in found:
        raise InputError(f"{folder}: no adapter {name!r} in it; there is {', '.join(found)}")
    return found[name]


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter folder.

    Raises:
        UnsupportedError: an option whose effect on the weights is not computed here; the message names it.
        CheckpointError: damaged, or tensors that belong to no module.
    """
    config = read_json(folder / ADAPTER_CONFIG)
    _check_config(config, folder)
    weights = folder / ADAPTER_WEIGHTS
    if not weights.is_file():
        pickled = folder / "adapter_model.bin"
        what = f"only {pickled.name}, a pickle, which is not opened" if pickled.is_file() else "no weights"
        raise CheckpointError(f"{folder}: {what}; expected {ADAPTER_WEIGHTS} (PEFT's save_pretrained writes it)")
    return adapter_of(folder, config, read_safetensors_header(weights))


def adapter_of(folder: Path, config: JsonObject, tensors: Mapping[str, TensorInfo]) -> Adapter:
    """Return the adapter of a config and tensors, wherever they were read from; `folder` is what messages name.

    Raises:
        UnsupportedError, CheckpointError: see `open_adapter`.
    """
    _check_config(config, folder)
    weights = folder / ADAPTER_WEIGHTS
    strange = [name for name, info in tensors.items() if info.dtype not in FLOAT_NAMES]
    if strange:
        raise CheckpointError(
            f"{weights}: {strange[0]} is {tensors[strange[0]].dtype}, expected a floating-point dtype"
        )
    modules, replaced = _grouped(tensors, weights)
    return Adapter(path=folder, config=config, tensors=tensors, modules=modules, replaced=replaced)


def _check_config(config: JsonObject, folder: Path) -> None:
    refuse_options(config, folder / ADAPTER_CONFIG)
    _check_types(config, folder / ADAPTER_CONFIG)


def refuse_options(config: JsonObject, path: Path) -> None:
    """Raise for every option that a merge here would not honour.

    Raises:
        UnsupportedError: naming the option.
    """
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UnsupportedError(f"{path}: peft_type is {kind!r}; only LORA adapters are merged")
    for key, reason in _REFUSED.items():
        if config.get(key):
            raise UnsupportedError(f"{path}: {key} is set and not merged here: {reason}")
    init = config.get("init_lora_weights", True)
    if isinstance(init, str) and init.lower().startswith(_INIT_CHANGES_BASE):
        raise UnsupportedError(
            f"{path}: init_lora_weights is {init!r}, which changes the base's weights too; save the adapter with "
            "path_initial_model_for_weight_conversion= (PEFT), which makes it a plain LoRA of the original base"
        )
    if config.get("bias", "none") not in ("none", "all", "lora_only"):
        raise UnsupportedError(f"{path}: bias is {config['bias']!r}; known are none, all and lora_only")
    unknown = {key: value for key, value in config.items() if key not in _COMPUTED | _HARMLESS | _REFUSED.keys()}
    unknown = {key: value for key, value in unknown.items() if value and value != _peft_defaults().get(key)}
    if unknown:
        raise UnsupportedError(f"{path}: unknown to this version, so not merged: {unknown}")


def _check_types(config: JsonObject, path: Path) -> None:
    """Raise where an option that is computed with is not of its kind: the file may come from anyone."""
    for key in _NUMBERS:
        if not _is_number(config.get(key, 8)):
            raise CheckpointError(f"{path}: {key} is {config[key]!r}, expected a number")
    for key in _PATTERNS:
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or not all(map(_is_number, patterns.values())):
            raise CheckpointError(f"{path}: {key} is {patterns!r}, expected numbers by pattern")
    for key in _LISTS:
        names = config.get(key) or []
        if not isinstance(names, (str, list)) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{path}: {key} is {names!r}, expected names")
    layers = config.get("layers_to_transform") or []
    if not all(map(_is_number, layers if isinstance(layers, list) else [layers])):
        raise CheckpointError(f"{path}: layers_to_transform is {layers!r}, expected layer numbers")
    expressions = [*(config.get("rank_pattern") or {}), *(config.get("alpha_pattern") or {})]
    expressions += [*(config.get("modules_to_save") or []), *(config.get("layers_pattern") or [])]
    expressions += [config[key] for key in _LISTS if isinstance(config.get(key), str)]
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            raise CheckpointError(f"{path}: {expression!r} is no regular expression ({error})") from error


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _peft_defaults() -> dict[str, Any]:
    """Return the values that the installed PEFT takes for each option; a newer one may know more than we do."""
    from peft import LoraConfig

    return dict(LoraConfig().to_dict())


def _by_pattern(patterns: Any, name: str, default: Any) -> Any:
    # PEFT's get_pattern_key: the first pattern that a whole tail of the name matches.
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            return value
    return default


def _matches(names: Any, name: str) -> bool:
    if not names:
        return False
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(is_named(name, one) for one in names)


def is_named(name: str, target: str) -> bool:
    """Return whether a name is the target's, or ends with it after a dot."""
    return name == target or name.endswith(f".{target}")


def _grouped(tensors: Mapping[str, TensorInfo], path: Path) -> tuple[tuple[Module, ...], dict[str, str]]:
    modules: dict[tuple[str, int], dict[str, str]] = {}
    replaced: dict[str, str] = {}
    for tensor in tensors:
        match = _FACTOR.fullmatch(tensor)
        if match is None:
            replaced[_plain(tensor)] = tensor
            continue
        name, kind = match["module"], match["kind"]
        kind = f"{kind}.bias" if match["leaf"] == "bias" else kind
        depth = name.count(".base_layer")
        modules.setdefault((_plain(name), depth), {})[kind] = tensor
    strange = [name for name in replaced.values() if ".lora_" in name or "token_adapter" in name]
    if strange:
        raise CheckpointError(
            f"{path}: {len(strange)} tensors have no place in a LoRA adapter: {', '.join(strange[:3])}"
        )
    for (name, _), factors in modules.items():
        pairs = ({"lora_A", "lora_B"}, {"lora_embedding_A", "lora_embedding_B"})
        if sum(pair <= factors.keys() for pair in pairs) != 1:
            raise CheckpointError(f"{path}: {name} has {', '.join(sorted(factors))}, expected both factors of a LoRA")
    if not modules and not replaced:
        raise CheckpointError(f"{path}: holds no tensor")
    return tuple(Module(name=n, depth=d, factors=factors) for (n, d), factors in modules.items()), replaced


def _plain(name: str) -> str:
    """Return a name without PEFT's prefix and wrappers."""
    return name.removeprefix("base_model.model.").replace(".base_layer", "")
