"""One pass over one file: the same bytes but for the updates, and damage on the way is found."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import DataError
from pipeline.model import shards
from pipeline.model.merging import FullUpdate, Plan
from pipeline.model.rewrite import rewrite
from pipeline.model.shards import Shard, read_shard


@pytest.fixture()
def parts(tmp_path: Path) -> tuple[Shard, Plan]:
    torch.manual_seed(0)
    tensors = {
        "kept": torch.randn(30, 20).bfloat16(),
        "moved": torch.randn(20, 10).bfloat16(),
        "scalar": torch.tensor(1.5),
        "whole": torch.arange(11),
        "empty": torch.empty(0, 4),
        "vector": torch.randn(17).half(),
    }
    save_file(tensors, tmp_path / "base.safetensors", metadata={"format": "pt"})
    save_file({"moved": tensors["moved"].float() + 0.1}, tmp_path / "trained.safetensors")
    update = FullUpdate(read_shard(tmp_path / "trained.safetensors"), "moved")
    return read_shard(tmp_path / "base.safetensors"), Plan("full", {"moved": update}, 1.0, None)


@pytest.fixture(params=[64, shards.BLOCK_BYTES], ids=["small-blocks", "one-block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", request.param)


def test_nothing_to_do_gives_the_same_bytes(
    parts: tuple[Shard, Plan], tmp_path: Path, blocks: None
) -> None:
    source, target = parts[0], tmp_path / "out"
    content = source.path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    found = rewrite(source, Plan("full", {}, 1.0, None), target, sha256=sha256)
    assert target.read_bytes() == content
    assert (found.size, found.sha256, found.unchanged) == (len(content), sha256, 6)
    assert found.unchanged_bytes == len(content) - len(source.raw)


@pytest.mark.parametrize("widen", [False, True])
def test_what_the_library_reads(
    parts: tuple[Shard, Plan], tmp_path: Path, blocks: None, widen: bool
) -> None:
    source, plan = parts
    target = tmp_path / "out"
    found = rewrite(source, plan, target, widen=widen)
    content = target.read_bytes()
    assert (found.size, found.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    trained = load_file(tmp_path / "trained.safetensors")["moved"]
    got = load_file(target)
    for name, want in load_file(source.path).items():
        want = trained.to(want.dtype) if name == "moved" and not widen else want
        want = trained if name == "moved" and widen else want
        assert torch.equal(got[name], want.float() if widen and want.dtype.itemsize == 2 else want)
    assert list(found.tensors) == ["moved"] and found.unchanged == 5
    assert found.tensors["moved"].share == pytest.approx(1, abs=0.05)


def test_never_writes_through_an_existing_file(parts: tuple[Shard, Plan]) -> None:
    before = parts[0].path.read_bytes()
    with pytest.raises(FileExistsError):
        rewrite(*parts, parts[0].path)
    assert parts[0].path.read_bytes() == before


@pytest.mark.parametrize("widen", [False, True])
@pytest.mark.parametrize(
    ("tensor", "message"),
    [("kept", "kept differs from the base"), ("moved", "moved reads back differently")],
)
def test_one_wrong_byte_on_the_way_is_found(
    parts: tuple[Shard, Plan],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    tensor: str,
    message: str,
    widen: bool,
) -> None:
    target = tmp_path / "out"
    rewrite(*parts, tmp_path / "good", widen=widen)
    wrong = read_shard(tmp_path / "good").entries[tensor].stop - 1
    real = os.pwrite

    def faulty(file: int, content: memoryview, at: int) -> int:
        """A disk that keeps one bit otherwise than it was told."""
        changed = bytearray(content)
        if at <= wrong < at + len(changed):
            changed[wrong - at] ^= 1
        return real(file, changed, at)

    monkeypatch.setattr(os, "pwrite", faulty)
    with pytest.raises(DataError, match=message):
        rewrite(*parts, target, widen=widen)


def test_a_disk_that_takes_little_at_a_time(
    parts: tuple[Shard, Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    rewrite(*parts, tmp_path / "good")
    monkeypatch.setattr(os, "pwrite", lambda file, content, at: real(file, content[:7], at))
    rewrite(*parts, tmp_path / "out")
    assert (tmp_path / "out").read_bytes() == (tmp_path / "good").read_bytes()


def test_a_base_that_changed_is_refused(parts: tuple[Shard, Plan], tmp_path: Path) -> None:
    with pytest.raises(DataError, match="content changed since it was sealed"):
        rewrite(*parts, tmp_path / "out", sha256="0" * 64)
