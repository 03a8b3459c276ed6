"""Attention that keeps the documents of a pack apart, and the choice of attention to train with.

On a CPU the block-diagonal mask of a whole pack costs more than the documents themselves: a pack of
1,024 tokens and twelve documents computes twelve times the products that are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.documents import documents_of

PER_DOCUMENT = "per_document"


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
    What lies before the first of them is the beginning of every document.
    """
    query, key = query.to(value.dtype), key.to(value.dtype)  # autocast leaves rotated ones in fp32
    starts = [0, query.shape[2]] if document_starts is None else document_starts.tolist()
    by_token = (t[0].transpose(0, 1) for t in (query, key, value))
    output: Tensor = DocumentAttention.apply(*by_token, starts, scaling)  # type: ignore[no-untyped-call]
    return output[None], None


class DocumentAttention(torch.autograd.Function):
    """Causal attention within each document: q [T, H, C], k and v [T, G, C] -> [T, H, C]."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, starts: list[int], scale: float
    ) -> Tensor:
        output = torch.empty_like(q, memory_format=torch.contiguous_format)
        ctx.parts = documents_of(tuple(starts))
        kept = [part.forward(q, k, v, scale, output) for part in ctx.parts]
        ctx.save_for_backward(q, k, v, output, *kept)
        ctx.shared, ctx.scale = starts[0], scale
        return output

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output, *kept = ctx.saved_tensors
        by_q, by_k, by_v = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)
        )
        by_shared = torch.zeros(2, ctx.shared, *k.shape[1:])  # fp32: a sum over documents
        for part, own in zip(ctx.parts, kept, strict=True):
            by_shared += part.backward(
                (q, k, v), output, own, by_output, ctx.scale, (by_q, by_k, by_v)
            )
        by_k[: ctx.shared] += by_shared[0]
        by_v[: ctx.shared] += by_shared[1]
        return by_q, by_k, by_v, None, None


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
