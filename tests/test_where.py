"""``untaxed where``: the folder of what is sealed, and one line for what is not."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from parts import ROOT, make_model, make_tokenizer

from pipeline import cli, prep
from pipeline.stage import main


@pytest.fixture()
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """A job on a small base, and where its artifacts go."""
    tree = yaml.safe_load((ROOT / "jobs" / "quickstart.yaml").read_text(encoding="utf-8"))
    tree["base"] = {"source": "base"}
    make_model(tmp_path / "base")
    make_tokenizer(tmp_path / "base")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(tree))
    monkeypatch.setenv("UNTAXED_DATA", str(tmp_path))
    return ("--job", str(tmp_path / "job.yaml"), "--runs", str(tmp_path / "runs"))


def test_what_is_sealed_has_a_folder(
    words: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for stage, said in (("base", "base: not adopted yet; run prep first"), ("prep", "to run")):
        assert cli.main(["where", stage, *words]) == 65
        line = capsys.readouterr().err
        assert said in line and line.count("\n") == 1
    assert main("prep", prep.run, words) == 0
    capsys.readouterr()
    for stage, file in (("base", "config.json"), ("prep", "train.jsonl")):
        assert cli.main(["where", stage, *words]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        assert Path(line).parent == tmp_path / "runs" and Path(line).name.startswith(f"{stage}-")
        assert (Path(line) / file).is_file()
    assert cli.main(["where", "merge", *words]) == 65
    assert "merge: to run" in capsys.readouterr().err
    assert cli.main(["where", "bake", *words]) == 78
    assert "has no such stage; wanted one of base, prep, anchor" in capsys.readouterr().err
