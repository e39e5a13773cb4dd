"""Weights in FP8, and what the config says of them: scales, layers that are left alone, the format."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.file_names import CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT
from grpo_toolkit.checkpoint.quantised_names import pattern_of, unlisted
from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.tensor_names import is_vision
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.rules.tensors.tensor_facts import HEAD, by_live_name, weights

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.doctor.parsed_folder import Folder

_KEY: Final = "quantization_config"
_FP8: Final = "F8_E4M3"
_WEIGHT: Final = ".weight"
_SCALES: Final = ("_scale", "_scale_inv")
# Layers that are linear in every release: of attention and feed-forward in the text model, and what leads into it.
_PROJECTION: Final = re.compile(r"\.layers\.\d+\.(?:self_attn|mlp)\.\w+_proj\.weight$")
_PROJECTOR: Final = re.compile(r"(?:^|\.)multi_modal_projector\.")
_NO_LAYER: Final = re.compile(r"embed|norm|\.ln_")


@rule(
    Severity.WRONG,
    "weights in FP8 without their scales",
    effect="transformers makes up the scales, with a warning only: other text, or NaN; vLLM says nothing, and answers "
    "the same token again and again",
    evidence="https://github.com/vllm-project/llm-compressor/issues/1306",
)
def fp8_scale_missing(folder: Folder) -> Iterator[Fault]:
    tensors = _fp8_weights(folder)
    bare = sorted(name for name in tensors if not any(name + end in folder.tensors for end in _SCALES))
    if bare and _weights_setting(folder):
        yield Fault(
            file=folder.tensors[bare[0]].file,
            key=bare[0],
            found=f"no {bare[0].rpartition('.')[2]}_scale beside it, as beside {len(bare)} of {len(tensors)} in FP8",
            expected="a scale for each weight in FP8: quantise again from the unquantised folder",
        )


@rule(
    Severity.UNLOADABLE,
    "scales of another shape than the config says",
    effect="size mismatch for weight_scale at loading",
    evidence="https://github.com/vllm-project/compressed-tensors/blob/main/src/compressed_tensors/quantization/"
    "lifecycle/initialize.py",
)
def fp8_scale_shape(folder: Folder) -> Iterator[Fault]:
    strategy = (_weights_setting(folder) or {}).get("strategy")
    wrong = []
    for name, info in sorted(_fp8_weights(folder).items()):
        scale = folder.tensors.get(f"{name}_scale")
        shapes = {"channel": {(*info.shape[:-1], 1)}, "tensor": {(1,), ()}}.get(str(strategy))
        if scale is not None and shapes is not None and scale.shape not in shapes:
            wrong.append((f"{name}_scale", scale, max(shapes)))
    if wrong:
        name, scale, shape = wrong[0]
        yield Fault(
            file=scale.file,
            key=name,
            found=f"{list(scale.shape)}, with {len(wrong)} scales",
            expected=f"{list(shape)}, which is a scale for each {strategy}",
        )


@rule(
    Severity.WRONG,
    "weights in FP8, and no quantization_config",
    effect="transformers takes the stored numbers without their scales: other text, or an error about dtypes; vLLM "
    "refuses the folder",
    evidence="https://huggingface.co/docs/transformers/quantization/compressed_tensors",
)
def fp8_unsaid(folder: Folder) -> Iterator[Fault]:
    tensors = _fp8_weights(folder)
    said = [folder.get(CONFIG, key) for key in (_KEY, "compression_config")]
    said.append(folder.get(CONFIG, "text_config", _KEY))
    if tensors and CONFIG in folder.objects and all(value in (ABSENT, None) for value in said):
        if folder.has("hf_quant_config.json"):  # ModelOpt's own file, which servers read
            return
        yield Fault(
            file=CONFIG,
            key=_KEY,
            found=ABSENT,
            expected=f"the format of the {len(tensors)} weights in FP8, such as {min(tensors)}, as whoever quantised "
            "them wrote it",
        )


@rule(
    Severity.WRONG,
    "quantization_config that the stored weights disagree with",
    effect="a weight in FP8 is taken for one that is not, or for another format: other text, or an error about "
    "dtypes; vLLM refuses the folder",
    evidence="https://huggingface.co/docs/transformers/quantization/compressed_tensors",
)
def quantization_disagrees(folder: Folder) -> Iterator[Fault]:
    setting, tensors = _weights_setting(folder), _fp8_weights(folder)
    if setting is None or not tensors:
        return
    if (setting.get("type"), setting.get("num_bits")) != ("float", 8):
        said = f"{setting.get('num_bits')} bits, {setting.get('type')}"
        yield Fault(file=CONFIG, key=f"{_KEY}.config_groups", found=said, expected="8 bits, float, as stored")
        return
    stored = {live.removesuffix(_WEIGHT): name for live, name in by_live_name(folder).items() if name in tensors}
    left = unlisted(stored, _ignore(folder))
    if left is not None and (listed := sorted(stored.keys() - set(left))):
        yield Fault(
            file=CONFIG,
            key=f"{_KEY}.ignore",
            found=f"has {len(listed)} layers whose weights are in FP8 ({stored[listed[0]]}, ...)",
            expected="layers that are not quantised alone",
        )


@rule(
    Severity.WRONG,
    "a list of layers to leave alone that misses some",
    effect="the reader expects them in FP8 and makes up their scales, with a warning only: a vision tower then sees "
    "noise. Names as one release of transformers spells them do not fit another one's",
    evidence="https://github.com/vllm-project/llm-compressor/issues/2641",
    mend="patterns that fit in every reader, in quantization_config.ignore",
)
def ignore_misses(folder: Folder) -> Iterator[Fault]:
    """Judge by the live model's names, and by the stored ones, which transformers before 4.52 has for its own."""
    if _weights_setting(folder) is None or not _targets_linear(folder) or not _fp8_weights(folder):
        return
    ignore, plain = _ignore(folder), dict(_unquantised_layers(folder))
    missed = {by: unlisted(plain.keys() if by == "live" else plain.values(), ignore) for by in ("live", "stored")}
    live, stored = missed["live"], missed["stored"]
    if live is None or stored is None or not (live or stored):
        return
    by_stored_name = {name: live_name for live_name, name in plain.items()}
    names = dict.fromkeys([*live, *(by_stored_name[name] for name in stored)])
    first = next(iter(names))
    # A layer of the text model may have been put there over one in FP8: which of the two is meant, nobody here knows.
    is_of_text = any(_PROJECTION.search(name + _WEIGHT) for name in names)
    patterns = list(dict.fromkeys([*ignore, *map(pattern_of, names)]))
    yield Fault(
        file=CONFIG,
        key=f"{_KEY}.ignore",
        found=f"does not fit {len(names)} of the layers that are stored unquantised ({first}, ...)",
        expected=f"{first} in it, or its weight in FP8" if is_of_text else f"a pattern such as {pattern_of(first)}",
        remedies=() if is_of_text else (Edit(file=CONFIG, path=(_KEY, "ignore"), value=patterns),),
        fails=_who_fails(live, stored),
    )


def _who_fails(live: Sequence[str], stored: Sequence[str]) -> str:
    """Return who expects such layers in FP8; to servers a head is none of them."""
    if live and stored:
        return "transformers" if all(name.endswith("lm_head") for name in live) else "transformers; vllm; sglang"
    return "transformers>=4.52" if live else "transformers<4.52"


@lru_cache(maxsize=4)  # several rules ask
def _fp8_weights(folder: Folder) -> Mapping[str, TensorInfo]:
    return {name: info for name, info in weights(folder).items() if info.dtype == _FP8 and name.endswith(_WEIGHT)}


def _groups(folder: Folder) -> list[Any]:
    if folder.get(CONFIG, _KEY, "quant_method") != "compressed-tensors":
        return []
    groups = folder.get(CONFIG, _KEY, "config_groups")
    return [group for group in groups.values() if isinstance(group, dict)] if isinstance(groups, dict) else []


def _weights_setting(folder: Folder) -> Mapping[str, Any] | None:
    """Return how compressed-tensors is told that weights are stored, where all layers are stored alike."""
    groups = _groups(folder)
    setting = groups[0].get("weights") if len(groups) == 1 else None
    return setting if isinstance(setting, dict) else None


def _targets_linear(folder: Folder) -> bool:
    return all(group.get("targets") == ["Linear"] for group in _groups(folder))


def _ignore(folder: Folder) -> list[Any]:
    found = folder.get(CONFIG, _KEY, "ignore")
    return found if isinstance(found, list) else []


def _unquantised_layers(folder: Folder) -> Iterator[tuple[str, str]]:
    """Yield the linear layers that are stored unquantised, by the live model's names, with the stored ones."""
    for live, name in by_live_name(folder).items():
        info = folder.tensors[name]
        is_layer = info.dtype in FLOAT_NAMES and len(info.shape) == 2 and name.endswith(_WEIGHT)
        is_beside = is_vision(live) or _PROJECTOR.search(live) or live.endswith(HEAD)
        if is_layer and not _NO_LAYER.search(live) and (is_beside or _PROJECTION.search(live)):
            yield live.removesuffix(_WEIGHT), name.removesuffix(_WEIGHT)
    if folder.is_generative and not any(live.endswith(HEAD) for live in by_live_name(folder)):
        yield "lm_head", "lm_head"  # tied to the embedding, which is stored, and a linear layer all the same
