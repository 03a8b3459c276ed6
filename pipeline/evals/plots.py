"""Pictures of the report: drawn once, saved as PNG beside it and as SVG inside it.

The SVG takes its colours from CSS variables of the page (so it follows light and dark) and keeps
text as text. The same input gives the same bytes.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FixedLocator,
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from pipeline.evals.palette import (
    BAD,
    BAD_SOFT,
    BASE,
    GOOD,
    INK,
    MUTED,
    PAPER,
    ROLE,
    STYLE,
    THEME,
    ZONE,
)

PANEL_WIDTH, PNG_DPI, MOST_POINTS = 3.9, 160, 400
LOG_FROM = 20.0


@dataclass(frozen=True)
class Estimate:
    """A value, its interval, and how it is to be seen (a key of ROLE)."""

    label: str
    value: float
    low: float
    high: float
    text: str
    role: str = "plain"


@dataclass(frozen=True)
class Panel:
    """Estimates on one axis. ``allowed``: the range that the gate lets through."""

    title: str
    estimates: tuple[Estimate, ...]
    proportion: bool = True
    allowed: tuple[float, float] | None = None


@dataclass(frozen=True)
class Refusals:
    """What one model refuses: harmful, borderline and ordinary requests, as far as measured.

    ``bounds``: the gate's bound of a label, where it has one.
    """

    title: str
    estimates: tuple[Estimate, ...]
    bounds: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Curve:
    """(step, value) points of one quantity on training batches and on development rows."""

    title: str
    train: tuple[tuple[float, float], ...]
    dev: tuple[tuple[float, float], ...]

    @property
    def logarithmic(self) -> bool:
        values = [value for _, value in (*self.train, *self.dev)]
        return bool(values) and min(values) > 0 and max(values) / min(values) >= LOG_FROM


@dataclass(frozen=True)
class Category:
    """One category: the estimates of base (if there is one) and aligned model on its rows."""

    label: str
    base: Estimate | None
    aligned: Estimate


@dataclass(frozen=True)
class Categories:
    title: str
    rows: tuple[Category, ...]


Drawable = Panel | Refusals | Curve | Categories


def draw(
    panels: Sequence[Drawable], *, columns: int = 1, titles: bool = True, note: str = ""
) -> Figure:
    """One figure with a panel for each of ``panels``, in a grid of ``columns``, over a ``note``."""
    columns = max(1, min(columns, len(panels)))
    rows = [panels[i : i + columns] for i in range(0, len(panels), columns)]
    heights = [max(_height(panel) + 0.4 * titles for panel in row) for row in rows]
    with matplotlib.rc_context(STYLE):
        figure = Figure(
            figsize=(PANEL_WIDTH * columns, sum(heights) + 0.25 * bool(note)), layout="constrained"
        )
        FigureCanvasAgg(figure)
        grid = figure.add_gridspec(len(rows), columns, height_ratios=heights)
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(grid[index // columns, index % columns])
            _draw(axes, panel)
            if titles:
                axes.set_title(_wrapped(panel.title, 28 if isinstance(panel, Categories) else 40))
        if note:
            figure.supxlabel(note, x=0.01, ha="left", fontsize=8, color=MUTED)
    return figure


def _height(panel: Drawable) -> float:
    if isinstance(panel, Panel):
        return 0.45 + 0.42 * len(panel.estimates)
    if isinstance(panel, Refusals):
        return 0.42 + 0.3 * len(panel.estimates)
    if isinstance(panel, Categories):
        return 0.65 + 0.25 * len(panel.rows)
    return 2.4


def _draw(axes: Axes, panel: Drawable) -> None:
    if isinstance(panel, Panel):
        _draw_panel(axes, panel)
    elif isinstance(panel, Refusals):
        _draw_refusals(axes, panel)
    elif isinstance(panel, Curve):
        _draw_curve(axes, panel)
    else:
        _draw_categories(axes, panel)


def _draw_panel(axes: Axes, panel: Panel) -> None:
    _rows(axes, [estimate.label for estimate in panel.estimates])
    ends = [v for e in panel.estimates for v in (e.low, e.value, e.high)]
    if panel.proportion:
        _percent_axis(axes, -0.03, 1.03)
    else:
        bounds = [b for b in panel.allowed or () if math.isfinite(b)]
        low, high = min(ends + bounds), max(ends + bounds)
        margin = 0.12 * (high - low) or 0.05 * abs(high) or 0.1
        axes.set_xlim(low - margin, high + margin)
        axes.xaxis.set_major_locator(MaxNLocator(4))
        axes.grid(axis="x")
    if panel.allowed:
        left, right = axes.get_xlim()
        axes.axvspan(max(left, panel.allowed[0]), min(right, panel.allowed[1]), color=ZONE, lw=0)
    left, right = axes.get_xlim()
    for y, estimate in enumerate(panel.estimates):
        _dot(axes, estimate, y)
        room = (estimate.value - left) / (right - left)
        axes.annotate(
            estimate.text,
            (estimate.value, y),
            (0, 7),
            textcoords="offset points",
            ha="left" if room < 0.06 else "right" if room > 0.94 else "center",
            va="bottom",
            fontsize=9,
            fontweight="bold" if estimate.role != "base" else "normal",
            color=ROLE[estimate.role][0],
        )


def _dot(axes: Axes, estimate: Estimate, y: float, size: float = 6.5) -> None:
    colour, marker = ROLE[estimate.role]
    axes.plot([estimate.low, estimate.high], [y, y], color=colour, lw=2, solid_capstyle="butt")
    axes.plot(
        [estimate.value],
        [y],
        marker=marker,
        ms=size + (1.5 if marker == "X" else 0),
        mfc=PAPER if estimate.role == "base" else colour,
        mec=colour if estimate.role == "base" else PAPER,
        mew=1.5 if estimate.role == "base" else 0.8,
        clip_on=False,
        zorder=3,
    )


def _draw_refusals(axes: Axes, panel: Refusals) -> None:
    _rows(axes, [estimate.label for estimate in panel.estimates])
    _percent_axis(axes, 0, 1.2)
    colours = {"harmful": GOOD, "borderline": BAD_SOFT, "ordinary": BAD}
    for y, estimate in enumerate(panel.estimates):
        colour = colours.get(estimate.label, BASE)
        axes.barh(y, estimate.value, height=0.62, color=colour)
        ends = ([estimate.value - estimate.low], [estimate.high - estimate.value])
        axes.errorbar(
            estimate.value, y, xerr=ends, color=INK, elinewidth=1.1, capsize=2.5, fmt="none"
        )
        bound = panel.bounds.get(estimate.label)
        if bound is not None:
            axes.plot([bound, bound], [y - 0.42, y + 0.42], color=INK, lw=1.4, ls=(0, (2, 1)))
        end = max(estimate.high, estimate.value) + 0.02
        if bound is not None and end - 0.03 < bound < end + 0.12:
            end = bound + 0.02
        axes.text(end, y, estimate.text, ha="left", va="center", fontsize=9, fontweight="bold")


def _draw_curve(axes: Axes, panel: Curve) -> None:
    if panel.train:
        steps, values = zip(*thinned(panel.train), strict=True)
        single = "o" if len(steps) == 1 else None
        axes.plot(steps, values, color=GOOD, lw=1.2, marker=single, label="training batches")
    if panel.dev:
        steps, values = zip(*panel.dev, strict=True)
        axes.plot(
            steps, values, color=BAD, lw=1.2, ls="--", marker="D", ms=4.5, label="development rows"
        )
    if panel.logarithmic:
        axes.set_yscale("log")
        axes.set_ylabel("logarithmic axis", fontsize=8.5)
        axes.yaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
    elif min((v for _, v in (*panel.train, *panel.dev)), default=0) >= 0:
        axes.set_ylim(bottom=0)
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.set_xlabel("optimiser step", fontsize=8.5)
    axes.grid(axis="y")
    axes.tick_params(axis="y", labelsize=8.5, labelcolor=MUTED)
    axes.legend(loc="best")


def _draw_categories(axes: Axes, panel: Categories) -> None:
    _rows(axes, [row.label for row in panel.rows])
    _percent_axis(axes, -0.03, 1.03)
    for y, row in enumerate(panel.rows):
        if row.base is not None:
            base = row.base
            axes.plot([base.value], [y], "o", ms=7.5, mfc=PAPER, mec=BASE, mew=1.4, clip_on=False)
        _dot(axes, row.aligned, y, 4.5)


def _rows(axes: Axes, labels: Sequence[str]) -> None:
    axes.set_yticks(range(len(labels)), [_wrapped(label, 24) for label in labels])
    axes.set_ylim(len(labels) - 0.45, -0.7)


def _percent_axis(axes: Axes, low: float, high: float) -> None:
    axes.set_xlim(low, high)
    axes.xaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid(axis="x")


def _wrapped(text: str, width: int) -> str:
    """At most two lines of ``width`` characters; a longer text ends with an ellipsis."""
    if len(text) <= width:
        return text
    cut = text.rfind(" ", 1, width + 1)
    head, tail = (text[:width], text[width:]) if cut < 1 else (text[:cut], text[cut + 1 :])
    return head + "\n" + (tail if len(tail) <= width else tail[: width - 1] + "\u2026")


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """``points``, or means over equal runs of them when there are more than MOST_POINTS."""
    size = math.ceil(len(points) / MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]


def to_png(figure: Figure) -> bytes:
    """PNG bytes without a date or a version."""
    buffer = io.BytesIO()
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # a category may hold characters that the font lacks; the SVG shows them
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(figure: Figure, description: str, salt: str) -> str:
    """An ``svg`` element to put into HTML, its colours from CSS; ``salt`` keeps ids apart."""
    buffer = io.StringIO()
    settings = STYLE | {"svg.hashsalt": f"untaxed {salt}"}
    with matplotlib.rc_context(settings), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="([^"]+)"', text)
    assert box is not None
    body = text[text.index(">", box.end()) + 1 :]
    # its style sheet would hold for the whole page
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)
    body = re.sub(r'style="[^"]*"', _themed, body)
    label = escape(description, quote=True)
    return f'<svg viewBox="{box.group(1)}" role="img" aria-label="{label}">{body.strip()}'


def _themed(style: re.Match[str]) -> str:
    text = style.group()
    for colour, variable in THEME.items():
        text = text.replace(f": {colour}", f": var({variable})")
    return text
