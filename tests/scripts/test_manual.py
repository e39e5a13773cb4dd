"""The manual's pages that are made from the code: they name all that the code has, and say so where they cannot."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

import grpo_toolkit
from grpo_toolkit.doctor.diagnose import ALL_RULES
from grpo_toolkit.doctor.findings import Severity
from grpo_toolkit.errors import InputError
from scripts.docs.pages import api, checks, commands, environment, errors, files, findings
from scripts.docs.pages.markdown import plain, sentence, table
from scripts.docs.pages.source import constant
from scripts.docs.site import GENERATED, TAKEN, relinked

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
WRITTEN = sorted(str(path.relative_to(DOCS)) for path in DOCS.rglob("*.md"))
_LINK = re.compile(r"""(?:\]\(|(?:src|srcset)=")([^)"#\s:]+)(?:#[^)"\s]*)?[)"]""")


def test_the_pages_are_made_with_the_standard_library_alone() -> None:
    code = (
        "import sys; from scripts.docs.site import pages\n"
        "print(sorted(pages()), sorted({name.partition('.')[0] for name in sys.modules} - sys.stdlib_module_names))"
    )
    done = subprocess.run([sys.executable, "-S", "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    made, modules = done.stdout.strip().split("] [")
    assert ast.literal_eval(f"{made}]") == sorted([*GENERATED, *TAKEN.values()])
    assert set(ast.literal_eval(f"[{modules}")) <= {"__main__", "grpo_toolkit", "scripts"}


def test_every_page_is_in_a_chapter_and_every_chapter_has_pages() -> None:
    listed = list(_pages_in(yaml.safe_load((DOCS / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(listed) == sorted([*WRITTEN, *GENERATED, *TAKEN.values()])


def _pages_in(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    else:
        for part in nav.values() if isinstance(nav, dict) else nav:
            yield from _pages_in(part)


@pytest.mark.parametrize("file", ["README.md", *TAKEN, *(f"docs/{name}" for name in WRITTEN)])
def test_links_lead_to_files_of_the_repository(file: str) -> None:
    text = (ROOT / file).read_text(encoding="utf-8")
    made = set() if file == "README.md" else {str((DOCS / place).resolve()) for place in [*GENERATED, *TAKEN.values()]}
    found = {str(((ROOT / file).parent / target).resolve()) for target in _LINK.findall(text)}
    assert [path for path in found - made if not Path(path).exists()] == []


def test_a_link_holds_in_the_site() -> None:
    text = '[a](docs/families.md#x) ![b](docs/latency.png) [c](CHANGELOG.md) <img src="docs/report.png"> [d](https://e.f/g)'
    assert relinked(text, "CONTRIBUTING.md", "project/contributing.md") == (
        '[a](../families.md#x) ![b](../latency.png) [c](changelog.md) <img src="../report.png"> [d](https://e.f/g)'
    )
    assert relinked("[`e.py`](grpo_vlm/e.py), [f](#g)", "recipes/README.md", "start/recipe.md") == "`e.py`, [f](#g)"
    assert relinked("[h](../CONTRIBUTING.md#i)", "docs/j.md", "j.md") == "[h](project/contributing.md#i)"


def test_every_option_of_every_command_has_its_row() -> None:
    page = commands.commands_page()
    for name, parser in commands.command_parsers().items():
        section = page.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for action in parser._actions:
            for flag in action.option_strings:
                if flag not in ("-h", "--help"):
                    assert len(re.findall(rf"^\| .*`{flag}[ `].* \| .+ \| .+ \|$", section, re.MULTILINE)) == 1, flag
        assert len(re.findall(rf"^    grpo-toolkit {name}\b", section, re.MULTILINE)) == 4  # usage, three examples
    doctor = page.partition("\n## doctor\n")[2].partition("\n## ")[0]
    assert "| `--json` | off | one JSON object on standard output |" in doctor
    assert "    python -m grpo_toolkit.cli.run SCRIPT_OR_MODULE" in page


def test_every_finding_has_an_anchor_and_every_severity_a_meaning() -> None:
    page = findings.findings_page()
    assert sorted(re.findall(r"\{ #([a-z0-9-]+) \}", page)) == sorted(rule.code for rule in ALL_RULES)
    assert list(findings.MEANINGS) == list(Severity)
    cache = page.partition("{ #generation-cache-off }")[2].partition("\n### ")[0]
    assert cache.strip().splitlines() == [
        "**KV cache off in generation\\_config.json.** Every token recomputes the whole prompt, and a vision model "
        "re-encodes the image for each of them.",
        "",
        "- Affected: transformers.",
        "- Repair: use\\_cache true, or no use\\_cache where the base has none.",
        "- Read more: <https://github.com/om-ai-lab/VLM-R1/issues/229>",
    ]


def test_every_public_name_is_on_one_page() -> None:
    places = re.findall(r"^::: grpo_toolkit\.(\w+)$", api.api_page() + api.callbacks_page(), re.MULTILINE)
    told = {kind.__name__ for kind in errors.error_classes()}
    assert len(places) == len(set(places))
    assert set(places) | told | set(api.older_names()) == set(grpo_toolkit.__all__)
    assert api.older_names() == {"Arm": "LatencyArm", "Options": "RunOptions", "Request": "GenerationRequest"}


def test_the_errors_have_their_parents() -> None:
    page = errors.errors_page()
    assert "| `CheckpointError` | `InputError` | A folder or file is not a readable checkpoint. |" in page
    assert f"| `InputError` | `GrpoToolkitError` | {InputError.__doc__} |" in page


def test_a_variable_that_is_not_described_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "| `OPENAI_API_KEY` | " in environment.environment_page()
    monkeypatch.setattr(environment, "MEANINGS", {**environment.MEANINGS, "NEW_ONE": "x"})
    monkeypatch.delitem(environment.MEANINGS, "NO_COLOR")
    with pytest.raises(ValueError, match=r"not described \['NO_COLOR'\], not in the source \['NEW_ONE'\]"):
        environment.environment_page()


def test_a_check_that_is_not_told_is_an_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert "same * on the same prompts" in checks.check_names()
    checks.hold_table()
    page = checks.PAGE.read_text(encoding="utf-8")
    assert "| KV cache in use | " in page
    (tmp_path / "checks.md").write_text(page.replace("| KV cache in use |", "| moon in the sky |"), encoding="utf-8")
    monkeypatch.setattr(checks, "PAGE", tmp_path / "checks.md")
    with pytest.raises(ValueError, match=r"not told \['KV cache in use'\], not in \S+ \['moon in the sky'\]"):
        checks.hold_table()


@pytest.mark.parametrize("schema", files.SCHEMAS.values())
def test_every_key_of_a_line_has_its_row(schema: str) -> None:
    page = files.files_page()
    for name, definition in json.loads((DOCS / schema).read_text(encoding="utf-8"))["$defs"].items():
        sections = re.findall(rf"^### `{name}`.*?(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
        assert any(all(f"\n| `{key}` | " in one for key in definition["properties"]) for one in sections), name


def test_a_file_whose_name_is_gone_from_the_source_is_an_error() -> None:
    assert constant("doctor.undo", "UNDO") == ".grpo_toolkit/undo"
    with pytest.raises(ValueError, match="no text GONE in grpo_toolkit"):
        constant("doctor.undo", "GONE")
    with pytest.raises(ValueError, match=r"no module doctor\.gone"):
        constant("doctor.gone", "UNDO")


def test_text_is_no_markup() -> None:
    assert plain("a_b `c_d` <e> 2*3") == "a\\_b `c_d` &lt;e> 2\\*3"
    assert [sentence("byte-order mark"), sentence("json.load fails."), sentence("vLLM fails")] == [
        "Byte-order mark.",
        "json.load fails.",
        "vLLM fails.",
    ]
    assert table(("a",), [["b|c `d|e`"]]) == "| a |\n| --- |\n| b\\|c `d|e` |"


EVERYONE_KNOWS = {
    "AMD", "API", "BOM", "CI", "CPU", "DIR", "FLOP", "GB", "GPU", "JSON", "MODEL", "README",
    "RESULTS", "URL", "UTF", "YAML",
}  # fmt: skip
READ_BY_ALL = [
    name for name in (*WRITTEN, *GENERATED) if not name.startswith(("background/", "benchmarks/", "project/"))
]


@pytest.mark.parametrize("name", READ_BY_ALL)
def test_every_abbreviation_is_in_the_glossary(name: str) -> None:
    page = GENERATED[name]() if name in GENERATED else (DOCS / name).read_text(encoding="utf-8")
    code = r"^```.*?^```|`[^`\n]*`|^    [^\n]*$|\]\([^)\n]*\)|<http[^>\n]*"
    words = re.sub(code, "", page, flags=re.MULTILINE | re.DOTALL)
    glossary = (DOCS / "reference" / "glossary.md").read_text(encoding="utf-8")
    used = set(re.findall(r"(?<![\w\\-])[A-Z]{2,}[A-Z0-9]*(?![\w\\-])", words))
    assert sorted(word for word in used - EVERYONE_KNOWS if word not in glossary) == []
