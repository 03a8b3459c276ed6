"""Stage 3b: adapters + development rows -> one epoch and one scale of its update, by the job's policy.

One training gives a whole curve between safety, over-refusal and reasoning: every sealed epoch times
every scale. All points are measured on one base in memory, whose weights become those that merge would
write; on rows that were neither trained on nor are reported.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.artifact import Artifact, write_atomic
from pipeline.data.chat import Chat, check_generation_prompt
from pipeline.errors import DataError, RecipeError
from pipeline.evals.choice import Point, chosen_of, pick, pooled
from pipeline.evals.development import Development, read_development
from pipeline.evals.engines import Embedded
from pipeline.evals.pareto import draw_choice
from pipeline.evals.plots import to_png
from pipeline.evals.score import Sampling, load_for_inference, measure, respond, write_rows
from pipeline.evals.stats import ratio_interval
from pipeline.graph import ChooseStep
from pipeline.model.base import load_tokenizer
from pipeline.model.epochs import Epochs, open_epochs
from pipeline.model.inplace import InPlace
from pipeline.stage import Context, main

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Rows = list[dict[str, Any]]


def run(
    recipe: ChooseStep, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write choice.json, points.jsonl, responses.jsonl and pareto.png under ``out``.

    Raises:
        DataError: rows that are not there, an epoch that is damaged or was never trained.
        RecipeError: an epoch that is not sealed, or no point that holds the bounds where the job
            wants one.
    """
    check_generation_prompt(recipe.chat)
    epochs = open_epochs(inputs["base"], inputs["sft"])
    wanted = recipe.choose.epochs or tuple(sorted(epochs.files))
    lost = [epoch for epoch in wanted if epoch not in epochs.files]
    if lost:
        raise RecipeError(f"choose.epochs has {lost[0]}: sealed are {sorted(epochs.files)}")
    development = _rows(recipe, inputs, context)
    todo = [(0, 0.0), *((epoch, scale) for epoch in wanted for scale in recipe.choose.scales)]
    trial = _Trial(recipe, inputs, context, epochs, development, len(todo))
    points, responses = [], []
    for epoch, scale in todo:
        point, answers = trial.at(epoch, scale)
        points.append(point)
        at = {"epoch": point.epoch, "scale": point.scale}
        responses += [at | row for row in answers]
        context.metric(len(points) - 1, {k: float(v["value"]) for k, v in point.metrics.items()})
    picked = pick(recipe.choose, points[0], points[1:], recipe.survival_floor)
    policy = recipe.choose.model_dump(mode="json", include={"wanted", "best", "otherwise"})
    choice = picked | {
        "policy": policy,
        "confidence": recipe.confidence,
        "dropped": development.dropped,
    }
    context.log(f"choose: {choice['verdict']}")
    write_rows(out / "responses.jsonl", responses)
    write_rows(out / "points.jsonl", choice["points"])
    (out / "pareto.png").write_bytes(to_png(draw_choice(choice)))
    told = {name: value for name, value in choice.items() if name != "points"}
    write_atomic(out / "choice.json", json.dumps(told, indent=1, allow_nan=False) + "\n")
    chosen = chosen_of(choice)
    return {
        **choice["chosen"],
        "meets": choice["meets"],
        "verdict": choice["verdict"],
        "points": len(points),
        "front": len(choice["front"]),
        "rows": len(development.items),
        "dropped": development.dropped,
        **{f"chosen_{name}": metric["value"] for name, metric in chosen["metrics"].items()},
    }


def _rows(recipe: ChooseStep, inputs: Mapping[str, Artifact], context: Context) -> Development:
    """The development rows; DataError where they do not measure what the policy asks for."""
    found = read_development(
        recipe.choose, recipe.reported, inputs, recipe.near_duplicate_threshold
    )
    for where, metric in recipe.choose.needed:
        if metric not in found.measured:
            raise DataError(
                f"{where}: no development row measures {metric}; raise prep.dev_fraction or add a"
                " suite to choose.suites"
            )
    context.log(
        f"choose: {len(found.items)} development rows; left out: {found.dropped['reported']} that"
        f" ask what is reported, {found.dropped['trained']} that ask what was trained on"
    )
    return found


@dataclass
class _Trial:
    """The base in memory, and what it is measured on."""

    recipe: ChooseStep
    inputs: Mapping[str, Artifact]
    context: Context
    epochs: Epochs
    development: Development
    total: int
    number: int = 0
    loaded: tuple[PreTrainedModel, InPlace] | None = None

    def __post_init__(self) -> None:
        self.chat = Chat(load_tokenizer(self.inputs["base"].folder), self.recipe.chat)

    def at(self, epoch: int, scale: float) -> tuple[Point, Rows]:
        """One point (epoch 0: the base) with its answers: measured, or as an earlier try left it."""
        self.number += 1
        folder = self.context.scratch / f"epoch-{epoch}-scale-{scale!r}"
        folder.mkdir(exist_ok=True)
        digests = " ".join(f"{name}={a.digest}" for name, a in sorted(self.inputs.items()))
        identity = f"{digests} epoch={epoch} scale={scale!r}"
        kept = folder / "point.json"
        found = json.loads(kept.read_text(encoding="utf-8")) if kept.exists() else {}
        if found.get("identity") != identity:
            found = {"identity": identity, **self._measured(epoch, scale, folder, identity)}
            write_atomic(kept, json.dumps(found) + "\n")
        point = Point(epoch, scale, found["metrics"], found["survival"])
        told = ", ".join(f"{k} {v['value']:.3f}" for k, v in point.metrics.items())
        self.context.log(f"choose: {self.number} of {self.total}: {point.name}: {told}")
        return point, found["answers"]

    def _measured(self, epoch: int, scale: float, folder: Path, identity: str) -> dict[str, Any]:
        model, variants = self._model()
        survival = variants.become(self.epochs.plan(epoch, scale) if epoch else None)
        if epoch and not survival.wanted:
            raise DataError(
                f"{self.epochs.folder(epoch)}: the update is zero everywhere: nothing was trained"
            )
        title = f"choose {self.number}/{self.total}"
        confidence = self.recipe.confidence
        drawn = self.recipe
        sampling = Sampling(drawn.batch_rows, drawn.temperature, drawn.seed, drawn.top_p)
        answers = respond(
            Embedded(model, self.chat, sampling, self.context.console),
            self.chat,
            self.development.items,
            sampling,
            replace(self.context, scratch=folder),
            identity=identity,
            title=title,
        )
        metrics = measure(answers, confidence)
        over = pooled(metrics, confidence)
        if over is not None:
            metrics["over_refusal"] = over
        if self.development.anchors:
            metrics["anchor_nll"] = self._anchor_loss(model, title)
        return {"metrics": metrics, "survival": survival.share, "answers": answers}

    def _model(self) -> tuple[PreTrainedModel, InPlace]:
        """Loaded when it is needed: all points may be finished."""
        if self.loaded is None:
            model = load_for_inference(self.inputs["base"].folder)
            self.loaded = model, InPlace(model, self.epochs.checkpoint)
        return self.loaded

    def _anchor_loss(self, model: PreTrainedModel, title: str) -> dict[str, Any]:
        """The loss on the base's own answers to the anchors, in nats per token."""
        from pipeline.evals.generate import loss

        anchors = self.development.anchors
        pairs = [(self.chat.prompt_ids(row["messages"]), row["response_ids"]) for row in anchors]
        found = loss(model, pairs, console=self.context.console, title=f"{title}: anchors")
        value, low, high = ratio_interval(
            [nats for nats, _ in found], [tokens for _, tokens in found], self.recipe.confidence
        )
        return {"value": value, "low": low, "high": high, "n": len(found)}


if __name__ == "__main__":
    import sys

    sys.exit(main("choose", run))
