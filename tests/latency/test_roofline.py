"""Bytes, FLOPs and what they allow: against figures that were worked out by hand, and against torch's own counter."""

from __future__ import annotations

import json
import re
import sys
from collections import defaultdict
from types import ModuleType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.latency.bench.roofline import roofline_of
from grpo_toolkit.latency.engines.protocol import Answer, EngineFacts, Evidence, Measured
from grpo_toolkit.latency.rows.row import Proof, Timeline
from grpo_toolkit.model.hardware.data_sheets import DATA_SHEETS, data_sheet
from grpo_toolkit.model.hardware.environment import state_of_card, throttle_reasons
from grpo_toolkit.model.hardware.model_sizes import ModelSizes, live_sizes, sizes_of
from grpo_toolkit.model.load import load_model

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def three_b(tmp_path_factory: pytest.TempPathFactory) -> ModelSizes:
    """The sizes of the published 3B shape, from its config and the shapes of its tensors."""
    from scripts.models.random_vlm import EMBEDDING_ROWS, SHAPES, full_size_tokenizer, tensor_shapes
    from scripts.models.tiny_vlm_files import write_model_files, write_tokenizer

    folder = tmp_path_factory.mktemp("three-b")
    shape, rows = SHAPES["qwen2.5-vl-3b"], EMBEDDING_ROWS["qwen2.5-vl-3b"]
    write_model_files(folder, shape=shape, token_ids=write_tokenizer(folder, full_size_tokenizer()), vocab_size=rows)
    config = json.loads((folder / "config.json").read_text())
    tensors = {name: (dims, 2 * _product(dims)) for name, dims in tensor_shapes(shape, vocab_size=rows).items()}
    sizes = sizes_of(config, tensors)
    assert sizes is not None
    return sizes


def _product(dims: tuple[int, ...]) -> int:
    count = 1
    for size in dims:
        count *= size
    return count


def measured(
    sizes: ModelSizes,
    hardware: str,
    *,
    bandwidth: float,
    flops: float,
    prompt_tokens: int,
    times: list[float],
    first_s: float,
) -> Measured:
    line = Timeline(
        token_times_s=times,
        prompt_tokens=prompt_tokens,
        output_tokens=len(times),
        phases_s={"prefill_s": first_s, "vision_s": 0.0},
    )
    return Measured(
        facts=EngineFacts(dtype="bfloat16", sizes=sizes, environment={"hardware": hardware}),
        answers=[Answer(timeline=line)],
        hardware={"bandwidth_bytes_per_s": bandwidth, "flops_per_s": flops},
    )


def test_the_published_3b_shape(three_b: ModelSizes) -> None:
    # Worked out in the notes of the project: 3.086 B parameters read per token, 36,864 bytes of cache per token.
    assert three_b.decode_parameters == 3_085_938_688
    assert three_b.decode_bytes == 6_171_877_376
    assert three_b.kv_bytes_per_token == 36_864
    assert three_b.weights_bytes == three_b.parameters * 2
    assert (three_b.vision_layers, three_b.vision_width, three_b.vision_window) == (32, 1280, 64)
    assert (three_b.vision_full_layers, three_b.merge) == (4, 4)


def test_the_floor_of_the_3b_shape_on_an_h200(three_b: ModelSizes) -> None:
    times = [0.1 + 0.005 * step for step in range(256)]
    arm = measured(three_b, "NVIDIA H200", bandwidth=4.3e12, flops=7e14, prompt_tokens=1024, times=times, first_s=0.04)
    arm.evidence = Evidence(proof=Proof(), patches=1024)
    found = roofline_of(arm, batch_size=1)
    assert found is not None
    assert found.bytes_per_step == 6_171_877_376 + 36_864 * (1024 + 128)
    assert found.floor_tpot_s == pytest.approx(0.001445, abs=1e-6)
    assert found.mbu == pytest.approx(0.289, abs=1e-3)
    assert found.gap_s == pytest.approx(0.003555, abs=1e-6)
    assert found.datasheet_bytes_per_s == 4.8e12
    assert found.peak_flops_per_s == 989.5e12
    assert found.prefill_flops is not None
    assert found.vision_flops is not None
    assert found.mfu == pytest.approx((found.prefill_flops + found.vision_flops) / (0.04 * 989.5e12))


def test_an_unknown_device_has_the_measured_figures_alone(three_b: ModelSizes) -> None:
    arm = measured(
        three_b, "AMD EPYC, 2 cores", bandwidth=1e10, flops=1e11, prompt_tokens=10, times=[1.0], first_s=1.0
    )
    found = roofline_of(arm, batch_size=1)
    assert found is not None
    assert (found.datasheet_bytes_per_s, found.peak_flops_per_s) == (None, 1e11)
    assert (found.mbu, found.gap_s, found.vision_flops) == (None, None, None)


def test_prefill_flops_are_what_torch_counts(qwen: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, _, _ = load_model(qwen, attn_implementation="eager")
    sizes = live_sizes(model)
    assert sizes is not None
    tokens = torch.randint(10, 90, (2, 64))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(input_ids=tokens, logits_to_keep=1)
    # Eager attention computes all pairs; what is needed are those up to the diagonal.
    every_pair = 4 * sizes.layers * sizes.heads * sizes.head_dim * 64 * 64
    needed = 4 * sizes.layers * sizes.heads * sizes.head_dim * 64 * 65 / 2
    assert counter.get_total_flops() == pytest.approx(
        sizes.prefill_flops(64, batch_size=2) + 2 * (every_pair - needed), rel=0.02
    )


def test_vision_flops_are_what_torch_counts(qwen: Path) -> None:
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    model, _, _ = load_model(qwen, attn_implementation="eager")  # not every SDPA kernel is counted
    sizes = live_sizes(model)
    assert sizes is not None
    side = 16  # patches; two windows of 8 to a side
    pixels, grid = torch.randn(side * side, 3 * 2 * 14 * 14), torch.tensor([[1, side, side]])
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.model.visual(pixels, grid_thw=grid)
    assert counter.get_total_flops() == pytest.approx(sizes.vision_flops(side * side), rel=0.05)


def test_headers_and_the_live_model_say_the_same(any_base: Path) -> None:
    model, _, _ = load_model(any_base)
    checkpoint = open_checkpoint(any_base)
    config = checkpoint.json("config.json")
    assert isinstance(config, dict)
    width = {"F32": 4, "BF16": 2}
    tensors = {
        name: (info.shape, _product(tuple(info.shape)) * width[info.dtype])
        for name, info in checkpoint.tensors().items()
    }
    found, live = sizes_of(config, tensors), live_sizes(model)
    assert found is not None
    assert live is not None
    for name in ("parameters", "weights_bytes", "decode_bytes", "kv_bytes_per_token", "vision_parameters"):
        assert getattr(found, name) == getattr(live, name), name


def test_a_config_that_says_nothing_has_no_sizes() -> None:
    assert sizes_of({"model_type": "mystery"}, {"w": ((2, 2), 16)}) is None


@pytest.mark.parametrize(
    ("name", "bandwidth"),
    [
        ("NVIDIA H200", 4.8e12),
        ("NVIDIA H100 80GB HBM3", 3.35e12),
        ("NVIDIA H100 PCIe", 2.0e12),
        ("NVIDIA A100-SXM4-80GB", 2.039e12),
        ("NVIDIA A100-SXM4-40GB", 1.555e12),
        ("NVIDIA L4", 300e9),
        ("NVIDIA L40S", 864e9),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA A10G", None),
        ("AMD EPYC", None),
    ],
)
def test_data_sheets_are_found_by_the_drivers_name(name: str, bandwidth: float | None) -> None:
    sheet = data_sheet(name)
    assert (sheet and sheet.bandwidth_bytes_per_s) == bandwidth


def test_every_data_sheet_names_its_source() -> None:
    assert all(re.fullmatch(r"https://www\.nvidia\.com/\S+", sheet.source) for sheet in DATA_SHEETS.values())


@pytest.mark.parametrize(
    ("bits", "words"),
    [
        (0x0, "none"),
        (0x1, "none"),
        (0x4, "power cap"),
        (0x60, "software thermal, hardware thermal"),
        (0x10, "other (0x0000000000000010)"),
    ],
)
def test_throttling_in_words(bits: int, words: str) -> None:
    assert throttle_reasons(bits) == words


def test_a_gpus_state_is_what_nvml_can_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class NVMLError(Exception):
        pass

    def broken(*_: object) -> None:
        raise NVMLError("not supported")

    # An H200's answers, read there on 2026-11-29; nvidia-smi said the same. Every other sensor is missing.
    nvml: Any = defaultdict(lambda: broken)
    nvml |= {
        "NVMLError": NVMLError,
        "nvmlInit": lambda: None,
        "nvmlDeviceGetHandleByUUID": lambda card: card,
        "nvmlSystemGetDriverVersion": lambda: "580.159.04",
        "nvmlDeviceGetPowerUsage": lambda _: 88460,
        "nvmlDeviceGetMemoryInfo": lambda *_: SimpleNamespace(used=1_722_500_000),
        "nvmlDeviceGetCurrentClocksThrottleReasons": lambda _: 4,
    }
    module = ModuleType("pynvml")
    module.__getattr__ = nvml.__getitem__  # type: ignore[method-assign]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert state_of_card("GPU-1") == {
        "driver": "580.159.04",
        "power_w": "88.46",
        "gpu_memory_used_mib": "1643",
        "throttle_reasons": "power cap",
    }
    nvml["nvmlInit"] = broken
    assert state_of_card("GPU-1") == {}


def test_a_machine_without_nvidias_module_has_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert state_of_card("GPU-1") == {}
