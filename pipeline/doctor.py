"""``untaxed doctor``: read what a job would train on, as tokens, before any GPU minute is spent.

Rows come from the sealed anchor stage, else from prep, which runs first where it is not sealed.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline import artifact as art
from pipeline.data import checks
from pipeline.data.chat import Chat
from pipeline.data.checks import Document, Finding, Model
from pipeline.data.contamination import Text, texts_of
from pipeline.data.rows import read_rows
from pipeline.data.templates import check_chat
from pipeline.evals.judge import judge_refusal
from pipeline.graph import Planned, Workspace, plan_job
from pipeline.launching import launch_stage
from pipeline.model.base import load_tokenizer
from pipeline.recipes import Job

SHOWN_ROWS = 8
SHOWN_CHARACTERS = 700
SPLITS = ("train", "dev")


@dataclass(frozen=True)
class Diagnosis:
    """All that was found, and the documents it was found in."""

    findings: list[Finding]
    documents: list[Document]
    chat: Chat

    @property
    def violations(self) -> list[Finding]:
        return [f for f in self.findings if f.level == "violation"]


def examine(job: Job, workspace: Workspace) -> Diagnosis:
    """Check everything about the training text of ``job``, whose prep stage is sealed.

    Raises:
        DataError: base or data that cannot be read at all.
    """
    planned = plan_job(job, workspace, adopt=True)
    base = planned["pack"].upstream["base"]
    chat, model = Chat(load_tokenizer(base), job.chat), _model(base)
    rows = list(_rows(planned))
    made, findings = checks.documents(rows, chat)
    findings += check_chat(chat, model)
    findings += checks.check_documents(made, chat, model, job.pack.max_length)
    near = job.prep.near_duplicate_threshold
    findings += checks.check_sets(made, _held_out(job, planned), judge_refusal, near)
    findings += budgets(job, made)
    return Diagnosis(findings, made, chat)


def _rows(planned: Mapping[str, Planned]) -> Iterator[tuple[str, dict[str, Any]]]:
    answered = "anchor" in planned and planned["anchor"].state() == "sealed"
    return _read(planned["anchor" if answered else "prep"].folder)


def _read(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for split in SPLITS:
        for line in (folder / f"{split}.jsonl").read_text(encoding="utf-8").splitlines():
            yield split, json.loads(line)


def _model(base: Path) -> Model:
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    stated = base / "generation_config.json"
    ends = (
        json.loads(stated.read_text(encoding="utf-8")).get("eos_token_id")
        if stated.exists()
        else None
    )
    ends = config.get("eos_token_id") if ends is None else ends
    listed = [ends] if isinstance(ends, int) else list(ends or ())
    return Model(
        int(config["vocab_size"]), config.get("max_position_embeddings"), frozenset(listed)
    )


def _held_out(job: Job, planned: Mapping[str, Planned]) -> dict[str, list[Text]]:
    inputs = planned["eval"].upstream
    return {
        suite.name: texts_of(
            read_rows(art.open_artifact(inputs[f"data.{suite.name}"]), suite.whole)
        )
        for suite in job.eval.suites
    }


def budgets(job: Job, made: Sequence[Document]) -> Iterator[Finding]:
    """Suites whose answers would be cut off before the model has done thinking."""
    answered = [d for d in made if d.row.get("response") is not None]  # a primer is no answer
    thinking = [len(d.target_ids or ()) for d in answered if d.row.get("think")]
    if not thinking:
        return
    usual = statistics.median(thinking)
    limits = {suite.name: suite.max_new_tokens for suite in job.eval.suites}
    if job.choose is not None:
        limits |= {s.name: s.max_new_tokens for s in job.choose.suites}
        if job.choose.dev is not None and job.choose.dev.max_new_tokens is not None:
            limits["choose.dev"] = job.choose.dev.max_new_tokens
    short = [name for name, limit in limits.items() if limit < usual]
    if short:
        yield Finding(
            "budget",
            "violation",
            f"half of the answers with thoughts have more than {usual:.0f} tokens, and the suites"
            f" {', '.join(short)} allow fewer: most would be cut off; raise max_new_tokens",
        )


def doctor(options: argparse.Namespace, jobs: Sequence[tuple[Path, Job]]) -> int:
    """Print samples, lengths and findings of each job; exit code 65 when a rule is broken."""
    console, broken = Console(), 0
    for path, job in jobs:
        workspace = Workspace(options.runs.resolve())
        if plan_job(job, workspace, adopt=False)["prep"].state() != "sealed":
            code = launch_stage("prep", path, options)
            if code:
                return code
        found = examine(job, workspace)
        console.rule(f"{job.name}  {path}", align="left")
        _show_samples(found.documents, found.chat, options.samples, console)
        _show_lengths(found.documents, console)
        _show_findings(found, console)
        broken += len(found.violations)
    return 65 if broken else 0


def _show_samples(made: Sequence[Document], chat: Chat, samples: int, console: Console) -> None:
    """The first documents of each source: what the model reads, and what it is trained to write."""
    shown: Counter[str] = Counter()
    for document in made:
        source = str(document.row["source"])
        if document.split != "train" or shown[source] >= samples:
            continue
        shown[source] += 1
        text = _shortened(document.prompt)
        target = "(the base will answer)"
        if document.target_ids is not None:
            target = _shortened(chat.tokenizer.decode(document.target_ids))
        title = f"--- {document.id} ({source}, {document.row['kind']})"
        for line, style in ((title, "dim"), (f"{text}>>>{target}<<<", "")):
            console.print(
                line, style=style, markup=False, highlight=False, emoji=False, soft_wrap=True
            )


def _shortened(text: str) -> str:
    if len(text) <= SHOWN_CHARACTERS:
        return text
    return f"{text[:SHOWN_CHARACTERS]} [... {len(text) - SHOWN_CHARACTERS} characters more]"


def _show_lengths(made: Sequence[Document], console: Console) -> None:
    table = Table(title="tokens a row", title_justify="left")
    for column in ("source", "rows", "shortest", "median", "longest", "trained", "lengths"):
        table.add_column(column, justify="left" if column in ("source", "lengths") else "right")
    sources: dict[str, list[Document]] = defaultdict(list)
    for document in made:
        sources[str(document.row["source"])].append(document)
    for source, group in sources.items():
        lengths = [d.tokens for d in group]
        answered = [d for d in group if d.target_ids is not None]
        trained = sum(len(d.target_ids or ()) for d in answered)
        share = f"{trained / sum(d.tokens for d in answered):.0%}" if answered else "-"
        table.add_row(
            source,
            str(len(group)),
            str(min(lengths)),
            f"{statistics.median(lengths):.0f}",
            str(max(lengths)),
            share,
            histogram(lengths),
        )
    console.print(table)


def histogram(values: Sequence[int], bins: int = 12) -> str:
    """Counts of ``values`` in equal steps from the least to the most, as heights 0 to 9."""
    low, high = min(values), max(values)
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, (value - low) * bins // max(1, high - low))] += 1
    most = max(counts)
    return "".join("." if not n else str(max(1, round(9 * n / most))) for n in counts)


def _show_findings(found: Diagnosis, console: Console) -> None:
    for finding in sorted(found.findings, key=lambda f: f.level == "note"):
        rows = ""
        if finding.rows:
            more = (
                f" and {len(finding.rows) - SHOWN_ROWS} more"
                if len(finding.rows) > SHOWN_ROWS
                else ""
            )
            rows = f" [{len(finding.rows)} rows: {', '.join(finding.rows[:SHOWN_ROWS])}{more}]"
        style = "red" if finding.level == "violation" else "yellow"
        console.print(
            f"{finding.level}: {finding.check}: {finding.what}{rows}",
            style=style,
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
    unanswered = sum(d.target_ids is None for d in found.documents)
    if unanswered:
        console.print(
            f"{unanswered} anchors have no answer yet: run the anchor stage and look again",
            highlight=False,
        )
    count = len(found.violations)
    console.print(
        f"doctor: {len(found.documents)} rows read,"
        f" {count or 'no'} rule{'' if count == 1 else 's'} broken",
        highlight=False,
    )
