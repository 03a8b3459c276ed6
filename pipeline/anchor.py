"""Stage 1b: prompts + base -> conversations that the base model answered in its own words.

Anchors, benign, hold the model where it was (ThinkSafe, arXiv 2601.23143): they keep it from refusing
everything. Answers that would teach the wrong thing are dropped and counted. Refusals may be the
model's own words too: then it is told to refuse, and trained without that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.artifact import Artifact
from pipeline.data.chat import Chat, Message, check_generation_prompt
from pipeline.data.rows import prompt_of
from pipeline.errors import DataError
from pipeline.evals.asking import Generation, Request
from pipeline.evals.engines import Engine, open_engine, request_for
from pipeline.evals.judge import judge_refusal
from pipeline.evals.ledger import answer
from pipeline.evals.score import Sampling, read_lines, write_rows
from pipeline.graph import AnchorStep
from pipeline.model.base import load_tokenizer
from pipeline.recipes import AnchorRecipe, RewriteRecipe
from pipeline.stage import Context, main

SPLITS = ("train.jsonl", "dev.jsonl")
LOOP_NGRAM = 6
LOOP_WINDOW_TOKENS = 64


def run(
    recipe: AnchorStep, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write train.jsonl and dev.jsonl under ``out``; rows that are not asked for pass unchanged."""
    check_generation_prompt(recipe.chat)
    rows = {name: read_lines(inputs["prep"].path(name)) for name in SPLITS}
    whole = [row for split in rows.values() for row in split]
    asked = [row for row in whole if row["kind"] == "anchor"]
    chat = Chat(load_tokenizer(inputs["base"].folder), recipe.chat)
    _check_primer(whole, chat)
    identity = f"{inputs['base'].digest} {inputs['prep'].digest}"
    engine = _engine(recipe.anchor, inputs["base"].folder, chat, context)
    ask = _asking(engine, context, f"{identity} {engine.identity}")
    limit = recipe.anchor.max_new_tokens
    generations = ask(
        [request_for(chat, row["id"], row["messages"], limit) for row in asked],
        "responses.jsonl",
        "anchor: the base answers",
    )
    dropped: Counter[str] = Counter()
    kept: dict[str, dict[str, Any]] = {}
    for row, generation in zip(asked, generations, strict=True):
        why, filled = fill(row, generation, chat, recipe.anchor)
        if why:
            dropped[why] += 1
        else:
            kept[row["id"]] = filled
    if asked and not kept:
        raise DataError(
            f"anchor: all {len(asked)} answers were dropped ({_reasons(dropped)}); raise"
            " anchor.max_new_tokens, set anchor.truncated=keep, or use other prompts"
        )
    refusals = [row for row in whole if row["kind"] == "refusal"]
    rewritten, facts = rewrite(refusals, recipe.anchor.rewrite_refusals, chat, ask, context)
    made = rewritten | kept
    for name, split in rows.items():
        write_rows(
            out / name,
            [made.get(r["id"], r) for r in split if r["kind"] != "anchor" or r["id"] in kept],
        )
    tokens = sum(len(row["response_ids"]) for row in kept.values())
    if asked:
        context.log(
            f"anchor: {len(kept)} of {len(asked)} answers kept, {tokens} tokens;"
            f" dropped: {_reasons(dropped) or 'none'}"
        )
    return {
        "prompts": len(asked),
        "kept": len(kept),
        "complete": sum(row["complete"] for row in kept.values()),
        "tokens": tokens,
        "dropped": dict(sorted(dropped.items())),
        "refusals_kept": sum(
            judge_refusal(prompt_of(row["messages"]), row["response"]) != "compliance"
            for row in kept.values()
        ),
        **facts,
        "generation": engine.facts,
    }


Ask = Callable[[Sequence[Request], str, str], list[Generation]]


def _asking(engine: Engine, context: Context, identity: str) -> Ask:
    """(requests, file of finished answers, title) -> answers."""

    def ask(requests: Sequence[Request], name: str, title: str) -> list[Generation]:
        path = context.scratch / name
        return answer(engine, requests, path=path, identity=identity, title=title, log=context.log)

    return ask


def rewrite(
    rows: Sequence[Mapping[str, Any]],
    recipe: RewriteRecipe | None,
    chat: Chat,
    ask: Ask,
    context: Context,
) -> tuple[dict[str, dict[str, Any]], dict[str, Any]]:
    """The refusals that the model worded itself, by id, and facts; none where ``recipe`` is None.

    DataError where not one of ``rows`` has such a refusal.
    """
    if recipe is None:
        return {}, {}
    made: dict[str, dict[str, Any]] = {}
    why: dict[str, str] = {}
    for number in range(1, recipe.tries + 1):
        todo = [row for row in rows if row["id"] not in made]
        # ids, and so seeds, of their own: samples are called ID#2, and so are repeated rows
        names = [row["id"] if number == 1 else f"{row['id']} try {number}" for row in todo]
        requests = [
            request_for(chat, name, instructed(row["messages"], recipe), recipe.max_new_tokens)
            for name, row in zip(names, todo, strict=True)
        ]
        title = f"anchor: the base words refusals, try {number} of {recipe.tries}"
        for row, generation in zip(todo, ask(requests, "refusals.jsonl", title), strict=True):
            flaw, filled = reword(row, generation, chat)
            if flaw:
                why[row["id"]] = flaw
            else:
                made[row["id"]] = filled
    kept = Counter(flaw for name, flaw in why.items() if name not in made)
    if rows and not made:
        raise DataError(
            f"anchor: none of {len(rows)} refusals could be rewritten ({_reasons(kept)}); raise"
            " anchor.rewrite_refusals.max_new_tokens, give it another instruction, or leave it out"
        )
    context.log(
        f"anchor: {len(made)} of {len(rows)} refusals rewritten by the base; prep's kept:"
        f" {_reasons(kept) or 'none'}"
    )
    facts = {"rows": len(rows), "rewritten": len(made), "kept": dict(sorted(kept.items()))}
    return made, {"rewritten_refusals": facts}


def instructed(messages: Sequence[Message], recipe: RewriteRecipe) -> list[Message]:
    """``messages`` with the instruction before the user's last words. Not as a system turn: some
    templates have none, and it would replace the job's own."""
    *before, last = messages
    return [*before, {**last, "content": f"{recipe.instruction}\n\n{last['content']}"}]


def reword(
    row: Mapping[str, Any], generation: Generation, chat: Chat
) -> tuple[str | None, dict[str, Any]]:
    """(why it may not replace the refusal of ``row``, or None; the row with it)."""
    flaw, filled = _answered(row, generation, chat, truncated="drop")
    if flaw is None:
        verdict = judge_refusal(prompt_of(row["messages"]), filled["response"])
        flaw = None if verdict == "refusal" else verdict
    return flaw, filled


def _check_primer(rows: Sequence[Mapping[str, Any]], chat: Chat) -> None:
    """RecipeError, before anything is generated, for a safety primer that pack could not render."""
    primer = next((row for row in rows if not row.get("complete", True)), None)
    if primer is not None:
        prompt = chat.prompt_text(primer["messages"])
        chat.target_text(primer["think"], primer["response"], prompt=prompt)


def _engine(recipe: AnchorRecipe, base: Path, chat: Chat, context: Context) -> Engine:
    """What answers as the base."""
    sampling = Sampling(recipe.batch_rows, recipe.temperature, recipe.seed, recipe.top_p)
    return open_engine(base, recipe.endpoint, chat, sampling, context)


def fill(
    row: Mapping[str, Any], generation: Generation, chat: Chat, recipe: AnchorRecipe
) -> tuple[str | None, dict[str, Any]]:
    """(why it is dropped or None, the anchor row with its answer)."""
    flaw, filled = _answered(row, generation, chat, recipe.truncated)
    if flaw is None and recipe.drop_refusals:
        verdict = judge_refusal(prompt_of(row["messages"]), filled["response"])
        flaw = "refusal" if verdict in ("refusal", "partial") else None
    return flaw, filled


def _answered(
    row: Mapping[str, Any], generation: Generation, chat: Chat, truncated: str
) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong with the answer, whatever it was to say, or None; the row with it).

    ``response_ids`` are the tokens as generated; a complete answer ends with the chat's end token
    (a model may have several). Text and think section are for reading.
    """
    ids = list(generation.ids)
    if generation.complete:
        ids[-1] = chat.end_id
    text = generation.text
    if text is None:
        text = chat.tokenizer.decode(ids, skip_special_tokens=True)
    think, response = chat.split_think(text, prompt=chat.prompt_text(row["messages"]))
    filled = dict(row) | {
        "think": think,
        "response": response,
        "response_ids": ids,
        "complete": generation.complete,
    }
    if generation.error is not None:
        return "error", filled
    if not text.strip() or (generation.complete and not response.strip()):
        return "empty", filled
    if not generation.complete and truncated == "drop":
        return "truncated", filled
    if loops(ids):
        return "repetition", filled
    return None, filled


def loops(ids: Sequence[int]) -> bool:
    """True when half of the 6-grams, over all tokens or over the last 64, repeat earlier ones."""
    for part in (ids, ids[-LOOP_WINDOW_TOKENS:]):
        grams = [tuple(part[i : i + LOOP_NGRAM]) for i in range(len(part) - LOOP_NGRAM + 1)]
        if len(grams) >= 2 * LOOP_NGRAM and len(set(grams)) * 2 <= len(grams):
            return True
    return False


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(dropped.items()))


if __name__ == "__main__":
    import sys

    sys.exit(main("anchor", run))
