"""Matplotlib figures as inline SVG in the page's colours: readable on light, dark and paper."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK = "#0a0001"
MUTED = "#0a0002"
GRID = "#0a0003"
SURFACE = "#0a0004"
SERIES = ("#0a0011", "#0a0012", "#0a0013", "#0a0014", "#0a0015")
"""Blue, orange, green, purple and yellow on the page; blue is also "good", orange "bad"."""

_PAGE_COLOURS = {INK: "ink", MUTED: "muted", GRID: "grid", SURFACE: "surface"} | {
    colour: f"series-{number}" for number, colour in enumerate(SERIES, start=1)
}
"""Placeholder that matplotlib draws with -> CSS variable of report.html that takes its place."""

_STYLE = {
    "svg.fonttype": "none",
    "font.sans-serif": ["DejaVu Sans"],
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.titlesize": 9,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.5,
    "lines.markersize": 4.5,
    "text.color": INK,
    "font.size": 9,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.width": 0.7,
    "ytick.major.width": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.4,
    "legend.columnspacing": 1.0,
}

SMALL = (4.8, 2.7)
"""Inches of half a page's width, at which 9 points are about the page's small print."""
WIDE = (9.2, 3.3)
"""Inches of a whole page's width."""


def render(name: str, plot: Callable[[Any], None], size: tuple[float, float] = SMALL) -> str:
    """Return the <svg> element of what plot draws on a matplotlib Figure.

    The same drawing gives the same text; the ids of figures of different names don't collide.
    matplotlib's settings are changed only while this runs.
    """
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure = Figure(figsize=size, layout="constrained")
        plot(figure)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Creator": None, "Date": None})
    document = buffer.getvalue()
    svg = document[document.index("<svg") :]
    svg = re.sub(r'\s(width|height)="[\d.]+pt"', "", svg, count=2)
    svg = re.sub(r'<g id="[\w.]+">', "<g>", svg)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub("|".join(_PAGE_COLOURS), lambda hit: f"var(--{_PAGE_COLOURS[hit[0]]})", svg)
