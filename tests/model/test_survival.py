"""The share of an update that is left, by hand."""

from __future__ import annotations

import pytest
import torch

from pipeline.model.survival import Survival


def test_share_and_norm_ratio() -> None:
    meant = torch.tensor([3.0, 4.0])
    half = Survival()
    half.add(torch.tensor([3.0, 0.0]), meant)
    assert (half.share, half.norm_ratio) == pytest.approx((9 / 25, 3 / 5))
    half.join(half)
    assert half.share == pytest.approx(9 / 25)
    assert Survival().share is None


def test_sums_are_those_of_fp64() -> None:
    torch.manual_seed(0)
    got, meant = torch.randn(40, 3000), torch.randn(40, 3000)
    found = Survival()
    for rows in range(0, 40, 8):
        found.add(got[rows : rows + 8], meant[rows : rows + 8])
    x, d = got.double().flatten(), meant.double().flatten()
    assert found.share == pytest.approx(float(x @ d / (d @ d)), abs=1e-6)
    assert found.norm_ratio == pytest.approx(float(x.norm() / d.norm()), rel=1e-6)
