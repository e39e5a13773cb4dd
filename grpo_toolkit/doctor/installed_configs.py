"""Config classes of the installed transformers, read as text: which there are, their defaults, the types they take."""

from __future__ import annotations

import ast
import os
import re
import sys
from functools import lru_cache
from typing import Any, Final

from grpo_toolkit.doctor.readers import installed_text, read_text


@lru_cache(maxsize=16)
def installed_knows(model_type: str) -> bool | None:
    """Return whether the installed transformers has a config class for a model type; None where none is installed.

    Its own tables are asked, as text: `CONFIG_MAPPING_NAMES`, which transformers 5 keeps in a file of its own.
    """
    for folder in sys.path:
        auto = os.path.join(folder or ".", "transformers", "models", "auto")  # noqa: PTH118 - half the time of Path
        if os.path.isdir(auto):  # noqa: PTH112
            return any(f'("{model_type}", "' in read_text(os.path.join(auto, name)) for name in _TABLES)  # noqa: PTH118
    return None


def installed_defaults(model_type: str, level: tuple[str, ...], key: str) -> tuple[Any, ...]:
    """Return the defaults that the config classes of a level give a setting; none where it cannot be told.

    The level that is no level of its own ("" of a text model) may be read by several classes.
    """
    found = []
    for source in _classes(model_type, level):
        said = _assigned(source, key)
        if said is None:
            return ()
        found += said
    return tuple(found)


def _assigned(source: str, key: str) -> list[Any] | None:
    """Return the literals that a text gives a name; None where one of them is no literal."""
    pattern = re.compile(rf"^ +{re.escape(key)}(?:: [^=\n]+)? ?= ?([^\n]+?),?$", re.MULTILINE)
    try:
        return [ast.literal_eval(literal) for literal in pattern.findall(source)]
    except (ValueError, SyntaxError):
        return None


def is_worked_out(model_type: str, level: tuple[str, ...], key: str) -> bool:
    """Return whether the installed config class works a setting out of others, whatever a config says for it."""
    name = re.escape(key)
    sources = "".join(_classes(model_type, level))
    said = re.findall(rf"^        self\.{name} = ((?:.*\(\n(?:.*\n)*?        \)|.+)$)", sources, re.MULTILINE)
    return bool(said) and not any(re.search(rf"\b{name}\b", value) for value in said)


def installed_takes(model_type: str, level: tuple[str, ...], key: str, value: Any) -> bool:
    """Return whether the installed config classes take a value for a setting; True where they do not say (4.x).

    transformers 5 checks the types of its configs' fields as they load.
    """
    types = _types(model_type, level, key)
    return not types or any(_fits(value, one) for one in types)


@lru_cache(maxsize=1024)
def _types(model_type: str, level: tuple[str, ...], key: str) -> tuple[str, ...]:
    """Return the types that the classes of a level take for a setting.

    Of the fields that all configs have, only the labels are looked into; the others take anything.
    """
    field = re.compile(rf"^    {re.escape(key)}: ([^=\n]+?)(?: =|$)", re.MULTILINE)
    classes = _classes(model_type, level)
    general = (_of_all(),) if key in ("id2label", "label2id") and classes else ()
    found = [one for source in (*classes, *general) for one in field.findall(source)]
    return tuple(one for text in found for one in _parts(text))


def _fits(value: Any, name: str) -> bool:
    if name == "None":
        return value is None
    if name.startswith(("list[", "tuple[", "List[", "Tuple[")):
        inside = _parts(name.partition("[")[2].removesuffix("]").removesuffix(", ..."))
        return isinstance(value, list) and all(any(_fits(item, one) for one in inside) for item in value)
    kinds = _KINDS.get(name.partition("[")[0].removeprefix("ClassVar"))
    if kinds is None:
        return True  # a class, or what is not known here
    return isinstance(value, kinds) and not (isinstance(value, bool) and bool not in kinds)


_KINDS: Final[dict[str, tuple[type, ...]]] = {
    "int": (int,), "float": (float, int), "str": (str,), "bool": (bool,), "dict": (dict,), "list": (list,),
    "tuple": (list,), "Dict": (dict,), "List": (list,), "torch.dtype": (str,), "RopeParameters": (dict,),
    "Literal": (str,),
}  # fmt: skip


def _parts(text: str) -> list[str]:
    """Return the alternatives of a type: "int | list[int | str]" has two."""
    parts, depth = [""], 0
    for sign in text.removeprefix("Optional[").removesuffix("]" if text.startswith("Optional[") else ""):
        depth += (sign == "[") - (sign == "]")
        if sign == "|" and depth == 0:
            parts.append("")
        else:
            parts[-1] += sign
    found = [part.strip() for part in parts if part.strip()]
    return [*found, "None"] if text.startswith("Optional[") else found


@lru_cache(maxsize=32)
def _classes(model_type: str, level: tuple[str, ...]) -> tuple[str, ...]:
    """Return the texts of the classes that read a level of a config: those of its type, or of its name.

    The top of a config is read by any class of the family but the tower's.
    """
    source = _source(model_type)
    classes = [text for text in re.split(r"(?m)^(?=class |@)", source) if text.startswith("class ")]
    if not level:
        return tuple(text for text in classes if "Vision" not in text.partition("(")[0])
    own = tuple(text for text in classes if f'\n    model_type = "{model_type}"' in text)
    part = {"text_config": "Text", "vision_config": "Vision"}.get(level[0], "")
    return own if len(classes) == 1 else tuple(text for text in classes if part in text.partition("(")[0]) or own


@lru_cache(maxsize=8)
def module_of(model_type: str) -> tuple[str, str]:
    """Return the folder of a type among the installed models, and the text of its config classes; both may be empty.

    The type may be a part's, such as "clip_vision_model".
    """
    if not re.fullmatch(r"[a-z0-9_]{1,60}", model_type):
        return "", ""
    words = model_type.split("_")
    for name in ("_".join(words[:count]) for count in range(len(words), 0, -1)):
        text = installed_text(f"transformers/models/{name}/configuration_{name}.py")
        if f'model_type = "{model_type}"' in text:
            return name, text
    return "", ""


def _source(model_type: str) -> str:
    return module_of(model_type)[1]


def installed_rotary(model_type: str, key: str) -> Any:
    """Return what the installed config class takes for a rotary setting that a config does not say; None if unknown.

    The base frequency may be a dict by kind of layers. Source: `RotaryEmbeddingConfigMixin` of transformers 5, and the
    arguments of the classes of 4.x.
    """
    if key == "partial_rotary_factor":
        found = re.search(r'setdefault\(\s*"partial_rotary_factor", ([0-9.]+)\)', _source(model_type))
        return float(found[1]) if found else 1.0
    own = installed_defaults(model_type, (), "default_theta") or installed_defaults(model_type, (), "rope_theta")
    general = _assigned(installed_text("transformers/modeling_rope_utils.py"), "default_theta") or []
    return next((value for value in (*own, *general) if value is not None), None) if _source(model_type) else None


@lru_cache(maxsize=1)
def _of_all() -> str:
    """Return the text of the class that all configs are of."""
    text = installed_text("transformers/configuration_utils.py")
    return text.partition("\nclass PreTrainedConfig")[2].partition("\n    def ")[0]


_TABLES: Final = ("auto_mappings.py", "configuration_auto.py")
