"""Attention over packed documents on this CPU: what a forward and backward pass of one layer costs.

python benchmarks/attention.py [--json FILE]

Shapes of SmolLM2-135M (9 heads, 3 key heads, 64 channels), about 1,000 tokens in documents of one
length, bf16, median of the rounds in milliseconds. All ways are run in turn in every round.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from pipeline.model.attention import per_document

HEADS, KEY_HEADS, CHANNELS = 9, 3, 64
LENGTHS = (32, 65, 130, 190, 256, 430, 1024)
TOKENS = 1024
Way = Callable[[Tensor, Tensor, Tensor, list[int]], Tensor]


def ours(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    module = torch.nn.Identity()
    at = torch.tensor(starts)
    return per_document(module, q, k, v, None, scaling=CHANNELS**-0.5, document_starts=at)[0]


def one_call_each(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """PyTorch's kernel for each document, with its own backward."""
    k, v = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (k, v))
    parts = [
        functional.scaled_dot_product_attention(
            q[:, :, a:b], k[:, :, a:b], v[:, :, a:b], is_causal=True
        )
        for a, b in itertools.pairwise(starts)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)


def block_mask(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """PyTorch's kernel once, with the block-diagonal causal mask of the whole pack."""
    k, v = (t.repeat_interleave(HEADS // KEY_HEADS, dim=1) for t in (k, v))
    document = torch.zeros(starts[-1], dtype=torch.long)
    document[starts[1:-1]] = 1
    document = document.cumsum(0)
    mask = (document[:, None] == document[None, :]).tril()
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return out.transpose(1, 2)


WAYS: dict[str, Way] = {
    "block mask": block_mask,
    "a call each": one_call_each,
    "untaxed": ours,
}


def milliseconds(way: Way, tensors: list[Tensor], starts: list[int], by_output: Tensor) -> float:
    started = time.perf_counter()
    way(*tensors, starts).backward(by_output)
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    options.add_argument("--rounds", type=int, default=15)
    given = options.parse_args()
    table = []
    print(f"{'tokens':>7} {'documents':>10}" + "".join(f"{name:>14}" for name in WAYS) + "  (ms)")
    for length in LENGTHS:
        count = max(1, TOKENS // length)
        starts = list(range(0, count * length + 1, length))
        generator = torch.Generator().manual_seed(length)

        def random(heads: int, tokens: int, generator: torch.Generator = generator) -> Tensor:
            values = torch.randn(1, tokens, heads, CHANNELS, generator=generator)
            return values.bfloat16().transpose(1, 2)

        tensors = [random(h, starts[-1]).requires_grad_() for h in (HEADS, KEY_HEADS, KEY_HEADS)]
        by_output = random(HEADS, starts[-1]).transpose(1, 2)
        rounds: dict[str, list[float]] = {name: [] for name in WAYS}
        for number in range(given.rounds + 2):
            for name, way in WAYS.items():
                spent = milliseconds(way, tensors, starts, by_output)
                if number >= 2:
                    rounds[name].append(spent)
        medians = {name: statistics.median(spent) for name, spent in rounds.items()}
        table.append({"length": length, "documents": count, "milliseconds": medians})
        cells = "".join(f"{value:>14.1f}" for value in medians.values())
        print(f"{length:>7} {count:>10}{cells}")
    if given.json:
        given.json.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
