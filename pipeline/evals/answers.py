"""What an answer ends on: the content of the last ``\\boxed{}``, what follows "the answer is", or the
last line; and a letter or a text read from that."""

from __future__ import annotations

import re

_BOXED = re.compile(r"\\f?boxed\s*\{")
_STATED = re.compile(r"\banswer[*_]*(?:\s+is\b|\s*:)", re.IGNORECASE)
_MARKUP = re.compile(r"\\(?:text|textbf|mathrm|mathbf|boldsymbol)\s*\{([^{}]*)\}")
_NAMED = r"[\W_]*(?:(?i:the\s+)?(?i:option|choice|letter)\W+)?"
_FIRST = re.compile(rf"{_NAMED}([A-Z])(?![\w'\u2019])")
_LISTED = re.compile(rf"{_NAMED}([A-Z])[).:\]](?:\s|$)")
_LAST = re.compile(r"(?:^|[^\w'\u2019])([A-Z])[\W_]*$")


def boxed(text: str) -> str | None:
    """The content of the last ``\\boxed{}`` that is closed; None without one."""
    starts = {found.end() for found in _BOXED.finditer(text)}
    opened: list[int] = []
    start = end = -1
    for brace in re.finditer(r"[{}]", text if starts else ""):
        if brace.group() == "{":
            opened.append(brace.end())
        elif opened and (inside := opened.pop()) in starts and inside > start:
            start, end = inside, brace.start()
    return text[start:end] if end >= 0 else None


def letter_of(text: str, letters: str) -> str | None:
    """The option that an answer ends on, as one of ``letters``; others do not count. None without one.

    Boxed, else what comes after "the answer is" or "answer:", the last of these that is a letter, else
    a letter that ends the last line, or begins it as an option does.
    """
    box = boxed(text)
    candidates = [(_FIRST, box)] if box is not None else []
    candidates += [(_FIRST, stated) for stated in reversed(_stated(text))]
    last = _last_line(text)
    candidates += [(_LAST, last), (_LISTED, last)]
    for pattern, part in candidates:
        plain = _MARKUP.sub(r"\1", part)
        found = pattern.search(plain) if pattern is _LAST else pattern.match(plain)
        if found and found.group(1) in letters:
            return found.group(1)
    return None


def words_of(text: str) -> str | None:
    """The text that an answer ends on: boxed, else stated (up to the end of its sentence), else the
    last line. None when there is nothing."""
    box = boxed(text)
    if box is not None and box.strip():
        return box.strip()
    for stated in reversed(_stated(text)):
        sentence = re.split(r"[.!](?:\s|$)", stated)[0].strip()
        if normalised(sentence):
            return sentence
    return _last_line(text) or None


def normalised(text: str) -> str:
    """Lower case, without markup, quotes and punctuation around it; commas are spaces."""
    plain = _MARKUP.sub(r"\1", text).replace("\\", " ").replace(",", " ")
    return " ".join(re.sub(r"[*_`$\"\u201c\u201d]+", " ", plain).casefold().split()).strip(".:;!' ")


def _stated(text: str) -> list[str]:
    """What follows each "the answer is", up to the end of its line (or of the next, if it says
    nothing)."""
    found = []
    for part in _STATED.split(text)[1:]:
        lines = [line for line in part.splitlines() if re.search(r"[^\s:*_]", line)]
        found.append(lines[0].lstrip(" \t:*_") if lines else "")
    return found


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""
