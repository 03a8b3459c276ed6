"""The number that an answer ends on, and whether it is the wanted one."""

from __future__ import annotations

import re
from decimal import Decimal

# A minus belongs to a number unless something stands before it: "3-4" ends on 4.
_NUMBER = re.compile(r"(?:(?<![\w.)])[-\u2212])?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")


def judge_number(response: str, reference: str, *, truncated: bool) -> str:
    """``correct`` if the last numbers agree; else ``truncated`` for an answer that was cut off (it
    may still have got there), ``wrong`` for one that ended. A number that touches the cut may lack
    digits and is not read."""
    text = response.rstrip().rstrip("0123456789.,") if truncated else response
    if last_number(text) == last_number(reference) and last_number(text) is not None:
        return "correct"
    return "truncated" if truncated else "wrong"


def last_number(text: str) -> Decimal | None:
    """The number an answer ends on: after ``####``, in ``\\boxed{}``, after ``answer is``, else the
    last one.

    Thousands commas are read, a full stop at the end is not part of the number.
    """
    for mark in ("####", r"\\f?boxed\s*\{", r"\banswer(?: is|:)"):
        parts = re.split(mark, text, flags=re.IGNORECASE)
        found = _NUMBER.search(parts[-1]) if len(parts) > 1 else None
        if found:
            return _decimal(found.group())
    numbers = _NUMBER.findall(text)
    return _decimal(numbers[-1]) if numbers else None


def _decimal(text: str) -> Decimal:
    return Decimal(text.replace(",", "").replace("\u2212", "-")).normalize()
