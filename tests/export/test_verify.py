"""The comparisons of `verify`: what may differ, and what may not, on literal records and on damaged exports."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from grpo_toolkit.checkpoint.folders.model_folder import open_checkpoint
from grpo_toolkit.checkpoint.safetensors_header import TensorInfo
from grpo_toolkit.export.checks import check_cache, check_inputs, check_logits, check_scores, check_tokens, same_form
from grpo_toolkit.export.export import export_model
from grpo_toolkit.export.policy_answers import PolicyAnswers, ask_policy, logit_noise, policy_noise
from grpo_toolkit.export.verify import verify_export
from grpo_toolkit.model import memory
from grpo_toolkit.model.generation.evidence import Evidence
from grpo_toolkit.model.generation.generate import Record, rivals
from grpo_toolkit.model.generation.request import Request, logged_requests
from grpo_toolkit.model.load import load_model
from grpo_toolkit.model.memory import why_too_large
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

pytestmark = pytest.mark.stack


def record(tokens: list[int], rivals: list[dict[int, float]] | None = None) -> Record:
    return Record(
        prompt_tokens=3,
        tokens=tokens,
        step_lengths=[3, *[1] * (len(tokens) - 1)],
        is_cached=True,
        vision_calls=1,
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
    assert check_tokens("same", [policy], [export], tie_margin=0.25).passed is passed


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
    assert same_form(one, other, vocabularies) is same
    assert same_form(one, TensorInfo(dtype="BF16", shape=wanted, file=""), vocabularies) is False


def test_a_cache_is_proven_by_more_than_one_step() -> None:
    assert check_cache([record([1, 2, 3])]).passed
    assert not check_cache([record([1])]).passed


def test_noise_is_how_far_a_policy_is_from_itself() -> None:
    one = record([1, 2], [{5: 1.0, 6: 2.0}, {7: 0.5}])
    assert policy_noise([one], [one]) == 0.0
    assert policy_noise([one], [record([1, 2], [{5: 1.25, 6: 2.0}, {7: 0.5}])]) == 0.25
    # From the first difference on, nothing compares but the gap that was overcome.
    assert policy_noise([one], [record([1, 7], [{5: 1.0, 6: 2.0}, {9: 9.0}])]) == 0.5


def test_a_token_is_no_rival_of_itself_when_two_logits_are_equal() -> None:
    """In bfloat16 they often are, and argmax and topk need not agree on which comes first."""
    logits = torch.tensor([0.5, 2.0, 2.0, 1.0, -1.0, 0.0], dtype=torch.bfloat16)
    assert rivals(logits, 1) == {2: 0.0, 3: 1.0, 0: 1.5, 5: 2.0}
    assert rivals(logits, 2) == {1: 0.0, 3: 1.0, 0: 1.5, 5: 2.0}


def evidence(logits: list[list[float]], **inputs: list[float]) -> Evidence:
    tensors = {name: torch.tensor([values]) for name, values in inputs.items()}
    return Evidence(inputs={"input_ids": torch.tensor([[1, 2]])} | tensors, logits=torch.tensor(logits))


def test_logits_are_held_against_a_tolerance_that_the_dtype_and_the_policy_give() -> None:
    want = evidence([[1.0, -1.0], [2.0, -2.0]])
    near = evidence([[1.0, -1.0], [2.0, -2.01]])
    check = check_logits([(want, want), (want, near)], dtype="bfloat16", noise=0.0)
    assert check.passed
    assert (
        check.detail
        == "0.0032 of their spread apart (allowed in bfloat16: 0.05), 0.01 at the worst token; 4 tokens of 2 requests"
    )
    assert not check_logits([(want, near)], dtype="float32", noise=0.0).passed
    assert check_logits([(want, near)], dtype="float32", noise=0.002).passed  # twice what the policy is from itself
    assert not check_logits([(want, evidence([[1.0, float("nan")], [2.0, -2.0]]))], dtype="bfloat16", noise=1.0).passed
    other = check_logits([(want, evidence([[1.0, -1.0, 0.0]]))], dtype="float32", noise=0.0)
    assert (other.passed, other.detail) == (False, "3 logits and not 2")


def test_logit_noise_ends_where_the_words_part() -> None:
    one, other = (
        replace(record([1, said]), evidence=evidence([[1.0, -1.0], [spread, 0.0]]))
        for said, spread in ((2, 1.0), (2, 1.5))
    )
    assert logit_noise([one], [one]) == 0.0
    assert logit_noise([one], [other]) == pytest.approx(0.5 / 2.5**0.5)
    parted = replace(other, tokens=[7, 7])  # after another first token the second has another prompt
    assert logit_noise([one], [parted]) == 0.0


def test_what_the_processor_makes_has_to_be_the_same_to_the_last_bit() -> None:
    want = evidence([[1.0]], pixel_values=[0.5, 0.25])
    assert check_inputs([(want, want)]).detail == "2 token ids and 2 pixel values of 1 requests are equal"
    for found, said in (
        (evidence([[1.0]], pixel_values=[0.5, 0.75]), "request 0: pixel_values differs by up to 0.5"),
        (evidence([[1.0]], pixel_values=[0.5]), "request 0: pixel_values has the shape (1, 1) and not (1, 2)"),
        (evidence([[1.0]]), "request 0: pixel_values is only there with the policy"),
    ):
        check = check_inputs([(want, found)])
        assert (check.passed, check.detail) == (False, said)


def test_answers_earn_the_same_reward_or_have_other_words() -> None:
    def length(records: Sequence[Record]) -> list[float]:
        return [float(len(one.tokens)) for one in records]

    same, parted = (record([1, 2]), record([1, 2])), (record([1, 2]), record([1]))
    assert check_scores("format reward", length, [same, parted]).detail == (
        "policy 2, export 1.5 on average over 2 prompts"
    )
    moods = iter([1.0, 0.0])
    wrong = check_scores("format reward", lambda records: [next(moods)], [same])
    assert not wrong.passed
    assert "request 0 has the same tokens and another reward" in wrong.detail
    asked = check_scores("format reward", lambda records: records[0].answer, [same])  # type: ignore[attr-defined]
    assert (asked.passed, asked.skipped) == (True, True)
    assert asked.detail.startswith("it could not be asked (AttributeError:")


@pytest.fixture(scope="module")
def asked(qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PolicyAnswers]:
    """An export and what its policy answered on a picture."""
    request = Request(
        messages=[{"role": "user", "content": "What is this?"}],
        images=[Image.new("RGB", (56, 56), (90, 120, 30))],
        max_new_tokens=6,
    )
    model, processor, _ = load_model(qwen)
    folder = tmp_path_factory.mktemp("asked") / "export"
    export_model(model, folder, processing_class=processor, verify=False)
    return folder, ask_policy(model, processor, [request], dtype=torch.float32)


def failing(folder: Path, answers: PolicyAnswers, base: Path) -> dict[str, str]:
    result = verify_export(
        folder,
        requests=answers.requests,
        expected=answers.records,
        noise=answers.noise,
        logit_noise=answers.logit_noise,
        base=base,
    )
    return {check.name: check.detail for check in result.failures}


def other_pixels(folder: Path) -> None:
    settings = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "preprocessor_config.json").write_text(json.dumps(settings | {"image_mean": [0.5, 0.5, 0.5]}))


def other_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"] *= 1.01  # too little to change a word
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def untied(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))


DAMAGES: dict[str, tuple[Callable[[Path], None], set[str]]] = {
    "nothing": (lambda folder: None, set()),
    "pixels": (
        other_pixels,
        {
            "same token ids and pixel values from the processor",
            "same logits as the trained policy",
            "nothing found by the doctor",
        },
    ),
    "weights": (other_weights, {"same logits as the trained policy"}),
    "ties": (untied, {"tensors as in the base", "embeddings tied as in the base"}),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_check_finds_its_own_fault(
    damage: str, asked: tuple[Path, PolicyAnswers], qwen: Path, tmp_path: Path
) -> None:
    folder, answers = tmp_path / "export", asked[1]
    shutil.copytree(asked[0], folder)
    change, names = DAMAGES[damage]
    change(folder)
    found = failing(folder, answers, qwen)
    found.pop("same greedy tokens as the trained policy", None) if damage == "pixels" else None
    assert found.keys() == names, found


def test_a_model_too_large_to_load_says_what_was_not_checked(
    qwen: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: Any, **options: Any) -> Any:
        raise AssertionError("it was loaded")

    monkeypatch.setattr(memory, "free_bytes", lambda device: 10_000)
    monkeypatch.setattr(PreTrainedModel, "from_pretrained", never)
    result = export_model(qwen, tmp_path / "export").verification
    assert result is not None
    assert result.passed
    assert {check.name for check in result.checks} - {check.name for check in result.skipped} == {
        "cache not switched off in the files",
        "tensors as in the base",
        "every stored value is finite",
        "nothing found by the doctor",
    }
    assert len(result.skipped) == 7
    assert {check.detail for check in result.skipped} == {"0.0 GB are needed to load it and 0.0 GB are free on cpu"}
    assert why_too_large(open_checkpoint(qwen).tensors(), "cpu") is not None
    monkeypatch.setattr(memory, "free_bytes", lambda device: 500_000)
    assert why_too_large(open_checkpoint(qwen).tensors(), "cpu") is None


def test_prompts_that_a_training_logged_are_replayed_and_their_form_is_valued(qwen: Path, tmp_path: Path) -> None:
    def format_reward(completions: list[Any], **kwargs: Any) -> list[float]:
        return [float(len(completion[0]["content"]) % 3) for completion in completions]

    trainer = grpo_trainer(qwen, tmp_path / "out", max_steps=1)
    trainer.reward_funcs = [format_reward, *trainer.reward_funcs[1:]]
    trainer.train()
    requests = logged_requests(trainer, max_new_tokens=8)
    assert 1 <= len(requests) <= 4
    assert all(len(request.images) == 1 for request in requests)
    assert all("What is number" in str(request.messages) for request in requests)
    result = export_model(trainer, tmp_path / "export").verification
    assert result is not None
    details = {check.name: check.detail for check in result.checks}
    assert details["same format reward on the same prompts"].endswith(f"on average over {len(requests)} prompts")
    assert result.passed
