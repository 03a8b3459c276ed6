"""The elements and texts of a report page."""

from __future__ import annotations

from html.parser import HTMLParser


class Page(HTMLParser):
    """The elements of a page; raises AssertionError where tags do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.stack: list[tuple[str, dict[str, str | None]]] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, list[tuple[str, dict[str, str | None]]]]] = []
        self.feed(text)
        self.close()
        assert self.stack == [], self.stack

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "input", "br"):
            self.stack.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack and self.stack[-1][0] == tag, (tag, self.stack[-2:])
        self.stack.pop()

    def handle_data(self, data: str) -> None:
        self.texts.append((data, list(self.stack)))

    def text_of(self, tag: str, name: str, value: str) -> str:
        """All text inside elements ``tag`` whose attribute ``name`` is ``value``."""
        inside = [
            t for t, s in self.texts if any(e[0] == tag and e[1].get(name) == value for e in s)
        ]
        return " ".join(" ".join(inside).split())
