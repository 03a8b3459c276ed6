"""``untaxed plan``: the memory of a job on a device that is not there, and what it recommends."""

from __future__ import annotations

from pathlib import Path

import pytest
from parts import ROOT

from pipeline import cli

JOB = ROOT / "jobs" / "r1-qwen-32b.yaml"


def planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str, job: Path = JOB
) -> tuple[int, str]:
    code = cli.main(["plan", "--job", str(job), "--runs", str(tmp_path / "runs"), *options])
    captured = capsys.readouterr()
    return code, captured.out + captured.err


def test_a_32b_job_is_planned_on_eight_gpus(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--engine", "fsdp", "--world-size", "8", "--device", "h100-80g")
    code, text = planned(tmp_path, capsys, *options)
    assert code == 0
    for words in (
        "fsdp x 8, h100-80g of 80.0 GB; checkpointing off, packs of 2,048 tokens",
        "host memory, pages of the base: 65.5",
        "recommended engine: ddp x 8, without checkpointing",
    ):
        assert words in text
    terms = ("weights", "adapter", "optimizer", "activations", "gathered weights", "gradients")
    rows = [line.split() for line in text.splitlines() if line.startswith("\u2502")]
    assert {word for row in rows for word in [" ".join(row[1:-3])]} >= set(terms)


def test_a_small_device_asks_for_checkpointing_and_qlora(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--engine", "fsdp", "--world-size", "4", "--device", "a10-24g")
    _, text = planned(tmp_path, capsys, *options)
    assert "recommended checkpointing: on (it does not fit without)" in text
    _, text = planned(tmp_path, capsys, "--world-size", "1", "--device", "a100-40g")
    assert "recommended engine: single x 1, QLoRA (sft.quantization=nf4)" in text


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--world-size", "0"), "--world-size 0: wanted at least 1"),
        (("--engine", "single", "--world-size", "2"), "--engine single with --world-size 2"),
        (("--device", "h100"), "--device h100: known are cpu, h200-141g"),
        (("--device-gb", "-1"), "--device-gb -1: wanted more than 0"),
        (("--world-size", "2", "--ranks-per-machine", "3"), "--ranks-per-machine 3: wanted 1 to 2"),
        (
            ("--engine", "zero3-offload", "--world-size", "2", "--set", "sft.quantization=nf4"),
            "zero3-offload; use single, ddp, fsdp",
        ),
    ],
)
def test_what_cannot_be_is_one_line(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    options: tuple[str, ...],
    words: str,
) -> None:
    code, text = planned(tmp_path, capsys, *options)
    assert code == 78
    assert words in text


def test_full_fine_tuning_is_said_not_to_be_planned(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = planned(tmp_path, capsys, "--set", "sft.lora=null")
    assert code == 0
    assert "memory: not planned, sft.lora is null" in text


def test_minutes_of_each_stage_are_printed_or_said_to_be_unknown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("UNTAXED_DATA", str(tmp_path))
    options = ("--world-size", "8", "--device", "h100-80g")
    code, text = planned(tmp_path, capsys, *options)
    assert code == 0
    rows = {line.split()[1]: line.split()[3:-1] for line in text.splitlines() if "\u2502" in line}
    assert float(rows["anchor"][-1]) > 1 and rows["sft"][0] == "8"
    assert rows["eval"][-3:] == ["not", "known", "yet"], "public sets are not in this data root"
    own = (
        'eval.suites=[{name: a, measures: harmful, source: "sample:harmful", max_new_tokens: 512}]'
    )
    gate = "eval.gate=[{metric: harmful_refusal, at_least: 0.9}]"
    _, text = planned(tmp_path, capsys, *options, "--set", own, "--set", gate)
    rows = {line.split()[1]: line.split()[3:-1] for line in text.splitlines() if "\u2502" in line}
    assert rows["baseline"] == rows["eval"] and float(rows["eval"][-1]) > 1
