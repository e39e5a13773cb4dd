"""The page of symptoms and messages: it reaches every finding, and quotes what the code says."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from grpo_toolkit.checkpoint.folders.model_folder import ADAPTER_CONFIG, CONFIG
from grpo_toolkit.cli.main import build_parser
from grpo_toolkit.doctor.diagnose import ALL_RULES
from grpo_toolkit.doctor.findings import Severity
from grpo_toolkit.step_time.causes.table import CAUSES
from scripts.docs.pages.source import sources, tree_of

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
SECTIONS = dict(re.findall(r"^## ([^\n]+)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
CODES = set(re.findall(r"\(reference/findings\.md#([a-z0-9-]+)\)", PAGE))
REFUSED = "An export, merge or repair is refused"
OURS = sorted(
    {
        *re.findall(r"^\| `([^`]+)` \|", SECTIONS[REFUSED], re.MULTILINE),
        *re.findall(r"`(the export after this training would fail:)`", PAGE),
        *re.findall(r"`(\.\.\.: [^`]+)`", PAGE),
        *re.findall(r"`((?:W&B|PeerError|grpo_toolkit:|the checkpoint's) [^`]+)`", PAGE),
    }
)


def rows_of(section: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.+) \|$", SECTIONS[section], re.MULTILINE)
    return [re.split(r" +(?<!\\)\| +", line) for line in lines if not line.startswith("---")][1:]


def test_every_finding_is_reached_and_every_code_is_one() -> None:
    severities = {rule.code: rule.severity for rule in ALL_RULES}
    assert CODES - severities.keys() == set()
    serious = {code for code, severity in severities.items() if severity is not Severity.NOTE}
    assert serious - CODES == set(), "each finding needs a row in docs/troubleshooting.md"


def test_every_row_says_what_to_do() -> None:
    rows = [row for section in SECTIONS for row in rows_of(section)]
    assert len(rows) >= 35
    assert [row for row in rows if not row[-1].strip()] == []
    assert {len(row) for row in rows} == {2, 3}


def test_every_cause_of_a_slow_step_has_its_row() -> None:
    assert {row[0] for row in rows_of("Training is slow")} == {cause.title for cause in CAUSES}


def templates() -> Iterator[str]:
    """Yield every text of the package, with an ellipsis where something is filled in."""
    known = {"CONFIG": CONFIG, "ADAPTER_CONFIG": ADAPTER_CONFIG}
    for path in sources("grpo_toolkit"):
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.JoinedStr):
                parts = (
                    str(part.value)
                    if isinstance(part, ast.Constant)
                    else known.get(ast.unparse(part.value) if isinstance(part, ast.FormattedValue) else "", "...")
                    for part in node.values
                )
                yield "".join(parts).replace("`", "")
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value.replace("`", "").replace("%s", "...")


TEMPLATES = list(templates())


@pytest.mark.parametrize("message", OURS)
def test_a_message_of_ours_is_in_the_code(message: str) -> None:
    pattern = re.compile(".*".join(map(re.escape, message.removeprefix("PeerError: ").split("..."))), re.DOTALL)
    assert any(pattern.search(template) for template in TEMPLATES)


@pytest.mark.parametrize("command", sorted(set(re.findall(r"(?:^|`)(grpo-toolkit [^`#\n]+)", PAGE, re.MULTILINE))))
def test_a_command_parses(command: str) -> None:
    assert build_parser().parse_known_args(shlex.split(command)[1:])[1] == []
