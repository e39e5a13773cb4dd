"""Diagnoses and repairs for a terminal: colour, wrapped text, a table for a run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from rich.console import Console, Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_toolkit.doctor.findings import Severity
from grpo_toolkit.reporting.terminal.diagnosis_text import advice, found_and_expected, place_of, repair_lines, verdict

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import RenderableType

    from grpo_toolkit.doctor.findings import Diagnosis, Finding
    from grpo_toolkit.doctor.repair import RepairResult

_STYLES: Final = {
    Severity.UNLOADABLE: "bold red",
    Severity.WRONG: "bold magenta",
    Severity.SLOW: "bold yellow",
    Severity.WASTEFUL: "bold blue",
    Severity.NOTE: "dim",
}


def print_diagnosis(diagnosis: Diagnosis) -> None:
    """One folder: what it is, its findings with their effects, what to do next."""
    parts: list[RenderableType] = [_heading(diagnosis)]
    parts += [_card(finding) for finding in diagnosis.findings]
    parts += [Text.assemble(("→ ", "bold green"), line) for line in advice(diagnosis)]
    Console(highlight=False).print(Group(*parts))


def _heading(diagnosis: Diagnosis) -> RenderableType:
    style = "bold green" if diagnosis.is_clean else "bold red"
    lines = Text.assemble(
        (str(diagnosis.path), "bold"),
        "  ",
        (verdict(diagnosis.findings), style),
        "\n",
        (" · ".join((diagnosis.kind, *diagnosis.facts)), "dim"),
    )
    if diagnosis.base is not None:
        lines.append(f"\ncompared with {diagnosis.base}", "dim")
    return Padding(lines, (0, 0, 1, 0))


def _card(finding: Finding) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=10)
    grid.add_column(ratio=1)
    grid.add_row(
        Text(finding.severity.value, _STYLES[finding.severity]),
        Text.assemble((finding.title, "bold"), "  ", (finding.code, "dim")),
    )
    grid.add_row("", Text.assemble((place_of(finding), "cyan"), "  ", found_and_expected(finding)))
    grid.add_row("", Text(finding.effect))
    grid.add_row("", Text(finding.evidence, f"dim link {finding.evidence}"))
    return Padding(grid, (0, 0, 1, 0))


def print_run(diagnoses: Sequence[Diagnosis], empty: Sequence[str]) -> None:
    """A run: one row a checkpoint."""
    table = Table(box=None, header_style="dim", pad_edge=False)
    for title in ("checkpoint", "kind", "verdict", "findings"):
        table.add_column(title, overflow="fold")
    for diagnosis in diagnoses:
        worst = diagnosis.findings[0].severity if diagnosis.findings else None
        style = "green" if diagnosis.is_clean or worst is None else _STYLES[worst]
        codes = dict.fromkeys(f.code for f in diagnosis.findings if f.severity is not Severity.NOTE)
        table.add_row(
            diagnosis.path.name or str(diagnosis.path),
            diagnosis.kind,
            Text(verdict(diagnosis.findings), style),
            ", ".join(codes),
        )
    console = Console(highlight=False)
    console.print(table)
    for line in empty:
        console.print(Text(line, "dim"))


def print_repair(result: RepairResult) -> None:
    """What a repair did, or would do: the changes as a coloured diff."""
    console = Console(highlight=False)
    if not result.applied:
        for line in result.plan.diff.splitlines():
            style = {"+": "green", "-": "red", "@": "cyan"}.get(line[:1], "dim")
            console.print(Text(line, style), soft_wrap=True)
    for number, line in enumerate(repair_lines(result)):
        style = "bold" if number == 0 else "yellow" if line.startswith("left") else ""
        console.print(Text(line, style))
