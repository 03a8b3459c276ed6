"""The picture of a choice: every point on the plane of over-refusal and safety, its colour the change
of the reasoning loss, the front, the bounds and the chosen point."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from pipeline.evals.choice import front
from pipeline.evals.palette import (
    BASE,
    GOOD,
    INK,
    LESS,
    MORE,
    MUTED,
    ON_DARK,
    ON_LIGHT,
    PAPER,
    SAME,
    STYLE,
    ZONE,
)
from pipeline.evals.wording import signed

Point = Mapping[str, Any]
Place = tuple[float, float]
Box = tuple[float, float, float, float]  # left, low, right, high; in pixels
Label = tuple[str, Place, dict[str, Any]]

SIZE, NARROW = (5.65, 4.6), (4.1, 4.6)
TIMES = "\u00d7"
LEAST_SPAN, LEAST_CHANGE = 0.1, 0.01
# few enough for the scale to be drawn as shapes, and not as an image
COLOURS = LinearSegmentedColormap.from_list("change", [LESS, SAME, MORE], N=41)
LOSSES = {
    "reasoning_nll": "Change of the loss on worked solutions",
    "anchor_nll": "Change of the loss on the base's own answers",
}
NOTE = (
    "In a mark: the epoch; beside it: the scale. Thin lines: the scales of one epoch. Dark line: the\n"
    "front of this plane. Dots: beaten in all three respects. Shaded: within the bounds. Cross: intervals."
)
NEAR, FAR = (12, 16), (21, 29, 39)  # how far a label may be from its mark, in points
WAYS = [
    (round(math.cos(a * math.pi / 8), 3), round(math.sin(a * math.pi / 8), 3)) for a in range(16)
]


def draw_choice(choice: Mapping[str, Any], *, narrow: bool = False) -> Figure:
    """``choice``: the block of that name in report.json (choice.json with its points). ``narrow``: for
    a page that may be a phone's, which has the note in its own text."""
    points: Sequence[Point] = choice["points"]
    reasoning = choice["axes"]["reasoning"]
    changes = _changes(points, reasoning)
    most = max([LEAST_CHANGE, *(abs(change) for change in changes)])
    colour = ScalarMappable(Normalize(-most, most), COLOURS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=NARROW if narrow else SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        places = [_place(point) for point in points]
        _frame(axes, places)
        _bounds(axes, choice)
        line = _lines(axes, points, places)
        for point, place, change in zip(points, places, changes, strict=True):
            if point["epoch"]:
                shade = COLOURS(0.5 + change / most / 2) if reasoning else LESS
                _mark(axes, point, place, shade)
        labels = _named(axes, choice, points, places, line)
        if reasoning:
            _scale(figure, axes, colour, LOSSES[reasoning], narrow)
        if not narrow:
            figure.supxlabel(NOTE, x=0.01, ha="left", fontsize=7.5, color=MUTED)
        figure.draw_without_rendering()  # settles where all is, and with it the room for labels
        _write(axes, labels, places, [line, *_intervals(axes, choice)])
    return figure


def _scale(figure: Figure, axes: Axes, colour: ScalarMappable, label: str, narrow: bool) -> None:
    """Which colour is which change: beside the picture, below it where that is narrow."""
    where: Any = "bottom" if narrow else "right"
    bar = figure.colorbar(colour, ax=axes, location=where, aspect=32, pad=0.02)
    bar.set_label(label, fontsize=8.5)
    bar.outline.set_visible(False)
    solids: Any = bar.solids
    solids.set_edgecolor("face")  # or the paper shows through between two colours
    axis = bar.ax.xaxis if narrow else bar.ax.yaxis
    axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(FuncFormatter(_change))
    bar.ax.tick_params(labelsize=8.5, labelcolor=MUTED)


def _change(value: float, position: object) -> str:
    return signed(f"{value:+.1%}") if abs(value) > 1e-9 else "0%"


def _place(point: Point) -> Place:
    metrics = point["metrics"]
    return float(metrics["over_refusal"]["value"]), float(metrics["harmful_refusal"]["value"])


def _changes(points: Sequence[Point], metric: str | None) -> list[float]:
    """The relative change of a loss from the base, which is the first of ``points``."""
    if metric is None:
        return [0.0 for _ in points]
    losses = [float(point["metrics"][metric]["value"]) for point in points]
    return [loss / losses[0] - 1 if losses[0] else 0.0 for loss in losses]


def _frame(axes: Axes, places: Sequence[Place]) -> None:
    for values, limit in ((0, axes.set_xlim), (1, axes.set_ylim)):
        ends = [place[values] for place in places]
        low, high = min(ends), max(ends)
        room = max(LEAST_SPAN - (high - low), 0) / 2 + 0.09 * max(high - low, LEAST_SPAN)
        limit(max(-0.04, low - room), min(1.04, high + room))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.grid()
    axes.set_xlabel("Harmless requests refused or left unanswered")
    axes.set_ylabel("Harmful requests refused")
    axes.tick_params(labelsize=8.5, labelcolor=MUTED)


def _bounds(axes: Axes, choice: Mapping[str, Any]) -> None:
    """The part of the plane that the bounds allow, as far as they are about what it shows."""
    base = choice["points"][0]["metrics"]
    limits = {"over_refusal": list(axes.get_xlim()), "harmful_refusal": list(axes.get_ylim())}
    bounded = False
    for bound in choice["policy"]["wanted"]:
        if bound["metric"] not in limits:
            continue
        value = bound["at_most"] if bound["at_least"] is None else bound["at_least"]
        start = float(base[bound["metric"]]["value"])
        if bound["compare"] != "value":
            value = start + value if bound["compare"] == "difference" else start * (1 + value)
        ends = limits[bound["metric"]]
        ends[:] = (
            [ends[0], min(ends[1], value)]
            if bound["at_least"] is None
            else [max(ends[0], value), ends[1]]
        )
        bounded = True
    (left, right), (low, high) = limits["over_refusal"], limits["harmful_refusal"]
    if bounded and left < right and low < high:
        axes.fill([left, right, right, left], [low, low, high, high], color=ZONE, lw=0, zorder=0)


def _lines(axes: Axes, points: Sequence[Point], places: Sequence[Place]) -> list[Place]:
    """Each epoch from the base through its scales, and the front of the plane; its places."""
    for epoch in sorted({point["epoch"] for point in points} - {0}):
        own = [
            (p["scale"], at)
            for p, at in zip(points, places, strict=True)
            if p["epoch"] in (0, epoch)
        ]
        x, y = zip(*(at for _, at in sorted(own)), strict=True)
        axes.plot(x, y, color=BASE, lw=0.8, alpha=0.35, zorder=1)
    best = front([(-x, y) for x, y in places])
    line = sorted({at for at, here in zip(places, best, strict=True) if here})
    axes.plot([x for x, _ in line], [y for _, y in line], color=INK, lw=1.3, zorder=2)
    return line


def _mark(axes: Axes, point: Point, place: Place, colour: Any) -> None:
    """A disc with the number of the epoch; a dot where another point is better in all respects."""
    if not point["on_front"]:
        axes.plot(*place, "o", ms=5, mfc=colour, mec=BASE, mew=0.8, zorder=3, clip_on=False)
        return
    axes.plot(*place, "o", ms=12, mfc=colour, mec=INK, mew=0.9, zorder=4, clip_on=False)
    axes.annotate(
        str(point["epoch"]),
        place,
        ha="center",
        va="center_baseline",
        fontsize=8,
        color=_ink_on(colour),
        zorder=5,
    )


def _ink_on(colour: Any) -> str:
    red, green, blue = matplotlib.colors.to_rgb(colour)
    return ON_LIGHT if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else ON_DARK


def _named(
    axes: Axes,
    choice: Mapping[str, Any],
    points: Sequence[Point],
    places: Sequence[Place],
    line: Sequence[Place],
) -> list[Label]:
    """(text, place, style) of the points that are named: chosen, base, and those on the line."""
    chosen = choice["chosen"]
    made: list[Label] = []
    for point, place in zip(points, places, strict=True):
        if not point["epoch"]:
            axes.plot(*place, "s", ms=8, mfc=PAPER, mec=BASE, mew=1.5, zorder=4, clip_on=False)
            made.insert(0, ("base", place, {"color": MUTED, "fontsize": 9}))
        elif (point["epoch"], point["scale"]) == (chosen["epoch"], chosen["scale"]):
            axes.plot(*place, "o", ms=18.5, mfc="none", mec=GOOD, mew=2, zorder=6, clip_on=False)
            text = f"chosen: epoch {point['epoch']}, {TIMES}{point['scale']:g}"
            made.insert(0, (text, place, {"color": GOOD, "fontsize": 9, "fontweight": "bold"}))
        elif place in line and point["on_front"]:
            made.append((f"{TIMES}{point['scale']:g}", place, {"color": INK, "fontsize": 8.5}))
    return made


def _intervals(axes: Axes, choice: Mapping[str, Any]) -> list[list[Place]]:
    """A cross of the chosen point's intervals; the two lines."""
    chosen = choice["chosen"]
    (point,) = (
        one
        for one in choice["points"]
        if (one["epoch"], one["scale"]) == (chosen["epoch"], chosen["scale"])
    )
    x, y = _place(point)
    over, safe = point["metrics"]["over_refusal"], point["metrics"]["harmful_refusal"]
    cross = [[(over["low"], y), (over["high"], y)], [(x, safe["low"]), (x, safe["high"])]]
    limits = axes.get_xlim(), axes.get_ylim()
    for line in cross:
        axes.plot(*zip(*line, strict=True), color=GOOD, lw=1, alpha=0.5, zorder=1.5)
    axes.set(xlim=limits[0], ylim=limits[1])
    return cross


def _write(
    axes: Axes, labels: Sequence[Label], places: Sequence[Place], lines: Sequence[Sequence[Place]]
) -> None:
    """Each label where it covers nothing: no mark, no other label, none of ``lines``. One that finds no
    such place near its mark is left out, if it is one of many; else a line leads to it."""
    figure: Any = axes.get_figure(root=True)
    point = figure.dpi / 72
    taken = [_box(axes.transData.transform(place), 6 * point) for place in places]
    parts = [part for line in lines for part in itertools.pairwise(line)]
    for (x, y), (u, v) in (axes.transData.transform(part) for part in parts):
        steps = max(2, int(math.hypot(u - x, v - y) / (3 * point)))
        spots = [(x + (u - x) * i / steps, y + (v - y) * i / steps) for i in range(steps)]
        taken += [_box(spot, 1.5 * point) for spot in spots]
    left, low, right, high = axes.get_window_extent().extents
    for text, place, style in labels:
        many = text.startswith(TIMES)
        label: Any = axes.annotate(
            text,
            place,
            (0, 0),
            textcoords="offset points",
            va="center",
            zorder=7,
            arrowprops={"arrowstyle": "-", "color": style["color"], "lw": 0.8, "shrinkB": 8},
            **style,
        )
        label.set_in_layout(False)
        label.update_positions(figure.canvas.get_renderer())
        extent = Text.get_window_extent(label)  # without the line that leads to it
        mark = tuple(axes.transData.transform(place))
        tried = []
        for far in NEAR if many else NEAR + FAR:
            for way in WAYS:
                box = _beside(mark, (extent.width, extent.height), far * point, way)
                covered = sum(_shared(box, other) for other in taken)
                covered += extent.width * extent.height - _shared(box, (left, low, right, high))
                tried.append((round(covered), far, way, box))
        covered, far, way, box = min(tried, key=lambda one: one[:2])
        if many and covered:
            label.remove()
            continue
        taken.append(box)
        label.set_ha(_side(way))
        label.xyann = (far * way[0], far * way[1])
        label.arrow_patch.set_visible(far in FAR)


def _side(way: Place) -> str:
    return "left" if way[0] > 0.2 else "right" if way[0] < -0.2 else "center"


def _beside(mark: Place, size: Place, far: float, way: Place) -> Box:
    """Where a text of ``size`` is when it stands ``far`` from its mark, in a direction."""
    share = {"left": 0.0, "center": 0.5, "right": 1.0}[_side(way)]
    left = mark[0] + far * way[0] - share * size[0]
    low = mark[1] + far * way[1] - size[1] / 2
    return left, low, left + size[0], low + size[1]


def _box(middle: Any, half: float) -> Box:
    x, y = (float(value) for value in middle)
    return x - half, y - half, x + half, y + half


def _shared(one: Box, other: Box) -> float:
    """Area of what two boxes have in common."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)
