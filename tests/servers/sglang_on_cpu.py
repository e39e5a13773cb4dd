"""`sglang.launch_server` on a machine without a GPU, from the wheel on PyPI, which has no kernels for CPUs.

It asks for the kernels' names when it is imported. On processors without AMX nothing calls them: with
`--attention-backend torch_native` every layer of SGLang runs in torch. Here the names are there and calling one is an
error; all else (server, scheduler, radix cache, sampler, processors) is SGLang's own. Its processes are spawned, so
this file is run by each of them.
"""

from __future__ import annotations

import importlib.machinery
import os
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

os.environ["SGLANG_USE_CPU_ENGINE"] = "1"
FLAGS = (
    "--device", "cpu", "--attention-backend", "torch_native", "--mm-attention-backend", "sdpa",
    "--sampling-backend", "pytorch", "--mem-fraction-static", "0.3", "--max-total-tokens", "8192",
    "--disable-overlap-schedule",
)  # fmt: skip


class Absent(ModuleType):
    """A module whose functions cannot be called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or (self.__name__ == "torch.ops.sgl_kernel" and not name.endswith("_cpu")):
            raise AttributeError(name)

        def absent(*_: Any, **__: Any) -> Any:
            raise NotImplementedError(f"{self.__name__}.{name}: no kernels for CPUs are installed")

        return absent


def without_kernels() -> None:
    import torch

    kernels = Absent("sgl_kernel")
    kernels.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    sys.modules["sgl_kernel"] = kernels
    torch.ops.sgl_kernel = Absent("torch.ops.sgl_kernel")  # type: ignore[assignment]


def without_pinned_memory() -> None:
    """LoRA asks for it whatever the device; without a GPU there is none."""
    import torch

    def unpinned(make: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, pin_memory=False, **kwargs: make(*args, **kwargs)

    for name in ("tensor", "zeros", "ones", "empty", "full", "arange"):
        setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self: self  # type: ignore[assignment,misc]


without_kernels()
without_pinned_memory()

if __name__ == "__main__":
    # By its functions: spawned processes run the file that is `__main__`, and have to find this one there.
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args([*sys.argv[1:], *FLAGS]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)
