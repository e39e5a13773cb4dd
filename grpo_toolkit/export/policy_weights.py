"""A live policy's weights as its export will hold them, for a while: an adapter merged, everything rounded.

An export of an adapter is not quite the policy that was trained: `W + D` is rounded once, to the dtype of the files,
where the live model rounds `W x` and `D x` apart. Almost every model hides that. A mixture of experts does not: where
two experts are close, its router takes the other one, and the answer is another although each tensor is right. So the
policy is asked with the very weights that are to be stored.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from grpo_toolkit.export.live_adapter import is_adapted
from grpo_toolkit.model.live_model import base_model

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch


@contextmanager
def weights_as(
    model: torch.nn.Module, dtype: torch.dtype, computed_in: torch.dtype, *, is_merged: bool
) -> Iterator[None]:
    """Round the parameters to `dtype`, hold them as `computed_in`, and put the very same values back on every exit.

    Buffers stay, as `from_pretrained` leaves them.

    Args:
        model: a live model, not sharded.
        dtype: of the export's files.
        computed_in: the dtype to compute in.
        is_merged: merge an adapter first, in float32 as the export's is. PEFT does it, not the code that is judged.
    """
    adapted = _adapted_layers(model) if is_merged else []
    if not adapted and base_model(model).dtype == dtype == computed_in:
        yield
        return
    with ExitStack() as back:
        done: set[int] = set()
        for layer, wrappers in adapted:
            for parameter, value in _sums(layer, wrappers, back):
                _put(parameter, value.to(dtype).to(computed_in), back)
                done.add(id(parameter))
        for parameter in model.parameters():
            data = parameter.data
            if data.is_floating_point() and id(parameter) not in done and not data.dtype == dtype == computed_in:
                _put(parameter, data.to(dtype).to(computed_in), back)
        yield


def is_mergeable(model: torch.nn.Module) -> bool:
    """Return whether PEFT can merge the live adapter into what the adapter was trained on.

    Not into quantised weights: PEFT would quantise the sum again. And PEFT before 0.17 adds a factor's bias without
    its scale, and takes the lengths of rows for DoRA on embeddings (tests/merge/test_merge.py).
    """
    import peft
    from packaging.version import Version

    if not is_adapted(model) or is_quantised(model):
        return False
    configs = [model.peft_config[name] for name in model.active_adapters]  # type: ignore[index, union-attr]
    is_odd = any(getattr(config, name, False) for config in configs for name in ("lora_bias", "use_dora"))
    return not (is_odd and Version(peft.__version__) < Version("0.17"))


def is_quantised(model: torch.nn.Module) -> bool:
    """Return whether the live model's weights are quantised."""
    return getattr(base_model(model), "hf_quantizer", None) is not None


def _adapted_layers(model: torch.nn.Module) -> list[tuple[torch.nn.Module, list[Any]]]:
    """Return each module that PEFT has adapted, with its wrappers: stacked experts have one for each parameter."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found: dict[int, tuple[torch.nn.Module, list[Any]]] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            layer = module.get_base_layer()
            found.setdefault(id(layer), (layer, []))[1].append(module)
    return list(found.values())


def _sums(
    layer: torch.nn.Module, wrappers: Sequence[Any], back: ExitStack
) -> Iterator[tuple[torch.nn.Parameter, torch.Tensor]]:
    """Return a layer's parameters, each with the sum that PEFT makes of it; the parameters themselves are as before.

    From then on, until `back` is closed, the wrappers add nothing.
    """
    import torch

    own = {id(parameter) for parameter in layer.parameters()}
    merged = [parameter for parameter in layer.parameters(recurse=False) if parameter.is_floating_point()]
    factors = {id(p): p for wrapper in wrappers for p in wrapper.parameters() if id(p) not in own}
    with torch.no_grad(), ExitStack() as wide:
        for parameter in (*merged, *factors.values()):
            wide.callback(setattr, parameter, "data", parameter.data)
            # A copy: PEFT adds in place. Factors of a bfloat16 model would be multiplied in bfloat16.
            parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32), copy=True)
        for wrapper in wrappers:
            back.callback(setattr, wrapper, "merged_adapters", list(wrapper.merged_adapters))
            if "_caches" in vars(wrapper):  # where DoRA keeps what it would unmerge with
                back.callback(setattr, wrapper, "_caches", dict(wrapper._caches))
            wrapper.merge()
        sums = [(parameter, parameter.data) for parameter in merged]
    yield from sums


def _put(parameter: torch.nn.Parameter, value: torch.Tensor, back: ExitStack) -> None:
    """Give a parameter another value until `back` is closed; on a GPU without holding both there, where it can be."""
    data = parameter.data
    if data.dtype == value.dtype and data.device.type != "cpu":
        back.callback(data.copy_, data.to("cpu"))
        data.copy_(value)
    else:
        back.callback(setattr, parameter, "data", data)
        parameter.data = value
