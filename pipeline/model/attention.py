"""Attention that keeps the documents of a pack apart, one causal call for each document.

On a CPU the block-diagonal mask of a whole pack costs more than the documents themselves: a pack of
1,024 tokens and twelve documents computes twelve times the products that are needed. And PyTorch's
backward for CPUs is slower than plain matrix products on short documents, so theirs is written here.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

PER_DOCUMENT = "per_document"
SHORT = 192  # tokens


def per_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    document_starts: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [1, H, T, C], key and value [1, G, T, C] -> [1, T, H, C]. Heads share keys in groups.

    ``document_starts`` int64 [D + 1]: where each document begins, and T; without it, one document.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in fp32
    starts = [0, query.shape[2]] if document_starts is None else document_starts.tolist()
    output: Tensor = DocumentAttention.apply(  # type: ignore[no-untyped-call]
        query[0], key[0], value[0], starts, scaling
    )
    return output[None], None


class DocumentAttention(torch.autograd.Function):
    """Causal attention within each document: q [H, T, C], k and v [G, T, C] -> [T, H, C]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float
    ) -> Tensor:
        output = torch.empty_like(q.transpose(0, 1), memory_format=torch.contiguous_format)
        sums = torch.empty(q.shape[:2], dtype=torch.float32)
        for a, b in itertools.pairwise(starts):
            heads = _heads(q, k, v, a, b)
            one, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *heads, 0.0, True, scale=scale
            )
            output[a:b] = one[0].transpose(0, 1)
            sums[:, a:b] = log_sum[0].view(len(q), b - a)
        ctx.save_for_backward(q, k, v, output, sums)
        ctx.starts, ctx.scale = starts, scale
        return output

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, sums = ctx.saved_tensors
        by_q, by_k, by_v = (torch.empty_like(t) for t in (q, k, v))
        for a, b in itertools.pairwise(ctx.starts):
            gradients = _short if b - a <= SHORT else _long
            by_q[:, a:b], by_k[:, a:b], by_v[:, a:b] = gradients(
                q[:, a:b],
                k[:, a:b],
                v[:, a:b],
                output[a:b],
                sums[:, a:b],
                by_output[a:b],
                ctx.scale,
            )
        return by_q, by_k, by_v, None, None


def _heads(q: Tensor, k: Tensor, v: Tensor, a: int, b: int) -> tuple[Tensor, ...]:
    """Rows a..b as [1, H, L, C] each, keys and values repeated for the heads that share them."""
    shared = len(q) // len(k)
    k, v = (t[:, a:b].repeat_interleave(shared, dim=0) for t in (k, v))
    return q[None, :, a:b], k[None], v[None]


def _short(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, sums: Tensor, by_output: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by plain products: scores and softmax in fp32, the rest in the inputs' dtype."""
    (heads, length, size), groups = q.shape, len(k)
    grouped_q, grouped_by = (t.reshape(groups, -1, size) for t in (q, by_output.transpose(0, 1)))
    scores = torch.bmm(grouped_q.float(), k.float().transpose(1, 2)).view(heads, length, length)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    p = scores.mul_(scale).sub_(sums[:, :, None]).exp_().masked_fill_(hidden, 0.0)
    by_v = torch.bmm(p.to(v.dtype).view(groups, -1, length).transpose(1, 2), grouped_by)
    by_p = torch.bmm(grouped_by, v.transpose(1, 2)).view(heads, length, length)
    by_scores = torch._softmax_backward_data(by_p.float(), p, -1, torch.float32).mul_(scale)
    by_scores = by_scores.to(q.dtype).view(groups, -1, length)
    by_q = torch.bmm(by_scores, k).view(heads, length, size)
    return by_q, torch.bmm(by_scores.transpose(1, 2), grouped_q), by_v


def _long(
    q: Tensor, k: Tensor, v: Tensor, output: Tensor, sums: Tensor, by_output: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients by PyTorch's kernel, which never holds all scores."""
    by_q, by_k, by_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        by_output.transpose(0, 1)[None],
        *_heads(q, k, v, 0, q.shape[1]),
        output.transpose(0, 1)[None],
        sums[None],
        0.0,
        True,
        scale=scale,
    )
    by_k, by_v = (t[0].unflatten(0, (len(k), -1)).sum(1) for t in (by_k, by_v))
    return by_q[0], by_k, by_v


def choose(config: Any, *, bf16: bool) -> str:
    """The attention to train with: per document on a CPU, FlashAttention on a GPU that has it, else
    PyTorch's own; the last two tell documents apart by their position ids.

    On a CPU a model with a sliding window or dropout gets PyTorch's own: the window is in its mask.
    """
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    if torch.cuda.is_available() and is_flash_attn_2_available() and bf16:
        return "flash_attention_2"

    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    dropout = getattr(config, "attention_dropout", 0.0)
    if torch.cuda.is_available() or windowed or dropout:
        return "sdpa"
    AttentionInterface.register(PER_DOCUMENT, per_document)
    return PER_DOCUMENT
