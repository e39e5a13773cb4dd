"""The rewards pay for one well-formed answer that is right, never raise, and never pay for a guess."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from packaging.version import Version

from grpo_toolkit import InputError
from grpo_vlm.rewards.answers import (
    ANSWER_TYPES,
    box_overlap,
    extract_answer,
    find_answer,
    is_right,
    is_right_directly,
    parse_box,
    parse_choice,
    parse_number,
)
from grpo_vlm.rewards.formulas import is_huge, same_formula
from grpo_vlm.rewards.rewards import (
    REWARDS,
    accuracy_reward,
    find_format_reward,
    find_rewards,
    format_reward,
    iou_reward,
    repetition_penalty_reward,
)

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(
    Version(metadata.version("trl")) < Version("1.16"), reason="the recipe needs TRL 1.16 and says so"
)

GOOD = "<think>A loop and a tail.</think><answer>9</answer>"


@pytest.mark.parametrize(
    ("text", "well_formed", "answer"),
    [
        (GOOD, 1.0, "9"),
        ("  <think>a</think>\n<answer> 9 </answer>\n", 1.0, "9"),
        ("<think></think><answer>9</answer>", 0.0, "9"),
        ("<think>a</think><answer></answer>", 0.0, None),
        ("<think>a</think><answer>9</answer><answer>8</answer>", 0.0, None),
        ("<answer>9</answer><think>a</think>", 0.0, "9"),
        ("<think>a</think> so <answer>9</answer>", 0.0, "9"),
        ("<think>a<think>b</think><answer>9</answer>", 0.0, "9"),
        ("<answer>9", 0.0, None),
        ("</answer>9<answer>", 0.0, None),
        ("9", 0.0, None),
        ("", 0.0, None),
    ],
)
def test_form_and_content(text: str, well_formed: float, answer: str | None) -> None:
    assert format_reward([text]) == [well_formed]
    assert extract_answer(text) == answer
    assert accuracy_reward([text], ["9"]) == [float(answer == "9")]


def test_conversational_completions_are_read() -> None:
    parts = [{"role": "assistant", "content": [{"type": "text", "text": GOOD}]}]
    assert accuracy_reward([[{"role": "assistant", "content": GOOD}], parts], ["9", "8"]) == [1.0, 0.0]
    assert format_reward([[{"role": "assistant", "content": None}]]) == [0.0]


@pytest.mark.parametrize(
    ("kind", "found", "reference", "right"),
    [
        ("text", "7", " 7 ", True),
        ("text", "7.0", "7", False),
        ("text", "Red", "red", True),
        ("text", "dark\n  Red", "Dark red", True),
        ("text", "darkred", "dark red", False),
        ("number", "3.0", "3", True),
        ("number", "$1,000$", "1000", True),
        ("number", "-.5", "-0.5", True),
        ("number", "3 or 4", "3", False),
        ("number", "three", "3", False),
        ("number", ".", "0", False),
        ("number", "nan", "nan", False),
        ("choice", "B", "B", True),
        ("choice", "(b)", "B", True),
        ("choice", "B. 12 cm", "B", True),
        ("choice", "A or B", "B", False),
        ("choice", "A. or B", "A", False),
        ("choice", "AB", "A", False),
        ("choice", "B. A circle", "B", True),
        ("choice", "B: I think", "B", True),
        ("choice", "B. vitamin C", "B", True),
        ("choice", "B. P(A)", "B", True),
        ("choice", "B. 12 cm, so B.", "B", True),
        ("choice", "A. a cat or A dog", "A", True),
        ("choice", "A and B", "A", False),
        ("choice", "A, B", "A", False),
        ("choice", "A/B", "A", False),
        ("choice", "A. 3 or B. 4", "A", False),
        ("choice", "B. 3, or A", "B", False),
        ("choice", "A. 3\nB. 4", "A", False),
        ("choice", "(A) 3 (B) 4", "A", False),
        ("choice", "A. B", "A", False),
        ("choice", "none", "none", False),
        ("math", "2\\sqrt{221}", "2 \\sqrt { 221 }", True),
        ("math", "29.7", "2 \\sqrt { 221 }", False),
        ("math", "0.5", "\\frac{1}{2}", True),
        ("math", "$\\boxed{5}$", "5", True),
        ("math", "5 or 6", "5", False),
        ("math", "A circle", "a  circle", True),
        ("math", "9^{9^{9}}", "5", False),
        ("box", "[0, 0, 10, 10]", "[0, 0, 10, 19]", True),
        ("box", "[0, 0, 10, 10]", "[0, 0, 10, 21]", False),
    ],
)
def test_kinds_of_answers(kind: str, found: str, reference: str, right: bool) -> None:
    assert is_right(found, reference, kind) is right
    assert accuracy_reward([f"<answer>{found}</answer>"], [reference], [kind]) == [float(right)]


@pytest.mark.parametrize(
    "formula",
    [
        "9^{9^{9}}",
        "2^{2^{2^{2^{2^{2}}}}}",
        "10^(10^10)",
        "0.1^{-10^{9}}",
        "10^{12345678}",
        "7 ^ 9 ^ 9",
        "100000!",
        "5!!!",
        "((9!)!)",
    ],
)
def test_numbers_that_cannot_be_computed_are_seen_at_a_glance(formula: str) -> None:
    assert is_huge(formula)
    assert same_formula(formula, f" {formula} ")


@pytest.mark.parametrize(
    ("found", "reference"),
    [
        ("2^{10}3^{4}", "82944"),
        ("x^{2}10^{6}", "1000000x^2"),
        ("(2^{3})^{2}", "64"),
        ("2^{2^{3}}", "256"),
        ("1000(5!)", "120000"),
        ("e^{-x^{2}}", "1/e^{x^2}"),
        ("2^{2023}", "2 \\cdot 2^{2022}"),
        ("6\\times 10^{23}", "60\\times 10^{22}"),
        ("5!", "120"),
        ("3!!", "720"),
        ("\\frac{7!}{5!}", "42"),
        ("\\sum_{k=1}^{100000} k", "5000050000"),
        ("\\int_0^{100000} x dx", "5000000000"),
        ("(-1)^{100001}", "-1"),
        ("1^{1000000}", "1"),
        ("x^2 100000", "100000x^2"),
        ("x^{100000}+1", "1+x^{100000}"),
        ("2^{100000}-1", "-1+2^{100000}"),
        ("\\frac{10000!}{9999!}", "10000"),
    ],
)
def test_ordinary_powers_and_factorials_are_computed(found: str, reference: str) -> None:
    assert not is_huge(found)
    assert same_formula(found, reference)


SLOW = ["(x+y+z+w)^{60}", "\\tan(\\tan(\\tan(\\tan(\\tan(\\tan(\\tan(1)))))))", "(" * 40 + "x" + ")" * 40]


def test_a_rollout_of_formulas_without_end_takes_seconds() -> None:
    """It took two minutes: two seconds each, or four where parsing and comparing were slow."""
    answers = [*SLOW, "9^{9^{9}}", "100000000!", "10^{10^{10}}", "5!!!", "\\frac{7^{3000000}}{3^{3000000}}"] * 8
    began = time.monotonic()
    paid = accuracy_reward([f"<answer>{answer}</answer>" for answer in answers], ["6"] * 64, ["math"] * 64)
    assert time.monotonic() - began < 15  # three of them take their second
    assert paid == [0.0] * 64


def test_a_timer_that_was_running_goes_on_after_a_comparison() -> None:
    def mine(*_: object) -> None: ...

    handler, (waiting, _) = signal.signal(signal.SIGALRM, mine), signal.setitimer(signal.ITIMER_REAL, 500)
    try:
        assert not same_formula(SLOW[0], "7")
        assert signal.getsignal(signal.SIGALRM) is mine
        assert 400 < signal.getitimer(signal.ITIMER_REAL)[0] < 499.5
    finally:
        signal.setitimer(signal.ITIMER_REAL, waiting)
        signal.signal(signal.SIGALRM, handler)


def test_formulas_are_compared_in_a_thread_too() -> None:
    pairs = [("0.25", "\\frac{1}{4}"), ("0.25", "\\frac{1}{5}"), ("9^{9^{9}}", "5")]
    with ThreadPoolExecutor(1) as pool:
        assert list(pool.map(lambda pair: is_right(*pair, "math"), pairs)) == [True, False, False]


@pytest.mark.parametrize(
    ("kind", "text", "reference", "right"),
    [
        ("number", "There are 3 items.", "3", True),
        ("text", "There are 3 items.", "3", True),
        ("number", "\\boxed{3}", "3", True),
        ("number", "First 2, then 1,000.", "1000", True),
        ("number", "3 or 4", "3", False),
        ("number", "about three", "3", False),
        ("choice", "The answer is B.", "B", True),
        ("text", "The answer is B.", "B", True),
        ("choice", "**B**", "B", True),
        ("choice", "Either A or, rather, D: a square", "D", True),
        ("choice", "B. vitamin C", "C", False),
        ("text", "The colour is **red**.", "Red", True),
        ("text", "**Answer**: red", "red", True),
        ("text", "It is red or blue.", "red", False),
        ("math", "So x = \\boxed{\\frac{1}{2}}.", "0.5", True),
        ("math", "The area is 35.", "35", True),
        ("math", "2\\sqrt{221}", "221", False),
        ("math", "<answer>35</answer> is it", "35", True),
        ("box", 'The dog: {"bbox_2d": [0, 0, 10, 10]}', "[0, 0, 10, 10]", True),
        ("text", "\\boxed{red", "red", False),
    ],
)
def test_an_answer_without_blocks_is_read_leniently(kind: str, text: str, reference: str, right: bool) -> None:
    assert is_right_directly(text, reference, kind) is right


def test_an_unknown_kind_is_the_datasets_error() -> None:
    with pytest.raises(ValueError, match="answer_type 'colour': expected one of text"):
        is_right("red", "red", "colour")


@pytest.mark.parametrize(
    ("answer", "overlap"),
    [
        ('{"bbox_2d": [10, 10, 20, 20], "label": "a dog"}', 1.0),
        ("```json\n[10.0, 10.0, 20.0, 20.0]\n```", 1.0),
        ("[15, 10, 25, 20]", 1 / 3),
        ("[20, 10, 30, 20]", 0.0),  # touching is no overlap
        ("[20, 20, 10, 10]", 0.0),
        ("[10, 10, 20, 20] [0, 0, 5, 5]", 0.0),  # two boxes are a guess
        ("[10, 10, 20]", 0.0),
        ("[1e9, 0, 2e9, 1]", 0.0),
        ("a dog", 0.0),
    ],
)
def test_boxes(answer: str, overlap: float) -> None:
    assert iou_reward([f"<think>t</think><answer>{answer}</answer>"], ["[10, 10, 20, 20]"]) == [pytest.approx(overlap)]


def test_repetition_costs_up_to_one() -> None:
    assert repetition_penalty_reward([list(range(40)), [5] * 100, [], [1, 2]]) == pytest.approx(
        [0.0, -94 / 95, 0.0, 0.0]
    )


def test_rewards_are_found_by_name_and_in_files(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(completions, **kwargs):\n    return [-len(c) for c in completions]\n")
    rewards = find_rewards(["format", f"{tmp_path}/mine.py:short"])
    assert rewards[0] is format_reward
    assert rewards[1](completions=["abc"]) == [-3]
    with pytest.raises(InputError, match="there are format, accuracy, iou, repetition_penalty"):
        find_rewards(["acuracy"])
    with pytest.raises(InputError, match="no function 'long' in"):
        find_rewards([f"{tmp_path}/mine.py:long"])
    with pytest.raises(InputError, match="is no Python file"):
        find_rewards(["nowhere.py:long"])


def test_the_form_is_judged_by_the_recipes_own_reward_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def format_of_dates(completions, date, **kwargs):\n    return []\n")
    assert find_format_reward(find_rewards(["accuracy", "format"])) is format_reward
    assert find_format_reward(find_rewards(["accuracy", f"{tmp_path}/mine.py:format_of_dates"])) is None


# What a policy writes when it is half right: the tags, in any order, with anything between them.
pieces = st.sampled_from(
    [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "9",
        "B",
        "[1, 2, 3, 4]",
        "\\frac{1}{2}",
        "$",
        "\\boxed{",
        "}",
        ",",
    ]
)
texts = st.one_of(st.text(max_size=60), st.lists(st.one_of(pieces, st.text(max_size=4)), max_size=12).map("".join))
references = {"text": "9", "number": "9", "choice": "B", "math": "\\frac{1}{2}", "box": "[1, 2, 3, 4]"}


@settings(max_examples=300, deadline=None)
@given(text=texts, kind=st.sampled_from(ANSWER_TYPES))
def test_any_string_gets_a_reward_within_bounds_and_a_guess_gets_nothing(text: str, kind: str) -> None:
    reference = references[kind]
    columns = {"completions": [text], "answer": [reference], "answer_type": [kind]}
    paid = {name: reward(**columns, completion_ids=[list(text.encode())])[0] for name, reward in REWARDS.items()}
    assert paid["format"] in (0.0, 1.0)
    assert paid["accuracy"] in (0.0, 1.0)
    assert 0.0 <= paid["iou"] <= 1.0
    assert -1.0 <= paid["repetition_penalty"] <= 0.0
    if text.count("<answer>") != 1 or text.count("</answer>") != 1 or extract_answer(text) is None:
        assert paid["accuracy"] == paid["iou"] == paid["format"] == 0.0


@settings(max_examples=300, deadline=None)
@given(text=texts, kind=st.sampled_from(ANSWER_TYPES))
def test_the_lenient_reading_takes_any_text_and_is_never_the_stricter(text: str, kind: str) -> None:
    assert find_answer(text, kind) != ""
    lenient = is_right_directly(text, references[kind], kind)
    assert lenient or not is_right(text.strip() or None, references[kind], kind)


@settings(max_examples=300, deadline=None)
@given(thought=st.text(max_size=20), filler=st.text(alphabet=" \n\t", max_size=5))
def test_an_empty_or_doubled_answer_block_is_never_paid(thought: str, filler: str) -> None:
    for answer in (f"<answer>{filler}</answer>", "<answer>9</answer><answer>9</answer>"):
        text = f"<think>{thought}</think>{answer}"
        assert format_reward([text]) == accuracy_reward([text], ["9"]) == [0.0]
        assert accuracy_reward([text], [filler]) == iou_reward([text], ["[1, 2, 3, 4]"]) == [0.0]


thousandths = st.integers(min_value=0, max_value=99_000_000)
sizes = st.integers(min_value=1, max_value=999_000)
boxes = st.builds(
    lambda x, y, width, height: tuple(value / 1000 for value in (x, y, x + width, y + height)),
    *(thousandths, thousandths, sizes, sizes),
)


@settings(deadline=None)
@given(one=boxes, other=boxes)
def test_overlap_is_symmetric_bounded_and_whole_with_itself(one: tuple[float, ...], other: tuple[float, ...]) -> None:
    left, right = str(list(one)), str(list(other))
    assert parse_box(left) == one
    assert box_overlap(left, left) == pytest.approx(1.0)
    assert 0.0 <= box_overlap(left, right) <= 1.0
    assert box_overlap(left, right) == pytest.approx(box_overlap(right, left))


@settings(deadline=None)
@given(text=st.text(max_size=40))
def test_parsers_take_any_text(text: str) -> None:
    number, choice = parse_number(text), parse_choice(text)
    assert number is None or number == number  # never NaN
    assert choice is None or len(choice) >= 1
