"""Classes of the installed transformers, read as text: what a processor asks for, what a tokenizer makes itself.

Nothing is imported. Only asked where something was found to differ, as it looks through the library's files.
"""

from __future__ import annotations

import ast
import os
import re
import sys
from functools import lru_cache
from typing import Any, Final

from grpo_toolkit.doctor.installed_configs import module_of
from grpo_toolkit.doctor.readers import installed_text, read_text

_PARTS: Final = {"tokenization": "Tokenizer", "processing": "Processor", "image_processing": "ImageProcessor"}


@lru_cache(maxsize=32)
def class_source(name: str, part: str) -> str:
    """Return the text of a class of the installed transformers; empty where there is none of that name.

    Args:
        name: the class's.
        part: "tokenization", "processing" or "image_processing", as the library's files are named.
    """
    if not name.isidentifier() or not name.endswith(_PARTS[part]):
        return ""
    found = re.compile(rf"^class {name}\b.*?(?=^\S|\Z)", re.MULTILINE | re.DOTALL)
    for folder in sys.path:
        models = os.path.join(folder or ".", "transformers", "models")  # noqa: PTH118 - half the time of Path
        if os.path.isdir(models):  # noqa: PTH112
            texts = (read_text(f"{models}/{model}/{part}_{model}.py") for model in _likely(os.listdir(models), name))  # noqa: PTH208
            return next((match[0] for match in map(found.search, texts) if match), "")
    return ""


def _likely(models: list[str], name: str) -> list[str]:
    """Return the library's model folders, those first whose name a class's begins with."""
    low = name.lower()
    return sorted(models, key=lambda model: (not low.startswith(model.replace("_", "")), -len(model)))


def default_in(source: str, key: str) -> Any:
    """Return a literal that a class gives an attribute or an argument; None where it gives none that can be told."""
    found = re.search(rf"^ +{re.escape(key)}(?:: [^=\n]+)? ?= ?(.+?),?(?: +#.*)?$", source, re.MULTILINE)
    named = None
    if found and found[1].isidentifier():  # a constant, such as the mean of CLIP's pictures
        constants = installed_text("transformers/utils/constants.py")
        named = re.search(rf"^{found[1]} = (.+)$", constants, re.MULTILINE)
    try:
        return ast.literal_eval((named or found)[1]) if found else None
    except (ValueError, SyntaxError):
        return None


@lru_cache(maxsize=256)
def reads_setting(model_type: str, level: tuple[str, ...], key: str) -> bool:
    """Return whether the installed transformers asks a config of a type for a setting; True where it cannot be told.

    It does not where neither the model's code nor the library's own has the name, nor any that the class gives it. The
    type of a part is asked where the class of the part may be any (`AutoConfig`).
    """
    config, code = module_of(model_type)[1], _modeling(model_type)
    if not code:
        return True
    if key == "model_type" and level:
        named = re.search(rf'"{re.escape(level[-1])}": (\w+)', config)
        return named is None or named[1] in ("AutoConfig", "SubConfigSpec")
    names = (key, *re.findall(rf'"(\w+)": "{re.escape(key)}"', config))
    own = re.compile(rf"\bself\.{re.escape(key)}\b")
    any_name = re.compile(rf"\b(?:{'|'.join(map(re.escape, names))})\b")
    general = (installed_text(f"transformers/{name}.py") for name in _ASK_ANY_CONFIG)
    return bool(own.search(config) or any_name.search(code) or any(map(any_name.search, general)))


def takes_null(model_type: str, key: str) -> bool:
    """Return whether the installed transformers works a setting out where a config says null; True if unknown."""
    config, code = module_of(model_type)[1], _modeling(model_type)
    asks_it = re.search(rf'\bconfig\.{re.escape(key)}\b|"{re.escape(key)}", config\b', code)
    return not code or f"{key} is None" in config or asks_it is None


def makes_dropout(model_type: str, key: str) -> bool:
    """Return whether the installed transformers makes a module of a share of dropped values, which checks it."""
    return re.search(rf"nn\.Dropout\((?:p=)?(?:\w+\.)*{re.escape(key)}\)", _modeling(model_type)) is not None


@lru_cache(maxsize=8)
def _modeling(model_type: str) -> str:
    """Return the text of the installed classes of a model; empty where it cannot be told."""
    name = module_of(model_type)[0]
    return installed_text(f"transformers/models/{name}/modeling_{name}.py") if name else ""


_ASK_ANY_CONFIG: Final = ("modeling_utils", "masking_utils", "modeling_rope_utils", "cache_utils", "generation/utils")


def registered_tokenizer(model_type: str) -> str:
    """Return the tokenizer class that the installed transformers has for a model type; empty where it has none."""
    auto = installed_text("transformers/models/auto/tokenization_auto.py")
    found = re.search(rf'"{re.escape(model_type)}",\s*\(?\s*"(\w+?)(?:Fast)?"', auto)
    return found[1] if found and found[1].endswith("Tokenizer") else ""


@lru_cache(maxsize=8)
def makes_its_steps(model_type: str, tokenizer_class: str) -> bool:
    """Return whether transformers 5, if installed, reads no steps of a tokenizer.json beside its vocabulary.

    A tokenizer class with an `__init__` of its own makes normalizer, pre-tokenizer and decoder itself. Which class it
    is says the tokenizer's config, or for some model types the library (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS`).
    """
    auto = installed_text("transformers/models/auto/tokenization_auto.py")
    listed = re.search(r"^MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS\b.*?^}", auto, re.MULTILINE | re.DOTALL)
    registered = re.search(rf'\("{re.escape(model_type)}", "(\w+?)(?:Fast)?"', auto)
    if listed is None:  # transformers 4 reads them all
        return False
    name = tokenizer_class.removesuffix("Fast")
    if registered is not None and f'"{model_type}",' in listed[0]:
        name = registered[1]
    return "def __init__(" in class_source(name, "tokenization")
