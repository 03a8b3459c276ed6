"""Products of bf16 matrices on a processor that has no instructions for them: through fp32, in tiles.

Without AVX-512 (or what ARM has) PyTorch multiplies bf16 element by element, six times slower than
fp32. What is computed stays the same: factors as they are, sums in fp32, the result rounded to bf16
once.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

TILE = 1 << 21  # elements of a factor that are held in fp32 at a time
DEEPEST = 4096  # of the shared dimension, in one tile
FEW_ROWS = 8  # a few rows are read and multiplied as fast as memory allows, without a copy
aten: Any = torch.ops.aten


def has_bf16() -> bool:
    """Whether PyTorch multiplies bf16 with instructions made for it on this processor."""
    supported = getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    return bool(supported and supported())


def use_fp32_products() -> None:
    """From now on this process multiplies bf16 matrices on the CPU through fp32, where it has to.

    Replaces PyTorch's kernels of mm, addmm, bmm and baddbmm; nothing happens where bf16 is native.
    """
    if has_bf16() or _replaced:
        return
    library = _library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that kernels are replaced
        for name, kernel in (("mm", mm), ("addmm", addmm), ("bmm", bmm), ("baddbmm", baddbmm)):
            library.impl(name, kernel, "CPU", allow_override=True)
    _replaced.append(library)  # replaced for as long as it lives


def replaced() -> bool:
    """Whether this process does."""
    return bool(_replaced)


_library: Any = torch.library.Library
_replaced: list[Any] = []


def mm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.mm``; as the next three, what PyTorch does for all but large products of bf16."""
    out = a.new_empty(a.shape[0], b.shape[1])
    if _slow(a, b, a.shape[0]):
        return _product(out, a, b)
    aten.mm.out(a, b, out=out)
    return out


def addmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """``torch.addmm``."""
    out = a.new_empty(a.shape[0], b.shape[1])
    if not _slow(a, b, a.shape[0]):
        aten.addmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)
        return out
    return _product(out, a, b, alpha, bias.expand_as(out) if beta else None, beta)


def bmm(a: Tensor, b: Tensor) -> Tensor:
    """``torch.bmm``."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if not _slow(a, b, a.shape[1] * a.shape[0]):
        aten.bmm.out(a, b, out=out)
        return out
    for part in _batches(a, b):
        aten.bmm.out(a[part].float(), b[part].float(), out=(held := _held(out[part])))
        out[part] = held
    return out


def baddbmm(bias: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Tensor:
    """``torch.baddbmm``."""
    out = a.new_empty(a.shape[0], a.shape[1], b.shape[2])
    if not _slow(a, b, a.shape[1] * a.shape[0]):
        aten.baddbmm.out(bias, a, b, beta=beta, alpha=alpha, out=out)
        return out
    bias = bias.expand_as(out)
    for part in _batches(a, b):
        held = _held(out[part])
        wide = bias[part].float() if beta else held
        aten.baddbmm.out(wide, a[part].float(), b[part].float(), beta=beta, alpha=alpha, out=held)
        out[part] = held
    return out


def _slow(a: Tensor, b: Tensor, rows: int) -> bool:
    """Whether the product is one of bf16 that is worth the way through fp32."""
    return a.dtype == b.dtype == torch.bfloat16 and rows > FEW_ROWS


def _held(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=torch.float32)


def _batches(a: Tensor, b: Tensor) -> list[slice]:
    """Slices of the batch whose factors fit a tile, at least one matrix each."""
    each = max(1, a.shape[1] * a.shape[2], b.shape[1] * b.shape[2])
    step = max(1, TILE // each)
    return [slice(at, at + step) for at in range(0, a.shape[0], step)]


def _product(
    out: Tensor, a: Tensor, b: Tensor, alpha: Any = 1, bias: Tensor | None = None, beta: Any = 0
) -> Tensor:
    """``out`` = beta bias + alpha a b, summed in fp32; factors are widened tile by tile."""
    (rows, depth), columns = a.shape, b.shape[1]
    deep = max(1, min(depth, DEEPEST))
    side = max(256, TILE // deep)
    for n in range(0, columns, side):
        for m in range(0, rows, side):
            place = out[m : m + side, n : n + side]
            held = torch.zeros(place.shape) if depth == 0 else _held(place)
            for k in range(0, depth, deep):
                left = a[m : m + side, k : k + deep].float()
                right = b[k : k + deep, n : n + side].float()
                aten.addmm.out(held, left, right, beta=1 if k else 0, out=held)
            if alpha != 1:
                held *= alpha
            if bias is not None:
                held.add_(bias[m : m + side, n : n + side], alpha=beta)
            place.copy_(held)
    return out
