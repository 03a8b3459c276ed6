"""One prompt and its answer, whoever answers. Torch-free."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, and the most tokens to generate. ``id`` seeds its sampling.

    ``messages``: the same as a conversation, for a server. ``stop``: texts that end the answer.
    """

    id: str
    prompt_ids: Sequence[int]
    max_new_tokens: int
    messages: Sequence[Mapping[str, str]] = ()
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class Generation:
    """Generated token ids; ``complete`` if they end with an end token (which is among them).

    Of a server that gives text alone, ``text`` is what it gave and ``ids`` are the tokens of that.
    ``error``: why there is no answer, after all tries.
    """

    ids: list[int]
    complete: bool
    text: str | None = None
    error: str | None = None


def seed_of(seed: int, request: Request) -> int:
    """The seed of one request, below 2**56."""
    digest = hashlib.sha256(f"{seed}:{request.id}".encode()).digest()
    return int.from_bytes(digest[:7], "little")
