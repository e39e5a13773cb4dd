"""Profiles of a device while a rollout decodes, and in a micro-batch."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from grpo_toolkit import StepTimeCallback
from grpo_toolkit.step_time.explain import find_causes
from grpo_toolkit.step_time.seams.busy_share import FIRST, STEPS, BusyShare
from grpo_toolkit.step_time.seams.device_profile import DeviceProfile, Span, covered
from grpo_toolkit.step_time.seams.kernel_shares import kernel_shares
from grpo_toolkit.step_time.seen import RolloutSeen, Seen
from tests.step_time.test_causes import MEAN
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path


def test_overlapping_spans_count_once() -> None:
    assert covered([]) == 0.0
    assert covered([(4.0, 6.0), (0.0, 2.0), (1.0, 3.0), (1.5, 2.5), (6.0, 7.0)]) == 6.0


def test_kernels_are_told_apart_by_their_names() -> None:
    spans = [
        Span("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NNT", 0.0, 20.0),
        Span("void cutlass::Kernel2<cutlass_80_tensorop_bf16_s16816gemm_relu_bf16_256x128>", 20.0, 30.0),
        Span("void pytorch_flash::flash_fwd_kernel<Flash_fwd_kernel_traits<128, 64, 64>>", 30.0, 40.0),
        Span("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", 40.0, 45.0),
        Span("fmha_cutlassF_bf16_aligned_64x128_rf_sm80", 45.0, 50.0),
        Span("void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>", 50.0, 60.0),
        Span("Memcpy DtoD (Device -> Device)", 60.0, 65.0),
        Span("ncclDevKernel_ReduceScatter_Sum_bf16_RING_LL", 60.0, 75.0),
    ]
    found = kernel_shares(spans, 100e-6)
    assert found is not None
    assert (found.products, found.attention, found.between) == pytest.approx((0.3, 0.2, 0.15))
    assert (found.exchange, found.idle) == pytest.approx((0.1, 0.25))
    assert kernel_shares([], 1.0) is None


def test_products_and_attention_are_known_by_pytorchs_names_too() -> None:
    matrix, heads = torch.randn(64, 64), torch.randn(1, 2, 64, 16)
    profile = DeviceProfile(torch.device("cpu"))
    matrix @ matrix
    torch.nn.functional.linear(matrix, matrix)
    torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
    torch.nn.functional.rms_norm(matrix, (64,))
    spans, wall_s = profile.close()
    found = kernel_shares(spans, wall_s)
    assert found is not None
    assert min(found.products, found.attention, found.between, found.idle) > 0
    assert found.products + found.attention + found.between + found.exchange + found.idle == pytest.approx(1)


def test_decode_steps_and_a_micro_batch_are_profiled_where_that_is_wanted(qwen: Path, tmp_path: Path) -> None:
    length = FIRST + STEPS + 2
    found: dict[bool, Any] = {}
    for profile in (False, True):
        callback = StepTimeCallback(strict=True, floors=False, profile=profile)
        trainer = grpo_trainer(
            qwen,
            tmp_path / str(profile),
            [callback],
            max_completion_length=length,
            generation_kwargs={"min_new_tokens": length},
        )
        callback.trainer = trainer
        trainer.train()
        assert callback._seen is not None
        found[profile] = callback._seen
    without, profiled = found[False], found[True]
    assert (without.rollout.busy, without.kernels) == (None, None)
    assert 0.0 < profiled.rollout.busy <= 1.0
    assert 0.0 < profiled.kernels.products < 1.0
    assert profiled.kernels.idle < 1.0
    assert DeviceProfile.is_free()
    assert replace(profiled.rollout, busy=None) == without.rollout  # the training is the same


def test_somebody_elses_profile_goes_on() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as theirs:
        busy = BusyShare(torch.device("cpu"))
        for _ in range(FIRST + STEPS):
            busy.before_step()
            torch.ones(3).sum()
    assert busy.share is None
    assert any("sum" in event.key for event in theirs.key_averages())


@pytest.mark.parametrize(("busy", "is_found"), [(None, True), (0.2, True), (0.95, False)])
def test_a_gpu_that_works_all_the_time_waits_for_no_launch(busy: float | None, is_found: bool) -> None:
    seen = Seen(rollout=RolloutSeen(rows=8, is_cached=True, busy=busy), is_gpu=True)
    causes = {one.cause: one for one in find_causes(seen, MEAN)}
    assert ("decode-launched-by-kernel" in causes) is is_found
    if busy == 0.2:
        assert causes["decode-launched-by-kernel"].evidence.endswith("and the GPU works for 20% of it")
