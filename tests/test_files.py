"""Hashes that are carried over: only where nobody wrote to the file since it was hashed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from parts import seal_as

from pipeline import artifact as art
from pipeline import files
from pipeline.artifact import Hashed, hash_file


@pytest.fixture()
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    return path


def test_shared_bytes_are_the_same_bytes(file: Path, tmp_path: Path) -> None:
    target = tmp_path / "shared"
    assert files.link_or_copy(file, target)
    assert target.read_bytes() == b"content"
    with pytest.raises(FileExistsError):
        files.link_or_copy(file, target)


def test_where_nothing_can_be_shared_bytes_are_copied(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("another file system")

    monkeypatch.setattr(files.fcntl, "ioctl", refuse)
    monkeypatch.setattr(os, "link", refuse)
    assert not files.link_or_copy(file, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"content"
    assert not file.samefile(tmp_path / "copy")


def sealed(runs: Path) -> art.Artifact:
    def fill(folder: Path) -> None:
        (folder / "rows").write_bytes(b"one two")

    return seal_as(runs, "prep", fill)


def test_a_write_in_place_is_noticed(runs: Path) -> None:
    found = sealed(runs)
    assert found.untouched("rows")
    path = found.path("rows")
    path.chmod(0o644)
    path.chmod(0o444)
    os.link(path, runs / "link")
    assert found.untouched("rows"), "neither its mode nor another name is its content"
    (runs / "link").chmod(0o644)
    (runs / "link").write_bytes(b"two one")
    assert not found.untouched("rows")


def test_a_file_in_its_place_is_noticed(runs: Path) -> None:
    found = sealed(runs)
    shutil.copy2(found.path("rows"), runs / "other")
    os.replace(runs / "other", found.path("rows"))
    assert not found.untouched("rows")


@pytest.mark.parametrize("content", [None, "", "[]", '{"rows": 1}', '{"rows": ["a", 1, 2]}'])
def test_without_stamps_nothing_is_known(runs: Path, content: str | None) -> None:
    found = sealed(runs)
    stamps = found.folder / files.STAMPS
    stamps.unlink()
    if content is not None:
        stamps.write_text(content)
    assert not found.untouched("rows")
    assert art.verify(found.folder) == 1


@pytest.mark.parametrize("touched", [False, True])
def test_sealing_takes_a_hash_only_of_what_was_hashed(runs: Path, touched: bool) -> None:
    staging = art.stage_folder(runs / "prep-x")
    path = staging / "rows"
    path.write_bytes(b"one")
    given = Hashed(hash_file(path).model_copy(update={"sha256": "0" * 64}), files.stamp(path))
    if touched:
        os.utime(path, ns=(0, 0))
    found = art.seal(
        staging,
        runs / "prep-x",
        stage="prep",
        stage_version=1,
        key="x",
        recipe={},
        inputs={},
        facts={},
        seconds=0.0,
        hashed={"rows": given},
    )
    assert (found.manifest.files["rows"].sha256 == "0" * 64) != touched
