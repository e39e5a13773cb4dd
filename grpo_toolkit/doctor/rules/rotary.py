"""Rotary positions: their settings beside the base's, and by what the installed classes take where none is said."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.json_files import ABSENT, is_number
from grpo_toolkit.doctor.findings import Edit, Fault, Severity, rule
from grpo_toolkit.doctor.installed_classes import reads_setting
from grpo_toolkit.doctor.installed_configs import installed_defaults, installed_rotary
from grpo_toolkit.doctor.readers import SINCE_5, V4
from grpo_toolkit.doctor.rules.fit import level_in
from grpo_toolkit.doctor.rules.settings import as_in_base, base_of_type, is_equal

if TYPE_CHECKING:
    from collections.abc import Iterator

    from grpo_toolkit.checkpoint.json_files import JsonObject
    from grpo_toolkit.doctor.parsed_folder import Folder

_ROPE: Final = ("rope_scaling", "rope_parameters")
_NEED_FACTOR: Final = ("linear", "dynamic", "yarn", "longrope", "llama3")


def _rope_places(folder: Folder) -> Iterator[tuple[tuple[str, ...], str, JsonObject, str]]:
    """Yield the objects with rotary settings: the path, the layers that they are of, the object, whom it concerns.

    Where a config has both forms, transformers 5 reads `rope_parameters` and older releases the other keys.
    """
    for level in ((), ("text_config",), ("vision_config",)):
        node = folder.get(CONFIG, *level)
        if level == () and CONFIG in folder.objects:
            node = folder.objects[CONFIG]
        if not isinstance(node, dict) or (level == () and isinstance(node.get("text_config"), dict)):
            continue  # beside a text model's own settings nobody reads those above
        has_new = isinstance(node.get("rope_parameters"), dict)
        has_old = "rope_theta" in node or "rope_scaling" in node
        yield level, "", node, V4 if has_new else ""
        for name in _ROPE:
            inner = node.get(name)
            fails = "" if not (has_new and has_old) else SINCE_5 if name == "rope_parameters" else V4
            if isinstance(inner, dict):
                yield (*level, name), "", inner, fails
                yield from (
                    ((*level, name, key), key, one, fails)
                    for key, one in inner.items()
                    if isinstance(one, dict) and key.endswith("_attention") and _has_layers(node, key)
                )


def _has_layers(node: JsonObject, kind: str) -> bool:
    """Return whether some layer is of a kind; of one that none is, nobody reads the settings."""
    kinds = node.get("layer_types")
    return not isinstance(kinds, list) or kind in kinds


def _rotated_by(folder: Folder) -> dict[tuple[str, str], Any]:
    """Return every rotary base frequency by the part of the model and the layers that have it."""
    return {
        ("vision" if path[:1] == ("vision_config",) else "", layers): node["rope_theta"]
        for path, layers, node, _ in _rope_places(folder)
        if "rope_theta" in node
    }


@rule(
    Severity.WRONG,
    "another rotary base frequency than the base's",
    effect="positions are rotated otherwise than in training: short texts come out right, and long ones get worse "
    "and worse",
    evidence="https://github.com/vllm-project/vllm/pull/42624",
    mend="the base's value",
    needs_base=True,
)
def rope_theta_differs(folder: Folder) -> Iterator[Fault]:
    base = base_of_type(folder)
    if base is None:
        return
    wanted = _rotated_by(base)
    for path, layers, node, fails in _rope_places(folder):
        part = "vision" if path[:1] == ("vision_config",) else ""
        ours, theirs = node.get("rope_theta", ABSENT), wanted.get((part, layers), ABSENT)
        same = base.get(CONFIG, *path, "rope_theta")
        theirs = theirs if same is ABSENT else same
        if ABSENT not in (ours, theirs) and not is_equal(ours, theirs) and not _is_default(folder, path, ours, theirs):
            yield as_in_base(CONFIG, (*path, "rope_theta"), ours, theirs, fails=fails)


def _is_default(folder: Folder, path: tuple[str, ...], ours: Any, theirs: Any) -> bool:
    """Return whether a null, in transformers 5, gives way to a default that is the base's value."""
    return ours is None and len(path) > 1 and theirs in installed_defaults(folder.model_type, (), "default_theta")


@rule(
    Severity.WRONG,
    "another share of rotated dimensions than the base's",
    effect="other dimensions of each head are rotated than in training: other text, or an error as the model is made",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py",
    mend="the base's value",
    needs_base=True,
)
def rope_share_differs(folder: Folder) -> Iterator[Fault]:
    base = base_of_type(folder)
    if base is None:
        return
    for path, _, node, fails in _rope_places(folder):
        for key in ("partial_rotary_factor", "mrope_section"):
            ours, theirs = node.get(key, ABSENT), base.get(CONFIG, *path, key)
            is_inside = {*_ROPE} & {*path}  # `settings_differ` judges those outside
            if is_inside and ours is not ABSENT and theirs not in (ABSENT, None) and not is_equal(ours, theirs):
                yield as_in_base(CONFIG, (*path, key), ours, theirs, fails=fails)


@rule(
    Severity.WRONG,
    "positions stretched as the base's, by other numbers",
    effect="the kind and the factor are the base's, and another setting of the stretching is not: positions are "
    "rotated otherwise than in training",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py",
    mend="the base's value",
    needs_base=True,
)
def rope_scaling_differs(folder: Folder) -> Iterator[Fault]:
    base = base_of_type(folder)
    if base is None:
        return
    for path, _, node, fails in _rope_places(folder):
        theirs = base.get(CONFIG, *path) if path[-1:] and path[-1] in _ROPE else ABSENT
        if not isinstance(theirs, dict) or any(node.get(key) != theirs.get(key) for key in _STRETCH):
            continue  # a training may stretch its positions
        for key, value in theirs.items():
            ours = node.get(key, ABSENT)
            if key in _OF_OTHER_RULES or isinstance(value, dict) or value is None or ours is ABSENT:
                continue
            if not is_equal(ours, value) and reads_setting(folder.model_type, (), key):
                yield as_in_base(CONFIG, (*path, key), ours, value, fails=fails)


_STRETCH: Final = ("rope_type", "type", "factor", "original_max_position_embeddings")
"""The settings of a training that stretches positions."""
_OF_OTHER_RULES: Final = ("rope_theta", "partial_rotary_factor", "mrope_section")


_ROPE_TYPES: Final = (*_NEED_FACTOR, "default", "mrope", "proportional", "axial", "su")


@rule(
    Severity.UNLOADABLE,
    "no kind of rotary positions that a release knows",
    effect="the function that computes them is looked up by this name: KeyError or TypeError as the model is made",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py",
    mend="the base's value",
)
def rope_type_unknown(folder: Folder) -> Iterator[Fault]:
    base = folder.base
    for path, _, node, fails in _rope_places(folder):
        kind = node.get("rope_type", "default")
        if path[-1:] in ((), ("text_config",), ("vision_config",)):
            continue
        right = ABSENT if base is None else base.get(CONFIG, *path, "rope_type")
        is_known = isinstance(kind, str) and kind in _ROPE_TYPES
        if is_known and (right is ABSENT or kind == right or (kind, right) in _NEED_NOT_DIFFER):
            continue
        if is_known and kind in _NEED_FACTOR:
            continue  # a training may stretch its positions
        edit = Edit(file=CONFIG, path=(*path, "rope_type"), value=right)
        yield Fault(
            file=CONFIG,
            key=".".join(edit.path),
            found=kind,
            expected="default, for one" if right is ABSENT else f"{right!r}, as in the base",
            remedies=() if right is ABSENT else (edit,),
            fails=fails,
        )


_NEED_NOT_DIFFER: Final = (("default", "mrope"), ("default", "axial"))


@rule(
    Severity.UNLOADABLE,
    "rotary scaling without its factor",
    effect="positions cannot be computed without the factor: loading ends with a KeyError, or with a warning and NaN",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py",
)
def rope_incomplete(folder: Folder) -> Iterator[Fault]:
    for path, _, node, fails in _rope_places(folder):
        kind = node.get("rope_type") or node.get("type")
        if path[-1:] not in ((), ("text_config",)) and kind in _NEED_FACTOR and node.get("factor") is None:
            key = ".".join((*path, "rope_type"))
            yield Fault(file=CONFIG, key=key, found=kind, expected="a factor", fails=fails)


@rule(
    Severity.UNLOADABLE,
    "rotary settings of a kind of layers that are no object",
    effect="each kind of layers takes its settings from an object of its own: an exception as the config is read",
    evidence="https://github.com/huggingface/transformers/blob/main/src/transformers/modeling_rope_utils.py",
    mend="the base's settings",
    fails=SINCE_5,
)
def rope_no_object(folder: Folder) -> Iterator[Fault]:
    for level in ((), ("text_config",)):
        inner = folder.get(CONFIG, *level, "rope_parameters")
        for key, value in inner.items() if isinstance(inner, dict) else ():
            if not key.endswith("_attention") or value is None or isinstance(value, dict):
                continue
            path = (*level, "rope_parameters", key)
            right = ABSENT if folder.base is None else folder.base.get(CONFIG, *path)
            edit = Edit(file=CONFIG, path=path, value=copy.deepcopy(right))
            remedies = (edit,) if isinstance(right, dict) else ()
            yield Fault(file=CONFIG, key=".".join(path), found=value, expected="an object", remedies=remedies)


@rule(
    Severity.WRONG,
    "rotary settings lost",
    effect="positions are rotated otherwise than in training: other text, or an error at the first token",
    evidence="https://github.com/vllm-project/vllm/pull/42624",
    mend="the base's settings, where there are none",
    needs_base=True,
)
def rope_lost(folder: Folder) -> Iterator[Fault]:
    base = base_of_type(folder)
    if base is None:
        return
    wanted, ours = _rope(base), _rope(folder)
    lost = sorted(set(wanted) - set(ours) - {"type", "rope_type"})
    node = folder.get(CONFIG, *level_in(folder, ("text_config",)))
    lost = [key for key in lost if not _is_of_class(folder, key, wanted[key])]
    lost = [key for key in lost if not isinstance(node, dict) or _has_layers(node, key) or "_attention" not in key]
    if not lost or CONFIG not in folder.objects:
        return
    remedies: tuple[Edit, ...] = ()
    if not set(ours) - {"rope_theta"}:
        remedies = tuple(_brought_back(folder, base))
    yield Fault(
        file=CONFIG,
        key=next((edit.path[-1] for edit in remedies), "rope_scaling"),
        found=f"{', '.join(lost)} absent",
        expected=f"{wanted[lost[0]]!r}, as in the base",
        remedies=remedies,
    )


def _brought_back(folder: Folder, base: Folder) -> Iterator[Edit]:
    """Yield the edits that write the base's rotary settings of the text model, in the base's form."""
    at = level_in(folder, ("text_config",))
    node = base.get(CONFIG, "text_config")
    node = node if isinstance(node, dict) else base.objects[CONFIG]
    for key in (*_ROPE, "rope_theta"):
        value = node.get(key)
        if value is not None and folder.get(CONFIG, *at, key) != value:
            yield Edit(file=CONFIG, path=(*at, key), value=copy.deepcopy(value))


def _is_of_class(folder: Folder, key: str, value: Any) -> bool:
    """Return whether the class takes a value where none is said, so that nothing is lost without it."""
    own = folder.get(CONFIG, "text_config", "model_type")
    model_type = own if isinstance(own, str) else folder.model_type
    if key == "partial_rotary_factor":
        return bool(value == installed_rotary(model_type, key))
    theta = installed_rotary(model_type, "rope_theta")
    if key == "rope_theta":
        return theta is None or isinstance(theta, dict) or bool(value == theta)
    if not key.endswith("_attention") or not isinstance(value, dict):
        return False
    if isinstance(theta, dict):
        theta = theta.get("local" if key.startswith("sliding") else "global", theta.get(key))
    plain = {"rope_type": "default", "rope_theta": theta}
    return all(plain.get(name, ABSENT) == one for name, one in value.items())


def _rope(folder: Folder) -> dict[str, Any]:
    """Return every rotary setting of the text model, in whatever form it is said, at the level that is read."""
    found: dict[str, Any] = {}
    node = folder.get(CONFIG, "text_config")
    node = node if isinstance(node, dict) else folder.objects.get(CONFIG, {})
    for name in _ROPE:
        value = node.get(name)
        found |= {key: one for key, one in value.items() if one is not None} if isinstance(value, dict) else {}
    return found | ({"rope_theta": node["rope_theta"]} if is_number(node.get("rope_theta")) else {})
