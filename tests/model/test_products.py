"""bf16 products through fp32: the right numbers, and in place of PyTorch's own where asked for."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from parts import ROOT
from torch import Tensor

from pipeline.model import products

SHAPES = [(9, 5, 7), (300, 70, 33), (17, 1, 1), (1030, 40, 300), (9, 0, 4), (0, 3, 4)]


@pytest.fixture(params=[False, True], ids=["whole", "many tiles"])
def _tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param:
        monkeypatch.setattr(products, "TILE", 64)
        monkeypatch.setattr(products, "DEEPEST", 16)


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).bfloat16()


def assert_rounded_once(got: Tensor, want: Tensor) -> None:
    """``want`` in fp64, rounded once: a sum in another order may round to the neighbour."""
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.double(), want, rtol=2**-7, atol=1e-3)


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize(("rows", "depth", "columns"), SHAPES)
def test_products_are_those_of_fp64_rounded_once(rows: int, depth: int, columns: int) -> None:
    a, b = random(rows, depth), random(columns, depth, seed=1).t()
    bias = random(columns, seed=2)
    assert_rounded_once(products.mm(a, b), a.double() @ b.double())
    assert_rounded_once(products.addmm(bias, a, b), bias.double() + a.double() @ b.double())
    assert_rounded_once(
        products.addmm(bias, a, b, beta=0.5, alpha=2),
        0.5 * bias.double() + 2 * (a.double() @ b.double()),
    )


@pytest.mark.usefixtures("_tiles")
@pytest.mark.parametrize("batch", [1, 3, 40])
def test_batched_products_too(batch: int) -> None:
    a, b = random(batch, 12, 20), random(batch, 9, 20, seed=1).transpose(1, 2)
    bias = random(12, 9, seed=2)
    assert_rounded_once(products.bmm(a, b), a.double() @ b.double())
    assert_rounded_once(
        products.baddbmm(bias, a, b, alpha=0.25), bias.double() + 0.25 * (a.double() @ b.double())
    )


def test_a_bias_that_does_not_count_is_not_read() -> None:
    a, b, nan = random(12, 4), random(4, 5, seed=1), torch.full((5,), float("nan")).bfloat16()
    assert_rounded_once(products.addmm(nan, a, b, beta=0), a.double() @ b.double())
    batched = products.baddbmm(nan, a[None], b[None], beta=0)
    assert_rounded_once(batched, (a.double() @ b.double())[None])


INSTALLED = """
import torch
from pipeline.model import products

products.has_bf16 = lambda: True
products.use_fp32_products()
assert not products.replaced(), "bf16 is native"
products.has_bf16 = lambda: False
narrow = [torch.randn(40, 30).bfloat16(), torch.randn(50, 30).bfloat16(), torch.randn(50).bfloat16()]
wide = [t.float().requires_grad_() for t in narrow]
used = []
products._product = lambda out, *rest, inner=products._product: used.append(1) or inner(out, *rest)


def check():
    for leaf in (*narrow, *wide):
        leaf.grad = None
    leaves = [t.requires_grad_() for t in narrow]
    torch.nn.functional.linear(*leaves).sum().backward()
    torch.nn.functional.linear(*wide).sum().backward()
    for low, high in zip(leaves, wide):
        torch.testing.assert_close(low.grad.float(), high.grad, rtol=2**-6, atol=2**-4)
    assert torch.equal(torch.ones(3, 3).long() @ torch.ones(3, 3).long(), torch.full((3, 3), 3))
    print(len(used))


before = torch.nn.functional.linear(*wide)
check()
products.use_fp32_products()
products.use_fp32_products()
assert torch.equal(before, torch.nn.functional.linear(*wide)), "fp32 has changed"
check()
"""


def test_they_replace_the_kernels_only_where_bf16_is_not_native() -> None:
    """In a process of its own: forward and both gradients of a linear layer go through them."""
    done = subprocess.run(
        [sys.executable, "-c", INSTALLED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["0", "3"]
    assert "warn" not in done.stderr.lower()
