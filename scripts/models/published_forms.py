"""A base that transformers 5 has saved, turned into the form in which such families are published.

Makers published most of them with transformers 4: rotary settings under other keys, Qwen2-VL's text settings at the
top, the image processor and the chat template in files of their own, tokens with names in a dictionary, a CLIP tower
with its `vision_model` inside. Tensors are named otherwise as well, which transformers 5 undoes itself as it saves.
What is written here means what was there before, by the word of the library: it loads both, and finds them equal.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

VERSION: Final = "4.57.6"
FLAT: Final = frozenset({"qwen2_vl", "qwen2_5_vl"})
"""Families whose text settings are published at the top of their config."""

BORN_IN_V5: Final = frozenset({"ministral", "qwen3_5", "qwen3_5_moe"})
"""Families that transformers 4.57 does not know: they are published as transformers 5 saves them."""

_NAMES: Final = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
    "qwen3_vl_moe_text": {"num_local_experts": "num_experts"},
}
_LAYER_TYPES: Final = {"granitemoehybrid": {"linear_attention": "mamba", "full_attention": "attention"}}
_TRANSPOSED: Final = frozenset({"qwen3_vl_moe"})
"""Families whose stacked experts are published the other way round; transformers 5 saves them as it holds them."""

_OF_THE_LEVEL: Final = frozenset({"model_type", "architectures", "dtype", "_name_or_path", "transformers_version"})
_NOISE: Final = frozenset({"dtype", "transformers_version", "_name_or_path"})
_PARTS: Final = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}


def publish(folder: Path) -> Path:
    """Turn a base into its published form, in place; raises AssertionError where the library reads another model."""
    from transformers import AutoConfig, AutoProcessor

    before = AutoConfig.from_pretrained(folder).to_dict(), _said_by(AutoProcessor.from_pretrained(folder))
    config = _read(folder / "config.json")
    _write(folder / "config.json", published_config(config))
    _publish_tokenizer(folder)
    if (folder / "processor_config.json").is_file():
        _publish_processor(folder)
    _publish_weights(folder, config)
    after = AutoConfig.from_pretrained(folder).to_dict(), _said_by(AutoProcessor.from_pretrained(folder))
    now, then = (dict(leaf for part in parts for leaf in _leaves(part)) for parts in (after, before))
    other = {key: (now.get(key), then.get(key)) for key in {**now, **then} if now.get(key) != then.get(key)}
    assert other == {}, other
    return folder


def published_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config of transformers 5 as 4.x would have written it."""
    content = _older_level(config)
    if "dtype" in config:
        content["torch_dtype"] = config["dtype"]
    content["transformers_version"] = VERSION
    if config["model_type"] in FLAT:
        text = content.pop("text_config")
        content = {**{key: value for key, value in text.items() if key not in _OF_THE_LEVEL}, **content}
    return content


def _older_level(config: Mapping[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in ("dtype", "rope_parameters")}
    nested = {
        key: _older_level(value) for key, value in kept.items() if isinstance(value, dict) and "model_type" in value
    }
    rotary = config.get("rope_parameters")
    older = {} if not rotary else _older_rotary(rotary)
    if "mrope_section" in (older.get("rope_scaling") or {}) and config["model_type"].removesuffix("_text") in FLAT:
        older["rope_scaling"]["type"] = "mrope"
    kind = config.get("model_type", "")
    names, types = _NAMES.get(kind, {}), _LAYER_TYPES.get(kind)
    content = {names.get(key, key): value for key, value in {**kept, **nested, **older}.items()}
    if types is not None:
        content["layer_types"] = [types[one] for one in content["layer_types"]]
    return content


def _older_rotary(rotary: Mapping[str, Any]) -> dict[str, Any]:
    """Return rotary settings under the keys of 4.x: theta and factor beside a `rope_scaling`, if there is any."""
    if "full_attention" in rotary:
        whole, local = (rotary[kind]["rope_theta"] for kind in ("full_attention", "sliding_attention"))
        others = {} if whole == local else {"rope_local_base_freq": local}
        return {**_older_rotary(rotary["full_attention"]), **others}
    scaling = {key: value for key, value in rotary.items() if key not in ("rope_theta", "partial_rotary_factor")}
    has_scaling = set(scaling) > {"rope_type"} or scaling.get("rope_type", "default") != "default"
    factor = {key: rotary[key] for key in ("partial_rotary_factor",) if key in rotary}
    return {"rope_theta": rotary["rope_theta"], "rope_scaling": scaling if has_scaling else None, **factor}


def _publish_tokenizer(folder: Path) -> None:
    config = _read(folder / "tokenizer_config.json")
    named = config.pop("model_specific_special_tokens", {})
    for key in ("backend", "is_local", "local_files_only", *named):
        config.pop(key, None)
    others = config.pop("extra_special_tokens", [])
    config["additional_special_tokens"] = others if isinstance(others, list) else []
    config["extra_special_tokens"] = named or (others if isinstance(others, dict) else {})
    if config.get("tokenizer_class") == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    tokens = _read(folder / "tokenizer.json")["added_tokens"]
    config["added_tokens_decoder"] = {
        str(token["id"]): {key: value for key, value in token.items() if key != "id"} for token in tokens
    }
    template = folder / "chat_template.jinja"
    if template.is_file():
        if (folder / "processor_config.json").is_file():
            _write(folder / "chat_template.json", {"chat_template": template.read_text()})
        else:
            config["chat_template"] = template.read_text()
        template.unlink()
    _write(folder / "tokenizer_config.json", config)
    ends = {key: config[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if config.get(key)}
    _write(folder / "special_tokens_map.json", ends)


def _publish_processor(folder: Path) -> None:
    outer = _read(folder / "processor_config.json")
    for part, file in _PARTS.items():
        if part in outer:
            content = outer.pop(part)
            _write(folder / file, {**content, "processor_class": outer["processor_class"]})
    if outer.keys() <= {"processor_class"}:
        (folder / "processor_config.json").unlink()
    else:
        _write(folder / "processor_config.json", outer)


def _publish_weights(folder: Path, config: Mapping[str, Any]) -> None:
    """Put the `vision_model` back into a CLIP or SigLIP tower, and turn experts round; the loader undoes both."""
    from safetensors.torch import load_file, save_file

    from scripts.models.base_variants import with_inner_vision_model

    weights = load_file(folder / "model.safetensors")
    if config.get("vision_config", {}).get("model_type") in ("clip_vision_model", "siglip_vision_model"):
        weights = with_inner_vision_model(weights)
    if config["model_type"] in _TRANSPOSED:
        turned = {name: tensor.mT.contiguous() for name, tensor in weights.items() if ".experts." in name}
        weights = {**weights, **turned}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _said_by(processor: Any) -> dict[str, Any]:
    """Return a processor's settings, and what its tokenizer makes of a text."""
    tokenizer = getattr(processor, "tokenizer", processor)
    parts = {name: part.to_dict() for name, part in vars(processor).items() if name in _PARTS}
    names = sorted(tokenizer.special_tokens_map.items(), key=str)
    template = getattr(processor, "chat_template", None)
    return {**parts, "tokens": tokenizer("<s>What?</s>")["input_ids"], "names": names, "template": template}


def _leaves(node: Mapping[str, Any], here: str = "") -> Iterator[tuple[str, Any]]:
    # What 4.x says twice: the type of rotary settings, and a factor that transformers 5 also keeps where it was.
    noise = _NOISE | {"type"} if "rope_type" in node else _NOISE | {"partial_rotary_factor"}
    for key, value in node.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{here}{key}.")
        elif key not in noise:
            yield f"{here}{key}", value


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def _write(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
