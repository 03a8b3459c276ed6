"""``untaxed run`` on a tiny model: every stage once, then skipped, then only what a change touches."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from parts import ROOT

from pipeline import artifact as art
from pipeline import cli

STAGES = ["prep", "anchor", "pack", "sft", "merge", "baseline", "eval"]
SUITES = {"harmful": "harmful", "borderline": "borderline", "ordinary": "benign"}


def source(name: str, split: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "source": f"sample:{name}", "where": {"split": split}} | more


def tiny_job(base: Path) -> dict[str, Any]:
    suites = [
        source(name, "heldout", measures=measures, limit=6, max_new_tokens=8)
        for name, measures in SUITES.items()
    ]
    answer = {"response": "answer"}
    suites.append(
        source("arithmetic", "heldout", measures="reasoning", limit=6, columns=answer)
        | {"max_new_tokens": 8}
    )
    return {
        "name": "tiny",
        "base": {"source": str(base)},
        "prep": {
            "sources": [
                source("harmful", "train", kind="refusal", limit=12),
                source("borderline", "train", kind="anchor", limit=12),
            ]
        },
        "anchor": {"max_new_tokens": 8, "truncated": "keep", "drop_refusals": False},
        "sft": {
            "optimizer": {"learning_rate": 0.02},
            "batch": {"rows": 8},
            "epochs": 2,
            "precision": "fp32",
            "anchors": {"objective": "kl"},
        },
        "eval": {
            "suites": suites,
            "gate": [{"metric": "harmful_refusal", "at_least": 0.9, "min_rows": 5}],
        },
    }


class Workplace:
    """A job file and a runs folder, driven only by the console command."""

    def __init__(self, folder: Path, base: Path, store: Path | None = None) -> None:
        self.folder = folder
        self.job = folder / "tiny.yaml"
        self.runs = folder / "runs"
        if store:
            self.runs.mkdir()
            shutil.copyfile(store, self.runs / "mlflow.db")
        self.write(tiny_job(base))

    def write(self, job: dict[str, Any]) -> None:
        self.job.write_text(yaml.safe_dump(job))

    def untaxed(
        self, *arguments: str, program: tuple[str, ...] = ("-m", "pipeline.cli")
    ) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, *program, *arguments, "--runs", str(self.runs)]
        return subprocess.run(
            command,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "160"},
            capture_output=True,
            text=True,
            timeout=400,
        )

    def run(self, *more: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.untaxed("run", "--job", str(self.job), *more, **options)

    def sealed(self) -> dict[str, set[str]]:
        """Names of the visible artifacts of each stage."""
        folders = [path.parent.name for path in self.runs.glob("*/" + art.MANIFEST)]
        return {s: {f for f in folders if f.startswith(f"{s}-")} for s in STAGES}


@pytest.fixture(scope="module")
def first(
    tmp_path_factory: pytest.TempPathFactory, base_folder: Path, empty_database: Path
) -> tuple[Workplace, subprocess.CompletedProcess[str]]:
    workplace = Workplace(tmp_path_factory.mktemp("untaxed"), base_folder, empty_database)
    return workplace, workplace.run()


First = tuple[Workplace, subprocess.CompletedProcess[str]]


@pytest.mark.slow
def test_all_stages_and_the_report(first: First) -> None:
    workplace, done = first
    assert done.returncode == 0, done.stderr
    assert all(len(names) == 1 for names in workplace.sealed().values())
    report = json.loads((workplace.runs / "report.json").read_text())
    metrics = {"harmful_refusal", "borderline_refusal", "benign_refusal"}
    metrics |= {"reasoning_accuracy", "reasoning_nll"}
    for side in ("base", "aligned"):
        assert set(report[side]) == metrics
        assert all(set(m) == {"value", "low", "high", "n"} for m in report[side].values())
        assert all(m["n"] == 6 for m in report[side].values())
    assert report["job"] == "tiny" and report["engine"] == "single" and report["world_size"] == 1
    assert report["trainable_parameters"] == 6 * (64 + 128)
    assert set(report["seconds"]) == set(STAGES)
    assert report["gate"]["checks"][0]["metric"] == "harmful_refusal"
    assert (workplace.runs / "report.html").stat().st_size > 10_000
    for words in ("harmful refusal", "report.html", "mlflow ui --backend-store-uri"):
        assert words in done.stdout


@pytest.mark.slow
def test_a_second_run_skips_everything_without_torch_or_mlflow(first: First) -> None:
    workplace, _ = first
    before = workplace.sealed()
    code = (
        "import sys; from pipeline.cli import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'mlflow', 'transformers'} & set(sys.modules);"
        "sys.exit(str(heavy) if heavy else code)"
    )
    started = time.monotonic()
    again = workplace.run(program=("-c", code))
    assert again.returncode == 0, again.stderr
    # what a user is promised on two idle cores; a busy machine gets some slack
    assert time.monotonic() - started < 60
    assert again.stderr.count(": sealed (") == len(STAGES)
    assert workplace.sealed() == before


@pytest.mark.slow
def test_a_changed_gate_runs_eval_only_and_jobs_are_put_side_by_side(
    first: First, base_folder: Path
) -> None:
    workplace, _ = first
    before = workplace.sealed()
    strict, out = workplace.folder / "strict.yaml", workplace.folder / "side"
    job = tiny_job(base_folder) | {"name": "strict"}
    job["eval"]["gate"][0]["at_least"] = 1.0
    strict.write_text(yaml.safe_dump(job))
    both = ("--job", str(workplace.job), "--job", str(strict))
    early = workplace.untaxed("report", *both, "--out", str(out))
    assert early.returncode == 65 and not out.exists()
    (line,) = early.stderr.strip().splitlines()
    assert "strict.yaml: strict is not finished" in line and "eval to run: no artifact" in line
    assert f"untaxed run --job {strict} first" in line
    planned = workplace.untaxed("plan", "--job", str(strict))
    assert planned.returncode == 0, planned.stderr
    states = [line for line in planned.stdout.splitlines() if "to run" in line]
    assert len(states) == 1 and "eval" in states[0]
    assert "trainable parameters: 1,152" in planned.stdout  # of the adopted base's own shapes
    done = workplace.untaxed("run", "--job", str(strict))
    assert done.returncode == 0, done.stderr
    after = workplace.sealed()
    assert len(after.pop("eval") - before.pop("eval")) == 1
    assert after == before
    kept = (workplace.runs / "report.json").read_bytes()
    both = ("--compare", str(workplace.job), str(strict))
    done = workplace.untaxed("report", *both, "--out", str(out))
    assert done.returncode == 0, done.stderr
    assert str(out / "report.html") in done.stdout
    report = json.loads((out / "report.json").read_text())
    assert [report["job"], *(r["job"] for r in report["compare"])] == ["tiny", "strict"]
    assert set(report["seconds"]) == set(STAGES)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert 'id="jobs"' in page and 'id="data"' in page
    assert (workplace.runs / "report.json").read_bytes() == kept


@pytest.mark.slow
def test_a_changed_file_is_found_and_made_again(first: First) -> None:
    workplace, _ = first
    (name,) = workplace.sealed()["pack"]
    sheet = workplace.runs / name / "trained.txt"
    whole = sheet.read_bytes()
    assert workplace.untaxed("verify").returncode == 0
    sheet.chmod(0o644)
    sheet.write_bytes(b"x" * len(whole))
    found = workplace.untaxed("verify")
    sheet.write_bytes(whole)
    assert found.returncode == 65 and "trained.txt: content changed" in found.stderr
    assert len(found.stderr.strip().splitlines()) == 1


def test_a_failed_stage_gives_its_exit_code(
    tmp_path: Path, base_folder: Path, empty_database: Path
) -> None:
    workplace = Workplace(tmp_path, base_folder, empty_database)
    done = workplace.run("--set", "prep.sources.0.columns.prompt=question")
    assert done.returncode == 65
    assert "question" in done.stderr and "Traceback" not in done.stderr
    assert not workplace.sealed()["prep"] and not (workplace.runs / "report.json").exists()


def test_a_report_of_a_job_that_never_ran_is_one_line(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace = Workplace(tmp_path, base_folder)
    arguments = ["--job", str(workplace.job), "--runs", str(workplace.runs)]
    assert cli.main(["report", *arguments]) == 65 and not workplace.runs.exists()
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "tiny is not finished" in line and "untaxed run --job" in line


def test_plan_writes_nothing(
    tmp_path: Path, base_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    workplace = Workplace(tmp_path, base_folder)
    arguments = ["--job", str(workplace.job), "--runs", str(workplace.runs)]
    assert cli.main(["plan", *arguments]) == 0
    said = capsys.readouterr().out
    assert all(stage in said for stage in STAGES)
    assert not workplace.runs.exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("run", "--nproc", "0"), "--nproc 0"),
        (("run", "--nproc", "2", "--engine", "single"), "--engine single"),
        (("run", "--engine", "zero9"), "zero9"),
        (("plan", "--job", "missing.yaml"), "missing.yaml: no such job file"),
        (("report", "--job", "missing.yaml"), "missing.yaml: no such job file"),
        (("report", "--out", __file__), "is a file; wanted a folder"),
        (("walk",), "walk"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    tmp_path: Path,
    arguments: tuple[str, ...],
    words: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    runs = () if arguments[0] == "walk" else ("--runs", str(tmp_path / "runs"))
    try:
        code: Any = cli.main([*arguments, *runs])
    except SystemExit as error:  # of the option parser
        code = error.code
    assert code == 78
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and words in lines[0]
    assert not (tmp_path / "runs").exists()


def test_a_real_process_has_the_same_exit_code() -> None:
    command = [sys.executable, "-m", "pipeline.cli", "walk"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (78, "")
    assert len(done.stderr.splitlines()) == 1
