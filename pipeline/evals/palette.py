"""Colours and type of the report's pictures: safe for the colour-blind, one name each in CSS."""

from __future__ import annotations

from typing import Any

INK, MUTED, GRID, PAPER, ZONE = "#1b2430", "#596573", "#d5dbe1", "#fffffe", "#e3f0e8"
BASE, GOOD, BAD, BAD_SOFT, UNSURE = "#5f6b78", "#0a62a6", "#b8430a", "#e59a5e", "#7d529c"
# The same in light and dark: what stands for a number, and what is written on it.
LESS, SAME, MORE = "#0b63a7", "#f2efe9", "#c14906"
ON_LIGHT, ON_DARK = "#10161d", "#ffffff"
THEME = {
    INK: "--ink",
    MUTED: "--muted",
    GRID: "--line",
    PAPER: "--paper",
    ZONE: "--zone",
    BASE: "--base",
    GOOD: "--good",
    BAD: "--bad",
    BAD_SOFT: "--bad-soft",
    UNSURE: "--unsure",
}
ROLE = {
    "base": (BASE, "o"),
    "passed": (GOOD, "o"),
    "failed": (BAD, "X"),
    "uninformative": (UNSURE, "D"),
    "plain": (GOOD, "o"),
}
STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.edgecolor": GRID,
    "axes.facecolor": "none",
    "axes.labelcolor": MUTED,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.axisbelow": True,
    "axes.unicode_minus": False,
    "xtick.color": MUTED,
    "ytick.color": INK,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": PAPER,
    "savefig.facecolor": PAPER,
    "svg.fonttype": "none",
    "svg.hashsalt": "untaxed",
    "path.simplify": True,
}
