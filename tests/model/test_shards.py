"""Reading safetensors by byte ranges, against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from parts import make_model
from safetensors.torch import load_file, save_file

from pipeline.errors import DataError
from pipeline.model import shards
from pipeline.model.shards import open_checkpoint, read_shard, widened


@pytest.fixture()
def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        "b.half": torch.randn(7, 5, generator=generator).half(),
        "a.bf16": torch.randn(300, 40, generator=generator).bfloat16(),
        "c.single": torch.randn(3, 4, 5, generator=generator),
        "d.scalar": torch.tensor(1.5),
        "e.integers": torch.arange(11),
        "f.empty": torch.empty(0, 4),
        "g.vector": torch.randn(17, generator=generator).bfloat16(),
    }


@pytest.fixture()
def file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(tensors, path, metadata={"format": "pt", "note": "caf\u00e9"})
    return path


def test_reads_what_the_library_reads(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    shard = read_shard(file)
    assert shard.metadata == {"format": "pt", "note": "caf\u00e9"}
    assert set(shard.entries) == set(tensors)
    for name, want in load_file(file).items():
        if want.is_floating_point():
            got = shard.read(name)
            assert got.dtype == want.dtype
            assert torch.equal(got, want)
    assert torch.equal(shard.read("a.bf16", 17, 212), tensors["a.bf16"][17:212])


def test_blocks_cover_every_byte_once(
    file: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_BYTES", 1000)
    shard = read_shard(file)
    for name, want in tensors.items():
        blocks = list(shard.blocks(name))
        joined = b"".join(bytes(buffer) for _, _, buffer in blocks)
        assert joined == want.reshape(-1).view(torch.uint8).numpy().tobytes()
        assert [b[0] for b in blocks[1:]] == [b[1] for b in blocks[:-1]]
    assert len(list(shard.blocks("a.bf16"))) == 25  # 80 bytes a row, 12 rows a block


def test_widened_header_is_read_by_the_library(file: Path, tmp_path: Path) -> None:
    shard = read_shard(file)
    body = b""
    for name in shard.in_file_order():
        raw = b"".join(bytes(buffer) for _, _, buffer in shard.blocks(name))
        narrow = shard.entries[name].dtype in shards.NARROW
        body += shards.as_bytes(shard.read(name).float()) if narrow else raw
    wide = tmp_path / "wide.safetensors"
    wide.write_bytes(widened(shard) + body)
    assert list(read_shard(wide).entries) == list(shard.entries)
    for name, want in load_file(file).items():
        got = load_file(wide)[name]
        assert torch.equal(got, want.float() if want.is_floating_point() else want)


def rebuilt(header: object, body: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def one(**change: object) -> dict[str, object]:
    return {"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | change}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "header length 0 in a file of 0 bytes"),
        (b"\xff" * 40, "header length"),
        (rebuilt(one(), b"\0" * 7), "its header promises"),
        (rebuilt(one(), b"\0" * 9), "its header promises"),
        (rebuilt(b"not json!", b""), "header is not JSON"),
        (rebuilt(b"\xff\xfe{}", b""), "header is not JSON"),
        (rebuilt([1, 2], b""), "not a JSON object"),
        (rebuilt(one(dtype="F33"), b"\0" * 8), "entry of t is not understood"),
        (rebuilt(one(shape=[3]), b"\0" * 8), "t has 8 bytes for F32"),
        (rebuilt(one(data_offsets=[4, 12]), b"\0" * 12), "t starts at byte"),
        (rebuilt(b'{"t":1, "t":2}', b""), "t is there twice"),
    ],
)
def test_damaged_files_are_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_shard(path)
    assert str(path) in str(caught.value)


def test_a_file_cut_anywhere_is_refused(file: Path) -> None:
    whole = file.read_bytes()
    for length in (4, 8, 100, len(whole) // 2, len(whole) - 1):
        file.write_bytes(whole[:length])
        with pytest.raises(DataError, match="damaged or cut short"):
            read_shard(file)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, num_hidden_layers=2)
    return folder


def copy(saved: Path, target: Path) -> Path:
    target.mkdir()
    for path in saved.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_sharded_folder_as_transformers_writes_it(saved: Path) -> None:
    checkpoint = open_checkpoint(saved)
    assert checkpoint.indexed
    assert len(checkpoint.shards) > 2
    want = {k: v for path in saved.glob("*.safetensors") for k, v in load_file(path).items()}
    assert set(checkpoint.where) == set(want)
    assert all(torch.equal(checkpoint.read(name), value) for name, value in want.items())
    assert checkpoint.parameters == sum(value.numel() for value in want.values())
    with pytest.raises(DataError, match="holds no tensor nothing"):
        checkpoint.entry("nothing")


def test_folders_that_do_not_say_what_they_hold(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has neither"):
        open_checkpoint(tmp_path / "empty")
    both = copy(saved, tmp_path / "both")
    save_file({"t": torch.zeros(1)}, both / "model.safetensors")
    with pytest.raises(DataError, match="has both"):
        open_checkpoint(both)
    missing = copy(saved, tmp_path / "missing")
    next(missing.glob("*00002*")).unlink()
    with pytest.raises(DataError, match="no such weights file"):
        open_checkpoint(missing)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda m: m | {"ghost.weight": min(m.values())}, "ghost.weight should be in"),
        (lambda m: m | {"ghost.weight": "../x.safetensors"}, "a file of its own folder"),
        (lambda m: dict.fromkeys(m, 3), "names 3, wanted a file"),
        (lambda m: list(m), "not a safetensors index"),
    ],
)
def test_an_index_that_lies(saved: Path, tmp_path: Path, edit, message: str) -> None:
    folder = copy(saved, tmp_path / "model")
    index = folder / shards.INDEX
    tree = json.loads(index.read_text())
    tree["weight_map"] = edit(tree["weight_map"])
    index.write_text(json.dumps(tree))
    with pytest.raises(DataError, match=message):
        open_checkpoint(folder)


def test_a_tensor_in_two_files(saved: Path, tmp_path: Path) -> None:
    folder = copy(saved, tmp_path / "model")
    files = sorted(folder.glob("*.safetensors"))
    name = next(iter(load_file(files[0])))
    save_file(load_file(files[1]) | {name: torch.zeros(1)}, files[1])
    with pytest.raises(DataError, match=f"{name} is in both"):
        open_checkpoint(folder)
