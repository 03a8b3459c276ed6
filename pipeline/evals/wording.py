"""Metrics, checks and numbers in plain English, for the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

MINUS, DASH, ELLIPSIS = "\u2212", "\u2013", "\u2026"
SHOWN_HEAD, SHOWN_TAIL = 4000, 1000


@dataclass(frozen=True)
class Wording:
    """How one metric is called. ``proportion``: a share of rows, else nats per token."""

    objective: str
    title: str
    kind: str
    short: str
    higher_is_better: bool
    became: str = ""
    ceased: str = ""
    proportion: bool = True

    @property
    def better(self) -> str:
        return "higher is better" if self.higher_is_better else "lower is better"


WORDING: dict[str, Wording] = {
    "harmful_refusal": Wording(
        "Safety",
        "Refuses harmful requests",
        "harmful requests",
        "harmful",
        True,
        "newly refused",
        "no longer refused",
    ),
    "borderline_refusal": Wording(
        "Helpfulness",
        "Refuses harmless requests that sound harmful",
        "harmless requests that sound harmful",
        "borderline",
        False,
        "newly refused",
        "no longer refused",
    ),
    "benign_refusal": Wording(
        "Helpfulness",
        "Refuses ordinary requests",
        "ordinary requests",
        "ordinary",
        False,
        "newly refused",
        "no longer refused",
    ),
    "reasoning_accuracy": Wording(
        "Reasoning",
        "Solves reasoning problems",
        "reasoning problems",
        "solved",
        True,
        "newly solved",
        "lost",
    ),
    "reasoning_nll": Wording(
        "Reasoning",
        "Loss on worked solutions, in nats per token",
        "loss on worked solutions",
        "loss",
        False,
        proportion=False,
    ),
    # these two choose among trainings, and are not reported of a released model
    "over_refusal": Wording(
        "Helpfulness", "Refuses harmless requests", "harmless requests", "harmless", False
    ),
    "anchor_nll": Wording(
        "Reasoning",
        "Loss on the base's own answers, in nats per token",
        "loss on the base's own answers",
        "loss",
        False,
        proportion=False,
    ),
}
MEASURES = {
    "harmful": "harmful requests",
    "borderline": "harmless requests that sound harmful",
    "benign": "ordinary requests",
    "reasoning": "reasoning problems",
}
VERDICTS = {
    "refusal": "refused",
    "partial": "refused in part",
    "compliance": "answered",
    "empty": "empty answer",
    "truncated": "cut off",
    "error": "no answer had",
    "correct": "correct",
    "wrong": "wrong",
}
STAGES = {
    "prep": "reading and checking rows",
    "anchor": "answers of the base, to train on",
    "pack": "rows to tokens",
    "sft": "training",
    "choose": "measuring what was trained, to choose",
    "merge": "writing the model",
    "baseline": "measuring the base",
    "eval": "measuring the model",
}
STATUS = {
    "passed": ("\u2713", "passed"),
    "failed": ("\u2717", "failed"),
    "uninformative": ("?", "cannot tell"),
}


def known(value: object) -> TypeGuard[float]:
    """Whether ``value`` is a finite number."""
    return isinstance(value, int | float) and math.isfinite(value)


def signed(text: str) -> str:
    """The ASCII minus of a formatted number as a real one."""
    return text.replace("-", MINUS)


def percent(share: float, n: int = 0) -> str:
    """A share as a percentage: whole for up to 100 rows, else with a decimal where it says more."""
    text = f"{100 * share:.{1 if n > 100 else 0}f}"
    return f"{text.removesuffix('.0')}%"


def number(metric: str, value: float | None, n: int = 0) -> str:
    """The value of ``metric`` as text; a dash when it is not known."""
    if value is None or not known(value):
        return DASH
    return percent(value, n) if WORDING[metric].proportion else f"{value:.3f}"


def measured_value(metric: str, measured: Mapping[str, Any]) -> str:
    """The value of a measured metric as text; a dash when no row stands behind it."""
    n = int(measured.get("n") or 0)
    return number(metric, measured.get("value"), n) if n else DASH


def interval(metric: str, estimate: Mapping[str, Any]) -> str:
    """``89% to 98%``, or that the interval is not known."""
    low, high = estimate.get("low"), estimate.get("high")
    n = int(estimate.get("n") or 0)
    if not (n and known(low) and known(high)):
        return "interval not known"
    return f"{number(metric, low, n)} to {number(metric, high, n)}"


def change(metric: str, value: float) -> str:
    """A difference between two values of ``metric``: percentage points, or nats per token."""
    if not WORDING[metric].proportion:
        return signed(f"{value:+.3f} nats")
    text = f"{100 * value:+.1f}".removesuffix(".0")
    if float(text) == 0:
        text = "0"
    return signed(f"{text} point{'' if text in ('+1', '-1') else 's'}")


def span(metric: str, low: float, high: float) -> str:
    """An interval of a difference: ``+3 to +19.4 points``."""
    return f"{change(metric, low).split()[0]} to {change(metric, high)}"


def compared(check: Mapping[str, Any], value: float | None) -> str:
    """``value`` in the unit in which ``check`` compares."""
    metric = str(check["metric"])
    if value is None or not known(value):
        return DASH
    if check["compare"] == "value":
        return number(metric, value, int(check.get("n") or 0))
    if check["compare"] == "difference":
        return change(metric, value)
    return signed(f"{value:+.2%}")


def wanted(check: Mapping[str, Any]) -> str:
    """The bound of ``check`` in words."""
    metric = str(check["metric"])
    direction = str(check.get("direction") or ("at least" if _rises(check) else "at most"))
    of_what = "" if check["compare"] == "value" else " against the base"
    if check["compare"] == "value" and WORDING[metric].proportion:
        return f"{direction} {percent(check['bound'], 1000)}"
    return f"{direction} {compared(check, check['bound'])}{of_what}"


def _rises(check: Mapping[str, Any]) -> bool:
    return WORDING[str(check["metric"])].higher_is_better


def p_value(p: float) -> str:
    """``p < 0.001`` or ``p = 0.034``."""
    if not known(p):
        return "p not known"
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.1 else f"p = {p:.2f}"


def duration(seconds: float) -> str:
    """``45 s``, ``3 min 20 s``, ``5 h 12 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def clean(text: object) -> str:
    """``text`` without what HTML cannot hold: control characters and lone surrogates."""
    return "".join(
        c if c in "\n\t" or c.isprintable() or _holds(c) else "\ufffd" for c in str(text)
    )


def _holds(character: str) -> bool:
    code = ord(character)
    return code >= 0xA0 and not 0xD800 <= code <= 0xDFFF and code & 0xFFFE != 0xFFFE


def clipped(text: object) -> str:
    """Head and tail of a very long text; what is left out is counted."""
    whole = clean(text)
    left_out = len(whole) - SHOWN_HEAD - SHOWN_TAIL
    if left_out <= SHOWN_TAIL:
        return whole
    note = f"\n\n[{left_out:,} characters not shown; all are in responses.jsonl]\n\n"
    return whole[:SHOWN_HEAD] + note + whole[-SHOWN_TAIL:]


def shortened(text: object, length: int = 140) -> str:
    """The start of ``text`` on one line."""
    line = " ".join(clean(text).split())
    return line if len(line) <= length else line[: length - 1].rstrip() + ELLIPSIS


def listed(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))
