"""Batched generation and scoring on Hugging Face decoders, in this process.

Each row writes its keys and values at its own length in a preallocated cache, so there is no left
padding; finished rows leave the batch and waiting rows take their place. Greedy results are those
of ``model.generate`` on each prompt alone, up to rounding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

from pipeline.errors import DataError
from pipeline.evals.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedModel

HEADROOM_TOKENS = 64
PREFIX_TOKENS = 8
LOSS_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Request:
    """One prompt as token ids, and the most tokens to generate. ``id`` seeds its sampling."""

    id: str
    prompt_ids: Sequence[int]
    max_new_tokens: int


@dataclass(frozen=True)
class Generation:
    """Generated token ids; ``complete`` if they end with an end token (which is among them)."""

    ids: list[int]
    complete: bool


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc, unused-ignore]
    """Keys and values [row, head, position, channel] of one layer, written at each row's length."""

    def __init__(self, keys: Tensor, values: Tensor, place: _Place) -> None:
        super().__init__()
        self.keys, self.values, self.place = keys, values, place
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        rows, at, width = self.place.rows, self.place.lengths, self.place.width
        self.keys[rows, :, at] = key_states[:, :, 0]
        self.values[rows, :, at] = value_states[:, :, 0]
        return self.keys[:, :, :width], self.values[:, :, :width]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.place.width, 0

    def get_seq_length(self) -> int:
        return self.place.width - 1

    def get_max_length(self) -> int:
        return int(self.keys.shape[2])


@dataclass
class _Place:
    """Where this step writes: row indices [B], lengths [B], and the positions that are read."""

    rows: Tensor
    lengths: Tensor
    width: int


@dataclass
class _Row:
    index: int
    ids: list[int]
    prompt_tokens: int
    limit: int
    uniforms: list[float]
    finished: bool = False


class _Batch:
    """The rows in flight and their cache; ``prefix``: token ids that all prompts begin with."""

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int] = ()) -> None:
        self.model: Any = model
        self.device = model.device
        self.prefix = DynamicCache()
        self.prefix_tokens = len(prefix)
        if prefix:
            self._run(torch.tensor([list(prefix)]), self.prefix)
        self.rows: list[_Row] = []
        self.layers: list[_SlotLayer] = []
        self.place = _Place(torch.empty(0), torch.empty(0), 0)

    @property
    def capacity(self) -> int:
        return int(self.layers[0].keys.shape[2]) if self.layers else 0

    def rebuild(self, admitted: list[_Row]) -> None:
        """Drop finished rows, prefill ``admitted`` and give every row room to grow."""
        kept = [i for i, row in enumerate(self.rows) if not row.finished]
        index = torch.tensor(kept, dtype=torch.long, device=self.device)
        rows = [self.rows[i] for i in kept] + admitted
        longest = max((len(row.ids) for row in rows), default=0)
        ceiling = max((row.prompt_tokens + row.limit for row in rows), default=0)
        capacity = min(longest + HEADROOM_TOKENS, ceiling)
        fresh = self._prefill(admitted) if admitted else None
        old = [(layer.keys, layer.values) for layer in self.layers] if kept else []
        layers: list[_SlotLayer] = []
        for depth in range(len(fresh.layers) if fresh else len(old)):
            parts = [tuple(t[index] for t in old[depth])] if old else []
            parts += [(fresh.layers[depth].keys, fresh.layers[depth].values)] if fresh else []
            keys, values = (_stack([p[which] for p in parts], capacity) for which in (0, 1))
            layers.append(_SlotLayer(keys, values, self.place))
        self.rows, self.layers = rows, layers
        self.cache = Cache(layers=layers)

    def _prefill(self, rows: list[_Row]) -> DynamicCache:
        """Keys and values of all prompt tokens but the last. Right padding needs no mask: causal
        attention never sees it, and the row's own tokens overwrite it."""
        heads = [row.ids[self.prefix_tokens : -1] or [0] for row in rows]
        tokens = torch.zeros(len(rows), max(map(len, heads)), dtype=torch.long)
        for i, head in enumerate(heads):
            tokens[i, : len(head)] = torch.tensor(head)
        cache = DynamicCache()
        for depth, layer in enumerate(self.prefix.layers):
            keys, values = (t.expand(len(rows), -1, -1, -1) for t in (layer.keys, layer.values))
            cache.update(keys, values, depth)
        self._run(tokens, cache)
        return cache

    def _run(self, tokens: Tensor, cache: DynamicCache) -> None:
        self.model(tokens.to(self.device), past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step(self) -> Tensor:
        """Logits [B, V] in fp32 after the last token of every row."""
        lengths = torch.tensor([len(row.ids) - 1 for row in self.rows], device=self.device)
        self.place.rows = torch.arange(len(self.rows), device=self.device)
        self.place.lengths, self.place.width = lengths, int(max(len(r.ids) for r in self.rows))
        seen = torch.arange(self.place.width, device=self.device)[None, :] <= lengths[:, None]
        tokens = torch.tensor([row.ids[-1] for row in self.rows], device=self.device)
        output = self.model(
            tokens[:, None],
            position_ids=lengths[:, None],
            attention_mask=seen[:, None, None, :],
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1].float()
        return logits


def _stack(parts: list[Tensor], capacity: int) -> Tensor:
    """Rows of all ``parts`` [row, head, position, channel] in one tensor of ``capacity``."""
    first = parts[0]
    shape = (sum(len(part) for part in parts), first.shape[1], capacity, first.shape[3])
    whole, at = first.new_zeros(shape), 0
    for part in parts:
        width = min(capacity, part.shape[2])
        whole[at : at + len(part), :, :width] = part[:, :, :width]
        at += len(part)
    return whole


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
    seed: int = 0,
    done: Callable[[int, Generation], None] | None = None,
    console: Console | None = None,
    title: str = "generate",
) -> list[Generation]:
    """Answer all ``requests``; results in their order. Temperature 0 is greedy.

    ``done(index, generation)`` is called as soon as a row is finished. With ``temperature`` > 0
    each row has its own random numbers from ``seed`` and its id, whatever the batch it runs in.
    Raises DataError for an empty prompt, one beyond a sliding window, or non-finite logits.
    """
    _check(model, requests)
    waiting = sorted(range(len(requests)), key=lambda i: -len(requests[i].prompt_ids))
    results: list[Generation | None] = [None] * len(requests)
    batch = _Batch(model, _common_prefix(requests))
    with Bar(console, title, len(requests)) as bar:
        while True:
            active = sum(not row.finished for row in batch.rows)
            if not active and not waiting:
                break
            room = batch_rows if waiting else len(batch.rows)
            idle = room - active
            full = any(len(row.ids) > batch.capacity for row in batch.rows)
            if full or (idle and idle * 8 >= room):
                admitted = [waiting.pop() for _ in range(min(idle, len(waiting)))]
                batch.rebuild([_row(i, requests[i], temperature, seed) for i in admitted])
            chosen = _choose(batch, temperature)
            for row, token in zip(batch.rows, chosen, strict=True):
                if row.finished:
                    continue
                row.ids.append(token)
                made = len(row.ids) - row.prompt_tokens
                row.finished = token in end_ids or made >= row.limit
                if row.finished:
                    result = Generation(row.ids[row.prompt_tokens :], token in end_ids)
                    results[row.index] = result
                    if done:
                        done(row.index, result)
                    bar.advance(made)
    return [result for result in results if result is not None]


def _check(model: PreTrainedModel, requests: Sequence[Request]) -> None:
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


def _common_prefix(requests: Sequence[Request]) -> list[int]:
    """The token ids before the last that all prompts share; [] when it is not worth a pass."""
    if len(requests) < 2:
        return []
    low = min(list(request.prompt_ids[:-1]) for request in requests)
    high = max(list(request.prompt_ids[:-1]) for request in requests)
    shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), None)
    shared = min(len(low), len(high)) if shared is None else shared
    return low[:shared] if shared >= PREFIX_TOKENS else []


def _row(index: int, request: Request, temperature: float, seed: int) -> _Row:
    uniforms: list[float] = []
    if temperature > 0:
        digest = hashlib.sha256(f"{seed}:{request.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        uniforms = torch.rand(
            request.max_new_tokens, generator=generator, dtype=torch.float64
        ).tolist()
    prompt = [int(token) for token in request.prompt_ids]
    return _Row(index, prompt, len(prompt), request.max_new_tokens, uniforms)


def _choose(batch: _Batch, temperature: float) -> list[int]:
    """The next token of every row in the batch."""
    logits = batch.step()
    best, greedy = logits.max(dim=-1)
    if not bool(torch.isfinite(best).all()):
        raise DataError("the model gives non-finite logits; its weights are damaged")
    if temperature == 0:
        return [int(token) for token in greedy.tolist()]
    at = [min(len(r.ids) - r.prompt_tokens, r.limit - 1) for r in batch.rows]
    drawn = torch.tensor([r.uniforms[i] for r, i in zip(batch.rows, at, strict=True)])
    cumulative = torch.softmax(logits.double() / temperature, dim=-1).cumsum(dim=-1)
    target = drawn.to(cumulative)[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, target, right=True)[:, 0]
    return [int(token) for token in found.clamp(max=logits.shape[-1] - 1).tolist()]


@torch.inference_mode()
def loss(
    model: PreTrainedModel,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    *,
    console: Console | None = None,
    title: str = "loss",
) -> list[tuple[float, int]]:
    """Summed cross-entropy in nats and token count of each target given its prompt.

    ``pairs``: (prompt ids, target ids). Batches hold at most LOSS_BATCH_TOKENS padded tokens.
    Raises DataError when a loss is not finite.
    """
    order = sorted(range(len(pairs)), key=lambda i: len(pairs[i][0]) + len(pairs[i][1]))
    results: list[tuple[float, int]] = [(0.0, 0)] * len(pairs)
    with Bar(console, title, len(pairs)) as bar:
        for group in _groups(order, [len(p) + len(t) for p, t in pairs]):
            width = max(len(pairs[i][0]) + len(pairs[i][1]) for i in group)
            first = min(len(pairs[i][0]) for i in group) - 1
            tokens = torch.zeros(len(group), width, dtype=torch.long)
            labels = torch.full((len(group), width), -100)
            for row, i in enumerate(group):
                prompt, target = list(pairs[i][0]), list(pairs[i][1])
                total = len(prompt) + len(target)
                tokens[row, :total] = torch.tensor(prompt + target)
                labels[row, len(prompt) - 1 : total - 1] = torch.tensor(target)
            model_: Any = model
            logits = model_(tokens.to(model.device), logits_to_keep=width - first).logits
            wanted = labels[:, first:].to(model.device)
            nats = functional.cross_entropy(
                logits.transpose(1, 2).float(), wanted, ignore_index=-100, reduction="none"
            )
            sums = nats.double().sum(dim=1).tolist()
            for i, value in zip(group, sums, strict=True):
                if not math.isfinite(value):
                    raise DataError(f"worked answer {i}: the loss is {value}; the model is damaged")
                results[i] = (float(value), len(pairs[i][1]))
                bar.advance(len(pairs[i][1]))
    return results


def _groups(order: list[int], lengths: list[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for i in order:  # ascending lengths: the newest row sets the width
        if groups and lengths[i] * (len(groups[-1]) + 1) <= LOSS_BATCH_TOKENS:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups
