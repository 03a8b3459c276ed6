"""Whatever is wrong with what a person gives: one line, the right exit code, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bad_checks import CHECKS
from bad_data import BASES, DATA
from bad_endpoint import ENDPOINTS
from bad_jobs import JOBS
from bad_machine import AROUND
from bad_stages import STAGES
from breaking import JOB, Case, Place, make_place, start

from pipeline import artifact as art
from pipeline import cli, stage

CASES: list[Case] = [*JOBS, *DATA, *CHECKS, *BASES, *STAGES, *AROUND, *ENDPOINTS]
LEFT_BEHIND = re.compile(
    r"\.(.+)\.(lock|scratch)|logs|adopted|(base|data)-[0-9a-f]{16}|\.?mlflow\S*"
)


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory, empty_database: Path) -> Path:
    """The project that every case gets a copy of."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    # Its linker probes write past pytest's capture; they run once, and so before all cases.
    assert deepspeed.ops.__compatible_ops__
    folder = tmp_path_factory.mktemp("project")
    (folder / "runs").mkdir()
    shutil.copyfile(empty_database, folder / "runs" / "mlflow.db")
    with pytest.MonkeyPatch.context() as patch, handlers_kept():
        patch.setenv("UNTAXED_DATA", str(folder))
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        make_place(folder)
    return folder


@contextmanager
def handlers_kept() -> Iterator[None]:
    """Stages install signal handlers, for the process is theirs; this one is not."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture()
def place(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    folder = tmp_path / "project"
    shutil.copytree(project, folder)
    monkeypatch.setenv("UNTAXED_DATA", str(folder))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # the store lies among the artifacts
    monkeypatch.delenv(stage.STATUS_FILE, raising=False)
    made = Place(folder, json.loads(json.dumps(JOB)))
    with made.stack, handlers_kept():
        yield made


def outcome(case: Case, arguments: list[str]) -> int:
    """The exit code of the stage (or of the console command) that the case is about."""
    try:
        if case.stage.startswith("untaxed "):
            return cli.main([case.stage.removeprefix("untaxed "), *arguments])
        if case.run is not None:
            return stage.main(case.stage, case.run, arguments)
        return start(case.stage, arguments)
    except SystemExit as error:  # of the option parser
        assert isinstance(error.code, int)
        return error.code


def said(text: str, case: Case) -> str:
    """The one line on standard error after what the stage said while it ran.

    Where nothing can be written, run tracking may say so too, in a line of its own.
    """
    name = case.stage.partition(" ")[0]
    running = re.compile(rf"{name}: {name}-[0-9a-f]{{16}}|tracking: .* recorded later, from .*")
    lines = [line for line in text.splitlines() if line and not running.fullmatch(line)]
    assert len(lines) == case.progress + 1, f"wanted one line, got:\n{text}"
    assert re.match(rf"{name}: (?!{name}: )", lines[-1])
    return lines[-1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_bad_input(case: Case, place: Place, capfd: pytest.CaptureFixture[str]) -> None:
    more = case.broken(place) or []
    before = place.snapshot()
    arguments = ["--runs", str(place.runs), *more]
    if "--job" not in more and case.stage != "untaxed verify":
        arguments += ["--job", str(place.write_job())]
    capfd.readouterr()
    code = outcome(case, arguments)
    line = said(capfd.readouterr().err, case)
    assert code == case.code, line
    for word in case.says:
        assert word in line, f"{word!r} is not in: {line}"
    assert "Traceback" not in line
    assert line.isascii() and len(line) < 1200
    whole(before, place)


def whole(before: dict[str, bytes], place: Place) -> None:
    """No staging folder is left, what was sealed is as it was, and what is new is whole."""
    assert not list(place.folder.rglob("*.tmp"))
    after = place.snapshot()
    assert {name: after[name] for name in before} == before
    for name in set(after) - set(before):
        assert LEFT_BEHIND.fullmatch(name), f"{name} is left behind"
        if name.startswith(("base-", "data-")):
            art.verify(place.runs / name)


def test_the_table_is_worth_its_name() -> None:
    assert len(CASES) >= 45
    assert len({case.name for case in CASES}) == len(CASES)
    assert {case.code for case in CASES} == {1, 65, 78, 143}
    for case in CASES:
        assert len(case.says) >= 2, f"{case.name}: say more of what the line must hold"


def test_the_launcher_hears_of_the_code(
    place: Place, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Also when the options are wrong; the first process that fails has the say."""
    for number, (option, code) in enumerate((("--nonsense", 78), ("--rebuild", 65))):
        status = place.folder / f"status-{number}"
        monkeypatch.setenv(stage.STATUS_FILE, str(status))
        place.line(3, "{")
        arguments = ["--job", str(place.write_job()), "--runs", str(place.runs), option]
        case = Case("", "prep", code, lambda p: None, ())
        assert outcome(case, arguments) == code
        assert outcome(case, [*arguments, "--job", "nowhere.yaml"]) == 78
        assert status.read_text() == str(code)
    capfd.readouterr()


def test_a_real_process_says_one_line_too(place: Place) -> None:
    """As a person would type it: nothing else on standard error, nothing on standard output."""
    place.unseal("prep")
    job = str(place.write_job())
    script = Path(stage.__file__).parent / "pack.py"
    done = subprocess.run(
        [sys.executable, str(script), "--job", job, "--runs", str(place.runs)],
        capture_output=True,
        text=True,
        env=os.environ | {"UNTAXED_DATA": str(place.folder)},
        cwd=place.folder,
    )
    assert (done.returncode, done.stdout) == (65, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("pack: needs prep (prep-") and line.endswith("run prep first")
