"""What can be wrong with training text before anything is trained, as findings with row ids.

Every check looks at tokens that come from the same ``Chat`` as those of pack, and says which rows break
which rule. Torch-free; the judge of refusals is passed in.
"""

from __future__ import annotations

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pipeline.data.chat import Chat
from pipeline.data.contamination import Suites, Text, text_of
from pipeline.data.dedup import normalised
from pipeline.data.rows import prompt_of
from pipeline.errors import UntaxedError, one_line

Judge = Callable[[str, str], str]
MISJUDGED = 0.2  # a share of a source's rows that is more than the judge's own error
ROLES = {"system": {"user"}, "user": {"assistant"}, "assistant": {"user"}}
BROKEN = re.compile(r"\ufffd|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\u00e2\u20ac|\u00c3[\u0080-\u00bf]")


@dataclass(frozen=True)
class Finding:
    """A rule that is broken (``violation``: do not train) or worth knowing (``note``).

    ``rows``: ids of the rows concerned; empty where it is about the model or the job.
    """

    check: str
    level: Literal["violation", "note"]
    what: str
    rows: tuple[str, ...] = ()


@dataclass(frozen=True)
class Document:
    """One conversation and its tokens. ``target_ids`` is None where the base has yet to answer."""

    row: Mapping[str, Any]
    split: str
    prompt: str
    prompt_ids: Sequence[int]
    target_ids: Sequence[int] | None

    @property
    def id(self) -> str:
        return str(self.row["id"])

    @property
    def asked(self) -> str:
        return prompt_of(self.row["messages"])

    @property
    def tokens(self) -> int:
        return len(self.prompt_ids) + len(self.target_ids or ())


@dataclass(frozen=True)
class Model:
    """What the checks need to know of the base."""

    vocabulary: int
    positions: int | None
    end_ids: Collection[int]


def documents(
    rows: Iterable[tuple[str, Mapping[str, Any]]], chat: Chat
) -> tuple[list[Document], list[Finding]]:
    """The rows (split, row) as pack renders them, and findings for those that it cannot render."""
    made: list[Document] = []
    failed: dict[str, list[str]] = defaultdict(list)
    for split, row in rows:
        try:
            prompt = chat.prompt_text(row["messages"])
            ids, target = chat.encode([prompt])[0], None
            if row.get("response_ids") is not None:
                target = [int(token) for token in row["response_ids"]]
            elif row.get("response") is not None or not row.get("complete", True):
                target = chat.target_ids(row.get("think"), row["response"], prompt=prompt)
        except UntaxedError as error:
            failed[one_line(error.__cause__ or error)].append(str(row["id"]))
            continue
        made.append(Document(row, split, prompt, ids, target))
    return made, [Finding("renders", "violation", why, tuple(ids)) for why, ids in failed.items()]


def check_documents(
    made: Sequence[Document], chat: Chat, model: Model, longest: int
) -> Iterator[Finding]:
    """Rows one by one; each rule gives one finding with all the rows that break it."""
    broken: dict[str, list[str]] = defaultdict(list)
    special = [str(t) for t in chat.tokenizer.added_tokens_decoder.values() if t.special]
    control = re.compile("|".join(map(re.escape, special)) or "(?!)")
    for document in made:
        for check in _of_row(document, chat, model, control):
            broken[check].append(document.id)
    for check, ids in broken.items():
        yield Finding(check, "violation", ROW_RULES[check], tuple(ids))
    by_source: dict[str, list[Document]] = defaultdict(list)
    for document in made:
        by_source[str(document.row["source"])].append(document)
    for source, group in by_source.items():
        long = tuple(d.id for d in group if d.tokens > longest)
        if long:
            share = len(long) / len(group)
            yield Finding(
                "length",
                "violation" if share > 0.5 else "note",
                f"{len(long)} of {len(group)} rows of {source} have more than pack.max_length ="
                f" {longest} tokens and would be dropped; raise it",
                long,
            )


ROW_RULES = {
    "user text": "what the user says is not in the prompt word for word; look at the template",
    "roles": "turns do not alternate between user and assistant; fix the messages",
    "broken text": "holds replacement or control characters, or UTF-8 read as Latin-1; fix the encoding",
    "control tokens": "the text spells a special token of the model, which ends turns or opens new ones;"
    " take it out",
    "unknown tokens": "the tokenizer does not know some of its characters",
    "vocabulary": "has a token that the model has no embedding for; tokenizer and model do not match",
    "lossless": "its tokens decode to another text; the tokenizer loses something",
    "trains something": "nothing but the end token is trained; give it a response",
    "ends": "the last trained token is not the end token: the model would not learn to stop",
    "ends once": "an end token stands inside the answer: the model would learn to stop there",
    "think section": "thoughts and answer do not come back out of the rendered text as they went in",
    "stray think marks": "a mark of the think section stands in the answer or the prompt",
    "positions": "has more tokens than the model has positions",
}


def _of_row(
    document: Document, chat: Chat, model: Model, control: re.Pattern[str]
) -> Iterator[str]:
    row, tokenizer = document.row, chat.tokenizer
    own = [m["content"] for m in row["messages"]]
    if row.get("response_ids") is None:  # the base's own tokens are what they are
        own += [text for text in (row.get("response"), row.get("think")) if text]
    roles = [m["role"] for m in row["messages"]]
    if any(b not in ROLES.get(a, ()) for a, b in itertools.pairwise(roles)):
        yield "roles"
    if any(BROKEN.search(text) for text in own):
        yield "broken text"
    asked = [m["content"].strip() for m in row["messages"] if m["role"] != "assistant"]
    if any(text not in document.prompt for text in asked):  # of earlier answers thoughts may go
        yield "user text"
    if any(control.search(text) for text in own):
        yield "control tokens"
    ids = [*document.prompt_ids, *(document.target_ids or ())]
    known = {tokenizer.bos_token_id, chat.end_id}  # GPT-2's kin call one token all three
    if tokenizer.unk_token_id in set(ids) - known:
        yield "unknown tokens"
    if max(ids, default=0) >= model.vocabulary:
        yield "vocabulary"
    elif _bare(_decoded(tokenizer, document.prompt_ids)) != _bare(document.prompt):
        yield "lossless"
    if model.positions is not None and len(ids) > model.positions:
        yield "positions"
    marks = [m.strip() for m in (chat.recipe.think_open, chat.recipe.think_close) if m.strip()]
    if any(mark in text for mark in marks for text in own):
        yield "stray think marks"
    if document.target_ids is not None:
        yield from _of_target(document, chat)


def _of_target(document: Document, chat: Chat) -> Iterator[str]:
    target, row = list(document.target_ids or ()), document.row
    if not [token for token in target if token != chat.end_id]:
        yield "trains something"
        return
    if row.get("complete", True) and target[-1] != chat.end_id:
        yield "ends"
    if chat.end_id in target[:-1]:
        yield "ends once"
    if row.get("response_ids") is not None and not row.get("complete", True):
        return
    text = _decoded(chat.tokenizer, target, skip_special_tokens=True)
    think, response = chat.split_think(text, prompt=document.prompt)
    wanted = (row.get("think") or "").strip()
    if (think or "") != wanted or response.strip() != (row.get("response") or "").strip():
        yield "think section"


def _decoded(tokenizer: Any, ids: Sequence[int], **options: bool) -> str:
    text: str = tokenizer.decode(ids, clean_up_tokenization_spaces=False, **options)
    return text


def _bare(text: str) -> str:
    """Without white space: some tokenizers write one space more after a special token."""
    return "".join(text.split())


def check_sets(
    made: Sequence[Document],
    held_out: Mapping[str, Sequence[Text]],
    judge: Judge,
    near: float,
) -> Iterator[Finding]:
    """Rows against one another, against evaluation sets (name -> rows), and by the judge.

    ``near``: the word-set similarity from which two prompts count as one.
    """
    train = [d for d in made if d.split == "train"]
    asked: dict[str, list[Document]] = defaultdict(list)
    for document in made:
        asked[normalised(document.asked)].append(document)
    twice = [d.id for group in asked.values() if len({g.split for g in group}) > 1 for d in group]
    if twice:
        yield Finding("apart", "violation", "asked in train and in dev; drop one", tuple(twice))
    torn = [
        d.id
        for group in asked.values()
        if {g.row["kind"] for g in group} > {"refusal"}
        for d in group
    ]
    if torn:
        yield Finding(
            "one answer", "violation", "the same prompt is refused and answered", tuple(torn)
        )
    hits = Suites(held_out).find([_text(document) for document in train], near)
    for name in held_out:
        found = [hit for hit in hits if hit.suite == name]
        if found:
            of = ", ".join(hit.of for hit in found[:3])
            yield Finding(
                "contamination",
                "violation",
                f"asked, or quoted, in the evaluation set {name} ({of}{', ...' if found[3:] else ''});"
                " leave prep.decontaminate on, which drops such rows",
                tuple(train[hit.index].id for hit in found),
            )
    yield from _judged(train, judge)
    kinds = {d.row["kind"] for d in train}
    if kinds == {"refusal"}:
        yield Finding(
            "balance",
            "note",
            "refusals and nothing else: models trained so refuse everything (arXiv 2601.23143); add"
            " harmless prompts as anchors",
        )


def _text(document: Document) -> Text:
    """What the base says in answer comes from it, whatever it has seen, and does not count."""
    row = document.row
    own = row["kind"] == "anchor" or row.get("response_ids") is not None
    answers = () if own else (row.get("think"), row.get("response"))
    return text_of(document.id, row["messages"], *answers)


def _judged(train: Sequence[Document], judge: Judge) -> Iterator[Finding]:
    """Refusals that comply, and answers that refuse; a few of many may be the judge's mistake."""
    rows: dict[tuple[str, str], list[Document]] = defaultdict(list)
    for d in train:
        if d.row.get("response") and d.row.get("complete", True):
            rows[str(d.row["kind"]), str(d.row["source"])].append(d)
    for (kind, source), group in rows.items():
        wrong, what = JUDGED[kind]
        judged = tuple(d.id for d in group if judge(d.asked, d.row["response"]) == wrong)
        if judged:
            yield Finding(
                "says what it should",
                "violation" if len(judged) > MISJUDGED * len(group) else "note",
                f"{len(judged)} of {len(group)} rows of {source} {what}",
                judged,
            )


JUDGED = {
    "refusal": ("compliance", "are refusals that do not read like one"),
    "answer": ("refusal", "are answers that refuse"),
    "anchor": ("refusal", "are anchors that the base refused; set anchor.drop_refusals"),
}
