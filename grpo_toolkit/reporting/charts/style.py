"""The look of charts: one palette with a light and a dark side, SVG for pages and PNG for files.

A chart is drawn once, in the light palette. In the SVG every colour of the palette becomes a CSS variable, so the page
that it stands in decides between light and dark; text stays text, in the page's font.
"""

from __future__ import annotations

import io
import re
from contextlib import contextmanager
from statistics import median
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# name: (light, dark); each pair has a contrast of 3:1 or more with its page.
PALETTE: Final = {
    "ink": ("#1b2330", "#e9edf2"),
    "soft": ("#5b6675", "#9ba8b8"),
    "grid": ("#e4e8ed", "#2c3541"),
    "page": ("#ffffff", "#161c25"),
    "base": ("#4775ad", "#7ba6dd"),
    "checkpoint": ("#b97d10", "#e3b04b"),
    "export": ("#1d8862", "#43bf8d"),
    "off": ("#c2453d", "#ee7c71"),
    "other1": ("#7a5ca6", "#ab90dc"),
    "other2": ("#13808f", "#4fb9c9"),
    "other3": ("#a3527f", "#d98ab4"),
    "other4": ("#6b7280", "#a2abb9"),
}
LIGHT: Final = {name: light for name, (light, _) in PALETTE.items()}
PHASE_COLOURS: Final = {
    "tokenize_s": LIGHT["other4"],
    "image_s": LIGHT["other3"],
    "transfer_s": LIGHT["off"],
    "vision_s": LIGHT["other1"],
    "prefill_s": LIGHT["other2"],
}
_LABELS: Final = {
    "base": "base",
    "checkpoint": "plain checkpoint",
    "export": "export",
    "export_no_cache": "export, cache off",
}
_WIDTH: Final = 5.1
_LEGEND_LETTERS: Final = 80
_SETTINGS: Final = {
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9.0,
    "axes.edgecolor": LIGHT["soft"],
    "axes.labelcolor": LIGHT["soft"],
    "axes.titlecolor": LIGHT["ink"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": LIGHT["grid"],
    "grid.linewidth": 0.8,
    "xtick.color": LIGHT["soft"],
    "ytick.color": LIGHT["soft"],
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "text.color": LIGHT["ink"],
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.8,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "grpo_toolkit",
}


@contextmanager
def styled() -> Iterator[None]:
    """Let matplotlib draw in our style inside; its global settings are as before afterwards."""
    import matplotlib

    with matplotlib.rc_context(_SETTINGS):
        yield


def new_figure(height: float = 3.1) -> Figure:
    """Make a figure whose width fits a phone and half a desktop page, `height` in inches, without pyplot."""
    from matplotlib.figure import Figure

    return Figure(figsize=(_WIDTH, height), layout="constrained")


def label_of(arm: str) -> str:
    """Return an arm's name as people read it."""
    name, bracket, run = arm.partition(" (")
    return _LABELS.get(name, name.replace("_", " ")) + bracket + run


def is_variant(arm: str) -> bool:
    """Return whether an arm was made slow on purpose, which would squeeze the others where differences are small."""
    return arm.partition(" (")[0].endswith("_no_cache")


def colours_of(arms: Sequence[str]) -> dict[str, str]:
    """Return a colour per arm, the same in all charts of a report; a comparison's second run takes the spare ones."""
    colours: dict[str, str] = {}
    own = {"base": "base", "checkpoint": "checkpoint", "export": "export", "export_no_cache": "off"}
    spare = [LIGHT[name] for name in ("other1", "other2", "other3", "other4", "off")]
    for arm in dict.fromkeys(arms):
        colour = LIGHT.get(own.get(arm.partition(" (")[0], ""), spare[0])
        if colour in colours.values() or colour == spare[0]:
            colour = spare[sum(taken in spare for taken in colours.values()) % len(spare)]
        colours[arm] = colour
    return colours


def horizontal_only(axes: Axes) -> None:
    """Draw grid lines across, none upward: for charts whose x is categories."""
    axes.grid(axis="x", visible=False)


def name_arms(axes: Axes, labels: Sequence[str]) -> None:
    """Name the rows of a chart of horizontal bars, the first at the top."""
    axes.set_yticks(range(len(labels)), labels)
    axes.tick_params(axis="y", labelcolor=LIGHT["ink"], labelsize=9)
    axes.invert_yaxis()
    axes.grid(axis="y", visible=False)
    axes.spines["left"].set_visible(False)


HALO: Final = {"linewidth": 6.0, "alpha": 0.4}
"""The look of a line that another one lies on, so that both are seen."""


def lying_on(curves: Mapping[str, Sequence[float]], height: float) -> dict[str, str]:
    """Return the arms whose curve cannot be told from that of an arm before it, with that arm.

    Args:
        curves: heights by arm, at the same places as far as they go, in the order in which they are drawn.
        height: of the whole axis: two curves closer than 1.5% of it look like one.
    """
    found: dict[str, str] = {}
    names = list(curves)
    for place, name in enumerate(names):
        for other in names[:place]:
            apart = [abs(one - two) for one, two in zip(curves[name], curves[other], strict=False)]
            if other not in found and apart and median(apart) < 0.015 * height:
                found[name] = other
                break
    return found


def line_look(arm: str, beneath: Mapping[str, str]) -> dict[str, Any]:
    """Return an arm's label in the legend and, where another line lies on it, the look that shows both."""
    on = f", as {label_of(beneath[arm])}" if arm in beneath else ""
    return {"label": f"{label_of(arm)}{on}", **(HALO if arm in beneath.values() else {})}


def legend_below(figure: Figure, handles: Any = None, labels: Any = None, *, columns: int = 4) -> None:
    """Put one legend under all axes of a figure."""
    if handles is None or labels is None:
        handles, labels = figure.axes[0].get_legend_handles_labels()
    longest = max(map(len, labels), default=1)
    fitting = max(1, min(columns, _LEGEND_LETTERS // (longest + 4)))
    rows = -(-len(labels) // fitting)
    figure.set_figheight(figure.get_figheight() + 0.19 * max(0, rows - 1))
    figure.legend(handles, labels, loc="outside lower center", ncols=fitting, handlelength=1.2, columnspacing=1.4)


def as_svg(figure: Figure, *, name: str, title: str) -> str:
    """Return the figure for a page: colours as CSS variables, ids that begin with `name`, a title for readers.

    Needs `styled()` around it, as drawing does.
    """
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="([^"]+)"', rf'id="{name}-\1"', text)
    text = re.sub(r"url\(#([^)]+)\)", rf"url(#{name}-\1)", text)
    text = re.sub(r'xlink:href="#([^"]+)"', rf'xlink:href="#{name}-\1"', text)
    for colour, (light, _) in PALETTE.items():
        text = text.replace(light, f"var(--{colour})")
    # Width and height in points would keep it from shrinking to a phone.
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    text = re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1).strip()


def as_png(figure: Figure, path: Path, *, dpi: int = 180) -> Path:
    """Write the figure as a picture on white, for model cards and trackers."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi, facecolor=LIGHT["page"], metadata={"Software": None})
    return path


def milliseconds(value_s: float) -> str:
    """Return a time for a label: three digits that matter."""
    value = value_s * 1e3
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
