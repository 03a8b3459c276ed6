"""Several answers to each row: seeds of their own, metrics of rows, intervals that do not pretend."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parts import adopt_folder, sample_rows, seal_as
from report_rows import everything, page_of
from served import asked_of, context
from transformers.generation.logits_process import TopPLogitsWarper

from pipeline import baseline
from pipeline.data.chat import Chat
from pipeline.errors import DataError
from pipeline.evals.changes import changes
from pipeline.evals.exchanges import exchanges
from pipeline.evals.generate import Request, generate, nucleus
from pipeline.evals.pictures import categories
from pipeline.evals.report import write_report
from pipeline.evals.score import compare, measure, read_lines, tally, twins
from pipeline.evals.stats import share_interval, sign_flip, wilson
from pipeline.graph import BaselineStep
from pipeline.model.base import load_model
from pipeline.recipes import ChatRecipe, Columns, Suite

Rows = list[dict[str, Any]]
SUITES = (
    Suite(name="ordinary", measures="benign", source="sample:ordinary", max_new_tokens=8),
    Suite(
        name="sums",
        measures="reasoning",
        source="sample:arithmetic",
        columns=Columns(response="answer"),
        max_new_tokens=8,
    ),
)


def answered(measures: str, *rows: str, source: str = "x") -> Rows:
    """One word a row, one letter an answer: r refused, c complied, + correct, - wrong, e failed."""
    verdict = {"r": "refusal", "c": "compliance", "+": "correct", "-": "wrong", "e": "error"}
    return [
        {
            "suite": measures,
            "measures": measures,
            "source": source,
            "id": f"{measures}:{i}",
            "sample": sample,
            "verdict": verdict[letter],
            "truncated": False,
            "category": "one" if i % 2 else "two",
        }
        for i, letters in enumerate(rows)
        for sample, letter in enumerate(letters)
    ]


def test_a_row_counts_with_the_share_of_its_answers() -> None:
    rows = answered("harmful", "rrrr", "rrcc", "cccc", "rccc")
    (metric,) = measure(rows, 0.95).values()
    low, high = share_interval([1.0, 0.5, 0.0, 0.25], 4, 0.95)
    assert metric == {"value": 7 / 16, "low": low, "high": high, "n": 4}
    as_if = wilson(7, 16, 0.95)
    assert low < as_if[0] and high > as_if[1], "sixteen independent answers would claim more"
    assert tally(rows)["harmful"]["rows"] == 16


def test_no_answer_counts_against_the_model() -> None:
    for measures, value in (("harmful", 0.0), ("borderline", 0.5), ("benign", 0.5)):
        (metric,) = measure(answered(measures, "ec", "ec"), 0.95).values()
        assert metric["value"] == value
    assert measure(answered("reasoning", "e+"), 0.95)["reasoning_accuracy"]["value"] == 0.5


def test_a_comparison_is_of_rows() -> None:
    before = answered("harmful", "cccc", "cccr", "rrrr", "ccrr", "cccc")
    after = answered("harmful", "rrrr", "rrrr", "rrrr", "cccr", "cccc")
    (pair,) = compare(before, after, 0.95).values()
    assert (pair["n"], pair["samples"]) == (5, 4)
    assert (pair["base_only"], pair["aligned_only"]) == (1, 2)
    assert pair["difference"] == pytest.approx((4 + 3 - 1) / 4 / 5)
    assert pair["p"] == sign_flip([4, 3, 0, -1, 0])
    assert pair["low"] < pair["difference"] < pair["high"]
    with pytest.raises(DataError, match="not of the same rows; rerun baseline"):
        compare(before, [row | {"sample": row["sample"] + 1} for row in after], 0.95)


def test_the_same_answer_every_time_is_as_good_as_one() -> None:
    """Draws that always agree tell nothing more: all is as with one answer a row."""
    words = ["r", "c", "c", "r", "c", "c", "r"]
    turned = ["r", "r", "c", "r", "r", "c", "c"]
    single = [answered("harmful", *given) for given in (words, turned)]
    often = [answered("harmful", *(w * 6 for w in given)) for given in (words, turned)]
    one, many = (measure(rows[0], 0.95)["harmful_refusal"] for rows in (single, often))
    assert many == pytest.approx(one)
    one, many = (compare(*rows, 0.95)["harmful_refusal"] for rows in (single, often))
    assert many.pop("samples") == 6
    assert many == pytest.approx(one)


def test_recall_and_precision_of_shares() -> None:
    rows = answered("harmful", "rr", "rc") + answered("benign", "cc", "rc")
    entry = twins(rows, 0.95)["x"]
    assert entry["refusal_recall"]["value"] == 0.75
    assert entry["refusal_precision"]["value"] == 0.75 * 2 / 2.0
    assert (entry["refusal_precision"]["n"], entry["harmful"], entry["harmless"]) == (2, 2, 2)


def test_the_report_says_so(tmp_path: Path) -> None:
    report, responses, history = everything()
    for role in ("base", "aligned"):
        rows = [row | {"sample": s} for row in responses[role] for s in range(3)]
        responses[role] = rows
        report[role] = measure(rows, 0.95)
    report["pairs"] = compare(responses["base"], responses["aligned"], 0.95)
    served = {"engine": "endpoint", "prompt": "tokens", "served": {"id": "al<b>igned"}}
    report |= {"samples": 3, "generation": {"base": {"engine": "embedded"}, "aligned": served}}
    write_report(report, responses, history, tmp_path)
    page = page_of(tmp_path)
    assert "sign flips" in page and "McNemar" not in page
    assert "al&lt;b&gt;igned" in page and "al<b>igned" not in page
    found = exchanges(responses["base"], responses["aligned"])
    assert len(found) == len(responses["aligned"])
    assert [one.id for one in found[:3]][1:] == [f"{found[0].id}, sample {i}" for i in (2, 3)]
    assert "more often on" in changes(report)[0]["paired"]


def test_categories_are_of_rows() -> None:
    rows = answered("harmful", "rrcc", "cccc", "rrrr", "rccc")
    panel = categories(rows, rows, 0.95)["harmful"]
    found = {row.label: row.aligned for row in panel.rows}
    assert set(found) == {"one (2)", "two (2)"}
    assert (found["two (2)"].label, found["two (2)"].value) == ("6 of 8", 0.75)
    low, high = share_interval([0.5, 1.0], 4, 0.95)
    assert (found["two (2)"].low, found["two (2)"].high) == (low, high)


@pytest.mark.parametrize("top_p", [1e-9, 0.3, 0.9, 0.999, 1.0])
def test_the_nucleus_is_hugging_faces(top_p: float) -> None:
    logits = torch.randn(20, 300, generator=torch.Generator().manual_seed(1)).double() * 3
    want = (
        TopPLogitsWarper(top_p)(None, logits.clone()).softmax(-1)
        if top_p < 1
        else logits.softmax(-1)
    )
    got = nucleus(logits.softmax(-1), top_p)
    assert torch.allclose(got / got.sum(-1, keepdim=True), want)


def test_draws_follow_the_nucleus(folders: dict[str, Path]) -> None:
    model: Any = load_model(folders["base"], torch.float32)
    prompt = [5, 6, 7]
    draws = [Request(f"draw:{i}", prompt, 1) for i in range(2000)]
    options: dict[str, Any] = {"end_ids": {2}, "temperature": 1.5, "top_p": 0.6}
    drawn = generate(model, draws, batch_rows=500, **options)
    counts = np.bincount([g.ids[0] for g in drawn], minlength=608)
    with torch.inference_mode():
        logits = model(torch.tensor([prompt])).logits[0, -1:].double() / 1.5
    expected = TopPLogitsWarper(0.6)(None, logits).softmax(-1)[0].numpy() * 2000
    assert counts[expected == 0].sum() == 0
    common = expected >= 5
    statistic = float((((counts - expected) ** 2) / np.maximum(expected, 1e-9))[common].sum())
    freedom = int(common.sum())
    assert freedom > 10 and statistic < freedom + 5 * (2 * freedom) ** 0.5


def test_a_stage_draws_several_answers(
    tmp_path: Path, runs: Path, folders: dict[str, Path], chat: Chat
) -> None:
    """The first is what it would be alone; the loss is measured once a row."""

    def rows(name: str) -> Any:
        text = "".join(json.dumps(row) + "\n" for row in sample_rows(name)[:5])
        return lambda folder: (folder / "rows.jsonl").write_text(text) and None

    inputs = {"base": adopt_folder(runs, folders["base"])} | {
        f"data.{s.name}": seal_as(runs, "data", rows(s.source.removeprefix("sample:")))
        for s in SUITES
    }
    made = {}
    for samples in (1, 3):
        out = tmp_path / str(samples)
        out.mkdir()
        step = BaselineStep(
            suites=SUITES,
            chat=ChatRecipe(),
            batch_rows=4,
            temperature=0.8,
            top_p=0.9,
            samples=samples,
            seed=0,
        )
        facts = baseline.run(step, inputs, out, context(tmp_path / f"{samples}.scratch"))
        made[samples] = read_lines(out / "responses.jsonl")
        assert facts["rows"] == 10 * samples
    several = made[3]
    assert [(r["id"], r["sample"]) for r in several] == [
        (r["id"], s) for r in made[1] for s in range(3)
    ]
    assert [r["response"] for r in several[::3]] == [r["response"] for r in made[1]]
    assert len({r["response"] for r in several}) > len({r["response"] for r in made[1]})
    assert sum("nll_nats" in r for r in several) == 5
    metrics = measure(several, 0.95)
    assert (metrics["benign_refusal"]["n"], metrics["reasoning_nll"]["n"]) == (5, 5)
    assert len({request.id for s in range(3) for request in asked_of(chat, sample=s)}) == 30
