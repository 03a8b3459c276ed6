"""Cases of bad input: what prep checks by itself, on rows to train on and on the suites' rows."""

from __future__ import annotations

import json
from typing import Any

from breaking import Breaking, Case, Place

FILE = "data/train.jsonl"
GOOD = {"prompt": "How do I pick a lock?", "response": "I can't help with that."}


def check(name: str, code: int, broken: Breaking, *says: str) -> Case:
    return Case(name, "prep", code, broken, says)


def setting(name: str, values: dict[str, Any], *says: str, code: int = 78) -> Case:
    return check(name, code, lambda p: p.set(**values), *says)


def response(name: str, text: str, *says: str) -> Case:
    """A row to train on with this response, as it stands in the file."""
    line = f'{{"prompt": "Hello", "response": "{text}"}}'
    return check(name, 65, lambda p: p.line(3, line), f"{FILE}:3: 'response'", *says)


def suite(name: str, content: str | bytes, *says: str, **suite: Any) -> Case:
    """The evaluation suite reads a file with this content."""

    def broken(p: Place) -> None:
        raw = content.encode() if isinstance(content, str) else content
        (p.folder / "data" / "test.jsonl").write_bytes(raw)
        p.job["eval"]["suites"] = [suited(source="data/test.jsonl", **suite)]

    return check(name, 65, broken, *says)


def suited(**more: Any) -> dict[str, Any]:
    return {"name": "test", "measures": "harmful"} | more


def lines(*rows: dict[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def all_contaminated(p: Place) -> None:
    p.job["eval"]["suites"].append(suited(source=FILE, limit=1))


def both_reasons(p: Place) -> None:
    """Half is in one suite, half in another."""
    rows = p.data.read_text().splitlines()
    for name, part in (("first", rows[:8]), ("second", rows[8:])):
        (p.folder / "data" / f"{name}.jsonl").write_text("\n".join(part) + "\n")
        p.job["eval"]["suites"].append(suited(name=name, source=f"data/{name}.jsonl"))


ANSWERS = {"measures": "reasoning", "columns": {"response": "answer"}}
CHECKS = [
    check(
        "all-contaminated",
        65,
        all_contaminated,
        f"{FILE}: source train has no rows left of 16 (16 contaminated by test)",
        "give it other rows or take the source out",
    ),
    check("contaminated-by-two", 65, both_reasons, "(16 contaminated by first, second)", "of 16"),
    setting(
        "all-foreign", {"prep__languages": ["de"]}, FILE, "no rows left", "16 language", code=65
    ),
    setting(
        "all-too-short",
        {"prep__min_prompt_characters": 5000},
        "no rows left of 16",
        "16 too short",
        code=65,
    ),
    setting(
        "unknown-language",
        {"prep__languages": ["english"]},
        "prep.languages: unknown language 'english'",
        "did you mean en?",
        "ISO 639",
    ),
    setting("language-alone", {"prep__languages": "en"}, "prep.languages: ", "valid tuple"),
    setting("most-of-none", {"prep__sources__0__most": 0}, "sources.0.most: ", "greater than 0"),
    setting(
        "lengths-backwards",
        {"prep__min_prompt_characters": 10, "prep__max_prompt_characters": 9},
        "prep.min_prompt_characters=10 is above prep.max_prompt_characters=9",
        "lower the one",
    ),
    setting(
        "decontaminate-perhaps",
        {"prep__decontaminate": "perhaps"},
        "prep.decontaminate: ",
        "valid boolean",
        "'perhaps'",
    ),
    response("response-is-empty", "", "is empty", "fill or drop the row"),
    response("response-is-blank", " \\n", "is empty", "fill or drop the row"),
    response("response-of-half-a-pair", "No\\udc00", "half a surrogate pair at character 3"),
    suite(
        "suite-without-an-answer",
        lines(GOOD | {"answer": "#### 4"}, GOOD),
        "data/test.jsonl:2: 'answer': got null",
        "wanted text",
        **ANSWERS,
    ),
    suite(
        "suite-without-answers",
        lines(GOOD),
        "data/test.jsonl: no column 'answer'",
        "columns there: prompt",
        **ANSWERS,
    ),
    suite("suite-not-utf8", b'{"prompt": "caf\xe9"}\n', "data/test.jsonl:1", "0xe9", "not UTF-8"),
    suite(
        "suite-where-nothing-is",
        lines(GOOD | {"label": "safe"}),
        "data/test.jsonl: no rows left where label=save",
        "did you mean 'safe'?",
        where={"label": "save"},
    ),
    check(
        "suite-half-that-is-not",
        65,
        lambda p: p.set(eval__suites__0__where={"split": "held-out"}),
        "sample:harmful: no rows left where split=held-out",
        "did you mean 'heldout'?",
    ),
]
