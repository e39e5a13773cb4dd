"""The comparisons of `verify`, on literal records: what may differ, and what may not."""

from __future__ import annotations

import pytest

from grpo_toolkit.checkpoint import TensorInfo
from grpo_toolkit.inference import Record, rivals
from grpo_toolkit.verify import _check_cache, _check_tokens, _same, policy_noise


def record(tokens: list[int], rivals: list[dict[int, float]] | None = None) -> Record:
    return Record(
        prompt_tokens=3,
        tokens=tokens,
        token_times_s=[0.1] * len(tokens),
        step_lengths=[3, *[1] * (len(tokens) - 1)],
        is_cached=True,
        vision_calls=1,
        peak_memory_bytes=0,
        rivals=rivals or [{0: 1.0}] * len(tokens),
    )


@pytest.mark.parametrize(
    ("policy", "export", "passed"),
    [
        (record([1, 2, 3]), record([1, 2, 3]), True),
        (record([1, 2, 3]), record([1, 9, 3]), False),
        (record([1, 2, 3]), record([1, 2]), False),
        # A tie: the two best were within rounding, and the export took the other one.
        (record([1, 2, 3], [{0: 1.0}, {9: 0.1, 8: 0.2}, {0: 1.0}]), record([1, 9, 7]), True),
        # Of three within rounding it took the third.
        (record([1, 2, 3], [{0: 1.0}, {9: 0.1, 8: 0.2}, {0: 1.0}]), record([1, 8, 7]), True),
        # Two were close, but what the export said was neither of them.
        (record([1, 2, 3], [{0: 1.0}, {9: 0.1}, {0: 1.0}]), record([1, 8, 7]), False),
        # The other one was taken, but not by rounding.
        (record([1, 2, 3], [{0: 1.0}, {9: 0.9}, {0: 1.0}]), record([1, 9, 7]), False),
    ],
)
def test_tokens_may_differ_from_a_tie_on_and_nowhere_else(policy: Record, export: Record, passed: bool) -> None:
    assert _check_tokens("same", [policy], [export], tie_margin=0.25).passed is passed


@pytest.mark.parametrize(
    ("found", "wanted", "vocabularies", "same"),
    [
        ((8, 4), (8, 4), (9, 8), True),
        ((9, 4), (8, 4), (9, 8), True),  # the resized vocabulary
        ((4, 4), (8, 4), (9, 8), False),  # half the heads
        ((0,), (64,), (8, 8), False),  # a ZeRO-3 stub
        ((9, 5), (8, 4), (9, 8), False),
    ],
)
def test_shapes_may_differ_by_the_vocabulary_alone(
    found: tuple[int, ...], wanted: tuple[int, ...], vocabularies: tuple[int, int], same: bool
) -> None:
    one, other = (TensorInfo(dtype="F32", shape=shape, file="model.safetensors") for shape in (found, wanted))
    assert _same(one, other, vocabularies) is same
    assert _same(one, TensorInfo(dtype="BF16", shape=wanted, file=""), vocabularies) is False


def test_a_cache_is_proven_by_more_than_one_step() -> None:
    assert _check_cache([record([1, 2, 3])]).passed
    assert not _check_cache([record([1])]).passed


def test_noise_is_how_far_a_policy_is_from_itself() -> None:
    one = record([1, 2], [{5: 1.0, 6: 2.0}, {7: 0.5}])
    assert policy_noise([one], [one]) == 0.0
    assert policy_noise([one], [record([1, 2], [{5: 1.25, 6: 2.0}, {7: 0.5}])]) == 0.25
    # From the first difference on, nothing compares but the gap that was overcome.
    assert policy_noise([one], [record([1, 7], [{5: 1.0, 6: 2.0}, {9: 9.0}])]) == 0.5


def test_a_token_is_no_rival_of_itself_when_two_logits_are_equal() -> None:
    """In bfloat16 they often are, and argmax and topk need not agree on which comes first."""
    import torch

    logits = torch.tensor([0.5, 2.0, 2.0, 1.0, -1.0, 0.0], dtype=torch.bfloat16)
    assert rivals(logits, 1) == {2: 0.0, 3: 1.0, 0: 1.5, 5: 2.0}
    assert rivals(logits, 2) == {1: 0.0, 3: 1.0, 0: 1.5, 5: 2.0}
