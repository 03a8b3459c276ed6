"""What a reply of an OpenAI-compatible server holds. BadReply where it does not hold what it should."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.errors import UntaxedError

REPORTED = ("id", "root", "parent", "owned_by", "max_model_len")
SHOWN = 200


class BadReply(Exception):
    """A reply that is not what was asked for. ``usable``: what it is taken for when others are no
    better."""

    def __init__(self, why: str, usable: Any = None) -> None:
        super().__init__(why)
        self.usable = usable


class NoLogprobs(UntaxedError):
    """The server does not give the log-probabilities of a prompt."""


@dataclass(frozen=True)
class Reply:
    """One answer. ``think``: thoughts that the server has parted from the text; ``ids``: the tokens,
    where the server gives them; ``nats``: their log-probabilities, where asked for."""

    think: str | None
    text: str
    ids: list[int] | None
    complete: bool
    nats: tuple[float, ...] = ()


def models_of(reply: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What /v1/models says of each model, by its name; nothing that changes from call to call."""
    data = reply.get("data")
    if not isinstance(data, list) or not all(isinstance(one, dict) for one in data):
        raise BadReply(f"no list of models: {_shown(reply)}")
    return {
        str(one.get("id")): {k: one[k] for k in REPORTED if isinstance(one.get(k), str | int)}
        for one in data
    }


def answer_of(reply: Mapping[str, Any]) -> Reply:
    """The answer in a reply of /v1/completions or /v1/chat/completions."""
    choice = _choice(reply)
    finish = choice.get("finish_reason")
    if finish not in ("stop", "length"):
        raise BadReply(f"an answer of finish_reason {finish!a}; wanted stop or length")
    think, text, message = None, choice.get("text"), choice.get("message")
    if isinstance(message, dict):
        think = message.get("reasoning_content") or message.get("reasoning") or None
        text = message.get("content")
        text = "" if text is None and think else text
    if not isinstance(text, str) or not (think is None or isinstance(think, str)):
        raise BadReply(f"an answer without text: {_shown(choice)}")
    ids = choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(type(i) is int for i in ids)):
        raise BadReply("token_ids are no list of tokens")
    think, text = (None if part is None else _sound(part) for part in (think, text))
    found = Reply(think, text or "", ids or None, finish == "stop", _logprobs(choice))
    if not (text or think or ids) and found.complete:
        raise BadReply("an empty answer", usable=found)
    return found


def prompt_tokens(reply: Mapping[str, Any]) -> int | None:
    """How many tokens the server read, where it says so."""
    _choice(reply)
    usage = reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def nats_of(reply: Mapping[str, Any], first: int, last: int) -> float:
    """Summed cross-entropy of the tokens from ``first`` to before ``last`` of an echoed prompt.
    NoLogprobs where none are told."""
    logprobs = _choice(reply).get("logprobs")
    values = logprobs.get("token_logprobs") if isinstance(logprobs, dict) else None
    if not isinstance(values, list) or len(values) < last:
        raise NoLogprobs("it does not tell how likely a prompt is")
    if not _finite(values[first:last]):
        raise BadReply("a log-probability that is no number")
    return -math.fsum(values[first:last])


def _choice(reply: Mapping[str, Any]) -> dict[str, Any]:
    choices = reply.get("choices")
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise BadReply(f"a reply without choices: {_shown(reply)}")
    return choices[0]


def _logprobs(choice: Mapping[str, Any]) -> tuple[float, ...]:
    """The log-probabilities of an answer's tokens, in either form of the protocol; () without."""
    found = choice.get("logprobs")
    if not isinstance(found, dict):
        return ()
    values, content = found.get("token_logprobs"), found.get("content")
    if values is None and isinstance(content, list):
        values = [part.get("logprob") if isinstance(part, dict) else None for part in content]
    return tuple(values) if isinstance(values, list) and _finite(values) else ()


def _sound(text: str) -> str:
    """``text`` without halves of surrogate pairs, which JSON can say and no tokenizer reads."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _finite(values: list[Any]) -> bool:
    return all(isinstance(v, float | int) and math.isfinite(v) for v in values)


def _shown(part: Mapping[str, Any]) -> str:
    return ascii(dict(part))[:SHOWN]
