"""What ``untaxed doctor --image`` finds: good where it is as promised, and each way in which it is not."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from pipeline import image
from pipeline.errors import DataError
from pipeline.image import Check


def found() -> dict[str, Check]:
    return {check.name: check for check in image.examine()}


def test_outside_an_image_it_finds_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in image.WRITTEN:
        monkeypatch.delenv(name, raising=False)
    checks = found()
    assert not checks["root file system"].good and "--read-only" in checks["root file system"].said
    assert not checks["HF_HOME"].good and not checks["parts list"].good
    assert checks["entry point"].good and checks["device"].good
    assert all(checks[name].good for name in image.IMPORTED)


def test_a_package_that_is_not_as_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock = tmp_path / "requirements.txt"
    lock.write_text("# c\nrich==0.0.1 \\\n    --hash=sha256:00\nnot-there==1\npytest==9.2.0\n")
    monkeypatch.setattr(image, "LOCK", lock)
    check = found()["packages"]
    assert not check.good
    assert "of 3 as locked; not rich" in check.said and "not-there (missing)" in check.said


def test_a_place_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HF_HOME", str(file / "below"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    checks = found()
    assert not checks["HF_HOME"].good and checks["TMPDIR"].good


def test_what_is_bad_is_named_and_the_exit_code_tells() -> None:
    text = io.StringIO()

    def look() -> Iterator[Check]:
        yield Check("one", True, "fine")
        yield Check("two", False, "broken [so]")

    with pytest.raises(DataError, match="image: two: not as the image should be"):
        image.doctor(Console(file=text), look)
    assert text.getvalue().splitlines() == ["ok   one: fine", "bad  two: broken [so]"]
    assert image.doctor(Console(file=text), lambda: iter([Check("one", True, "")])) == 0
