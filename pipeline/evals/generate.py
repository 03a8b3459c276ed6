"""Batched generation and scoring on Hugging Face decoders, in this process.

Finished rows leave the batch and waiting rows take their place. Greedy results are those of
``model.generate`` on each prompt alone, up to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.errors import DataError
from pipeline.evals.asking import Generation, Request, seed_of
from pipeline.evals.progress import Bar
from pipeline.evals.slots import Prefix, Row, Slots, passes, shared_prefix

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

LOSS_ROWS = 256


def end_tokens(model: PreTrainedModel, end_id: int) -> frozenset[int]:
    """The tokens that end an answer: the tokenizer's and those of the generation config."""
    stated = getattr(model.generation_config, "eos_token_id", None)
    more = [stated] if isinstance(stated, int) else list(stated or [])
    return frozenset([end_id, *more])


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    requests: Sequence[Request],
    *,
    end_ids: Collection[int],
    batch_rows: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    stopped: Callable[[Request, Sequence[int]], bool] | None = None,
    done: Callable[[int, Generation], None] | None = None,
    console: Console | None = None,
    title: str = "generate",
) -> list[Generation]:
    """Answer all ``requests``; results in their order. Temperature 0 is greedy.

    ``done(index, generation)`` is called as soon as a row is finished. With ``temperature`` > 0
    each row has its own random numbers from ``seed`` and its id, whatever the batch it runs in, and
    draws from the fewest tokens that hold ``top_p`` of the probability (Holtzman et al., 2020).
    ``stopped(request, ids)``: whether what was generated so far says all that is wanted.
    Raises DataError for an empty prompt, one beyond a sliding window, or non-finite logits.
    """
    check_requests(model, requests)
    twins = _twins(requests, temperature)
    # popped from the end: the most tokens to generate first, so that few rows are left for last
    waiting = sorted(twins, key=lambda i: (requests[i].max_new_tokens, len(requests[i].prompt_ids)))
    results: list[Generation | None] = [None] * len(requests)
    prefix = shared_prefix([request.prompt_ids for request in requests])
    slots = Slots(model, prefix, min(batch_rows, len(waiting)))
    with Bar(console, title, len(requests)) as bar:
        while slots.rows or waiting:
            room = slots.size - len(slots.rows)
            if waiting and room * 8 >= slots.size:
                admitted = [waiting.pop() for _ in range(min(room, len(waiting)))]
                slots.admit([_row(i, requests[i], temperature, seed) for i in admitted])
            finished = []
            for slot, token in enumerate(_choose(slots, temperature, top_p)):
                row = slots.rows[slot]
                row.ids.append(token)
                ended = token in end_ids or row.made == row.limit
                if not ended and not (stopped and stopped(requests[row.index], row.answer)):
                    continue
                finished.append(slot)
                result = Generation(row.answer, token in end_ids)
                for index in twins[row.index]:
                    results[index] = result
                    if done:
                        done(index, result)
                    bar.advance(row.made)
            slots.retire(finished)
    return [result for result in results if result is not None]


def _twins(requests: Sequence[Request], temperature: float) -> dict[int, list[int]]:
    """First index -> indices of all requests that must get the same answer. Drawn ones never do."""
    if temperature > 0:
        return {i: [i] for i in range(len(requests))}
    first: dict[tuple[int, tuple[str, ...], tuple[int, ...]], int] = {}
    twins: dict[int, list[int]] = {}
    for i, request in enumerate(requests):
        asked = (request.max_new_tokens, request.stop, tuple(request.prompt_ids))
        twins.setdefault(first.setdefault(asked, i), []).append(i)
    return twins


def check_requests(model: PreTrainedModel, requests: Sequence[Request]) -> None:
    """DataError for a prompt that is empty, or with its answer more than the model can hold."""
    config = model.config
    longest = getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    for request in requests:
        if not request.prompt_ids:
            raise DataError(f"row {request.id}: the prompt has no tokens")
        total = len(request.prompt_ids) + request.max_new_tokens
        if window is not None and total > window:
            raise DataError(
                f"row {request.id}: {total} tokens do not fit the model's sliding window of"
                f" {window}; lower max_new_tokens or leave the row out"
            )
        if longest is not None and total > longest:
            raise DataError(
                f"row {request.id}: {len(request.prompt_ids)} prompt tokens and"
                f" {request.max_new_tokens} new ones are more than the model's {longest} positions;"
                " lower max_new_tokens or leave the row out"
            )


def _row(index: int, request: Request, temperature: float, seed: int) -> Row:
    uniforms: list[float] = []
    if temperature > 0:
        generator = torch.Generator().manual_seed(seed_of(seed, request))
        uniforms = torch.rand(
            request.max_new_tokens, generator=generator, dtype=torch.float64
        ).tolist()
    prompt = [int(token) for token in request.prompt_ids]
    return Row(index, prompt, len(prompt), request.max_new_tokens, uniforms)


def _choose(slots: Slots, temperature: float, top_p: float) -> list[int]:
    """The next token of every row in flight."""
    logits = slots.step().float()
    best, greedy = logits.max(dim=-1)
    if not bool(torch.isfinite(best).all()):
        raise DataError("the model gives non-finite logits; its weights are damaged")
    if temperature == 0:
        return [int(token) for token in greedy.tolist()]
    drawn = torch.tensor([row.uniforms[row.made] for row in slots.rows])
    cumulative = nucleus(torch.softmax(logits.double() / temperature, dim=-1), top_p).cumsum(dim=-1)
    target = drawn.to(cumulative)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return [int(token) for token in found.clamp(max=logits.shape[-1] - 1).tolist()]


def nucleus(probabilities: Tensor, top_p: float) -> Tensor:
    """``probabilities`` [B, V] with zero for all but the likeliest that reach ``top_p`` together."""
    if top_p == 1:
        return probabilities
    ranked, order = probabilities.sort(dim=-1, descending=True)
    before = ranked.cumsum(dim=-1) - ranked
    return torch.zeros_like(ranked).scatter_(-1, order, ranked.where(before < top_p, 0.0))


@torch.inference_mode()
def loss(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    console: Console | None = None,
    title: str = "loss",
) -> list[tuple[float, int]]:
    """Summed cross-entropy in nats and token count of each target given its prompt.

    ``pairs``: (prompt ids, target ids). Raises DataError when a loss is not finite.
    """
    results: list[tuple[float, int]] = [(0.0, 0)] * len(pairs)
    prefix = Prefix(model, shared_prefix([prompt for prompt, _ in pairs]))
    rests = [[*prompt, *target][prefix.tokens :] for prompt, target in pairs]
    with Bar(console, title, len(pairs)) as bar:
        for group in passes([len(rest) for rest in rests]):
            sums = _nats(model, prefix, [(rests[i], len(pairs[i][1])) for i in group])
            for i, value in zip(group, sums, strict=True):
                if not math.isfinite(value):
                    raise DataError(f"worked answer {i}: the loss is {value}; the model is damaged")
                results[i] = (value, len(pairs[i][1]))
                bar.advance(len(pairs[i][1]))
    return results


def _nats(model: Any, prefix: Prefix, rows: Sequence[tuple[list[int], int]]) -> list[float]:
    """Summed cross-entropy of the last tokens of ``rows``: (ids after the prefix, how many)."""
    width = max(len(ids) for ids, _ in rows)
    first = min(len(ids) - trained for ids, trained in rows) - 1
    tokens = torch.zeros(len(rows), width, dtype=torch.long)
    wanted = torch.full((len(rows), width), -1)
    for row, (ids, trained) in enumerate(rows):
        tokens[row, : len(ids)] = torch.tensor(ids)
        wanted[row, len(ids) - trained - 1 : len(ids) - 1] = torch.tensor(ids[-trained:])
    logits = model(
        tokens.to(model.device),
        past_key_values=prefix.copies(len(rows)) if prefix.tokens else None,
        use_cache=prefix.tokens > 0,
        logits_to_keep=width - first,
    ).logits
    at, column = (wanted[:, first:] >= 0).nonzero(as_tuple=True)
    nats = []
    for part in range(0, len(at), LOSS_ROWS):  # all of them in fp32 would be gigabytes
        rows_, columns = at[part : part + LOSS_ROWS], column[part : part + LOSS_ROWS]
        labels = wanted[:, first:][rows_, columns].to(logits.device)
        scores = logits[rows_.to(logits.device), columns.to(logits.device)].float()
        nats.append(functional.cross_entropy(scores, labels, reduction="none"))
    sums = torch.zeros(len(rows), dtype=torch.float64)
    return [float(v) for v in sums.index_add(0, at, torch.cat(nats).double().cpu()).tolist()]
