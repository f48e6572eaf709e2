"""Matplotlib figures as inline SVG in the page's colours: readable on light, dark and paper."""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
from matplotlib.figure import Figure

INK, MUTED, GRID, SURFACE = (f"#0a000{number}" for number in range(1, 5))
SERIES = tuple(f"#0a001{number}" for number in range(1, 9))
"""Blue, rust, green, purple, amber, sky, black and pink on the page; blue is also "good", rust
"bad". Any two of them differ by 27 or more in CIELAB to normal eyes, and nearly so to the
colour-blind."""

_NAMES = ("ink", "muted", "grid", "surface", *(f"series-{number}" for number in range(1, 9)))
_VARIABLES = dict(zip((INK, MUTED, GRID, SURFACE, *SERIES), _NAMES, strict=True))
"""Placeholder that matplotlib draws with -> CSS variable of the page that takes its place."""

LIGHT = dict(
    zip(
        ("page", *_NAMES),
        (
            *("#f5f5f7", "#1c1c1f", "#62626a", "#e4e4e8", "#ffffff"),
            *("#0045c3", "#b7340c", "#1c734f", "#6f357d"),
            *("#e48302", "#559af3", "#161f27", "#c883aa"),
        ),
        strict=True,
    )
)
DARK = dict(
    zip(
        ("page", *_NAMES),
        (
            *("#131316", "#ececf0", "#a0a0aa", "#3a3a41", "#1d1d21"),
            *("#3f7fff", "#e76e32", "#52d187", "#9497e2"),
            *("#f7d02d", "#acdfff", "#eaffe3", "#dc82aa"),
        ),
        strict=True,
    )
)
"""CSS variables of a page and their colours; paper is light."""

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
    return re.sub("|".join(_VARIABLES), lambda hit: page_colour(hit[0]), svg)


def page_colour(placeholder: str) -> str:
    """Return what stands in the page for a colour of a drawing."""
    return f"var(--{_VARIABLES[placeholder]})"


def standalone(svg: str) -> str:
    """Return the text of an .svg file: a figure of render's in the colours of paper."""
    coloured = re.sub(r"var\(--([\w-]+)\)", lambda hit: LIGHT[hit[1]], svg)
    fonts = "system-ui, 'DejaVu Sans', sans-serif"
    return coloured.replace("'DejaVu Sans', sans-serif", fonts) + "\n"
