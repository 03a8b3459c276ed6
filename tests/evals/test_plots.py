"""Pictures are real, say what they are given, repeat byte for byte and survive odd labels."""

from __future__ import annotations

import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from pipeline.evals.palette import THEME
from pipeline.evals.plots import (
    MOST_POINTS,
    Categories,
    Category,
    Curve,
    Drawable,
    Estimate,
    Panel,
    Refusals,
    draw,
    thinned,
    to_png,
    to_svg,
)

BASE = Estimate("base", 0.1, 0.05, 0.17, "10%", "base")
ALIGNED = Estimate("aligned", 0.95, 0.89, 0.98, "95%", "failed")
ODD = '<script>alert("1")</script> $\\frac{ & \u4f60\u597d _^{ --'
PANELS: dict[str, Drawable] = {
    "panel": Panel("Refuses harmful requests", (BASE, ALIGNED), allowed=(0.9, float("inf"))),
    "loss": Panel("Loss", (BASE, ALIGNED), proportion=False, allowed=(float("-inf"), 0.2)),
    "refusals": Refusals("job", (BASE, ALIGNED), {"aligned": 0.9}),
    "curve": Curve("Cross-entropy", ((1, 3.0), (2, 0.1)), ((2, 0.5),)),
    "point": Curve("Cross-entropy", ((1, 0.0),), ()),
    "categories": Categories("By category", (Category("fraud (3)", BASE, ALIGNED),)),
    "odd": Categories(ODD, (Category(ODD, None, ALIGNED), Category(ODD * 9, BASE, ALIGNED))),
    "many": Categories("Many", tuple(Category(f"c{i}", BASE, ALIGNED) for i in range(40))),
}


@pytest.mark.parametrize("name", PANELS)
def test_png_opens_and_shows_something(name: str) -> None:
    content = to_png(draw([PANELS[name]], note="note"))
    image = Image.open(io.BytesIO(content))
    image.verify()
    pixels = np.asarray(Image.open(io.BytesIO(content)).convert("RGB")).reshape(-1, 3)
    colours, counts = np.unique(pixels, axis=0, return_counts=True)
    assert len(colours) > 20
    assert counts.max() < 0.99 * len(pixels)
    assert image.width >= 600


@pytest.mark.parametrize("name", PANELS)
def test_svg_is_xml_with_theme_colours_only(name: str) -> None:
    svg = to_svg(draw([PANELS[name]], titles=False), "what it shows", name)
    # HTML needs no namespace for xlink; XML does
    root = ElementTree.fromstring(svg.replace("<svg ", '<svg xmlns:xlink="x" ', 1))
    assert root.attrib["role"] == "img" and root.attrib["aria-label"] == "what it shows"
    assert "http" not in svg and "<style" not in svg
    used = set(re.findall(r"(?:fill|stroke): (#[0-9a-f]{6})", svg))
    # a line without points keeps its default colour and draws nothing
    assert not used & set(THEME)
    assert "var(--ink)" in svg or "var(--muted)" in svg


def test_svg_holds_labels_and_values_as_text() -> None:
    root = ElementTree.fromstring(
        to_svg(draw([PANELS["panel"]], titles=False), "d", "s").replace(
            "<svg ", '<svg xmlns:xlink="x" ', 1
        )
    )
    texts = {element.text for element in root.iter("text")}
    assert {"base", "aligned", "10%", "95%", "0%", "100%"} <= texts


def test_labels_are_text_and_never_markup_or_formulas() -> None:
    svg = to_svg(draw([PANELS["odd"]], titles=False), ODD, "odd")
    assert "<script" not in svg
    assert "&lt;script&gt;" in svg and "\u4f60\u597d" in svg


def test_same_input_same_bytes_and_other_salt_other_ids() -> None:
    panel = PANELS["categories"]
    assert to_png(draw([panel])) == to_png(draw([panel]))
    first, again, other = (to_svg(draw([panel]), "d", salt) for salt in ("a", "a", "b"))
    assert first == again
    ids = [set(re.findall(r' id="([^"]+)"', svg)) for svg in (first, other)]
    assert ids[0] and not ids[0] & ids[1]


def test_a_failed_value_looks_unlike_a_passed_one_without_colour() -> None:
    shapes = set()
    for role in ("base", "passed", "failed", "uninformative"):
        svg = to_svg(draw([Panel("t", (Estimate("a", 0.5, 0.4, 0.6, "50%", role),))]), "d", "s")
        marker = re.search(r'<path id="[^"]+" d="([^"]+)"', svg)
        fill = re.search(r'<use [^>]*style="fill: var\((--paper)?', svg)
        assert marker and fill
        shapes.add((marker.group(1), fill.group(1)))
    assert len(shapes) == 4


def test_long_histories_are_averaged_and_keep_their_mean() -> None:
    points = [(float(i), float(i % 7)) for i in range(10 * MOST_POINTS)]
    short = thinned(points)
    assert len(short) == MOST_POINTS
    assert np.mean([v for _, v in short]) == pytest.approx(np.mean([v for _, v in points]))
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


@pytest.mark.parametrize(
    ("values", "logarithmic"),
    [((3.0, 0.1), True), ((3.0, 2.0), False), ((3.0, 0.0), False), ((), False)],
)
def test_log_scale_only_for_wide_positive_ranges(
    values: tuple[float, ...], logarithmic: bool
) -> None:
    points = tuple((float(i), value) for i, value in enumerate(values))
    assert Curve("c", points, ()).logarithmic is logarithmic
