"""The rows in flight of a batched generation: their tokens, and their keys and values in slots.

Each row writes its keys and values at its own length in a preallocated cache, so there is no left
padding. Slots are filled from the front: a step multiplies unfinished rows and no others.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicCache

if TYPE_CHECKING:
    from transformers import PreTrainedModel

HEADROOM_TOKENS = 64
PASS_TOKENS = 2048
PREFIX_TOKENS = 8


@dataclass
class Row:
    """One prompt with what was generated so far. ``uniforms``: its random numbers in [0, 1)."""

    index: int
    ids: list[int]
    prompt_tokens: int
    limit: int
    uniforms: list[float]

    @property
    def made(self) -> int:
        return len(self.ids) - self.prompt_tokens

    @property
    def answer(self) -> list[int]:
        return self.ids[self.prompt_tokens :]


class Prefix:
    """Token ids that all prompts begin with, and their keys and values, computed once."""

    def __init__(self, model: PreTrainedModel, ids: Sequence[int]) -> None:
        self.tokens = len(ids)
        self.cache = DynamicCache()
        if ids:
            body(model, torch.tensor([list(ids)]), self.cache)

    def copies(self, rows: int) -> DynamicCache:
        """A cache of ``rows`` rows that begins with the prefix."""
        cache = DynamicCache()
        for depth, layer in enumerate(self.cache.layers):
            keys, values = (t.expand(rows, -1, -1, -1) for t in (layer.keys, layer.values))
            cache.update(keys, values, depth)
        return cache


def shared_prefix(prompts: Sequence[Sequence[int]]) -> list[int]:
    """The token ids before the last that all ``prompts`` share; [] when not worth a pass."""
    if len(prompts) < 2:
        return []
    low, high = (list(end(prompts, key=list)[:-1]) for end in (min, max))
    shared = next((i for i, (a, b) in enumerate(zip(low, high, strict=False)) if a != b), None)
    shared = min(len(low), len(high)) if shared is None else shared
    return low[:shared] if shared >= PREFIX_TOKENS else []


def passes(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Indices of rows of about one length, at most PASS_TOKENS padded tokens together."""
    group: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        if group and lengths[i] * (len(group) + 1) > PASS_TOKENS:
            yield group
            group = []
        group.append(i)
    if group:
        yield group


def body(model: Any, tokens: Tensor, cache: DynamicCache) -> None:
    """Extend ``cache`` by ``tokens`` [B, T]; no logits are made."""
    model.base_model(tokens.to(model.device), past_key_values=cache, use_cache=True)


class _SlotLayer(CacheLayerMixin):  # type: ignore[misc, unused-ignore]
    """Keys and values [slot, head, position, channel] of one layer, written at each row's length."""

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
        return self.keys[: len(rows), :, :width], self.values[: len(rows), :, :width]

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
    """Where this step writes: slots [B], lengths [B], and how many positions are read."""

    rows: Tensor
    lengths: Tensor
    width: int


class Slots:
    """Up to ``size`` rows in flight; row i of ``rows`` has slot i."""

    def __init__(self, model: PreTrainedModel, prefix: Sequence[int], size: int) -> None:
        self.model: Any = model
        self.prefix = Prefix(model, prefix)
        self.size = size
        self.rows: list[Row] = []
        self.layers: list[_SlotLayer] = []
        self.place = _Place(torch.empty(0), torch.empty(0), 0)

    def admit(self, rows: Sequence[Row]) -> None:
        """Compute the keys and values of all prompt tokens but the last, and take the rows in.

        Right padding needs no mask: causal attention never sees it, and the row's own tokens
        overwrite it.
        """
        heads = [row.ids[self.prefix.tokens : -1] or [0] for row in rows]
        for group in passes([len(head) for head in heads]):
            tokens = torch.zeros(len(group), len(heads[group[-1]]), dtype=torch.long)
            for i, which in enumerate(group):
                tokens[i, : len(heads[which])] = torch.tensor(heads[which])
            fresh = self.prefix.copies(len(group))
            body(self.model, tokens, fresh)
            first = len(self.rows)
            self.rows += [rows[which] for which in group]
            self._make_room(fresh)
            for layer, new in zip(self.layers, fresh.layers, strict=True):
                for whole, part in ((layer.keys, new.keys), (layer.values, new.values)):
                    width = min(whole.shape[2], part.shape[2])
                    whole[first : len(self.rows), :, :width] = part[:, :, :width]

    def retire(self, finished: Sequence[int]) -> None:
        """Drop the rows with these indices; rows from the end take their slots."""
        left = len(self.rows) - len(finished)
        holes = [i for i in finished if i < left]
        movers = sorted(set(range(left, len(self.rows))) - set(finished))
        if holes:
            to, source = (torch.tensor(i, device=self.model.device) for i in (holes, movers))
            for layer in self.layers:
                layer.keys[to], layer.values[to] = layer.keys[source], layer.values[source]
        for hole, mover in zip(holes, movers, strict=True):
            self.rows[hole] = self.rows[mover]
        del self.rows[left:]

    def step(self) -> Tensor:
        """Logits [B, V] after the last token of every row."""
        device = self.model.device
        self._make_room()
        lengths = torch.tensor([len(row.ids) - 1 for row in self.rows], device=device)
        self.place.rows = torch.arange(len(self.rows), device=device)
        self.place.lengths, self.place.width = lengths, max(len(row.ids) for row in self.rows)
        seen = torch.arange(self.place.width, device=device)[None, :] <= lengths[:, None]
        tokens = torch.tensor([row.ids[-1] for row in self.rows], device=device)
        output = self.model(
            tokens[:, None],
            position_ids=lengths[:, None],
            attention_mask=seen[:, None, None, :],
            past_key_values=Cache(layers=self.layers),
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits

    def _make_room(self, like: DynamicCache | None = None) -> None:
        """Slots for every row's tokens and some to come; ``like`` has the shapes of the layers."""
        longest = max(len(row.ids) for row in self.rows)
        if self.layers and longest <= self.layers[0].keys.shape[2]:
            return
        ceiling = max(row.prompt_tokens + row.limit for row in self.rows)
        capacity = min(longest + HEADROOM_TOKENS, max(longest, ceiling))
        old = list(self.layers)
        self.layers = []
        for shaped in old or (like.layers if like else []):
            made = []
            for part in (shaped.keys, shaped.values):
                whole = part.new_zeros(self.size, part.shape[1], capacity, part.shape[3])
                if old:
                    whole[:, :, : part.shape[2]] = part
                made.append(whole)
            self.layers.append(_SlotLayer(made[0], made[1], self.place))
