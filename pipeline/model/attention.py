"""Attention that keeps the documents of a pack apart, without a mask over the whole pack.

On a GPU that is FlashAttention with the documents' borders. On a CPU the block-diagonal mask of a
whole pack costs more than the documents themselves: a pack of 1,024 tokens and twelve documents
computes twelve times the products that are needed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.model.documents import documents_of

PER_DOCUMENT, VARLEN = "per_document", "varlen"
AMPERE = (8, 0)  # compute capability from which on PyTorch's FlashAttention works


def borders(starts: Tensor, device: torch.device) -> dict[str, Any]:
    """What every layer's attention on ``device`` has to know of the documents of a pack, made once.

    starts: int64 [D + 1] on the CPU, where each document begins, and T. The names for a GPU are
    those that FlashAttention in transformers takes, which otherwise reads the borders from the
    position ids, and has the CPU wait for the GPU, in each layer.
    """
    if device.type == "cpu":
        return {"document_starts": starts}
    at = starts.to(torch.int32).to(device, non_blocking=True)
    longest = int(starts.diff().max())
    names = ("cu_seq_lens_q", "cu_seq_lens_k"), ("max_length_q", "max_length_k")
    return dict.fromkeys(names[0], at) | dict.fromkeys(names[1], longest)


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
        with torch.autocast("cpu", enabled=False):  # it would lower the precision of the scores
            for part in ctx.parts:
                part.forward((q, k, v), scale, output)
        ctx.save_for_backward(q, k, v)
        ctx.shared, ctx.scale = starts[0], scale
        return output

    @staticmethod
    def backward(ctx: Any, by_output: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        by_q, by_k, by_v = (
            torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v)
        )
        by_shared = torch.zeros(2, ctx.shared, *k.shape[1:])  # fp32: a sum over documents
        with torch.autocast("cpu", enabled=False):
            for part in ctx.parts:
                by_shared += part.backward((q, k, v), ctx.scale, by_output, (by_q, by_k, by_v))
        by_k[: ctx.shared] += by_shared[0]
        by_v[: ctx.shared] += by_shared[1]
        return by_q, by_k, by_v, None, None


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """All documents in one call of the FlashAttention that comes with PyTorch for CUDA; shapes as in
    ``per_document``, ``cu_seq_lens_q`` int32 [D + 1]; without it, one document."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (t[0].transpose(0, 1).to(value.dtype) for t in (query, key, value))
    at, longest = cu_seq_lens_q, max_length_q
    if at is None or longest is None:
        longest = len(q)
        at = torch.arange(0, longest + 1, longest, dtype=torch.int32, device=q.device)
    output = varlen_attn(
        q, k, v, at, at, longest, longest, scale=scaling, window_size=(-1, 0), enable_gqa=True
    )
    assert isinstance(output, Tensor)  # without return_aux
    return output[None], None


def choose(config: Any, *, bf16: bool) -> str:
    """The attention to train with: per document on a CPU; on a GPU, in bf16, FlashAttention, of its
    own package where that is installed, else PyTorch's; and in what is left PyTorch's attention with
    a mask, which transformers makes from the position ids.

    Left are fp32 on a GPU, and models with a sliding window or dropout without the package.
    """
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    on_gpu = torch.cuda.is_available()
    if on_gpu and is_flash_attn_2_available() and bf16:
        return "flash_attention_2"

    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    dropout = getattr(config, "attention_dropout", 0.0)
    if windowed or dropout:
        return "sdpa"
    if not on_gpu:
        AttentionInterface.register(PER_DOCUMENT, per_document)
        return PER_DOCUMENT
    if not bf16 or torch.cuda.get_device_capability() < AMPERE:
        return "sdpa"
    AttentionInterface.register(VARLEN, varlen)
    return VARLEN
