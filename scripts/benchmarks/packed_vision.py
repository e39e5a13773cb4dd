"""The gain of packed vision: the tower of Qwen2.5-VL-3B with random weights, as transformers runs it and packed.

    python -m scripts.benchmarks.packed_vision              # on a GPU
    python -m scripts.benchmarks.packed_vision --tiny       # a check of the script, on a CPU

Three tables, printed at the end:

* the tower over 8 and 64 different images and over 8 copies of one, forward alone (rollouts, log-probabilities) and
  forward with checkpointed backward (training), and over one image of three sizes (what an answer's first token waits
  for); `batch` and `varlen` are the packed ways with the kernel forced, `packed` is what the library chooses;
* attention alone for the shapes of such calls, with the first call of a length that the process has not seen, where
  cuDNN plans;
* how far each way is from float64, in its dtype.

Times are medians in milliseconds; ways take turns, so that a clock that drifts falls on all of them. A way whose first
call takes more than a second is measured once again only. Each row goes to standard error as soon as it is there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    import torch

PUBLISHED = {
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048,
    "fullatt_block_indexes": [7, 15, 23, 31], "window_size": 112, "patch_size": 14, "spatial_merge_size": 2,
}  # fmt: skip
"""The vision part of Qwen2.5-VL-3B's config."""

TINY = PUBLISHED | {
    "depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32,
    "fullatt_block_indexes": [1],
}  # fmt: skip

AROUND_1950 = [(44, 44), (46, 42), (38, 52), (54, 36), (40, 48), (50, 40), (42, 46), (34, 58)]
"""Height and width in patches of images of some 1,950."""

WAYS = ("loop", "batch", "varlen", "packed")
SKIPPED = float("nan")
SLOW_MS = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="a tiny tower and few patches")
    parser.add_argument("--rounds", type=int, default=5, help="measured calls of each way")
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output instead of tables")
    options = parser.parse_args()

    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    tables = {
        "tower": told(tower_rows(device, dtype, tiny=options.tiny, rounds=options.rounds)),
        "attention": told(attention_rows(device, dtype, tiny=options.tiny, rounds=options.rounds)),
        "distance": told(distance_rows(device, tiny=options.tiny)),
    }
    if options.json:
        print(json.dumps({"device": name_of(device), "torch": torch.__version__, **tables}))
        return
    print(f"\n{name_of(device)}, torch {torch.__version__}, {str(dtype).removeprefix('torch.')} (ms, medians)\n")
    for table in tables.values():
        print_table(table)


def told(rows: Iterator[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows, each printed as soon as it was measured: a run that is cut short has shown something."""
    found = []
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
        found.append(row)
    return found


def tower_rows(device: torch.device, dtype: torch.dtype, *, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Time the whole tower, each way in turn."""
    import torch

    few = [(6, 10), (4, 4), (8, 6)]
    images = few if tiny else AROUND_1950
    sizes = {"8 images": images, "8 copies": [images[0]] * 8, "64 images": images * (1 if tiny else 8)}
    singles = [(4, 6)] if tiny else [(56, 76), (94, 176), (252, 260)]
    sizes |= {f"one of {height * width // 4:,} tokens": [(height, width)] for height, width in singles}
    arms = [("", dtype, nullcontext)]
    if device.type == "cuda":
        arms.append(("float32, autocast: ", torch.float32, lambda: torch.autocast("cuda", dtype=torch.bfloat16)))
    for prefix, weights, context in arms:
        tower = build_tower(TINY if tiny else PUBLISHED, device, weights)
        for name, grids in sizes.items():
            if prefix and name != "8 images":
                continue
            patches, grid = pictures(grids, device, weights, are_copies="copies" in name)
            with context():
                for what, run in (("forward", forward), ("forward and backward", backward)):
                    if run is forward or "one of" not in name:
                        row = in_turns(tower, partial(run, tower, patches, grid), rounds=rounds)
                        yield {"tower": f"{prefix}{name}, {what}"} | row


def attention_rows(device: torch.device, dtype: torch.dtype, *, tiny: bool, rounds: int) -> Iterator[dict[str, Any]]:
    """Time attention alone, over segments of these lengths."""
    windows = [64, 64, 64, 48, 32] if tiny else [64] * 26 + [48] * 6 + [32] * 4 + [16]
    frames = [60, 16, 48] if tiny else [height * width for height, width in AROUND_1950]
    shapes = {
        "windows of 8 images": windows * 8,
        "the same, all of 64": [64] * len(windows) * 8,
        "windows of 64 images": windows * (8 if tiny else 64),
        "8 images, uneven": frames,
        "8 images, even": [frames[0]] * 8,
        "64 images, uneven": frames * 8,
        **{f"one of {length:,} patches": [length] for length in ((96,) if tiny else (4256, 16544, 65520))},
        "mixed: 16,544 and 8 of 1,950": [512 if tiny else 16544, *frames],
    }
    for name, lengths in shapes.items():
        for what in ("forward", "forward and backward"):
            yield {"attention": f"{name}, {what}"} | attention_in_turns(
                lengths, device, dtype, rounds=rounds, is_backward=what != "forward"
            )
    yield {"attention": "one image, first call of its length"} | {
        way: first_call(way, device, dtype, start=80 if tiny else 4000) for way in ("loop", "batch", "varlen")
    }


def distance_rows(device: torch.device, *, tiny: bool) -> Iterator[dict[str, Any]]:
    """Measure the largest distance from float64, of output and gradients, as a part of the largest value."""
    import torch

    lengths = [64, 64, 48, 20] if tiny else [64] * 20 + [48, 32, 16, 900, 700]
    exact = attend("loop", lengths, inputs(sum(lengths), device, torch.float64), is_backward=True)
    for dtype in (torch.float32, torch.bfloat16):
        row: dict[str, Any] = {"distance from float64": str(dtype).removeprefix("torch.")}
        for way in WAYS:
            tensors = inputs(sum(lengths), device, dtype)
            if can_force(way, tensors[0]):
                found = attend(way, lengths, tensors, is_backward=True)
                away = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(found, exact, strict=True)]
                row[way] = f"{float(max(away)):.1e}"
        yield row


def build_tower(numbers: dict[str, Any], device: torch.device, dtype: torch.dtype) -> Any:
    import torch
    from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as library
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig

    torch.manual_seed(0)
    with device:
        tower = library.Qwen2_5_VisionTransformerPretrainedModel(Qwen2_5_VLVisionConfig(**numbers))
    tower.config._attn_implementation = "sdpa"
    tower.gradient_checkpointing_enable({"use_reentrant": False})
    return tower.to(device, dtype)


def pictures(
    grids: list[tuple[int, int]], device: torch.device, dtype: torch.dtype, *, are_copies: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    import torch

    grid = torch.tensor([[1, height, width] for height, width in grids], device=device)
    images = [torch.randn(height * width, 1176, device=device, dtype=dtype) for height, width in grids]
    return torch.cat(images[:1] * len(images) if are_copies else images), grid


def forward(tower: Any, patches: torch.Tensor, grid: torch.Tensor) -> None:
    import torch

    tower.eval()
    with torch.no_grad():
        tower(patches, grid_thw=grid)


def backward(tower: Any, patches: torch.Tensor, grid: torch.Tensor) -> None:
    tower.train()
    out = tower(patches, grid_thw=grid)
    (out if hasattr(out, "sum") else out.pooler_output).float().sum().backward()
    tower.zero_grad()


def in_turns(tower: Any, call: Callable[[], None], *, rounds: int) -> dict[str, float]:
    """Return the median milliseconds of a call of the tower by each way; one call of each to warm up."""
    from grpo_toolkit.model.attention.packed_vision import packed_vision

    query = next(tower.parameters())

    def measure(way: str) -> float:
        with ExitStack() as stack:
            if way != "loop":
                stack.enter_context(packed_vision(tower))
                stack.enter_context(forced(way))
            return timed(call, query.device)

    return medians(measure, [way for way in WAYS if can_force(way, query)], rounds=rounds)


def medians(measure: Callable[[str], float], ways: list[str], *, rounds: int) -> dict[str, float]:
    """Median milliseconds of each way, in turns; slow ways get one call beside the first, which warms up."""
    left = {way: 1 if measure(way) > SLOW_MS else rounds for way in ways}
    times: dict[str, list[float]] = {}
    for turn in range(rounds):
        for way in ways:
            if turn < left[way]:
                times.setdefault(way, []).append(measure(way))
    return {way: statistics.median(times[way]) if way in times else SKIPPED for way in WAYS}


def attention_in_turns(
    lengths: list[int], device: torch.device, dtype: torch.dtype, *, rounds: int, is_backward: bool
) -> dict[str, float]:
    tensors = inputs(sum(lengths), device, dtype)

    def measure(way: str) -> float:
        return timed(lambda: attend(way, lengths, tensors, is_backward=is_backward), device)

    return medians(measure, [way for way in WAYS if can_force(way, tensors[0])], rounds=rounds)


def first_call(way: str, device: torch.device, dtype: torch.dtype, *, start: int) -> float:
    """Return the median milliseconds of the first call of a length, over five lengths that no other way is given."""
    times = []
    for step in range(5):
        length = start + 8 * (5 * WAYS.index(way) + step)
        tensors = inputs(length, device, dtype)
        if not can_force(way, tensors[0]):
            return SKIPPED
        times.append(timed(lambda: attend(way, [length], tensors, is_backward=False), device))  # noqa: B023
    return statistics.median(times)


_BORDERS: dict[Any, torch.Tensor] = {}


def attend(way: str, lengths: list[int], tensors: list[torch.Tensor], *, is_backward: bool) -> list[torch.Tensor]:
    """Attend over segments, with gradients if asked; the plan of equal lengths is kept, as for a forward's layers."""
    import torch

    from grpo_toolkit.model.attention.segment_attention import packed_attention

    layer = torch.nn.Module()
    options: dict[str, Any] = {"scaling": tensors[0].shape[-1] ** -0.5, "is_causal": False}
    with nullcontext() if is_backward else torch.no_grad(), forced(way):
        if way == "loop":
            parts = zip(*(tensor.split(lengths, dim=2) for tensor in tensors), strict=True)
            out = torch.cat([packed_attention(layer, *part, None, **options)[0] for part in parts], dim=1)
        else:
            key = (tuple(lengths), tensors[0].device)
            if key not in _BORDERS:
                _BORDERS[key] = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=tensors[0].device)
            out = packed_attention(layer, *tensors, None, cu_seq_lens_q=_BORDERS[key], **options)[0]
        return [out.detach(), *torch.autograd.grad(out.float().square().sum(), tensors)] if is_backward else [out]


def inputs(rows: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    import torch

    draws = torch.Generator(device).manual_seed(rows)
    shape = (rows, 16, 80)
    tensors = [torch.randn(shape, dtype=torch.float64, device=device, generator=draws).to(dtype) for _ in range(3)]
    return [tensor.transpose(0, 1)[None].requires_grad_() for tensor in tensors]


def can_force(way: str, query: torch.Tensor) -> bool:
    """Return whether the variable-length kernel takes a dtype on a device, with the published tower's heads."""
    import torch

    from grpo_toolkit.model.attention.segment_attention import can_use_varlen

    if way != "varlen":
        return True
    example = torch.empty(1, 16, 8, 80, dtype=query.dtype, device=query.device)
    return can_use_varlen(example, example, {"is_causal": False})


@contextmanager
def forced(way: str) -> Iterator[None]:
    """Make packed attention use one kernel inside, whatever the library would choose."""
    from grpo_toolkit.model.attention import segment_attention

    chosen = segment_attention.choose_kernel
    if way in ("batch", "varlen"):
        segment_attention.choose_kernel = lambda *_: way  # type: ignore[assignment]
    try:
        yield
    finally:
        segment_attention.choose_kernel = chosen


def timed(call: Callable[[], object], device: torch.device) -> float:
    import torch

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return (time.perf_counter() - start) * 1000


def name_of(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


def print_table(rows: list[dict[str, Any]]) -> None:
    title = next(iter(rows[0]))
    width = max(len(title), *(len(row[title]) for row in rows))
    print(f"{title:{width}}" + "".join(f"{way:>10}" for way in WAYS))
    for row in rows:
        cells = (row.get(way, SKIPPED) for way in WAYS)
        shown = (cell if isinstance(cell, str) else "-" if cell != cell else f"{cell:,.2f}" for cell in cells)
        print(f"{row[title]:{width}}" + "".join(f"{cell:>10}" for cell in shown))
    print()


if __name__ == "__main__":
    sys.exit(main())
