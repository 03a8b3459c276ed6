"""How much of an update a merged file holds after rounding to the dtype that loading gives.

The share is the projection <W'_loaded - W, dW> / <dW, dW>.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Survival:
    """Sums over tensors: <got, dW>, <dW, dW> and <got, got>, with got = W'(as loaded) - W."""

    dot: float = 0.0
    wanted: float = 0.0
    got: float = 0.0

    def add(self, got: Tensor, delta: Tensor) -> None:
        """A block of rows, in fp32; blocks are summed in fp64."""
        self.dot += _product(got, delta)
        self.wanted += _product(delta, delta)
        self.got += _product(got, got)

    def join(self, other: Survival) -> None:
        self.dot += other.dot
        self.wanted += other.wanted
        self.got += other.got

    @property
    def share(self) -> float | None:
        """Projection of what arrived on what was meant; None where nothing was meant."""
        return self.dot / self.wanted if self.wanted else None

    @property
    def norm_ratio(self) -> float | None:
        """Size of what arrived over the size of what was meant."""
        return math.sqrt(self.got / self.wanted) if self.wanted else None


@dataclass
class Proof:
    """What the files of one merge have shown; ``widened``: 16-bit floats became F32."""

    widened: bool = False
    tensors: dict[str, Survival] = field(default_factory=dict)
    unchanged: int = 0
    unchanged_bytes: int = 0

    def total(self) -> Survival:
        total = Survival()
        for survival in self.tensors.values():
            total.join(survival)
        return total


def _product(left: Tensor, right: Tensor) -> float:
    return float(torch.dot(left.flatten(), right.flatten()))
