"""Stage 5: weights -> report: safety, over-refusal and reasoning beside the base, and the gate."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact, write_atomic
from pipeline.data.chat import Chat, check_generation_prompt
from pipeline.errors import DataError
from pipeline.evals import datasheet
from pipeline.evals.agreement import judges_of
from pipeline.evals.choice import read_choice
from pipeline.evals.engines import Embedded, Engine, request_for
from pipeline.evals.gate import evaluate
from pipeline.evals.judges import judge_rows, open_judges
from pipeline.evals.report import write_report
from pipeline.evals.score import (
    Sampling,
    compare,
    identity_of,
    load_for_inference,
    measure,
    probe_items,
    probe_logits,
    read_lines,
    respond,
    tally,
    twins,
    write_rows,
)
from pipeline.evals.verdicts import Item, read_items
from pipeline.graph import EvalStep
from pipeline.model.base import load_tokenizer
from pipeline.recipes import METRICS, EvalEndpoint
from pipeline.stage import Context, main

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SAME_LOGITS = 1e-6
SCORES = ("base", "aligned", "twins")
TIMED = ("prep", "baseline", "sft", "choose", "merge")


def run(
    recipe: EvalStep, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write responses.jsonl, scores.json, report.json, report.html and plots under ``out``.

    Raises DataError when the merged model's logits are the base's: nothing would be measured.
    """
    started = time.monotonic()
    check_generation_prompt(recipe.chat)
    items = read_items(recipe.eval.suites, inputs)
    chat = Chat(load_tokenizer(inputs["merge"].folder), recipe.chat)
    settings = recipe.eval
    sampling = Sampling(
        settings.batch_rows, settings.temperature, settings.seed, settings.top_p, settings.samples
    )
    judges = open_judges(settings.judges, inputs, settings.batch_rows, context)
    engine = open_changed(settings.endpoint, inputs, chat, items, sampling, context)
    aligned = respond(
        engine,
        chat,
        items,
        sampling,
        context,
        identity=identity_of("merge", inputs),
        title="eval",
    )
    base = read_lines(inputs["baseline"].path("responses.jsonl"))
    generation = engine.facts
    del engine  # its model makes room for those of the judges
    judge_rows(judges, aligned, "eval")
    report = build_report(recipe, inputs, base, aligned, generation)
    report["seconds"]["eval"] = round(time.monotonic() - started, 3)
    write_rows(out / "responses.jsonl", aligned)
    for name in ("scores", "report"):
        content = report if name == "report" else {k: report[k] for k in SCORES}
        write_atomic(out / f"{name}.json", json.dumps(content, indent=1, allow_nan=False) + "\n")
    history = read_lines(inputs["sft"].path("metrics.jsonl"))
    write_report(report, {"base": base, "aligned": aligned}, history, out)
    _tell(report, context)
    facts = {f"base_{name}": metric["value"] for name, metric in report["base"].items()}
    facts |= {f"aligned_{name}": metric["value"] for name, metric in report["aligned"].items()}
    context.metric(0, facts)
    return facts | {
        "gate_passed": report["gate"]["passed"],
        "rows": len(aligned),
        "generation": generation,
    }


def open_changed(
    endpoint: EvalEndpoint | None,
    inputs: Mapping[str, Artifact],
    chat: Chat,
    items: Sequence[Item],
    sampling: Sampling,
    context: Context,
) -> Engine:
    """The merged model, in this process or on a server, after making sure that it is not the base."""
    base, merged = inputs["base"].folder, inputs["merge"].folder
    if endpoint is None:
        model = load_changed(base, merged, chat, items)
        return Embedded(model, chat, sampling, context.console)
    from pipeline.evals.endpoint import check_changed, connect

    before = connect(endpoint.served("base"), chat, sampling, context)
    after = connect(endpoint.served("aligned"), chat, sampling, context, aligned=True)
    probes = [
        request_for(chat, item.row.id, item.row.messages, item.suite.max_new_tokens)
        for item in probe_items(items)
    ]
    check_changed(before, after, probes)
    return after


def load_changed(base: Path, merged: Path, chat: Chat, items: Sequence[Item]) -> PreTrainedModel:
    """The merged model, after making sure that it answers probes otherwise than the base does.

    Serving the base in silence is the classic failure of adapter evaluation; one model is in
    memory at a time.
    """
    before = probe_logits(load_for_inference(base), chat, items)
    model = load_for_inference(merged)
    after = probe_logits(model, chat, items)
    moved = float((after - before).abs().max())
    if moved <= SAME_LOGITS * float(before.abs().max()):
        raise DataError(
            f"{merged}: the merged model gives the base's logits on {len(before)} probes (largest"
            f" difference {moved:.1e}); its adapter is absent or without effect: check merge.scale"
            " and rerun sft and merge"
        )
    return model


def build_report(
    recipe: EvalStep,
    inputs: Mapping[str, Artifact],
    base: list[dict[str, Any]],
    aligned: list[dict[str, Any]],
    generation: Mapping[str, Any],
) -> dict[str, Any]:
    """The content of report.json. ``generation``: who answered as the aligned model."""
    confidence = recipe.eval.confidence
    before, after = measure(base, confidence), measure(aligned, confidence)
    pairs = compare(base, aligned, confidence)
    sft, merge = inputs["sft"], inputs["merge"]
    judges = recipe.eval.judges
    judged = {"judges": judges_of(aligned, judges, confidence, base)} if judges else {}
    choice = {"choice": read_choice(inputs["choose"].folder)} if "choose" in inputs else {}
    sheet = json.loads(inputs["prep"].path("sheet.json").read_text(encoding="utf-8"))
    return {
        "job": recipe.job,
        "engine": _fact(sft, "engine"),
        "world_size": _fact(sft, "world_size"),
        "trainable_parameters": _fact(sft, "trainable_parameters"),
        "base": before,
        "aligned": after,
        "gate": evaluate(recipe.eval.gate, before, after, pairs),
        "pairs": pairs,
        "twins": {"base": twins(base, confidence), "aligned": twins(aligned, confidence)},
        "responses": {"base": tally(base), "aligned": tally(aligned)},
        "confidence": confidence,
        "samples": recipe.eval.samples,
        "generation": {"base": _fact(inputs["baseline"], "generation"), "aligned": generation},
        "tokens": {
            "trained": sft.facts.get("tokens"),
            "generated": {
                name: sum(row["tokens"] for row in rows)
                for name, rows in (("base", base), ("aligned", aligned))
            },
        },
        "seconds": {name: inputs[name].manifest.seconds for name in TIMED if name in inputs},
        "data": datasheet.cut(sheet),
        "recipe": {
            "base": inputs["base"].facts.get("source"),
            "base_digest": inputs["base"].digest,
            "merged_digest": merge.digest,
            "chat": recipe.chat.model_dump(mode="json"),
            "sft": sft.manifest.recipe,
            "merge": merge.manifest.recipe,
            "eval": recipe.eval.model_dump(mode="json"),
        },
        **choice,
        **judged,
    }


def _fact(artifact: Artifact, name: str) -> Any:
    if name not in artifact.facts:
        raise DataError(
            f"{artifact.folder}: its manifest states no {name}; rerun that stage with --rebuild"
        )
    return artifact.facts[name]


def _tell(report: Mapping[str, Any], context: Context) -> None:
    for name in METRICS:
        if name in report["aligned"]:
            before, after = report["base"][name], report["aligned"][name]
            context.log(
                f"eval: {name} {before['value']:.3f} -> {after['value']:.3f}"
                f" [{after['low']:.3f}, {after['high']:.3f}] (n={after['n']})"
            )
    for check in report["gate"]["checks"]:
        context.log(f"eval: {check['status']}: {check['metric']}: {check['why']}")
    context.log(f"eval: gate {'passed' if report['gate']['passed'] else 'not passed'}")


if __name__ == "__main__":
    import sys

    sys.exit(main("eval", run))
