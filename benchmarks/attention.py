"""Attention over packed documents on this CPU: what a forward and backward pass of one layer costs.

python benchmarks/attention.py [--json FILE]

Shapes of SmolLM2-135M (9 heads, 3 key heads, 64 channels), about 1,000 tokens in documents of one
length, bf16, median of the rounds in milliseconds. All ways are run in turn in every round. A second
table has the forward pass alone, and flex attention (compiled, with a mask of blocks by document that
is made beforehand): PyTorch has no backward pass of it for CPUs.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pipeline.model.allocator import keep_freed_memory
from pipeline.model.attention import per_document
from pipeline.model.products import use_fp32_products

HEADS, KEY_HEADS, CHANNELS = 9, 3, 64
LENGTHS = (32, 65, 130, 190, 256, 430, 1024, 2048)
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


compiled = torch.compile(flex_attention, dynamic=False)  # its C++ for dynamic shapes is not valid


@functools.cache
def blocks(starts: tuple[int, ...]) -> BlockMask:
    """Which blocks of 128 x 128 scores hold some that count, for causal documents."""
    document = torch.zeros(starts[-1], dtype=torch.long)
    document[list(starts[1:-1])] = 1
    document = document.cumsum(0)

    def counts(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document[query] == document[key])

    return create_block_mask(counts, None, None, starts[-1], starts[-1], device="cpu")


def flex(q: Tensor, k: Tensor, v: Tensor, starts: list[int]) -> Tensor:
    """One compiled kernel that skips the blocks between documents."""
    out = compiled(q, k, v, block_mask=blocks(tuple(starts)), enable_gqa=True)
    return out.transpose(1, 2)


WAYS: dict[str, Way] = {
    "block mask": block_mask,
    "a call each": one_call_each,
    "untaxed": ours,
}
FORWARD = WAYS | {"flex": flex}


def both_passes(way: Way, tensors: list[Tensor], starts: list[int], by_output: Tensor) -> float:
    started = time.perf_counter()
    way(*tensors, starts).backward(by_output)
    return (time.perf_counter() - started) * 1e3


@torch.no_grad()
def forward_pass(way: Way, tensors: list[Tensor], starts: list[int], by_output: Tensor) -> float:
    plain = [t.detach() for t in tensors]
    started = time.perf_counter()
    way(*plain, starts)
    return (time.perf_counter() - started) * 1e3


def medians(
    length: int, ways: dict[str, Way], milliseconds: Callable[..., float], rounds: int
) -> dict[str, float]:
    """Of each way, over documents of ``length`` tokens."""
    starts = list(range(0, max(1, TOKENS // length) * length + 1, length))
    generator = torch.Generator().manual_seed(length)

    def random(heads: int) -> Tensor:
        values = torch.randn(1, starts[-1], heads, CHANNELS, generator=generator)
        return values.bfloat16().transpose(1, 2)

    tensors = [random(heads).requires_grad_() for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    by_output = random(HEADS).transpose(1, 2)
    with torch.no_grad():
        outputs = [way(*(t.detach() for t in tensors), starts) for way in ways.values()]
    for output in outputs:  # what is timed is the same attention
        torch.testing.assert_close(output, outputs[0], rtol=0.05, atol=0.02)
    spent: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 2):
        for name, way in ways.items():
            one = milliseconds(way, tensors, starts, by_output)
            if number >= 2:
                spent[name].append(one)
    return {name: statistics.median(each) for name, each in spent.items()}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    given = options.parse_args()
    keep_freed_memory()  # these two as training does
    use_fp32_products()
    tables: dict[str, dict[int, dict[str, float]]] = {}
    for title, ways, passes in (
        ("forward and backward", WAYS, both_passes),
        ("forward", FORWARD, forward_pass),
    ):
        tables[title] = {}
        print(f"{title}, ms")
        print(f"{'tokens':>7} {'documents':>10}" + "".join(f"{name:>14}" for name in ways))
        for length in given.lengths:
            row = tables[title][length] = medians(length, ways, passes, given.rounds)
            cells = "".join(f"{value:>14.1f}" for value in row.values())
            print(f"{length:>7} {max(1, TOKENS // length):>10}{cells}", flush=True)
    if given.json:
        given.json.write_text(json.dumps(tables, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
