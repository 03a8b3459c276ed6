"""Promotion, rollback and lineage, by the command line, in the registry of a real MLflow."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tracked import STATED, Play, Records, make_runs

from pipeline import artifact as art
from pipeline import cli, origin
from pipeline.graph import stages_of

pytest_plugins = ("tracked",)
MODEL = "untaxed-tiny"


@pytest.fixture()
def says(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """(exit code, what was said) of a command on ``runs``."""

    def run(runs: Path, *words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = cli.main([*words, "--runs", str(runs)])
        said = capsys.readouterr()
        return code, (said.err if code else said.out).strip()

    return run


Says = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, adopted: Path, empty_database: Path, base_folder: Path
) -> Path:
    """Version 1 was released, 2 is; 3 did not pass."""
    runs = tmp_path_factory.mktemp("made") / "runs"
    make_runs(runs, adopted, empty_database)
    with pytest.MonkeyPatch.context() as patch:
        for name in STATED:
            patch.delenv(name, raising=False)
        job = Play(runs, base_folder)
        job.through(*stages_of(job.job), gate_passed=True)
        for mark, passed in ((" second", True), (" third", False)):
            job.finish("merge", mark=mark)
            job.finish("eval", gate_passed=passed)
        aliases = Records(job.runs).aliases()
    assert aliases == {"candidate": "3", "released": "2", "previous": "1"}
    return runs


@pytest.fixture()
def three(tmp_path: Path, made: Path, own_store: None) -> Path:
    """A copy of those runs."""
    return Path(shutil.copytree(made, tmp_path / "runs"))


def test_rollback_releases_what_was_released_before(three: Path, says: Says) -> None:
    code, said = says(three, "rollback", MODEL)
    assert (code, said) == (0, f"{MODEL}/1 is released; {MODEL}/2 is taken back")
    assert Records(three).aliases() == {"candidate": "3", "released": "1"}
    code, said = says(three, "rollback", MODEL)
    assert code == 65 and "has no alias previous; it has candidate (3), released (1)" in said
    code, said = says(three, "promote", f"{MODEL}/2")
    assert (code, said) == (0, f"{MODEL}/2 is released, after 1")
    assert Records(three).aliases() == {"candidate": "3", "released": "2", "previous": "1"}
    code, said = says(three, "promote", f"{MODEL}@released")
    assert (code, said) == (0, f"{MODEL}/2 is released already")


def test_without_a_passed_gate_only_a_recorded_reason_releases(three: Path, says: Says) -> None:
    code, said = says(three, "promote", MODEL)
    assert code == 78 and f"{MODEL}/3: its gate did not pass" in said
    for half in (["--override"], ["--why", "urgent"], ["--override", "--why", " "]):
        code, said = says(three, "promote", MODEL, *half)
        assert code == 78 and "--override and --why REASON go together" in said
    records = Records(three)
    assert records.aliases()["released"] == "2"
    code, said = says(three, "promote", MODEL, "--override", "--why", "a demonstration")
    assert (code, said) == (0, f"{MODEL}/3 is released, after 2")
    assert records.aliases() == {"candidate": "3", "released": "3", "previous": "2"}
    recorded = json.loads(records.versions()[2].tags["untaxed.override"])
    assert recorded["why"] == "a demonstration" and recorded["what"] == "promote"
    assert recorded["by"] and recorded["at"]
    _, said = says(three, "lineage", MODEL)
    assert "released by override: a demonstration (" in said


def test_a_model_that_was_never_evaluated(play: Callable[..., Play], says: Says) -> None:
    job = play()
    job.through("prep", "anchor", "pack", "sft", "merge")
    code, said = says(job.runs, "promote", MODEL)
    assert code == 78 and "its gate was never asked; let untaxed run evaluate it" in said


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("promote", "untaxed-other"), 65, "untaxed-other: no such model; merge registers"),
        (("promote", f"{MODEL}/9"), 65, f"{MODEL}: has no version 9; it has 1, 2, 3"),
        (("promote", f"{MODEL}@best"), 65, f"{MODEL}: has no alias best; it has candidate (3)"),
        (("promote", f"{MODEL}@"), 78, "wanted NAME, NAME@ALIAS or NAME/VERSION"),
        (("rollback", f"{MODEL}/2"), 78, "wanted NAME"),
        (("lineage", "a/b/c"), 78, "wanted NAME, NAME@ALIAS or NAME/VERSION"),
    ],
)
def test_models_that_are_not_there(
    three: Path, says: Says, words: tuple[str, ...], code: int, said: str
) -> None:
    got, line = says(three, *words)
    assert got == code and said in line and "\n" not in line
    assert Records(three).aliases()["released"] == "2"


def test_lineage_goes_back_to_rows_code_and_image(
    play: Callable[..., Play], says: Says, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(origin.REVISION, "0123456789abcdef0123456789abcdef01234567")
    monkeypatch.setenv(origin.IMAGE, "registry.example/untaxed@sha256:feed")
    job = play()
    job.through(*stages_of(job.job), gate_passed=True)
    merged = art.open_artifact(job.planned["merge"].folder)
    code, text = says(job.runs, "lineage", f"{MODEL}@released", "--json")
    found = json.loads(text)
    assert code == 0 and found["model"] == f"{MODEL}/1"
    assert found["aliases"] == ["candidate", "released"]
    assert (found["digest"], found["gate"], found["override"]) == (merged.digest, "passed", None)
    assert [stage["stage"] for stage in found["stages"]] == stages_of(job.job)
    for stage in found["stages"]:
        planned = job.planned[stage["stage"]]
        assert (stage["key"], stage["status"]) == (planned.key, "FINISHED")
        assert stage["digest"] == art.open_artifact(planned.folder).digest
        assert stage["revision"] == "0123456789abcdef0123456789abcdef01234567"
        assert stage["image"] == "registry.example/untaxed@sha256:feed"
    rows = {row["name"]: row for row in found["stages"][0]["rows"]}
    sources = {source.source for source in job.job.prep.sources}
    assert {row["source"] for row in rows.values()} >= sources
    for name, row in rows.items():
        data = art.open_artifact(job.planned["prep"].upstream[f"rows.{name}"])
        assert data.digest.startswith(row["digest"])
    _, lines = says(job.runs, "lineage", MODEL)
    assert lines.startswith(f"{MODEL}/1 (candidate, released)  gate passed")
    assert "code 0123456789ab  image registry.example/untaxed@sha256:feed" in lines


def test_the_revision_is_that_of_the_checkout(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(origin.REVISION, raising=False)
    found = origin.revision()
    if (origin.ROOT / ".git").exists():
        assert found is not None and len(found.removesuffix("-dirty")) == 40
    else:
        assert found is None
