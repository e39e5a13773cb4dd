"""The rules as the table in the README.

python -m scripts.docs.doctor_rules --write README.md    # between its two markers
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Final

from grpo_toolkit.doctor.diagnose import ALL_RULES
from scripts.docs.pages.markdown import between

BEGIN: Final = "<!-- rules: python -m scripts.docs.doctor_rules --write README.md -->"
END: Final = "<!-- end of rules -->"


def rule_table() -> str:
    """Return every rule as a row of Markdown: its code with the evidence, severity, fault, repair."""
    rows = ["| finding | severity | fault | repair |", "|---|---|---|---|"]
    for rule in ALL_RULES:
        fault = f"{rule.title} (beside the base)" if rule.needs_base else rule.title
        rows.append(f"| [`{rule.code}`]({rule.evidence}) | {rule.severity.value} | {fault} | {rule.mend or '-'} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """Return a README with its table as the rules give it.

    Raises:
        ValueError: the markers are not in it.
    """
    return between(text, BEGIN, END, rule_table())


def main() -> None:
    """Print the table, or write it into a file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path, metavar="README")
    path: Path | None = parser.parse_args().write
    if path is None:
        print(rule_table())
    else:
        path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
