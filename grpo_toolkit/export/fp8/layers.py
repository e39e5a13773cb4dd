"""The layers of an export that become FP8, and the names of those that do not, in every reader's spelling.

Quantised are the linear layers of the text model, the module that holds the input embeddings. Everything beside it
(vision tower, projector, output head) and everything in it that is no linear layer (embeddings, norms) stays as it is.

The classes of the installed transformers decide what a linear layer is; no weight is read. A reader applies `ignore`
to the module names of its own live model, and these differ: `visual.blocks.0`, `model.visual.blocks.0`. Names as one
release spells them, which is what a quantiser that loads the model writes down, miss the tower in another one. It is
then quantised with scales that no file holds. So the names here are patterns, from whatever prefix on.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from grpo_toolkit.checkpoint.folders.model_folder import CONFIG
from grpo_toolkit.checkpoint.name_lists import summarised
from grpo_toolkit.checkpoint.quantised_names import pattern_of
from grpo_toolkit.checkpoint.tensor_names import live_name
from grpo_toolkit.errors import InputError, UnsupportedError
from grpo_toolkit.model.load import model_without_weights

if TYPE_CHECKING:
    from collections.abc import Iterable

    from transformers import PreTrainedModel

    from grpo_toolkit.checkpoint.weights.base_weights import Base

_WEIGHT: Final = ".weight"
# A router is a linear layer in one release and none in the next, a stack of experts always none.
_EXPERTS: Final = re.compile(r"\.experts\.")


@dataclass(frozen=True, kw_only=True)
class Layers:
    """The layers of a model folder by what becomes of them.

    Attributes:
        quantised: the stored weights that become FP8.
        ignore: patterns, as compressed-tensors reads them, of the linear layers that do not.
    """

    quantised: frozenset[str]
    ignore: tuple[str, ...]


def refuse_quantised(folder: Base) -> None:
    """Raise for a folder that is quantised already.

    Raises:
        InputError: its config says so.
    """
    found = folder.config.get("quantization_config")
    if found:
        method = found.get("quant_method", "") if isinstance(found, dict) else ""
        raise InputError(
            f"{folder.path / CONFIG}: quantization_config is set{f' ({method})' if method else ''}, so this is "
            "quantised already; name the folder that it was made of"
        )


def find_layers(folder: Base) -> Layers:
    """Return what becomes of the layers of a model folder, by its headers and the classes of the installed library.

    Raises:
        InputError: it is quantised already.
        UnsupportedError: it has layers that this format cannot hold, or none that it can.
    """
    refuse_quantised(folder)
    model = model_without_weights(folder.path)
    inside, linear = _linear_layers(model)
    ours = {live_name(name + _WEIGHT, folder.family): name for name in linear}
    stored = {live: name for live, name in folder.stored.items() if live in ours and ours[live].startswith(inside)}
    quantised = set(stored.values())
    prefix = live_name(f"{inside}x", folder.family).removesuffix("x")
    embeddings = _name_of(model, model.get_input_embeddings()) + _WEIGHT
    others = sorted(
        name
        for live, name in folder.stored.items()
        if live.startswith(prefix)
        and live != live_name(embeddings, folder.family)
        and (len(folder.tensors[name].shape) > 1)
        and (name not in quantised or len(folder.tensors[name].shape) != 2 or _EXPERTS.search(live))
    )
    if others:
        raise UnsupportedError(
            f"{folder.path}: {len(others)} of its tensors ({summarised(others)}) are of layers that this FP8 cannot "
            "hold, which is for linear layers alone, without experts; serve the unquantised export, or quantise it "
            "with llmcompressor"
        )
    if not quantised:
        raise UnsupportedError(f"{folder.path}: no linear layer is stored that could be FP8; serve it as it is")
    kept = [live for live, name in ours.items() if not name.startswith(inside)]
    patterns = tuple(dict.fromkeys(pattern_of(live) for live in sorted(kept)))
    _check(folder, patterns, _spellings(kept, folder, ours), _spellings(stored, folder, ours))
    return Layers(quantised=frozenset(quantised), ignore=patterns)


def _linear_layers(model: PreTrainedModel) -> tuple[str, list[str]]:
    """Return the prefix of the text model's names, and the names of all linear layers."""
    from torch.nn import Linear

    inside = _name_of(model, model.get_input_embeddings()).rpartition(".")[0]
    return f"{inside}." if inside else "", [n for n, module in model.named_modules() if isinstance(module, Linear)]


def _name_of(model: PreTrainedModel, wanted: object) -> str:
    return str(next(name for name, module in model.named_modules() if module is wanted))


def _spellings(live: Iterable[str], folder: Base, installed: dict[str, str]) -> set[str]:
    """Return the module names of weights as the live model, the installed one and the files spell them."""
    names = {name for one in live for name in (one, f"{installed[one]}{_WEIGHT}", folder.stored.get(one, one))}
    return {name.removesuffix(_WEIGHT) for name in names}


def _check(folder: Base, patterns: Iterable[str], kept: Iterable[str], quantised: Iterable[str]) -> None:
    """Hold the patterns against every name, with the matching of the library itself.

    Raises:
        UnsupportedError: a part of the model has a name that its text model's layers have, too.
    """
    from compressed_tensors.utils.match import match_name

    for names, wanted in ((kept, True), (quantised, False)):
        for name in names:
            if any(match_name(name, pattern) for pattern in patterns) is not wanted:
                raise UnsupportedError(
                    f"{folder.path}: no pattern tells {name} from the layers that are {'' if wanted else 'not '}"
                    "quantised; serve the unquantised export, or quantise it with llmcompressor"
                )
