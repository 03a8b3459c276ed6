"""Stage 4: base + adapter -> one plain model folder, with a certificate.

The sum is planned from file headers and applied tensor by tensor in fp32; files without an updated
tensor are shared with the base. Every byte that is written is read back, compared and hashed in the
same pass. Memory: the adapter and a few blocks of rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline import artifact as art
from pipeline.artifact import Artifact
from pipeline.errors import DataError, RecipeError
from pipeline.files import link_or_copy
from pipeline.model import merging, probes
from pipeline.model.card import model_card
from pipeline.model.epochs import open_epochs
from pipeline.model.merging import Plan
from pipeline.model.shards import INDEX, NARROW, Checkpoint, open_checkpoint
from pipeline.model.survival import Proof
from pipeline.model.weights import write_weights
from pipeline.recipes import MergeRecipe
from pipeline.stage import Context, main

# fp32 noise of a deep model may pass the bound; a wrong or missing pair also shows as a part of
# what the update does to the logits.
PARITY_BOUND = 1e-5
PARITY_OF_UPDATE = 1e-3
WRITTEN_HERE = ("README.md", "certificate.json", art.MANIFEST)


@dataclass(frozen=True)
class Merge:
    """What is merged into what: the opened base, the epoch's folder and the plan. ``chosen``: what the
    choose stage said, where it chose epoch and scale."""

    base: Artifact
    checkpoint: Checkpoint
    config: Any
    epoch: int
    trained: Path
    plan: Plan
    scale: float
    chosen: dict[str, str] | None = None


def run(
    recipe: MergeRecipe, inputs: Mapping[str, Artifact], out: Path, context: Context
) -> dict[str, Any]:
    """Write a Hugging Face model folder, certificate.json and README.md under ``out``."""
    merge = _plan(recipe, inputs)
    files = merging.touched(merge.checkpoint, merge.plan)
    context.log(
        f"merge: epoch {merge.epoch} at scale {merge.scale:g}, {len(merge.plan.updates)} of"
        f" {len(merge.checkpoint.where)} tensors change, in {len(files)} of"
        f" {len(merge.checkpoint.shards)} files"
    )
    proof = _write(merge, recipe, out, context)
    logits = _probe(merge, proof, out)
    certificate = _certificate(merge, proof, context, out, recipe.survival_floor, logits)
    text = json.dumps(certificate, indent=1, sort_keys=True, allow_nan=False)
    art.write_atomic(out / "certificate.json", text + "\n")
    art.write_atomic(out / "README.md", model_card(merge.base, inputs["sft"], certificate))
    share = proof.total().share
    context.log(
        f"merge: {'none' if share is None else f'{share:.1%}'} of the update is in the file;"
        f" logits agree with base and adapter to {logits['parity']:.1e}, rounding moves them by"
        f" {logits['rounding']:.1e}, the update by {logits['update']:.1e}"
    )
    return {
        "method": merge.plan.method,
        "epoch": merge.epoch,
        "scale": merge.scale,
        "dtype": certificate["dtype"],
        "parameters": merge.checkpoint.parameters,
        "survival": share,
        "parity": logits["parity"],
        "rounding_effect": logits["rounding"],
        "update_effect": logits["update"],
        "certificate": certificate,
    }


def _plan(recipe: MergeRecipe, inputs: Mapping[str, Artifact]) -> Merge:
    epochs = open_epochs(inputs["base"], inputs["sft"])
    epoch, scale, choice = recipe.epoch or epochs.last, recipe.scale, inputs.get("choose")
    chosen = None
    if choice is not None:
        found = json.loads(choice.path("choice.json").read_text(encoding="utf-8"))
        epoch, scale = int(found["chosen"]["epoch"]), float(found["chosen"]["scale"])
        chosen = {"choice_digest": choice.digest, "verdict": found["verdict"]}
    if epoch not in epochs.files:
        raise RecipeError(f"merge.epoch={epoch}: training sealed epochs {sorted(epochs.files)}")
    plan = epochs.plan(epoch, scale)
    return Merge(
        inputs["base"],
        epochs.checkpoint,
        epochs.config,
        epoch,
        epochs.folder(epoch),
        plan,
        scale,
        chosen,
    )


def _write(merge: Merge, recipe: MergeRecipe, out: Path, context: Context) -> Proof:
    """Write the weights, in fp32 where the recipe says so."""
    load_dtype = merge.config.dtype if isinstance(merge.config.dtype, torch.dtype) else None
    _link_others(merge, out)
    for widen in (False, True):
        proof, hashed = write_weights(
            merge.base,
            merge.checkpoint,
            merge.plan,
            out,
            widen=widen,
            load_dtype=torch.float32 if widen else load_dtype,
            log=context.log,
        )
        context.hashed.update(hashed)
        total = proof.total()
        if merge.scale and not total.wanted:
            raise DataError(f"{merge.trained}: the update is zero everywhere: nothing was trained")
        if total.share is None or total.share >= recipe.survival_floor:
            return proof
        low = (
            f"merge: {total.share:.1%} of the update survives rounding to"
            f" {_dtypes(open_checkpoint(out))}, merge.survival_floor is {recipe.survival_floor:.1%}"
        )
        if widen or recipe.below_floor == "refuse":
            way_out = "" if widen else "set merge.below_floor: fp32, "
            raise RecipeError(f"{low}; {way_out}lower the floor, or train a larger update")
        context.log(f"{low}; writing the whole model in fp32")
        for file in (*merge.checkpoint.shards, INDEX, "config.json"):
            (out / file).unlink(missing_ok=True)
        _write_fp32_config(merge, out)
    raise AssertionError("the fp32 pass returns or raises")


def _link_others(merge: Merge, out: Path) -> None:
    """All files of the base but its weights; weights that loading ignores are left behind."""
    for name in merge.base.manifest.files:
        if name.endswith(".safetensors") or name in WRITTEN_HERE:
            continue
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        link_or_copy(merge.base.path(name), out / name)


def _write_fp32_config(merge: Merge, out: Path) -> None:
    path = merge.base.path("config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    config.pop("torch_dtype", None)
    config["dtype"] = "float32"
    art.write_atomic(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    if merge.checkpoint.indexed:
        index = json.loads(merge.base.path(INDEX).read_text(encoding="utf-8"))
        sizes = [
            entry.size_bytes * (2 if entry.dtype in NARROW else 1)
            for shard in merge.checkpoint.shards.values()
            for entry in shard.entries.values()
        ]
        index.setdefault("metadata", {})["total_size"] = sum(sizes)
        art.write_atomic(out / INDEX, json.dumps(index, indent=2, sort_keys=True) + "\n")


def _probe(merge: Merge, proof: Proof, out: Path) -> dict[str, float]:
    """Logits on random prompts, all in fp32, as largest relative differences.

    ``parity``: base with adapter (by PEFT) against the fp32 sum before rounding; ``rounding``:
    against the written file; ``update``: against the base alone.
    """
    token_ids = probes.probe_ids(merge.config.vocab_size)
    folder, plan = merge.base.folder, merge.plan

    opened = {name: update.opened() for name, update in plan.updates.items()}

    def summed(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        weight = merge.checkpoint.read(name, start, stop).float()
        if name not in opened:
            return weight
        stop = merge.checkpoint.entry(name).rows if stop is None else stop
        return opened[name](weight, start, stop)[1].reshape(weight.shape)

    def trained_fully(name: str, start: int = 0, stop: int | None = None) -> Tensor:
        update = plan.updates.get(name)
        if isinstance(update, merging.FullUpdate):
            return update.trained.read(update.name, start, stop)
        return merge.checkpoint.read(name, start, stop)

    base, merged = merge.checkpoint.read, open_checkpoint(out).read
    if plan.method == "lora":
        reads = [base, summed, merged, base]
        wanted, sums, written, alone = _logits(merge, reads, token_ids)
    else:
        reads = [trained_fully, summed, merged, base]
        wanted, sums, written, alone = (probes.probe_logits(folder, r, token_ids) for r in reads)
    found = {
        "parity": probes.difference(wanted, sums),
        "rounding": probes.difference(wanted, written),
        "update": probes.difference(wanted, alone),
    }
    if not all(math.isfinite(value) for value in found.values()):
        raise DataError(f"merge: the logits of the probes are not finite: {found}")
    if found["parity"] > max(PARITY_BOUND, PARITY_OF_UPDATE * found["update"]):
        raise DataError(
            f"merge: merged logits differ from base with adapter by {found['parity']:.1e}, wanted"
            f" at most {PARITY_BOUND:.0e}; the adapter means more than W + s B A"
        )
    if merge.scale and (not proof.total().got or torch.equal(written, alone)):
        raise DataError(
            "merge: the merged model answers the probes exactly as the base does: nothing of the"
            " update is left; set merge.below_floor: fp32, or train a larger update"
        )
    return found


def _logits(merge: Merge, reads: list[probes.Read], token_ids: Tensor) -> list[Tensor]:
    """Logits for each of ``reads``, the first with the adapter: all in one run, or one by one where
    the model does not allow it."""
    adapter: dict[str, Any] = {"adapter": merge.trained, "scale": merge.scale}
    folder = merge.base.folder
    try:
        return probes.probe_lanes(folder, reads, merge.plan.updates, token_ids, **adapter)
    except probes.Unsuited:
        first = probes.probe_logits(folder, reads[0], token_ids, **adapter)
        return [first, *(probes.probe_logits(folder, read, token_ids) for read in reads[1:])]


def _certificate(
    merge: Merge,
    proof: Proof,
    context: Context,
    out: Path,
    floor: float,
    logits: dict[str, float],
) -> dict[str, Any]:
    """What was done and measured. Rounded so that it does not depend on the number of threads."""
    total = proof.total()
    weights = {file: context.hashed[file].entry for file in merge.checkpoint.shards}
    return {
        "method": merge.plan.method,
        "epoch": merge.epoch,
        "base_digest": merge.base.digest,
        "weights_digest": art.digest_of(weights),
        "dtype": _dtypes(open_checkpoint(out)),
        "widened_to_fp32": proof.widened,
        "scale": merge.scale,
        "factor": merge.plan.scale,
        "rank": merge.plan.rank,
        "pairs": list(merge.plan.modules),
        "changed": len(proof.tensors),
        "unchanged": proof.unchanged,
        "unchanged_bytes_compared": proof.unchanged_bytes,
        "survival": {
            "floor": floor,
            "share": _rounded(total.share),
            "norm_ratio": _rounded(total.norm_ratio),
            "tensors": {
                name: {"share": _rounded(s.share), "norm_ratio": _rounded(s.norm_ratio)}
                for name, s in sorted(proof.tensors.items())
            },
        },
        "logits": {
            "probes": probes.PROBES,
            "tokens_per_probe": probes.PROBE_TOKENS,
            "parity_bound": PARITY_BOUND,
            "parity_at_most": _decade(logits["parity"]),
            "rounding": float(f"{logits['rounding']:.0e}"),
            "update": float(f"{logits['update']:.0e}"),
        },
        **({"chosen": merge.chosen} if merge.chosen else {}),
    }


def _dtypes(checkpoint: Checkpoint) -> str:
    found = {e.dtype for s in checkpoint.shards.values() for e in s.entries.values()}
    return ", ".join(sorted(found))


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 6)


def _decade(value: float) -> float:
    """The next power of ten."""
    return 0.0 if value == 0 else float(f"1e{math.ceil(math.log10(value))}")


if __name__ == "__main__":
    import sys

    sys.exit(main("merge", run))
