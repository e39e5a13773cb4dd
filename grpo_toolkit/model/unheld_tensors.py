"""Stored tensors that a model's class does not hold, by the word of the loader itself.

Makers publish more than a class of transformers loads: heads that predict several tokens ahead (`mtp.*`, or one layer
more than the config counts), frequencies and position ids that once were parameters. Loading passes over them, some
with a warning and some in silence (`_keys_to_ignore_on_load_unexpected`), and saving leaves them out. Servers use
them.
"""

from __future__ import annotations

import copy
import warnings
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

from grpo_toolkit.checkpoint.safetensors_header import FLOAT_NAMES
from grpo_toolkit.checkpoint.tensor_names import is_lora, live_name, without_wrappers
from grpo_toolkit.model.live_model import base_model
from grpo_toolkit.model.load import model_without_weights
from grpo_toolkit.model.sharding.gather import unsharded_models

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping
    from pathlib import Path

    import torch
    from transformers import PreTrainedModel

    from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
    from grpo_toolkit.checkpoint.weights.base_weights import Base
    from grpo_toolkit.model.load import LoadReport


def unheld_groups(
    model: torch.nn.Module, tensors: Mapping[str, TensorInfo], groups: Mapping[str, Collection[str]]
) -> frozenset[str]:
    """Return the groups of stored tensors without which the model's class would load just as whole.

    The loader is asked on the meta device, with tensors that have a shape and no values: with all of them, then
    without the ones in question. Whatever is missing then and was not before had a place in the model.

    Args:
        model: the model whose class is asked, live or without weights.
        tensors: the stored tensors of the folder, by name.
        groups: names of tensors, each group judged as one; a tied head is in none, since loading can do without it.
    """
    missing_at_best = _missing(model, tensors) if groups else None
    if missing_at_best is None:
        return frozenset()

    def unheld(keys: list[str]) -> list[str]:
        left_out = {name for key in keys for name in groups[key]}
        if _missing(model, {name: info for name, info in tensors.items() if name not in left_out}) == missing_at_best:
            return keys
        if len(keys) == 1:
            return []
        middle = len(keys) // 2
        return unheld(keys[:middle]) + unheld(keys[middle:])

    return frozenset(unheld(sorted(groups)))


def unheld_in_folder(
    folder: Path, tensors: Mapping[str, TensorInfo], groups: Mapping[str, Collection[str]]
) -> frozenset[str]:
    """Return the same of a folder, for the class that loads it for generation; none where no class is known."""
    model = model_of_folder(folder)
    return frozenset() if model is None else unheld_groups(model, tensors, groups)


def without_the_bases(report: LoadReport, base: Base) -> LoadReport:
    """Return the report of a load without unexpected tensors that the base has, too: it is published with them."""

    def is_own(name: str) -> bool:
        return is_lora(name) or without_wrappers(name) != name or live_name(name, base.family) not in base.stored

    own = list(filter(is_own, report.unexpected))
    if own and (model := model_of_folder(base.path)) is not None:
        # The loader may have spelled them otherwise, or stacked experts of a layer that has no place.
        unexpected = _load_keys(model, base.tensors)["unexpected_keys"]
        own = [name for name in own if name not in unexpected]
    return replace(report, unexpected=own)


def model_of_folder(folder: Path) -> PreTrainedModel | None:
    """Return the model that a folder's config describes, on the meta device; None where no class is known."""
    try:
        return model_without_weights(folder)
    except (OSError, ValueError, KeyError, ImportError):
        return None


def _missing(model: torch.nn.Module, tensors: Mapping[str, TensorInfo]) -> frozenset[str] | None:
    try:
        return frozenset(_load_keys(model, tensors)["missing_keys"])
    except (RuntimeError, ValueError, KeyError, OSError):
        # A stack of experts of which some are left out is no stack; or a class that cannot be loaded so at all.
        return None


def _load_keys(model: torch.nn.Module, tensors: Mapping[str, TensorInfo]) -> Mapping[str, Any]:
    """Return what the loader says about a folder that has these tensors: `missing_keys`, `unexpected_keys`."""
    import torch

    inner: Any = base_model(model)
    config = copy.deepcopy(inner.config)
    if hasattr(config, "quantization_config"):  # the names of the folder are those of the unquantised model
        del config.quantization_config
    state = {
        name: torch.empty(info.shape, device="meta", dtype=getattr(torch, FLOAT_NAMES.get(info.dtype, "int64")))
        for name, info in tensors.items()
    }
    with unsharded_models(), torch.random.fork_rng(devices=[]), _silent():
        _, report = type(inner).from_pretrained(
            None,
            config=config,
            state_dict=state,
            device_map="meta",
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a vocabulary that was resized
        )
    return cast("Mapping[str, Any]", report)


@contextmanager
def _silent() -> Iterator[None]:
    """Keep the loader's report to ourselves: what is missing here is left out on purpose."""
    from transformers.utils import logging

    verbosity, has_bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(verbosity)
        if has_bars:
            logging.enable_progress_bar()
