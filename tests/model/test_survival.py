"""Reading back: damage to a written file is found, whichever tensor it hits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipeline.artifact import hash_file
from pipeline.errors import DataError
from pipeline.model.merging import FullUpdate, Plan, write_merged
from pipeline.model.shards import Shard, read_shard
from pipeline.model.survival import Proof, Survival, read_back


@pytest.fixture()
def parts(tmp_path: Path) -> tuple[Shard, Plan]:
    torch.manual_seed(0)
    tensors = {"kept": torch.randn(30, 20).bfloat16(), "moved": torch.randn(20, 10).bfloat16()}
    save_file(tensors, tmp_path / "base.safetensors")
    save_file({"moved": tensors["moved"].float() + 0.1}, tmp_path / "trained.safetensors")
    update = FullUpdate(read_shard(tmp_path / "trained.safetensors"), "moved")
    return read_shard(tmp_path / "base.safetensors"), Plan("full", {"moved": update}, 1.0, None)


def write(parts: tuple[Shard, Plan], target: Path, widen: bool) -> None:
    source, plan = parts
    write_merged(source, plan, target, widen=widen, sha256=hash_file(source.path).sha256)


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [("kept", "kept differs from the base"), ("moved", "moved reads back differently")],
)
def test_one_wrong_byte_is_found(
    parts: tuple[Shard, Plan], tmp_path: Path, tensor: str, message: str, widen: bool
) -> None:
    target = tmp_path / "out.safetensors"
    write(parts, target, widen)
    proof = Proof()
    read_back(*parts, target, proof, load_dtype=None)
    assert (list(proof.tensors), proof.unchanged) == (["moved"], 1)
    content = bytearray(target.read_bytes())
    content[read_shard(target).entries[tensor].stop - 1] ^= 1
    target.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_back(*parts, target, Proof(), load_dtype=None)


def test_other_tensors_are_found(parts: tuple[Shard, Plan], tmp_path: Path) -> None:
    save_file({"kept": torch.zeros(1)}, tmp_path / "out.safetensors")
    with pytest.raises(DataError, match="other tensors than were written"):
        read_back(*parts, tmp_path / "out.safetensors", Proof(), load_dtype=None)


def test_share_and_norm_ratio() -> None:
    meant = torch.tensor([3.0, 4.0])
    half = Survival()
    half.add(torch.tensor([3.0, 0.0]), meant)
    assert (half.share, half.norm_ratio) == pytest.approx((9 / 25, 3 / 5))
    half.join(half)
    assert half.share == pytest.approx(9 / 25)
    assert Survival().share is None
