"""The comparison of two formulas by math-verify, within a second.

A policy samples formulas on which sympy would work for hours: towers of powers, factorials of factorials, polynomials
of a hundredth degree. Those whose numbers cannot be computed are seen at a glance; what else takes long is stopped,
and counts as different.
"""

from __future__ import annotations

import functools
import logging
import math
import re
import signal
import threading
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LONGEST = 200
"""Characters. An answer is short; a longer text is compared as text."""

SECONDS = 1.0
"""For both formulas and their comparison. Of 2,025 pairs of ordinary ones the median took 0.01 s, the slowest 0.2, or
0.5 beside three other processes on two cores."""

MOST_DIGITS, LARGEST_EXPONENT, LARGEST_FACTORIAL = 1e6, 1e8, 99_999

_RAISED = re.compile(r"\s*\^[\s{(]*")
_BRACKETS = str.maketrans("{}()", "    ")
_TOWERS = re.compile(r"(?<![\d_.])(\d*\.?\d+)\^[+-]?(\d+(?:\^\d+)*)", re.ASCII)
_FACTORIALS = re.compile(r"(\d+)((?: *!)+)", re.ASCII)


def same_formula(found: str, reference: str) -> bool:
    """Return whether two texts are the same but for case, spaces and dollar signs, or the same by math-verify."""
    if _as_text(found) == _as_text(reference):
        return True
    if max(len(found), len(reference)) > LONGEST or is_huge(found) or is_huge(reference):
        return False
    return _same_by_sympy(found, reference)


def is_huge(formula: str) -> bool:
    """Return whether a text has a number with a million digits or more, as far as a glance can tell.

    `9^{9^{9}}`, `10^{12345678}` and `5!!!` are such: that `!!` is no double factorial is how math-verify reads it.
    `x^{12345678}` has no such number, nor has `\\sum_{k=1}^{12345678}`.
    """
    # `9^{9^{9}}` is a tower, `2^{10}3^{4}` is none.
    bare = _RAISED.sub("^", formula).translate(_BRACKETS)
    return any(_is_huge_power(float(base), tower) for base, tower in _TOWERS.findall(bare)) or any(
        _is_huge_factorial(int(digits), marks.count("!")) for digits, marks in _FACTORIALS.findall(bare)
    )


def _is_huge_power(base: float, tower: str) -> bool:
    """Return whether an exponent, itself a tower such as `9^9`, is too large, or its power has too many digits."""
    exponent = 1
    for level in map(int, reversed(tower.split("^"))):
        if level > 1 and exponent * math.log10(level) > math.log10(LARGEST_EXPONENT):
            return True
        exponent = level**exponent
    return base > 0 and exponent * abs(math.log10(base)) > MOST_DIGITS


def _is_huge_factorial(number: int, times: int) -> bool:
    for _ in range(times):
        if number > LARGEST_FACTORIAL:
            return True
        number = math.factorial(number)
    return False


@functools.lru_cache(maxsize=4096)  # The completions of a group often answer the same.
def _same_by_sympy(found: str, reference: str) -> bool:
    parse, verify = _math_verify()
    try:
        with _at_most(SECONDS):
            ours, theirs = (parse(_in_dollars(text), parsing_timeout=None) for text in (found, reference))
            return bool(verify(theirs, ours, timeout_seconds=None))
    except _OutOfTimeError:
        return False


@functools.cache
def _math_verify() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return `parse` and `verify`, used once: the first formulas of a process need not pay for the start.

    They can keep time themselves, by signals and in whole seconds, each anew for parsing, parsing and comparing.
    """
    from math_verify import parse, verify

    for name in ("math_verify.parser", "math_verify.grader"):  # A line for each odd sample would bury the rest.
        logging.getLogger(name).setLevel(logging.CRITICAL)
    root, number = (parse(text, parsing_timeout=None) for text in ("$2\\sqrt{221}$", "$5$"))
    verify(root, number, timeout_seconds=None)
    return parse, verify


class _OutOfTimeError(BaseException):
    """The end of the time; not an `Exception`, which math-verify would take for a formula that it cannot read."""


@contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise `_OutOfTimeError` in what takes longer; a timer that was running goes on afterwards.

    By a signal, which only the main thread gets (TRL calls rewards in it): in another thread there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise _OutOfTimeError

    began, handler = time.monotonic(), signal.signal(signal.SIGALRM, stop)
    waiting, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        try:
            yield
        finally:  # The signal may still come here; it comes once.
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:
        signal.signal(signal.SIGALRM, handler)
        if waiting:
            signal.setitimer(signal.ITIMER_REAL, max(waiting - (time.monotonic() - began), 0.001), interval)


def _in_dollars(text: str) -> str:
    """Put LaTeX between dollar signs, where alone math-verify reads it; datasets write it bare."""
    return text if any(mark in text for mark in ("$", "\\(", "\\[", "\\boxed")) else f"${text}$"


def _as_text(text: str) -> str:
    return "".join(text.split()).strip("$").casefold()
