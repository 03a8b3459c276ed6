"""A frozen output head whose logits never exist all at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

T = TypeVar("T")
CHUNK_BYTES = {"cpu": 2**25, "cuda": 2**29}  # of fp32 logits


class ChunkedHead(nn.Module):
    """The head's weight [V, hidden size], given to some rows at a time, outside of autograd.

    Whoever needs a gradient makes it there and then. So a sharded weight is gathered once, in the
    forward pass, and its own gradient is never formed.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    @torch.no_grad()
    def forward(self, hidden: Tensor, work: Callable[[Tensor, Tensor, slice], T]) -> list[T]:
        """``work(weight, hidden[rows], rows)`` for consecutive rows of ``hidden`` [N, hidden size]."""
        vocabulary, place = self.weight.shape[0], self.weight.device.type
        each = max(1, CHUNK_BYTES.get(place, CHUNK_BYTES["cuda"]) // (4 * vocabulary))
        slices = [slice(at, min(at + each, len(hidden))) for at in range(0, len(hidden), each)]
        return [work(self.weight, hidden[rows], rows) for rows in slices]


class WithGradient(torch.autograd.Function):
    """``total`` as a function of ``hidden`` whose gradient is known already."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, total: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return total.clone()

    @staticmethod
    def backward(ctx: Any, by_total: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * by_total.to(gradient.dtype), None, None
