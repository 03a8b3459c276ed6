"""Attention of the documents of a pack on a CPU: short ones together, padded; long ones one by one.

Up to some 2,000 tokens PyTorch's kernel for CPUs is slower than plain matrix products and a softmax,
forward and backward, and a call for each short document costs more than its arithmetic. So short
documents of like lengths are one batch, and longer ones go in blocks of queries, so that never all
scores are there.

Chats of one template begin alike. A causal model gives the tokens that all documents begin with the
same states in each of them, so a pack can hold them once, before the documents, which all see them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

SHORT = 192  # tokens
BLOCK, BLOCK_SCORES = 128, 1 << 21  # queries, of all heads at most so many scores
ALIKE = 0.7  # of the longest one's length, at least, to be padded to it

Span = tuple[int, int]
Three = tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=64)
def documents_of(starts: tuple[int, ...]) -> list[Together | Alone]:
    """The parts of a pack. ``starts``: where each document begins, and T; what lies before the first
    is shared by all.

    ``forward`` of a part writes its rows of ``output`` [T, H, C]. ``backward`` writes its rows of
    ``by``, the gradients by q, k and v, and returns those by the shared rows of k and v, float32
    [2, S, G, C], or 0 where nothing is shared.
    """
    shared = starts[0]
    parts: list[Together | Alone] = [Alone(0, (0, shared))] if shared > SHORT else []
    if 0 < shared <= SHORT:
        parts.append(Together(0, [(0, shared)]))
    groups: list[list[Span]] = []
    for span in sorted(itertools.pairwise(starts), key=lambda s: s[0] - s[1]):
        if span[1] - span[0] + shared > SHORT:
            parts.append(Alone(shared, span))
        elif groups and _length(span) >= ALIKE * _length(groups[-1][0]):
            groups[-1].append(span)
        else:
            groups.append([span])
    return parts + [Together(shared, group) for group in groups]


def _length(span: Span) -> int:
    return span[1] - span[0]


class Together:
    """Short documents in one batch. Scores and softmax are fp32, the rest has the inputs' dtype.

    A padded key comes after every real query, so the causal mask hides it; what a padded query gives
    is not read, and its gradient is zero.
    """

    def __init__(self, shared: int, spans: list[Span]) -> None:
        self.shared, self.count = shared, len(spans)
        self.length = max(_length(span) for span in spans)
        place = torch.arange(self.length)
        own = torch.stack([(place + a).clamp_max(b - 1) for a, b in spans])
        real = torch.stack([place < b - a for a, b in spans]).flatten()
        self.queries = own.flatten()
        self.keys = torch.cat([torch.arange(shared).expand(len(spans), -1), own], 1).flatten()
        self.padded = ~real[:, None, None]
        self.real = real.nonzero()[:, 0]
        self.rows = self.queries[self.real]
        seen = torch.ones(self.length, shared + self.length, dtype=torch.bool).tril(shared)
        self.mask = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)

    def forward(self, qkv: Three, scale: float, output: Tensor) -> None:
        q, k, v = self._batches(*qkv)
        p = self._probabilities(q, k, scale).to(q.dtype)
        self._write(output, torch.bmm(p, v), q.shape[1] // self.length)

    def backward(self, qkv: Three, scale: float, by_output: Tensor, by: Three) -> Tensor | float:
        q, k, v = self._batches(*qkv)
        groups, heads = len(k) // self.count, q.shape[1] // self.length
        incoming = by_output.index_select(0, self.queries).masked_fill_(self.padded, 0.0)
        by_o = _by_group(incoming, self.count, groups)
        p = self._probabilities(q, k, scale)
        by_v = torch.bmm(p.to(q.dtype).transpose(1, 2), by_o)
        by_p = torch.bmm(by_o, v.transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_p.float(), p, -1, torch.float32)
        by_scores = by_scores.mul_(scale).to(q.dtype)
        self._write(by[0], torch.bmm(by_scores, k), heads)
        by_k = torch.bmm(by_scores.transpose(1, 2), q)
        totals = [self._write_keys(t, g) for t, g in zip(by[1:], (by_k, by_v), strict=True)]
        return torch.stack(totals) if self.shared else 0.0

    def _probabilities(self, q: Tensor, k: Tensor, scale: float) -> Tensor:
        """float32 [D G, (H / G) L, S + L], zero where hidden."""
        mask = self.mask.repeat(q.shape[1] // self.length, 1)
        scores = torch.baddbmm(mask, q.float(), k.float().transpose(1, 2), alpha=scale)
        return torch.softmax(scores, -1)

    def _batches(self, q: Tensor, k: Tensor, v: Tensor) -> Three:
        """q [D G, (H / G) L, C]; k and v [D G, S + L, C]."""
        groups = k.shape[1]
        own = _by_group(q.index_select(0, self.queries), self.count, groups)
        keys = (_by_group(t.index_select(0, self.keys), self.count, groups) for t in (k, v))
        return own, *keys  # type: ignore[return-value]

    def _write(self, target: Tensor, batch: Tensor, heads: int) -> None:
        """The real rows of ``batch`` [D G, heads x L, C] into ``target`` [T, H, C]."""
        split = batch.view(self.count, -1, heads, self.length, batch.shape[2])
        rows = split.permute(0, 3, 1, 2, 4).reshape(self.count * self.length, *target.shape[1:])
        target.index_copy_(0, self.rows, rows.index_select(0, self.real))

    def _write_keys(self, target: Tensor, batch: Tensor) -> Tensor:
        """The documents' own rows into ``target`` [T, G, C]; the sum of the shared ones."""
        split = batch.view(self.count, -1, self.shared + self.length, batch.shape[2]).transpose(
            1, 2
        )
        rows = split[:, self.shared :].reshape(self.count * self.length, *target.shape[1:])
        target.index_copy_(0, self.rows, rows.index_select(0, self.real))
        return split[:, : self.shared].sum(0, dtype=torch.float32)


class Alone:
    """One longer document, in blocks of queries."""

    def __init__(self, shared: int, span: Span) -> None:
        self.shared, self.span = shared, span

    def forward(self, qkv: Three, scale: float, output: Tensor) -> None:
        q, k, v = qkv[0], *(self._whole(t) for t in qkv[1:])
        exact, groups = k.float(), len(k)
        for a, b, seen in self._blocks(q.shape[1]):
            own = _by_group(q[a:b], 1, groups)
            p = _probabilities(own, exact[:, seen], b - a, scale).to(q.dtype)
            rows = torch.bmm(p, v[:, seen]).view(groups, -1, b - a, v.shape[2])
            output[a:b] = rows.permute(2, 0, 1, 3).reshape(output[a:b].shape)

    def backward(self, qkv: Three, scale: float, by_output: Tensor, by: Three) -> Tensor | float:
        """Scores, softmax and sums over blocks are fp32."""
        q, k, v = qkv[0], *(self._whole(t) for t in qkv[1:])
        exact, groups = k.float(), len(k)
        by_k, by_v = torch.zeros_like(exact), torch.zeros_like(exact)
        for a, b, seen in self._blocks(q.shape[1]):
            own, by_o = (_by_group(t[a:b], 1, groups) for t in (q, by_output))
            p = _probabilities(own, exact[:, seen], b - a, scale)
            low = p.to(q.dtype)
            by_v[:, seen] += torch.bmm(low.transpose(1, 2), by_o)
            by_p = torch.bmm(by_o, v[:, seen].transpose(1, 2)).float()
            by_scores = torch._softmax_backward_data(by_p, p, -1, torch.float32)
            by_scores = by_scores.mul_(scale).to(q.dtype)
            rows = torch.bmm(by_scores, k[:, seen]).view(groups, -1, b - a, k.shape[2])
            by[0][a:b] = rows.permute(2, 0, 1, 3).reshape(by[0][a:b].shape)
            by_k[:, seen] += torch.bmm(by_scores.transpose(1, 2), own)
        start, end = self.span
        for target, rows in zip(by[1:], (by_k, by_v), strict=True):
            target[start:end] = rows[:, self.shared :].transpose(0, 1)
        if not self.shared:
            return 0.0
        return torch.stack([rows[:, : self.shared].transpose(0, 1) for rows in (by_k, by_v)])

    def _blocks(self, heads: int) -> Iterator[tuple[int, int, slice]]:
        """Queries from where to where, and which of the document's keys they see."""
        start, end = self.span
        keys = self.shared + end - start
        size = max(1, min(BLOCK, BLOCK_SCORES // (heads * keys)))
        for a in range(start, end, size):
            b = min(a + size, end)
            yield a, b, slice(0, self.shared + b - start)

    def _whole(self, t: Tensor) -> Tensor:
        """[G, S + L, C]: the shared rows and its own."""
        a, b = self.span
        rows = torch.cat([t[: self.shared], t[a:b]]) if self.shared else t[a:b]
        return rows.transpose(0, 1).contiguous()


def _by_group(rows: Tensor, count: int, groups: int) -> Tensor:
    """[D L, H, C] of ``count`` documents -> [D G, (H / G) L, C]: the queries that look at the same keys."""
    split = rows.view(count, len(rows) // count, groups, -1, rows.shape[2]).permute(0, 2, 3, 1, 4)
    return split.reshape(count * groups, -1, rows.shape[2])


def _probabilities(q: Tensor, keys: Tensor, count: int, scale: float) -> Tensor:
    """Of ``count`` queries [G, (H / G) L, C] and float32 ``keys`` [G, K, C], the last of which are the
    queries' own: float32 [G, (H / G) L, K]."""
    scores = torch.bmm(q.float(), keys.transpose(1, 2)).mul_(scale)
    later = torch.full((count, count), -torch.inf).triu_(1)
    scores.view(len(q), -1, count, keys.shape[1])[..., -count:].add_(later)
    return torch.softmax(scores, -1)
