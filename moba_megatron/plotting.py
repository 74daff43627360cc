"""Matplotlib figures that stay legible at 375 pixels: one width, labels at the ends of lines instead of a legend."""
import itertools
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

WIDTH = 4.2  # inches: shown 375 pixels wide, text of 9 points is 11 pixels high
DPI = 200
LINE = 0.16  # inches between two labels, at least
HIGHEST = 0.95  # of the axes' height: where the highest label may stand, below the title


class Theme(NamedTuple):
    """Colours of a page."""

    paper: str
    ink: str
    muted: str
    accent: str
    grid: str
    others: tuple[str, ...]


LIGHT = Theme("#ffffff", "#1f2328", "#59636e", "#0a5cc4", "#d8dee4",
              ("#b3470b", "#1a7f37", "#8250df", "#59636e", "#0b7285", "#9a6700"))


@contextmanager
def figure(path: str | Path, rows: int = 1, columns: int = 1, width: float = WIDTH, height: float = 3.0,
           theme: Theme = LIGHT, **options):
    """A figure (inches) in a theme's colours, written to ``path`` when the block ends; yields (figure, axes). The
    path's folder is made; an .svg has neither date nor random ids. ``options``: of ``pyplot.subplots``. Without
    matplotlib: ImportError, which says how to install it."""
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: pip install 'moba_megatron[plot]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    path = Path(path)
    look = {"figure.facecolor": theme.paper, "axes.facecolor": theme.paper, "savefig.facecolor": theme.paper,
            "text.color": theme.ink, "axes.labelcolor": theme.ink, "xtick.color": theme.muted,
            "ytick.color": theme.muted, "axes.edgecolor": theme.muted, "grid.color": theme.grid, "font.size": 9,
            "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
            "axes.axisbelow": True, "axes.grid": True, "axes.grid.axis": "y", "svg.hashsalt": path.name}
    with pyplot.rc_context(look):
        drawn, axes = pyplot.subplots(rows, columns, figsize=(width, height), **{"layout": "constrained", **options})
        try:
            yield drawn, axes
            path.parent.mkdir(parents=True, exist_ok=True)
            drawn.savefig(path, dpi=DPI, metadata={"Date": None} if path.suffix == ".svg" else None)
        finally:
            pyplot.close(drawn)


def label_ends(axes, labels: Sequence[tuple[float, str, str]]) -> None:
    """Lays the figure out and writes labels (y of the line's end, text, colour) to the right of axes whose limits are
    set, each beside its y, moved apart where they touch."""
    axes.figure.draw_without_rendering()
    step = LINE / (axes.figure.get_figheight() * axes.get_position().height)
    to_axes = axes.transData - axes.transAxes
    places = sorted((to_axes.transform((axes.get_xlim()[1], y))[1], text, colour) for y, text, colour in labels)
    spread = list(itertools.accumulate((y for y, _, _ in places), lambda below, y: max(y, below + step)))
    excess = max(0.0, spread[-1] - HIGHEST) if spread else 0.0
    for y, (_, text, colour) in zip(spread, places):
        axes.text(1.02, y - excess, text, transform=axes.transAxes, color=colour, va="center", fontsize=9)


def short(tokens: float) -> str:
    """A number of tokens as 32K or 1M."""
    return f"{tokens / 2**20:g}M" if tokens >= 1 << 20 else f"{tokens / 2**10:g}K"


def length_axis(axes, tokens: Sequence[int], label: str = "tokens in the sequence") -> None:
    """A logarithmic x axis with a tick at each of the lengths."""
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(tokens), [short(n) for n in tokens])
    axes.minorticks_off()
    axes.set_xlabel(label, loc="left")


def log_axis(axes) -> None:
    """A logarithmic y axis with plain numbers, also at 2 and 5 where it spans little."""
    from matplotlib.ticker import LogLocator
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 300 * low else (1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
