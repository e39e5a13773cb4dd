"""An explanation for a terminal: facts that need no clock, what each cause costs, where the time went, cures."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from grpo_toolkit.latency.bench.statistics import MIN_PAIRS
from grpo_toolkit.latency.explain.causes import BY_NAME
from grpo_toolkit.latency.explain.explanation import top_cause, unexplained_share
from grpo_toolkit.reporting.terminal.two_questions import batch_sentence

if TYPE_CHECKING:
    from rich.console import RenderableType

    from grpo_toolkit.latency.rows.row import Effect, ExplanationRow, Ratio
    from grpo_toolkit.latency.tune.tuning import Tuning


def explanation(row: ExplanationRow) -> RenderableType:
    """Return the whole explanation, the verdict first."""
    parts: list[RenderableType] = [_verdict(row), Text()]
    if row.audit:
        parts.append(Text("Seen without a clock", "bold"))
        parts += [_card(effect) for effect in row.audit]
    return Group(*parts, _waterfall(row), Text(), _split(row))


def _verdict(row: ExplanationRow) -> Text:
    ratio = row.trained_s / row.base_s
    times = f"{row.trained_s * 1e3:.1f} ms an answer, the base {row.base_s * 1e3:.1f} ms: {ratio:.2f} times as long"
    if row.low_s is None or row.high_s is None:
        times += f"\nno interval: that takes {MIN_PAIRS} rounds, so this may be chance"
    elif row.low_s <= 0 <= row.high_s:
        reach = f"{row.low_s * 1e3:+.1f} to {row.high_s * 1e3:+.1f} ms"
        times = f"cannot tell: {reach} an answer, {ratio:.2f} times the base's {row.base_s * 1e3:.1f} ms at the median"
    top = top_cause(row)
    if top is None:
        return Text.assemble((f"{row.trained}\n", "bold"), times, "\n", ("no cause was found", "dim"))
    cause = next(effect for effect in row.audit if effect.cause == top)
    return Text.assemble(
        (f"{row.trained}\n", "bold"),
        times,
        "\nmend first: ",
        (_title(top), "bold yellow"),
        ("\n→ ", "bold green"),
        cause.command or cause.cure,
        no_wrap=True,  # a command that is broken in a path cannot be copied
        overflow="ignore",
    )


def _card(effect: Effect) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=2)
    grid.add_column(ratio=1)
    grid.add_row("", Text.assemble((_title(effect.cause), "yellow"), "  ", (effect.cause, "dim")))
    grid.add_row("", Text(effect.evidence))
    grid.add_row("", Text.assemble((effect.cure, "dim"), ("\n→ ", "bold green"), effect.command))
    return Padding(grid, (0, 0, 1, 0))


def _waterfall(row: ExplanationRow) -> Table:
    """Return the way from the base to the trained model, a cause a row."""
    table = Table(title="From base to trained, ms an answer", title_justify="left", box=None, header_style="dim")
    table.add_column("cause")
    for name in ("effect", "95% interval", "physics", "share"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_row("base", f"{row.base_s * 1e3:.1f}", "", "", "")
    difference = row.trained_s - row.base_s
    for effect in row.effects:
        style = "dim" if effect.layer == "unexplained" else ""
        table.add_row(
            Text(_title(effect.cause), style),
            f"{effect.effect_s * 1e3:+.1f}",
            _interval(effect),
            "" if effect.predicted_s is None else f"{effect.predicted_s * 1e3:+.1f}",
            f"{effect.effect_s / difference:.0%}" if difference else "",
        )
    table.add_row("trained", f"{row.trained_s * 1e3:.1f}", "", "", f"{1 - unexplained_share(row):.0%} explained")
    return table


def _interval(effect: Effect) -> str:
    if effect.low_s is None or effect.high_s is None:
        return "none" if effect.layer != "exact" else ""
    return f"{effect.low_s * 1e3:+.1f} to {effect.high_s * 1e3:+.1f}"


def _split(row: ExplanationRow) -> Table:
    table = Table(title="Where it is spent, exactly", title_justify="left", box=None, header_style="dim")
    table.add_column("part")
    table.add_column("difference ms", justify="right")
    for effect in row.split:
        table.add_row(effect.cause, f"{effect.effect_s * 1e3:+.1f}")
    table.add_row("all", f"{(row.trained_s - row.base_s) * 1e3:+.1f}")
    return table


def _title(cause: str) -> str:
    return BY_NAME[cause].title if cause in BY_NAME else cause


def tuned(tuning: Tuning) -> RenderableType:
    """Return what was tried, and the best of it as code, as keys and as serving commands."""
    table = Table(title=Text(f"Settings of {tuning.path}"), title_justify="left", box=None, header_style="dim")
    table.add_column("setting")
    for name in ("TPOT ms", "tokens/s", "peak GB", "first s", "same tokens"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("")
    for trial in tuning.trials:
        style = "bold green" if trial == tuning.best else "" if trial.is_eligible else "dim"
        table.add_row(
            Text(trial.name, style),
            "-" if trial.tpot_s is None else f"{trial.tpot_s * 1e3:.2f}",
            "-" if trial.tokens_per_s is None else f"{trial.tokens_per_s:.0f}",
            "-" if trial.peak_bytes is None else f"{trial.peak_bytes / 1e9:.2f}",
            "-" if trial.first_s is None else f"{trial.first_s:.1f}",
            "-" if trial.equal_tokens is None else f"{trial.equal_tokens} of {tuning.new_tokens}",
            Text(trial.note, "dim"),
        )
    ratio = tuning.ratio
    verdict = "the default is the best" if ratio is None else f"{tuning.speedup:.2f} times as fast as the default"
    if ratio is not None:
        verdict += f" ({_inverse(ratio)}, {ratio.pairs} pairs)"
    lines = [Text(f"{tuning.best.name}: {verdict}", "bold"), Text(), Text(tuning.code()), Text()]
    keys = tuning.generation_keys()
    lines.append(Text(f"generation_config.json: {json.dumps(keys)}" if keys else "generation_config.json: nothing"))
    lines += [Text(command) for command in tuning.serving_commands()]
    told = "Larger batches were not timed: that would have taken too long."
    lines += [Text(), Text(told if tuning.batches is None else batch_sentence(tuning.batches))]
    return Group(table, Text(), *lines)


def _inverse(ratio: Ratio) -> str:
    if ratio.low is None or ratio.high is None:
        return "no interval"
    return f"{1 / ratio.high:.2f} to {1 / ratio.low:.2f}"
