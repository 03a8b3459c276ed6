"""Attention of the documents of a pack on a CPU: short ones together, padded; long ones one by one.

Each call of a kernel costs more than the arithmetic of a short document, and PyTorch's attention for
CPUs is slower than plain matrix products, so short documents of like lengths are one batch, and
longer ones go in blocks of queries; above ``LONG`` tokens the kernel wins.

Chats of one template begin alike. A causal model gives the tokens that all documents begin with the
same states in each of them, so a pack can hold them once, before the documents, which all see them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

SHORT, LONG = 192, 767  # tokens
BLOCK = 128  # queries
ALIKE = 0.7  # of the longest one's length, at least, to be padded to it

Span = tuple[int, int]
Three = tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=64)
def documents_of(starts: tuple[int, ...]) -> list[Together | Alone]:
    """The parts of a pack. ``starts``: where each document begins, and T; what lies before the first
    is shared by all.

    ``forward`` of a part writes its rows of ``output`` [T, H, C], and above ``LONG`` tokens those of
    ``sums``, the logarithm of the sum of each query's exponentiated scores, float32 [T, H].
    ``backward`` writes its rows of ``by``, the gradients by q, k and v, and returns those by the
    shared rows of k and v, float32 [2, S, G, C], or 0 where nothing is shared.
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

    def forward(self, qkv: Three, scale: float, output: Tensor, sums: Tensor) -> None:
        q, k, v = self._batches(*qkv)
        p = self._probabilities(q, k, scale).to(q.dtype)
        self._write(output, torch.bmm(p, v), q.shape[1] // self.length)

    def backward(
        self,
        qkv: Three,
        scale: float,
        output: Tensor,
        sums: Tensor,
        by_output: Tensor,
        by: Three,
    ) -> Tensor | float:
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
    """One longer document: in blocks of queries, or above ``LONG`` tokens by PyTorch's kernel. Neither
    ever holds all scores."""

    def __init__(self, shared: int, span: Span) -> None:
        self.shared, self.span = shared, span
        self.by_kernel = shared + _length(span) > LONG

    def forward(self, qkv: Three, scale: float, output: Tensor, sums: Tensor) -> None:
        a, b = self.span
        if not self.by_kernel:
            self._forward_by_blocks(qkv, scale, output)
            return
        whole = (self._whole(t) for t in qkv)
        rows, totals = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *whole, 0.0, True, scale=scale
        )
        output[a:b] = rows[0, :, self.shared :].transpose(0, 1)
        sums[a:b] = totals[0, :, self.shared :].T

    def _forward_by_blocks(self, qkv: Three, scale: float, output: Tensor) -> None:
        k, v = (self._whole(t)[0].contiguous() for t in qkv[1:])
        exact, groups = k.float(), len(k)
        for a, b, seen in self._blocks():
            q = _by_group(qkv[0][a:b], 1, groups)
            p = _probabilities(q, exact[:, seen], b - a, scale).to(q.dtype)
            rows = torch.bmm(p, v[:, seen]).view(groups, -1, b - a, v.shape[2])
            output[a:b] = rows.permute(2, 0, 1, 3).reshape(output[a:b].shape)

    def _blocks(self) -> Iterator[tuple[int, int, slice]]:
        """Queries from where to where, and which of the document's keys they see."""
        start, end = self.span
        for a in range(start, end, BLOCK):
            b = min(a + BLOCK, end)
            yield a, b, slice(0, self.shared + b - start)

    def backward(
        self,
        qkv: Three,
        scale: float,
        output: Tensor,
        sums: Tensor,
        by_output: Tensor,
        by: Three,
    ) -> Tensor | float:
        a, b = self.span
        if self.by_kernel:
            by_keys = self._backward_by_kernel(qkv, scale, output, sums, by_output, by[0])
        else:
            by_keys = self._backward_by_blocks(qkv, scale, by_output, by[0])
        for target, rows in zip(by[1:], by_keys, strict=True):
            target[a:b] = rows[self.shared :]
        return (
            torch.stack([rows[: self.shared].float() for rows in by_keys]) if self.shared else 0.0
        )

    def _backward_by_kernel(
        self,
        qkv: Three,
        scale: float,
        output: Tensor,
        sums: Tensor,
        by_output: Tensor,
        by_q: Tensor,
    ) -> list[Tensor]:
        """Writes the rows of ``by_q``; returns the gradients by k and v, [S + L, G, C] each."""
        a, b = self.span
        q, k, v = (self._whole(t) for t in qkv)
        groups = k.shape[1]
        shared_by = [
            torch.nn.functional.pad(t[a:b], (0, 0, 0, 0, self.shared, 0))  # theirs is not from here
            for t in (by_output, output)
        ]
        incoming, result = (t.transpose(0, 1)[None] for t in shared_by)
        repeated = (t.repeat_interleave(q.shape[1] // groups, dim=1) for t in (k, v))
        gradient, *by_keys = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            incoming,
            q,
            *repeated,
            result,
            self._whole(sums[:, :, None])[..., 0],
            0.0,
            True,
            scale=scale,
        )
        by_q[a:b] = gradient[0, :, self.shared :].transpose(0, 1)
        return [t[0].unflatten(0, (groups, -1)).sum(1).transpose(0, 1) for t in by_keys]

    def _backward_by_blocks(
        self, qkv: Three, scale: float, by_output: Tensor, by_q: Tensor
    ) -> list[Tensor]:
        """The same. Scores, softmax and sums over blocks are fp32."""
        k, v = (self._whole(t)[0].contiguous() for t in qkv[1:])
        exact, groups = k.float(), len(k)
        by_k, by_v = torch.zeros_like(exact), torch.zeros_like(exact)
        for a, b, seen in self._blocks():
            q, by_o = (_by_group(t[a:b], 1, groups) for t in (qkv[0], by_output))
            p = _probabilities(q, exact[:, seen], b - a, scale)
            low = p.to(q.dtype)
            by_v[:, seen] += torch.bmm(low.transpose(1, 2), by_o)
            by_p = torch.bmm(by_o, v[:, seen].transpose(1, 2)).float()
            by_scores = torch._softmax_backward_data(by_p, p, -1, torch.float32)
            by_scores = by_scores.mul_(scale).to(q.dtype)
            rows = torch.bmm(by_scores, k[:, seen]).view(groups, -1, b - a, k.shape[2])
            by_q[a:b] = rows.permute(2, 0, 1, 3).reshape(by_q[a:b].shape)
            by_k[:, seen] += torch.bmm(by_scores.transpose(1, 2), q)
        return [by_k.transpose(0, 1), by_v.transpose(0, 1)]

    def _whole(self, t: Tensor) -> Tensor:
        """[1, H, S + L, C]: the shared rows and its own."""
        a, b = self.span
        rows = torch.cat([t[: self.shared], t[a:b]]) if self.shared else t[a:b]
        return rows.transpose(0, 1)[None]


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
