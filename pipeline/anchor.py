"""Stage 1b: benign prompts + base -> conversations that the base model answered in its own words.

Anchors hold the model where it was (ThinkSafe, arXiv 2601.23143): they keep it from refusing
everything. Answers that would teach the wrong thing are dropped and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact
from pipeline.data.chat import Chat, check_generation_prompt
from pipeline.errors import DataError
from pipeline.evals.judge import judge_refusal
from pipeline.evals.score import load_for_inference, read_lines, write_rows
from pipeline.graph import AnchorStep
from pipeline.model.base import load_tokenizer
from pipeline.recipes import AnchorRecipe
from pipeline.stage import Context, main

if TYPE_CHECKING:
    from pipeline.evals.generate import Generation

SPLITS = ("train.jsonl", "dev.jsonl")
LOOP_NGRAM = 6
LOOP_WINDOW_TOKENS = 64


def run(
    recipe: AnchorStep, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write train.jsonl and dev.jsonl under ``out``; rows of other kinds pass unchanged."""
    check_generation_prompt(recipe.chat)
    rows = {name: read_lines(inputs["prep"].path(name)) for name in SPLITS}
    asked = [row for split in rows.values() for row in split if row["kind"] == "anchor"]
    chat = Chat(load_tokenizer(inputs["base"].folder), recipe.chat)
    identity = f"{inputs['base'].digest} {inputs['prep'].digest}"
    generations = _answer(asked, chat, recipe.anchor, inputs["base"].folder, identity, context)
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
    for name, split in rows.items():
        whole = [kept.get(row["id"]) if row["kind"] == "anchor" else row for row in split]
        write_rows(out / name, [row for row in whole if row is not None])
    tokens = sum(len(row["response_ids"]) for row in kept.values())
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
            judge_refusal(_asked(row), row["response"]) != "compliance" for row in kept.values()
        ),
    }


def _answer(
    rows: Sequence[Mapping[str, Any]],
    chat: Chat,
    recipe: AnchorRecipe,
    base: Path,
    identity: str,
    context: Context,
) -> list[Generation]:
    """The base's answers to ``rows``, going on from what an earlier try finished."""
    from pipeline.evals.generate import Request, end_tokens
    from pipeline.evals.ledger import answer

    model = load_for_inference(base)
    return answer(
        model,
        [
            Request(row["id"], chat.prompt_ids(row["messages"]), recipe.max_new_tokens)
            for row in rows
        ],
        path=context.scratch / "responses.jsonl",
        identity=identity,
        end_ids=end_tokens(model, chat.end_id),
        batch_rows=recipe.batch_rows,
        temperature=recipe.temperature,
        seed=recipe.seed,
        console=context.console,
        title="anchor: the base answers",
    )


def fill(
    row: Mapping[str, Any], generation: Generation, chat: Chat, recipe: AnchorRecipe
) -> tuple[str | None, dict[str, Any]]:
    """(why it is dropped or None, the row with its answer).

    ``response_ids`` are the tokens as generated; a complete answer ends with the chat's end token
    (a model may have several). Text and think section are for reading.
    """
    ids = list(generation.ids)
    if generation.complete:
        ids[-1] = chat.end_id
    text = chat.tokenizer.decode(ids, skip_special_tokens=True)
    think, response = chat.split_think(text, prompt=chat.prompt_text(row["messages"]))
    filled = dict(row) | {
        "think": think,
        "response": response,
        "response_ids": ids,
        "complete": generation.complete,
    }
    if not text.strip() or (generation.complete and not response.strip()):
        return "empty", filled
    if not generation.complete and recipe.truncated == "drop":
        return "truncated", filled
    if loops(ids):
        return "repetition", filled
    verdict = judge_refusal(_asked(row), response)
    if recipe.drop_refusals and verdict in ("refusal", "partial"):
        return "refusal", filled
    return None, filled


def loops(ids: Sequence[int]) -> bool:
    """True when half of the 6-grams, over all tokens or over the last 64, repeat earlier ones."""
    for part in (ids, ids[-LOOP_WINDOW_TOKENS:]):
        grams = [tuple(part[i : i + LOOP_NGRAM]) for i in range(len(part) - LOOP_NGRAM + 1)]
        if len(grams) >= 2 * LOOP_NGRAM and len(set(grams)) * 2 <= len(grams):
            return True
    return False


def _asked(row: Mapping[str, Any]) -> str:
    return "\n\n".join(m["content"] for m in row["messages"] if m["role"] == "user")


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {why}" for why, count in sorted(dropped.items()))


if __name__ == "__main__":
    import sys

    sys.exit(main("anchor", run))
