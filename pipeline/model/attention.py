"""Attention that keeps the documents of a pack apart, one causal call for each document.

On a CPU the block-diagonal mask of a whole pack costs more than the documents themselves: a pack of
1,024 tokens and twelve documents computes twelve times the products that are needed.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

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
    """query [1, H, T, C], key and value [1, G, T, C] -> [1, T, H, C].

    ``document_starts`` int64 [D + 1]: where each document begins, and T; without it, one document.
    """
    heads = query.shape[1] // key.shape[1]
    if heads > 1:
        key, value = (t.repeat_interleave(heads, dim=1) for t in (key, value))
    starts = [0, query.shape[2]] if document_starts is None else document_starts.tolist()
    parts = [
        functional.scaled_dot_product_attention(
            query[:, :, a:b],
            key[:, :, a:b],
            value[:, :, a:b],
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
        )
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2), None


def choose(config: Any, *, bf16: bool) -> str:
    """The attention to train with: per document on a CPU, FlashAttention on a GPU that has it, else
    PyTorch's own; the last two tell documents apart by their position ids.

    A model with a sliding window keeps its own: the window is part of its mask.
    """
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    if torch.cuda.is_available() and is_flash_attn_2_available() and bf16:
        return "flash_attention_2"

    windowed = getattr(config, "sliding_window", None) and getattr(
        config, "use_sliding_window", True
    )
    if torch.cuda.is_available() or windowed:
        return "sdpa"
    AttentionInterface.register(PER_DOCUMENT, per_document)
    return PER_DOCUMENT
