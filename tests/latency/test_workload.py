"""Workloads: exact lengths, live ends, seeds, and no two requests alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from grpo_toolkit.errors import InputError
from grpo_toolkit.latency.bench.workload import THINKING, count_tokens, image_size, made_up, traffic_of
from grpo_toolkit.model.generation.request import Request
from grpo_toolkit.model.load import load_processor

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="module")
def processor(qwen: Path) -> Any:
    return load_processor(qwen)


def text(request: Request) -> str:
    return str(request.messages[-1]["content"])


@pytest.mark.parametrize("image_tokens", [None, 4, 30])
@pytest.mark.parametrize("wanted", [250, 601])
def test_a_made_up_prompt_has_exactly_as_many_tokens(processor: Any, wanted: int, image_tokens: int | None) -> None:
    traffic = made_up(processor, prompt_tokens=wanted, image_tokens=image_tokens, max_new_tokens=3)
    for turn in (-2, 0, 5):
        (request,) = traffic.batch(turn)
        assert count_tokens(request, processor, image_tokens) == wanted
        assert (request.exact, request.max_new_tokens) == (True, 3)
        # The count is that of the processor itself, image included.
        messages = [{"role": "user", "content": [{"type": "image"}] * bool(request.images) + [
            {"type": "text", "text": text(request)}]}]  # fmt: skip
        rendered = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        inputs = processor(text=[rendered], images=list(request.images) or None, return_tensors="pt")
        assert inputs["input_ids"].shape[1] == wanted


def test_the_length_of_a_prompt_is_found_in_a_few_looks(processor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch of hundreds with long prompts took a minute to write: 40 counts of 4,096 tokens for each."""
    traffic = made_up(processor, prompt_tokens=4096, max_new_tokens=3, batch_size=8)
    lengths = []

    def counting(*args: Any) -> int:
        lengths.append(count_tokens(*args))
        return lengths[-1]

    monkeypatch.setattr("grpo_toolkit.latency.bench.workload.count_tokens", counting)
    requests = traffic.batch(0)
    assert [count_tokens(request, processor) for request in requests] == [4096] * 8
    assert len(lengths) <= 8 * 12


def test_new_lengths_never_meet_those_of_an_earlier_round(processor: Any) -> None:
    traffic = made_up(processor, prompt_tokens=250, max_new_tokens=8, lengths="new")
    prompts = [count_tokens(traffic.batch(turn)[0], processor) for turn in range(-2, 4)]
    assert prompts == [250, 250, 258, 266, 274, 282]
    seen = [set(range(prompt, prompt + 8)) for prompt in prompts[2:]]
    assert all(not one & two for index, one in enumerate(seen) for two in seen[:index])


def test_no_two_requests_are_alike_and_a_seed_gives_the_same_again(processor: Any) -> None:
    for kind in ("fixed", "natural"):
        traffic = made_up(
            processor, kind=kind, prompt_tokens=250, image_tokens=4, max_new_tokens=3, batch_size=2, seed=5
        )
        requests = [request for turn in range(-3, 6) for request in traffic.batch(turn)]
        assert len({text(request)[:40] for request in requests}) == len(requests)
        assert len({request.images[0].tobytes() for request in requests}) == len(requests)
        again = made_up(
            processor, kind=kind, prompt_tokens=250, image_tokens=4, max_new_tokens=3, batch_size=2, seed=5
        )
        assert [text(request) for request in again.batch(2)] == [text(request) for request in traffic.batch(2)]
        assert again.batch(2)[1].images[0].tobytes() == traffic.batch(2)[1].images[0].tobytes()
        other = made_up(processor, kind=kind, prompt_tokens=250, max_new_tokens=3, seed=6)
        assert text(other.batch(-1)[0]) != text(traffic.batch(-1)[0])


def test_the_thinking_instruction_comes_first(processor: Any) -> None:
    for thinking in (True, False):
        (request,) = made_up(processor, kind="natural", max_new_tokens=3, thinking=thinking).batch(0)
        assert [message["role"] for message in request.messages] == ["system", "user"][not thinking :]
        assert (request.messages[0]["content"] == THINKING) is thinking
        assert request.exact is False


def test_given_requests_are_asked_in_turn_and_never_twice_alike() -> None:
    given = [Request(messages=[{"role": "user", "content": name}]) for name in ("one", "two")]
    natural = traffic_of(given, kind="natural", max_new_tokens=9)
    assert [text(natural.batch(turn)[0]) for turn in (0, 1)] == ["one", "two"]
    assert text(natural.batch(2)[0]).endswith(". one")
    fixed = traffic_of(given, max_new_tokens=9)
    texts = [text(fixed.batch(turn)[0]) for turn in range(-2, 6)]
    assert len(set(texts)) == 8
    assert {len(said) for said in texts} == {len("Request 123456. one")}
    thinking = traffic_of(given, kind="natural", max_new_tokens=9, thinking=True)
    assert thinking.batch(0)[0].messages[0] == {"role": "system", "content": THINKING}
    parts = [{"type": "text", "text": "q"}, {"type": "image"}]
    placed = traffic_of([Request(messages=[{"role": "user", "content": parts}])], max_new_tokens=9).batch(0)[0]
    assert placed.messages[0]["content"][1:] == parts


@pytest.mark.parametrize(("tokens", "size"), [(4, (56, 56)), (16, (112, 112)), (30, (168, 140)), (7, (196, 28))])
def test_an_image_of_so_many_tokens(processor: Any, tokens: int, size: tuple[int, int]) -> None:
    assert image_size(processor, tokens) == size


@pytest.mark.parametrize("tokens", [1, 10**9 + 7])
def test_an_image_that_the_model_does_not_allow_is_refused(processor: Any, tokens: int) -> None:
    with pytest.raises(InputError, match="no image of this model has"):
        image_size(processor, tokens)


def test_a_prompt_without_room_is_refused(processor: Any) -> None:
    with pytest.raises(InputError, match="a prompt of 20 tokens has no room for its template and image"):
        made_up(processor, prompt_tokens=20, image_tokens=16, max_new_tokens=3)


@pytest.mark.parametrize("change", [{"requests": []}, {"max_new_tokens": 0}, {"batch_size": 0}])
def test_a_workload_of_nothing_is_refused(change: dict[str, Any]) -> None:
    given: dict[str, Any] = {"requests": [Request(messages=[])], "max_new_tokens": 1, "batch_size": 1} | change
    with pytest.raises(InputError, match="a workload needs"):
        traffic_of(given.pop("requests"), **given)
