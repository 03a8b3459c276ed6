"""What can be wrong with a chat template and its tokenizer, whatever the rows are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from pipeline.data.chat import Chat, Message
from pipeline.data.checks import Finding, Model
from pipeline.errors import one_line

PROBE: list[Message] = [{"role": "user", "content": "PROBE-QUESTION"}]
NO_DAY = "{% macro strftime_now(form) %}PROBE-DATE{% endmacro %}"
REPLY: Message = {"role": "assistant", "content": "PROBE-ANSWER"}


def check_chat(chat: Chat, model: Model) -> Iterator[Finding]:
    """Template, end token and tokenizer, apart from any row."""
    recipe, tokenizer = chat.recipe, chat.tokenizer
    template = str(tokenizer.chat_template)
    try:
        prompt = chat.prompt_text(PROBE)
        other_day = _render(chat, PROBE, chat_template=NO_DAY + template)
    except Exception as error:  # of the template
        yield Finding("renders", "violation", f"no prompt can be written: {one_line(error)}")
        return
    if "PROBE-DATE" in other_day:
        yield Finding(
            "stable template",
            "violation",
            "the template writes today's date, so the same rows are other tokens tomorrow; state a"
            " date in chat.template_options or chat.system, or edit the template",
        )
    for option in recipe.template_options:
        if option not in template:
            yield Finding(
                "known option",
                "violation",
                f"chat.template_options.{option} is not in the template; take it out",
            )
    if recipe.system is not None and recipe.system.strip() not in prompt:
        yield Finding("system prompt", "violation", "the template does not write chat.system")
    if "PROBE-QUESTION" not in prompt:
        yield Finding("user text", "violation", "the template does not write what the user says")
    yield from _turn(chat, prompt)
    if model.end_ids and chat.end_id not in model.end_ids:
        name = tokenizer.convert_ids_to_tokens(chat.end_id)
        yield Finding(
            "end token",
            "violation",
            f"training ends answers with {name}, and generation does not stop at it (it stops at"
            f" {tokenizer.convert_ids_to_tokens(sorted(model.end_ids))}); set eos_token",
        )
    yield from _beginning(chat, prompt)


def _turn(chat: Chat, prompt: str) -> Iterator[Finding]:
    """How the template itself writes an answer, against how we do."""
    tokenizer, recipe = chat.tokenizer, chat.recipe
    try:
        whole = _render(chat, [*PROBE, REPLY])
    except Exception as error:  # of the template
        why = f"the template fails on an answer: {one_line(error)}"
        yield Finding("whole turn", "violation", why)
        return
    before, found, after = whole.partition("PROBE-ANSWER")
    if not found:
        yield Finding("whole turn", "violation", "the template does not write the answer")
        return
    end = tokenizer.convert_ids_to_tokens(chat.end_id)
    if not after.lstrip().startswith(str(end)):
        yield Finding(
            "turn end",
            "violation",
            f"the template ends an answer with {after.strip()[:24] or 'nothing'!r}, training with"
            f" {end!r}; set eos_token to what the template writes",
        )
    own = _render(chat, PROBE, add_generation_prompt=True)
    if recipe.generation_prompt is not None and own != prompt:
        yield Finding(
            "generation prompt",
            "note",
            f"the job begins answers after {prompt[-24:]!r}, the template itself after {own[-24:]!r};"
            " serve with the job's, or the model is asked otherwise than it was trained",
        )
    opened = bool(recipe.think_open.strip()) and prompt.rstrip().endswith(recipe.think_open.strip())
    closed = bool(recipe.think_close.strip()) and prompt.rstrip().endswith(
        recipe.think_close.strip()
    )
    if not (opened or closed or before.startswith(prompt) or prompt.startswith(before.rstrip())):
        yield Finding(
            "generation prompt",
            "violation",
            f"an answer begins after {prompt[-24:]!r} when asked for, and after {before[-24:]!r} in a"
            " conversation; set chat.generation_prompt to the latter",
        )


def _beginning(chat: Chat, prompt: str) -> Iterator[Finding]:
    bos = chat.tokenizer.bos_token_id
    if bos is None or bos == chat.end_id:
        return
    ids = chat.encode([prompt])[0]
    if ids[:2] == [bos, bos]:
        yield Finding("one BOS", "violation", "a prompt begins with two BOS tokens; wanted one")
    if ids[:1] != [bos] and chat.tokenizer("x")["input_ids"][:1] == [bos]:
        yield Finding(
            "one BOS",
            "violation",
            "the tokenizer begins texts with BOS, the template does not: training would have none;"
            " write bos_token into the template",
        )


def _render(chat: Chat, messages: Sequence[Message], **options: Any) -> str:
    text: str = chat.tokenizer.apply_chat_template(
        chat.with_system(messages), tokenize=False, **(chat.recipe.template_options | options)
    )
    return text
