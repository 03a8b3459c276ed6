"""The baseline stage on a small real model, against model.generate and the model's own loss."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from parts import sample_rows, seal_as
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.artifact import Artifact
from pipeline.baseline import run
from pipeline.errors import DataError, RecipeError
from pipeline.evals.numbers import judge_number
from pipeline.evals.score import measure, read_lines, tally
from pipeline.graph import BaselineStep
from pipeline.recipes import ChatRecipe, Columns, Suite
from pipeline.stage import Context

SOURCES = {"harmful": "harmful", "borderline": "borderline", "benign": "ordinary"}


def suite(measures: str, limit: int = 6, new: int = 30) -> Suite:
    name = SOURCES.get(measures, "arithmetic")
    return Suite(
        name=name,
        measures=measures,
        source=f"sample:{name}",
        columns=Columns(response="answer" if measures == "reasoning" else None),
        limit=limit,
        max_new_tokens=new,
    )


SUITES = tuple(suite(measures) for measures in ("harmful", "borderline", "benign", "reasoning"))


def inputs_of(runs: Path, base: Artifact) -> dict[str, Artifact]:
    def fill(name: str) -> Any:
        def write(folder: Path) -> None:
            text = "".join(json.dumps(row) + "\n" for row in sample_rows(name)[:20])
            (folder / "rows.jsonl").write_text(text)

        return write

    return {"base": base} | {f"data.{s.name}": seal_as(runs, "data", fill(s.name)) for s in SUITES}


def scored(
    tmp_path: Path, inputs: dict[str, Artifact], name: str = "out", **change: Any
) -> tuple[Path, dict[str, Any]]:
    out, scratch = tmp_path / name, tmp_path / f"{name}.scratch"
    out.mkdir()
    scratch.mkdir(exist_ok=True)
    step = BaselineStep(suites=SUITES, chat=ChatRecipe(), batch_rows=5, temperature=0.0, seed=0)
    step = step.model_copy(update=change)
    return out, run(step, inputs, out, Context(scratch=scratch))


def test_answers_and_losses_are_the_models(tmp_path: Path, runs: Path, base: Artifact) -> None:
    out, facts = scored(tmp_path, inputs_of(runs, base))
    rows = read_lines(out / "responses.jsonl")
    assert facts["rows"] == len(rows) == 24
    assert [row["suite"] for row in rows] == [s.name for s in SUITES for _ in range(6)]
    model = AutoModelForCausalLM.from_pretrained(base.folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    for row in rows:
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        prompt = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            ids = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=30,
                do_sample=False,
                eos_token_id=2,
                pad_token_id=0,
            )[0, prompt.shape[1] :].tolist()
        assert row["tokens"] == len(ids)
        assert row["response"] == tokenizer.decode(ids, skip_special_tokens=True)
        assert row["truncated"] == (ids[-1] != 2)
        if row["measures"] != "reasoning":
            assert "nll_nats" not in row
            continue
        worked = tokenizer(row["reference"], add_special_tokens=False)["input_ids"] + [2]
        whole = torch.cat([prompt, torch.tensor([worked])], dim=1)
        labels = torch.cat([torch.full_like(prompt, -100), torch.tensor([worked])], dim=1)
        with torch.inference_mode():
            mean = float(model(whole, labels=labels).loss)
        assert row["nll_tokens"] == len(worked)
        assert row["nll_nats"] == pytest.approx(mean * len(worked), rel=1e-5)
        truncated = ids[-1] != 2
        want = judge_number(row["response"], row["reference"], truncated=truncated)
        assert row["verdict"] == want


def test_scores_are_those_of_the_rows(tmp_path: Path, runs: Path, base: Artifact) -> None:
    out, facts = scored(tmp_path, inputs_of(runs, base))
    rows = read_lines(out / "responses.jsonl")
    scores = json.loads((out / "scores.json").read_text())
    assert scores == {
        "confidence": 0.95,
        "metrics": measure(rows, 0.95),
        "twins": {},
        "responses": tally(rows),
    }
    values = {name: metric["value"] for name, metric in scores["metrics"].items()}
    assert facts == values | {"rows": 24, "generation": {"engine": "embedded"}}
    assert set(values) == {
        "harmful_refusal",
        "borderline_refusal",
        "benign_refusal",
        "reasoning_accuracy",
        "reasoning_nll",
    }


def test_batch_size_changes_nothing_that_is_text(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    inputs = inputs_of(runs, base)
    written = []
    for name, rows in (("a", 1), ("b", 24)):
        out, _ = scored(tmp_path, inputs, name, batch_rows=rows)
        written.append(read_lines(out / "responses.jsonl"))
    for one, other in zip(*written, strict=True):
        one["nll_nats"], other["nll_nats"] = 0.0, 0.0
        assert one == other


def test_a_killed_baseline_goes_on(
    tmp_path: Path, runs: Path, base: Artifact, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipeline.evals import generate as generating

    inputs = inputs_of(runs, base)
    whole, _ = scored(tmp_path, inputs, "whole")
    real, asked = generating.generate, []

    def dies(model: Any, requests: Any, *, done: Any, **options: Any) -> Any:
        def stop(index: int, generation: Any) -> None:
            done(index, generation)
            asked.append(index)
            if len(asked) == 10:
                raise KeyboardInterrupt

        return real(model, requests, done=stop, **options)

    def counts(model: Any, requests: Any, **options: Any) -> Any:
        asked.append(len(requests))
        return real(model, requests, **options)

    (tmp_path / "first").mkdir()
    scratch = tmp_path / "again.scratch"
    scratch.mkdir()
    step = BaselineStep(suites=SUITES, chat=ChatRecipe(), batch_rows=5, temperature=0.0, seed=0)
    monkeypatch.setattr(generating, "generate", dies)
    with pytest.raises(KeyboardInterrupt):
        run(step, inputs, tmp_path / "first", Context(scratch=scratch))
    monkeypatch.setattr(generating, "generate", counts)
    out, _ = scored(tmp_path, inputs, "again")
    assert asked[10:] == [14]
    assert (out / "responses.jsonl").read_bytes() == (whole / "responses.jsonl").read_bytes()


def test_a_template_that_opens_the_think_section(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    """All that a short chain holds is thought: no answer, so no verdict on one; and the worked
    answer is scored after the section is closed."""
    chat = ChatRecipe(generation_prompt="<|im_start|>assistant\n<think>\n")
    out, _ = scored(tmp_path, inputs_of(runs, base), chat=chat)
    rows = read_lines(out / "responses.jsonl")
    cut = [row for row in rows if row["truncated"]]
    assert cut
    for row in cut:
        assert row["response"] == ""
        assert row["verdict"] == "truncated"
        assert row["think"]
    tokenizer = AutoTokenizer.from_pretrained(base.folder)
    for row in (row for row in rows if row["measures"] == "reasoning"):
        text = f"\n</think>\n\n{row['reference']}"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert row["nll_tokens"] == len(ids) + 1


def test_what_cannot_be_measured_is_refused_before_generating(
    tmp_path: Path, runs: Path, base: Artifact
) -> None:
    inputs = inputs_of(runs, base)
    bare = SUITES[3].model_copy(update={"columns": Columns()})
    with pytest.raises(RecipeError, match="names no worked answer"):
        scored(tmp_path, inputs, "bare", suites=(bare,))
    with pytest.raises(RecipeError, match="generation_prompt is empty"):
        scored(tmp_path, inputs, "empty", chat=ChatRecipe(generation_prompt=""))
    with pytest.raises(DataError, match="more than the model's 512 positions"):
        scored(tmp_path, inputs, "long", suites=(suite("harmful", new=510),))
