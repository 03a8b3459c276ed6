"""``untaxed doctor``: quiet on sound rows under every template, and finds each planted defect."""

from __future__ import annotations

import json
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import pytest
from chat_templates import CHATML, DEEPSEEK_R1, QWEN3, TEMPLATES
from defects import PLANTED, Patient, complying_refusal, row
from killable import prepare
from parts import ROOT

from pipeline import cli
from pipeline.data import checks
from pipeline.doctor import budgets, histogram
from pipeline.jobfile import load_job

SOUND = TEMPLATES | {"smollm2": replace(CHATML, bos="<|im_start|>")}  # begins every turn with it


@pytest.mark.parametrize("name", SOUND)
def test_sound_rows_are_left_in_peace(name: str, base_folder: Path) -> None:
    patient = Patient(base_folder, SOUND[name])
    assert [f for f in patient.findings() if f.level == "violation"] == []


def test_qwen3_with_thinking_switched_off(base_folder: Path) -> None:
    """Its prompt ends with an empty section: rows without thoughts are sound, others cannot be."""
    patient = Patient(base_folder, QWEN3, {"template_options": {"enable_thinking": False}})
    (found,) = (f for f in patient.findings() if f.level == "violation")
    assert (found.check, found.rows) == ("renders", ("a1",))
    patient.change(1, think=None)
    assert [f for f in patient.findings() if f.level == "violation"] == []


@pytest.mark.parametrize(
    ("plant", "check", "level", "rows"), PLANTED, ids=[entry[0].__name__ for entry in PLANTED]
)
def test_a_planted_defect_is_found(
    plant: Callable[[Patient], None],
    check: str,
    level: str,
    rows: tuple[str, ...],
    base_folder: Path,
) -> None:
    patient = Patient(base_folder)
    before = {(f.check, f.level) for f in patient.findings()}
    plant(patient)
    found = [f for f in patient.findings() if (f.check, f.level) == (check, level)]
    assert (check, level) not in before
    assert found, [f.check for f in patient.findings()]
    assert any(f.rows == rows for f in found), found
    assert all("\n" not in f.what for f in found)


def test_a_few_misjudged_rows_are_worth_a_look_and_no_more(base_folder: Path) -> None:
    patient = Patient(base_folder)
    for number in range(9):
        words = f"How do I break window number {number} of the {'abcdefghi'[number]} house?"
        patient.rows.append(
            ("train", row(f"m{number}", "refusal", words, "I won't help with that."))
        )
    complying_refusal(patient)
    (found,) = (f for f in patient.findings() if f.check == "says what it should")
    assert (found.level, found.rows) == ("note", ("r1",))


def test_deepseek_forgets_thoughts_and_training_does_not(base_folder: Path) -> None:
    """Its template drops the section of what was said before; the rendered target keeps it."""
    patient = Patient(base_folder, DEEPSEEK_R1)
    made, _ = checks.documents(patient.rows, patient.chat)
    (thought,) = (d for d in made if d.id == "a1")
    assert "Two twice." in patient.chat.tokenizer.decode(thought.target_ids)


def test_the_command_reads_a_job_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = prepare(tmp_path / "job", rows=40, seal=False)
    arguments = ["doctor", "--job", str(folder / "job.yaml"), "--runs", str(tmp_path / "runs")]
    assert cli.main(arguments) == 65  # its only suite is what it trains on
    said = capsys.readouterr().out
    assert "contamination" in said and "prep.decontaminate" in said
    assert ">>>" in said and "<<<" in said
    assert "tokens a row" in said
    assert not list((tmp_path / "runs").glob("pack-*"))
    job = json.loads((folder / "job.yaml").read_text())
    other = deepcopy(job)
    other["eval"]["suites"][0]["source"] = "sample:arithmetic"
    other["eval"]["suites"][0]["measures"] = "benign"
    (folder / "other.yaml").write_text(json.dumps(other))
    arguments[2] = str(folder / "other.yaml")
    assert cli.main(arguments) == 0
    assert "no rules broken" in capsys.readouterr().out


def test_answers_that_think_longer_than_a_suite_allows_are_told() -> None:
    """Also the suites and rows that a choice among trainings is made on."""
    made = [
        checks.Document(row(f"r{n}", "answer", "?", "!", think="Long."), "train", "?", [1], [2] * n)
        for n in (20, 40, 60)
    ]
    choose = (
        "choose={wanted: [{metric: harmful_refusal, at_least: 0.9}], dev: {max_new_tokens: 39}}"
    )
    job = load_job(ROOT / "jobs" / "quickstart.yaml", (choose,))
    (found,) = budgets(job, made)
    assert found.level == "violation" and "have more than 40 tokens" in found.what
    assert "suites harmful, borderline, ordinary, choose.dev allow fewer" in found.what
    assert list(budgets(job, made[:1])) == []
    assert list(budgets(job, [replace(d, row=d.row | {"think": None}) for d in made])) == []


def test_the_histogram_spans_from_the_least_to_the_most() -> None:
    assert histogram([1, 1, 1, 12], bins=3) == "9.3"
    assert histogram([5], bins=4) == "9..."
