"""The tables of docs/support.md: the stacks, backends and servers that the tests run on, from the tests themselves.

python -m scripts.docs.support --write docs/support.md    # in the environment of the newest stack
"""

from __future__ import annotations

import argparse
import ast
import re
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Final

from scripts.benchmarks.two_processes import ALONE, KINDS
from scripts.docs.pages.markdown import ROOT, print_or_write, table
from scripts.docs.pages.source import tree_of

if TYPE_CHECKING:
    from collections.abc import Iterator

BEGIN: Final = "<!-- support: python -m scripts.docs.support --write docs/support.md -->"
END: Final = "<!-- end of support -->"
PACKAGES: Final = ("transformers", "trl", "peft", "accelerate")
STACKS: Final = ("newest", "middle", "oldest")
PARTS: Final = {
    "KV cache, saves, pushes": ("model/test_kv_cache.py", "model/test_save_hook.py", "model/test_portable_saves.py"),
    "resumes": ("model/test_resume_check.py", "model/test_moments.py"),
    "exports and their checks": ("export/test_export.py", "export/test_policy_weights.py", "export/test_verify.py"),
    "the doctor's rules against real readers": ("doctor/test_real_readers.py", "doctor/test_wild_reports.py"),
    "repaired folders load": ("doctor/test_repair_loads.py", "doctor/test_compat.py"),
    "scripts of VLM-R1, R1-V, Visual-RFT": ("callbacks/test_vlm_r1.py", "callbacks/test_pinned_trainers.py"),
    "examples of TRL 1.16": ("callbacks/test_trl_examples.py",),
    "scripts that cannot be edited, by `grpo_toolkit.cli.run`": ("cli/test_run.py",),
    "`StepTimeCallback`": ("callbacks/test_step_time.py",),
    "`PackedVisionCallback`": ("callbacks/test_packed_vision.py", "model/test_packed_vision.py"),
    "`FastRolloutCallback`": ("callbacks/test_fast_rollout.py", "model/rollouts/test_rollouts.py"),
    "`rows_once`": ("model/inputs/test_rows_once.py",),
    "`LatencyCallback`, `bench`, `explain`, `tune`": ("latency/test_engines.py", "latency/test_explain.py"),
    "the recipe": ("recipes/test_recipe.py",),
}
"""The files that try each part; one that is marked `stack` runs on every stack, any other on the newest alone."""

_TOO_OLD: Final = re.compile(r"Version\((\w+)\.__version__\) < Version\(['\"]([\d.]+)['\"]\)")


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A test that is run with each kind of training on several processes.

    Attributes:
        title: of its column.
        file: of the tests, under `tests/`.
        function: the test.
        lora: count only cases with an adapter; None where the test has no such parameter.
    """

    title: str
    file: str
    function: str
    lora: bool | None = None


CLAIMS: Final = (
    Claim(
        title="export of a full fine-tune",
        file="model/test_distributed.py",
        function="test_every_kind_of_training_ends_in_the_same_export",
    ),
    Claim(
        title="export of an adapter",
        file="model/test_distributed_adapter.py",
        function="test_the_adapter_of_a_sharded_model_is_exported",
    ),
    Claim(title="cache on in saves", file="model/test_distributed.py", function="test_saves_keep_the_cache_on"),
    Claim(
        title="resume bit-identical",
        file="model/test_distributed.py",
        function="test_a_resume_on_two_processes_is_bit_identical",
    ),
    Claim(
        title="fast rollouts, full",
        file="model/rollouts/test_distributed_rollouts.py",
        function="test_the_copy_is_the_policy_after_each_step",
        lora=False,
    ),
    Claim(
        title="fast rollouts, adapter",
        file="model/rollouts/test_distributed_rollouts.py",
        function="test_the_copy_is_the_policy_after_each_step",
        lora=True,
    ),
    Claim(
        title="both fast callbacks",
        file="callbacks/test_fast_step_on_ranks.py",
        function="test_two_processes_train_as_without_them",
    ),
    Claim(title="slow rank named", file="step_time/test_distributed.py", function="test_the_slow_rank_is_named"),
)
"""The columns of the table of backends."""


def stacks_table() -> str:
    """Return the stacks of scripts/setup.sh, with what each pins."""
    rows = []
    for stack in STACKS:
        told = (pins_of(stack).get(package, "newest") for package in PACKAGES)
        runs = "every test" if stack == "newest" else "the tests marked `stack`"
        rows.append([stack, *told, f"`bash scripts/test {stack}`", runs])
    return table(("stack", *PACKAGES, "command", "what runs"), rows)


def pins_of(stack: str) -> dict[str, str]:
    """Return the versions that scripts/setup.sh pins, by package.

    Raises:
        ValueError: it has no such stack.
    """
    text = (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    match = re.search(rf"^ +{stack}\) (.*);;$", text, re.MULTILINE)
    if match is None:
        raise ValueError(f"scripts/setup.sh: no stack {stack}")
    return dict(re.findall(r"(\w+)==([\d.*]+)", match[1]))


def _is_marked(path: Path) -> bool:
    return "pytest.mark.stack" in path.read_text(encoding="utf-8")  # as conftest.py looks


def runs_on(path: Path, stack: str) -> bool:
    """Return whether a file of tests runs on a stack: it is marked, and does not leave itself out whole."""
    if stack == "newest":
        return True
    marks = [
        ast.unparse(node.value)
        for node in tree_of(path).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    wanted = [pair for mark in marks for pair in _TOO_OLD.findall(mark)]
    return _is_marked(path) and not any(_is_older(pins_of(stack).get(name), least) for name, least in wanted)


def _is_older(pin: str | None, least: str) -> bool:
    if pin is None:
        return False
    have, need = ([int(part) for part in text.removesuffix(".*").split(".")] for text in (pin, least))
    return have < need


def parts_table() -> str:
    """Return on which stacks the tests of each part run."""
    words = {frozenset({True}): "yes", frozenset({False}): "not run", frozenset({True, False}): "in part"}
    rows = [
        [part, *(words[frozenset(runs_on(ROOT / "tests" / file, stack) for file in files)] for stack in STACKS)]
        for part, files in PARTS.items()
    ]
    return table(("part", *STACKS), rows)


def backends_table() -> str:
    """Return which claims are tested on two processes, for each kind of training."""
    found = [set(tried_kinds(claim)) for claim in CLAIMS]
    rows = [[f"`{kind}`", *("yes" if kind in kinds else "not run" for kinds in found)] for kind in KINDS]
    return table(("backend", *(claim.title for claim in CLAIMS)), rows)


def tried_kinds(claim: Claim) -> Iterator[str]:
    """Yield the kinds of training that a test is parametrized with.

    Raises:
        ValueError: there is no such test, or its parameters cannot be read.
    """
    tree = tree_of(ROOT / "tests" / claim.file)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and node.name == claim.function:
            for mark in node.decorator_list:
                if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.parametrize":
                    yield from _kinds_of(mark, claim)
            return
    raise ValueError(f"tests/{claim.file}: no {claim.function}")


def _kinds_of(mark: ast.Call, claim: Claim) -> Iterator[str]:
    names, values = mark.args
    if isinstance(values, ast.Name) and values.id == "KINDS":
        yield from KINDS
        return
    named = ast.literal_eval(names)
    names_of_case = (named,) if isinstance(named, str) else named
    for case in ast.literal_eval(values):
        given = dict(zip(names_of_case, (case,) if isinstance(named, str) else case, strict=True))
        if "kind" in given and claim.lora in (None, given.get("lora")):
            yield given["kind"]


def tables() -> str:
    """Return the three tables, without their date."""
    return "\n\n".join(
        (
            "## Stacks",
            stacks_table(),
            "## Parts",
            "A file of tests may leave out single tests on a stack, with its reason.",
            parts_table(),
            "## Backends",
            f"Two processes on the CPUs of one machine, newest stack. `{ALONE}` is what they are compared with: one "
            "process.",
            backends_table(),
        )
    )


def dated(tables: str) -> str:
    """Return the tables under a line with today's date and the versions that are installed."""
    versions = ", ".join(f"{package} {version(package)}" for package in (*PACKAGES, "torch", "deepspeed"))
    return f'Written on {date.today()}. "newest" was then {versions}.\n\n{tables}'


def is_current(page: str) -> bool:
    """Return whether a page has the tables of today's tests, whatever the day they were written."""
    return tables() in page


def main() -> None:
    """Print the tables, or write them into a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="PAGE", help="the page with the two markers")
    print_or_write(dated(tables()), parser.parse_args().write, begin=BEGIN, end=END)


if __name__ == "__main__":
    main()
