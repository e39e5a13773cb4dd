"""Verification with pictures: a processor that raises, a tower that never runs, eyes that are not asked."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial, wraps
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch

from grpo_toolkit import ExportCallback, LatencyCallback, verify_export
from grpo_toolkit.cli import main
from grpo_toolkit.errors import WorkerError
from grpo_toolkit.export.checks import check_inputs
from grpo_toolkit.export.picture_check import check_pictures
from grpo_toolkit.export.policy_answers import ask_policy
from grpo_toolkit.model.generation.drawn_pictures import (
    Sight,
    made_up_requests,
    picture_requests,
    places_pictures,
    sight_of,
)
from grpo_toolkit.model.generation.evidence import Evidence
from grpo_toolkit.model.generation.generate import generate
from grpo_toolkit.model.load import load_model, load_processor
from scripts.models.tiny_bases import build_llama
from tests.support.training import grpo_trainer

if TYPE_CHECKING:
    from pathlib import Path

    from grpo_toolkit.model.generation.generate import Record
    from grpo_toolkit.model.generation.request import Request


def with_limit(base: Path, folder: Path, pixels: int) -> Path:
    shutil.copytree(base, folder)
    file = folder / "preprocessor_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_pixels": pixels}))
    return folder


def asker(model: Any, processor: Any) -> Any:
    """Answer as the process of a verification does."""

    def answer(request: Request) -> Record:
        try:
            return generate(model, processor, request)
        except ValueError as error:
            raise WorkerError(str(error)) from error

    return answer


def test_pictures_are_drawn_of_several_sizes_and_one_above_the_limit() -> None:
    low = picture_requests(Sight(takes_pictures=True, limits=(3136, 28 * 28 * 16)))
    assert [request.images[0].size for request in low] == [(112, 84), (84, 168), (140, 140)]
    assert all(request.max_new_tokens for request in low)
    high = picture_requests(Sight(takes_pictures=True, limits=(3136, 12845056)))
    width, height = high[-1].images[0].size
    assert width * height > 12845056
    assert [request.max_new_tokens for request in high] == [8, 8, 0]  # the last one through the processor alone
    assert len(picture_requests(Sight(takes_pictures=True))) == 2
    assert picture_requests(Sight()) == []
    assert [len(request.images) for request in made_up_requests(Sight(takes_pictures=True))] == [0, 1, 1]
    again = picture_requests(Sight(takes_pictures=True))
    assert [r.images[0].tobytes() for r in again] == [r.images[0].tobytes() for r in low[:2]]


@pytest.mark.parametrize("pixels", [28 * 28 * 16, 12845056])
def test_a_vlm_answers_pictures_up_to_its_limit(pixels: int, qwen: Path, tmp_path: Path) -> None:
    folder = with_limit(qwen, tmp_path / "folder", pixels)
    result = verify_export(folder)
    assert result.passed
    (check,) = (check for check in result.checks if check.name == "pictures answered")
    assert not check.skipped
    assert "112 x 84" in check.detail
    assert "the vision tower ran for each" in check.detail
    assert ("140 x 140 in" in check.detail) is (pixels < 100_000)
    assert ("through the processor alone" in check.detail) is (pixels > 100_000)


def test_a_tower_that_never_runs_does_not_pass(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, processor, _ = load_model(qwen)
    sight = replace(sight_of(processor, model), limits=None)
    look, kept = model.model.get_image_features, []

    @wraps(look)  # its signature is read
    def looking(*args: Any, **kwargs: Any) -> Any:
        kept.append(look(*args, **kwargs))
        return kept[-1]

    monkeypatch.setattr(model.model, "get_image_features", looking)
    check = check_pictures(sight, asker(model, processor))
    assert check is not None
    assert check.passed
    assert len(kept) == 2
    # The same again from memory: right words, and nobody has looked.
    remembered = wraps(look)(lambda *_, **__: kept.pop(0))
    monkeypatch.setattr(model.model, "get_image_features", remembered)
    check = check_pictures(sight, asker(model, processor))
    assert check is not None
    assert not check.passed
    assert check.detail == "the vision tower never ran for 2 of 2 requests with a picture"


def test_a_processor_that_raises_at_the_limit_alone_does_not_pass(qwen: Path, tmp_path: Path) -> None:
    model, processor, _ = load_model(with_limit(qwen, tmp_path / "folder", 28 * 28 * 64))
    sight = sight_of(processor, model)
    images = processor.image_processor
    inner = type(images).__call__

    class Picky(type(images)):  # type: ignore[misc]
        def __call__(self, given: Any, *args: Any, **kwargs: Any) -> Any:
            picture = given[0] if isinstance(given, list) else given
            if picture.width * picture.height > 28 * 28 * 64:
                raise ValueError("too large for me")
            return inner(self, given, *args, **kwargs)

    images.__class__ = Picky
    check = check_pictures(sight, asker(model, processor))
    assert check is not None
    assert not check.passed
    assert check.detail == "a picture of 252 x 252: too large for me"
    # A policy with this processor is asked what it can answer; its export is then refused by the check.
    answers = ask_policy(model, processor, ())
    assert [len(request.images) for request in answers.requests] == [0, 1, 1]


def test_eyes_that_are_not_asked_are_told(qwen: Path, tmp_path: Path) -> None:
    model, processor, _ = load_model(qwen)
    never = partial(pytest.fail, "asked")
    processor.chat_template = None
    check = check_pictures(sight_of(processor, model), never)
    assert check is not None
    assert check.skipped
    assert "no chat template" in check.detail
    blind = check_pictures(sight_of(processor.tokenizer, model), never)  # what was saved with the model is a tokenizer
    assert blind is not None
    assert not blind.passed
    llama, tokenizer, _ = load_model(build_llama(tmp_path / "llama"))
    assert check_pictures(sight_of(tokenizer, llama), never) is None

    ids = Evidence(inputs={"input_ids": torch.tensor([[1, 2]])}, logits=torch.zeros(1, 4))
    assert "no picture was asked" in check_inputs([(ids, ids)], sees=True).detail
    assert check_inputs([(ids, ids)]).detail == "2 token ids and 0 pixel values of 1 requests are equal"


TEXT_ALONE: Final = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}assistant:",
    "{% for message in messages %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endfor %}:",
)


@pytest.mark.parametrize("template", TEXT_ALONE)
def test_a_training_with_a_template_for_text_alone_is_exported_and_told_before_it(
    template: str, qwen: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    processor = load_processor(qwen)
    assert places_pictures(processor)
    processor.chat_template = template
    assert not places_pictures(processor)
    exporting = ExportCallback(tmp_path / "export", strict=True)
    grpo_trainer(
        qwen, tmp_path / "out", [exporting], with_images=False, processing_class=processor, max_steps=1
    ).train()
    assert exporting.result is not None
    checks = {check.name: check for check in exporting.result.verification.checks}
    assert checks["pictures answered"].skipped
    assert "places no picture" in checks["pictures answered"].detail
    assert any("places no picture" in str(finding) and not finding.is_obstacle for finding in exporting.findings)
    # Nobody says of a folder alone that it is meant so.
    assert main(["doctor", str(tmp_path / "export"), "--base", str(qwen)]) == 1


def test_the_command_line_asks_with_pictures(qwen: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = with_limit(qwen, tmp_path / "folder", 28 * 28 * 16)
    assert main(["verify", str(folder), "--reference", str(qwen)]) == 1  # another limit: other pixels at the limit
    said = capsys.readouterr().out
    assert "ok    pictures answered" in said
    assert main(["export", str(folder), str(tmp_path / "out"), "--base", str(folder), "--json"]) == 0
    checks = {c["name"]: c for c in json.loads(capsys.readouterr().out)["verification"]["checks"]}
    assert " 0 pixel values" not in checks["same token ids and pixel values from the processor"]["detail"]
    assert checks["pictures answered"]["passed"]


def test_the_latency_callback_asks_the_same(qwen: Path) -> None:
    model, processor, _ = load_model(qwen)
    found = LatencyCallback()._requests(None, {"model": model, "processing_class": processor})  # type: ignore[arg-type]
    wanted = made_up_requests(sight_of(processor, model))
    assert [[i.tobytes() for i in r.images] for r in found] == [[i.tobytes() for i in r.images] for r in wanted]
    assert sum(len(request.images) for request in found) == 2
