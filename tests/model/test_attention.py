"""Attention by document against PyTorch's with the block-diagonal mask of the whole pack."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pipeline.model.attention import per_document
from pipeline.model.documents import SHORT

PACKS = {
    "one": [40],
    "several": [1, 7, 64, 33],
    "around the border": [SHORT - 1, SHORT, SHORT + 1],
    "long and short": [300, 5, 210],
}
SHARED = 11


def inputs(lengths: list[int], heads: int, key_heads: int, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v laid out as transformers hands them over, and a gradient of the output."""
    generator = torch.Generator().manual_seed(sum(lengths) + heads)
    tokens = sum(lengths)
    made = [
        torch.randn(1, tokens, count, 16, generator=generator).to(dtype)
        for count in (heads, key_heads, key_heads, heads)
    ]
    return [t.transpose(1, 2).requires_grad_() for t in made[:3]] + [made[3]]


def expected(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    mask = (document[:, None] == document[None, :]).tril()
    out = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor, lengths: list[int]) -> Tensor:
    starts = torch.tensor([0, *lengths]).cumsum(0)
    module = torch.nn.Identity()
    return per_document(module, q, k, v, None, scaling=0.25, document_starts=starts)[0]


@pytest.mark.parametrize(("heads", "key_heads"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_output_and_gradients_in_fp32(lengths: list[int], heads: int, key_heads: int) -> None:
    *tensors, by_output = inputs(lengths, heads, key_heads, torch.float32)
    want = expected(*tensors, lengths)
    wanted = [want, *torch.autograd.grad(want, tensors, by_output)]
    got = ours(*tensors, lengths)
    gotten = [got, *torch.autograd.grad(got, tensors, by_output)]
    for left, right in zip(gotten, wanted, strict=True):
        assert left.shape == right.shape
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_gradients_in_bf16_are_as_close_to_fp32_as_those_of_pytorch(lengths: list[int]) -> None:
    *tensors, by_output = inputs(lengths, 6, 2, torch.bfloat16)
    exact = [t.detach().float().requires_grad_() for t in tensors]
    truth = torch.autograd.grad(expected(*exact, lengths), exact, by_output.float())
    theirs = torch.autograd.grad(expected(*tensors, lengths), tensors, by_output)
    mine = torch.autograd.grad(ours(*tensors, lengths), tensors, by_output)
    for true, their, own in zip(truth, theirs, mine, strict=True):
        assert (own.float() - true).norm() <= 1.5 * (their.float() - true).norm() + 1e-3


def test_without_starts_it_is_one_document() -> None:
    *tensors, _ = inputs([30], 4, 2, torch.float32)
    alone = per_document(torch.nn.Identity(), *tensors, None, scaling=0.25)[0]
    assert torch.equal(alone, ours(*tensors, [30]))


@pytest.mark.parametrize("lengths", PACKS.values(), ids=PACKS)
def test_a_shared_beginning_gives_what_repeating_it_gives(lengths: list[int]) -> None:
    *tensors, by_output = inputs([SHARED, *lengths], 6, 2, torch.float32)
    starts = [SHARED, *(SHARED + sum(lengths[: i + 1]) for i in range(len(lengths)))]
    got = per_document(
        torch.nn.Identity(), *tensors, None, scaling=0.25, document_starts=torch.tensor(starts)
    )[0]
    beginning = torch.arange(SHARED)
    parts = [torch.cat([beginning, torch.arange(a, b)]) for a, b in itertools.pairwise(starts)]
    repeated = torch.cat(parts)
    alone = [SHARED + length for length in lengths]
    whole = expected(*(t[:, :, repeated] for t in tensors), alone)
    own = torch.cat([torch.arange(len(p)) + sum(alone[:i]) for i, p in enumerate(parts)])
    keep = torch.cat([beginning, own[(repeated >= SHARED)]])
    want = whole[:, keep]
    wanted = [want, *torch.autograd.grad(want, tensors, by_output)]
    gotten = [got, *torch.autograd.grad(got, tensors, by_output)]
    for left, right in zip(gotten, wanted, strict=True):
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()
