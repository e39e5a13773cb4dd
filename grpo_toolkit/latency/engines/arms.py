"""The things that are timed: folders, endpoints, live models, and how each runs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo_toolkit.checkpoint.folders.base_lookup import base_of_adapter
from grpo_toolkit.checkpoint.folders.model_folder import Kind, open_checkpoint
from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.engines.protocol import Options
from grpo_toolkit.model.load import has_processor, joined, load_processor
from grpo_toolkit.model.memory import free_bytes, process_bytes

if TYPE_CHECKING:
    import os
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class LatencyArm:
    """A model to time, and the way in which it runs.

    Attributes:
        name: on charts.
        path: a model or adapter folder; it gets a process of its own.
        url: or an OpenAI-compatible endpoint, such as `http://localhost:8000/v1`; `path`, if given too, names its
            model there.
        live: or a model in this process with its processor, measured as it stands.
        options: how it is loaded and runs.
        process: arms of the same folder share a process if this number and what they are loaded with are the same.
    """

    name: str
    path: Path | None = None
    url: str | None = None
    live: tuple[Any, Any] | None = field(default=None, repr=False, compare=False)
    options: Options = field(default_factory=Options)
    process: int = 0

    @property
    def place(self) -> str:
        """The folder, the address, or "live"."""
        if self.url is not None:
            return self.url if self.path is None else f"{self.url} {self.path}"
        return "live" if self.path is None else str(self.path)

    @property
    def engine_key(self) -> tuple[object, ...]:
        """The key of the engine: arms with the same one share it.

        Compiled steps with different SDPA kernels share no process: taking turns there, each would be compiled anew at
        every turn (see `LocalEngine`). Nor does one that keeps its cache, which is in the memory of all that do. A
        live model is where it is.
        """
        if self.live is not None:
            return (id(self.live[0]), self.process, self.options.load_key)
        kernels = self.options.sdpa_backend if self.options.is_compiled else None
        return (self.path, self.url, self.process, self.options.load_key, kernels, self.options.ahead)

    @property
    def warm_key(self) -> tuple[object, ...]:
        """The key of the warm-up: arms with the same one share an engine, and what is compiled for their options."""
        return (self.engine_key, self.options if self.options.is_compiled else None)


Arm = LatencyArm
"""The older name, which is the one inside this package."""


def named_arms(
    arms: Sequence[Arm] | Mapping[str, str | os.PathLike[str]],
    options: Options | None = None,
    *,
    device: str | None = None,
) -> list[Arm]:
    """Return arms as they are, or made from {name: folder}, all loaded and run as the options (and `device`) say.

    Raises:
        InputError: two arms of one name.
    """
    if isinstance(arms, Mapping):
        chosen = options or Options()
        if device is not None:
            chosen = replace(chosen, device=device)
        return [Arm(name=name, path=Path(path), options=chosen) for name, path in arms.items()]
    if len({arm.name for arm in arms}) < len(arms):
        raise InputError("two arms have the same name; give them names of their own")
    return list(arms)


def fitting(arms: Sequence[Arm], *, spare: Sequence[str] = ()) -> list[Arm]:
    """Return the arms whose processes fit on the GPU all at once.

    Args:
        arms: of folders, on one device; a CPU has room for all.
        spare: names of arms to leave out for want of room, the first one first.

    Raises:
        InputError: without those there is no room either.
    """
    device, left = arms[0].options.device, list(arms)
    free = free_bytes(device) if device.startswith("cuda") else None
    if free is None:
        return left
    for name in (None, *spare):
        left = [arm for arm in left if arm.name != name] or left
        folders = {arm.engine_key: arm.path for arm in left if arm.path is not None}
        needed = sum(map(process_bytes, folders.values()))
        if needed <= free:
            return left
    raise InputError(
        f"the arms need about {needed / 1e9:.1f} GB on {device} at once, and {free / 1e9:.1f} GB are free there; "
        "ask for fewer (arms=), or after the training: grpo-toolkit bench base=BASE export=EXPORT --device cuda"
    )


def processor_of(arms: Sequence[Arm]) -> Any:
    """Return the processor (or tokenizer) of the first arm that has one here; None for endpoints alone.

    Raises:
        CheckpointError: a folder that is no checkpoint, or an adapter whose base is not here.
    """
    for arm in arms:
        if arm.live is not None:
            return arm.live[1]
        if arm.url is not None or arm.path is None:
            continue
        checkpoint = open_checkpoint(arm.path)
        own = load_processor(arm.path) if has_processor(arm.path) else None
        if checkpoint.kind is Kind.ADAPTER and not hasattr(own, "tokenizer"):  # none, or a tokenizer alone
            original = load_processor(base_of_adapter(arm.path))
            return original if own is None else joined(own, original)
        if own is not None:
            return own
    return None
