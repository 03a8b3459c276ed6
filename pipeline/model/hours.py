"""How long the stages of a job take at the limits of a GPU: no stage can be faster. Torch-free.

Generation reads all weights and the cache of keys and values once a token; training and the loss on
worked answers are bound by arithmetic. Both at the rates that the maker states (dense bf16, one
direction of the memory): launching kernels, loading, gathering and waiting come on top.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.model.geometry import (
    BF16_BYTES,
    cache_bytes_per_token,
    linear_shapes,
    total_parameters,
)
from pipeline.recipes import Geometry


@dataclass(frozen=True)
class Card:
    """FLOP/s in dense bf16 and bytes/s of memory, from the data sheet."""

    flops: float
    bandwidth: float


CARDS = {
    "h200-141g": Card(989e12, 4.8e12),
    "h100-80g": Card(989e12, 3.35e12),
    "a100-80g": Card(312e12, 2.039e12),
    "a100-40g": Card(312e12, 1.555e12),
    "l40s-48g": Card(362e12, 0.864e12),
    "a10-24g": Card(125e12, 0.6e12),
}


@dataclass(frozen=True)
class Answers:
    """``rows`` answers of ``tokens`` each, so many at once."""

    rows: int
    tokens: int
    at_once: int


def linear_weights(geometry: Geometry) -> int:
    """Of one decoder layer."""
    return sum(rows * columns for rows, columns in linear_shapes(geometry).values())


def training_flops(
    geometry: Geometry, tokens: int, epochs: int, cut: int, *, checkpointing: bool
) -> int:
    """The layers below ``cut`` run forward once, all others forward and, but the lowest of them,
    backward (activations alone, since weights are frozen) in each epoch, and the head both. Attention
    between tokens, norms and the adapter are left out."""
    layer, head = linear_weights(geometry), geometry.vocab_size * geometry.hidden_size
    above = geometry.layers - cut
    forward = above * layer * (2 if checkpointing else 1)
    each = forward + (above - 1) * layer + 2 * head
    return 2 * tokens * (cut * layer + epochs * each)


def training_seconds(flops: int, card: Card, processes: int) -> float:
    return flops / (card.flops * processes)


def generation_seconds(geometry: Geometry, asked: Sequence[Answers], card: Card) -> float:
    """One GPU, places refilled as rows end. Prompts are left out."""
    weights, cache = total_parameters(geometry), cache_bytes_per_token(geometry)
    seconds = 0.0
    for one in asked:
        together = min(one.rows, one.at_once)
        if not together:
            continue
        read = BF16_BYTES * weights + together * cache * one.tokens / 2
        step = max(read / card.bandwidth, 2 * together * weights / card.flops)
        seconds += step * one.tokens * one.rows / together
    return seconds
