"""Cases of bad input: what earlier stages left, training and merging."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from typing import Any

from bad_data import lost_tensor
from breaking import ROOT, Breaking, Case, Place, start
from parts import sample_rows

from pipeline.artifact import MANIFEST
from pipeline.data.rows import spread

ZERO3 = str(ROOT / "ds_configs" / "zero3.json")


def changed(stage: str, file: str) -> Breaking:
    """A sealed file has other bytes, and another size."""

    def broken(p: Place) -> None:
        path = p.sealed(stage) / file
        content = path.read_bytes()
        path.unlink()
        path.write_bytes(content + b"\n")

    return broken


def rows_changed(p: Place) -> None:
    content = p.rows.read_bytes()
    p.rows.unlink()
    p.rows.write_bytes(content[:-1])


def same_size(p: Place) -> None:
    path = p.sealed("prep") / "train.jsonl"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content.replace(b"a", b"b", 1))


def lost(stage: str, file: str) -> Breaking:
    return lambda p: (p.sealed(stage) / file).unlink()


def manifest(stage: str, change: Callable[[str], str]) -> Breaking:
    def broken(p: Place) -> None:
        path = p.sealed(stage) / MANIFEST
        path.write_text(change(path.read_text()))

    return broken


def extra_key(text: str) -> str:
    return json.dumps(json.loads(text) | {"approved_by": "nobody"})


def index_entry(p: Place) -> None:
    for entry in (p.runs / "adopted").glob("data-*.json"):
        entry.write_text("{}")


def unsealed(stage: str) -> Breaking:
    return lambda p: shutil.rmtree(p.sealed(stage))


LEFT = [
    Case(
        "upstream-not-sealed",
        "pack",
        65,
        unsealed("prep"),
        ("needs prep (prep-", "run prep first"),
    ),
    Case("baseline-not-run", "eval", 65, lambda p: None, ("needs baseline", "run baseline first")),
    Case(
        "changed-after-sealing",
        "pack",
        65,
        changed("prep", "train.jsonl"),
        ("train.jsonl: ", "bytes, sealed with", "rerun stage prep with --rebuild"),
    ),
    Case(
        "lost-after-sealing",
        "sft",
        65,
        lost("pack", "steps.json"),
        ("steps.json: missing, sealed with", "rerun stage pack with --rebuild"),
    ),
    Case(
        "adopted-rows-changed",
        "prep",
        65,
        rows_changed,
        ("rows.jsonl: ", "sealed with", "remove the folder data-"),
    ),
    Case(
        "manifest-cut",
        "pack",
        65,
        manifest("prep", lambda text: text[:100]),
        ("manifest.json: damaged manifest", "rerun stage prep with --rebuild"),
    ),
    Case(
        "manifest-of-its-own-stage",
        "pack",
        65,
        manifest("pack", lambda text: ""),
        ("manifest.json: damaged manifest", "rerun stage pack with --rebuild"),
    ),
    Case(
        "manifest-with-more-in-it",
        "sft",
        65,
        manifest("base", extra_key),
        ("manifest.json: damaged manifest", "remove the folder base-"),
    ),
    Case(
        "index-entry-damaged",
        "prep",
        65,
        index_entry,
        ("adopted/data-", "damaged index entry", "remove this file"),
    ),
    Case(
        "changed-within-its-size",
        "untaxed verify",
        65,
        same_size,
        ("train.jsonl: content changed since it was sealed", "rerun stage prep with --rebuild"),
    ),
    Case(
        "nothing-to-verify",
        "untaxed verify",
        65,
        lambda p: ["--runs", str(p.base)],
        ("base: no sealed artifact", "below this folder"),
    ),
]


def with_two_jobs(p: Place) -> list[str]:
    return ["--job", str(p.write_job()), "--job", str(p.write_job())]


def rows_without_number(p: Place) -> list[str]:
    suite = {"name": "sums", "measures": "reasoning", "source": "data/sums.jsonl"}
    p.set(eval__suites=[suite | {"columns": {"response": "answer"}}])
    rows = [
        {"prompt": "1 + 1", "answer": "The answer is 2."},
        {"prompt": "2 + 2", "answer": "Four"},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (p.folder / "data" / "sums.jsonl").write_text(text)
    return []


def sums_without_column(p: Place) -> None:
    p.set(eval__suites=[{"name": "sums", "measures": "reasoning", "source": "sample:arithmetic"}])


def deepspeed(content: dict[str, Any] | str) -> Breaking:
    def broken(p: Place) -> list[str]:
        p.unseal("sft")
        path = p.folder / "ds.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        return ["--ds", str(path)]

    return broken


def options(*given: str) -> Breaking:
    """Training is to run, with these options."""

    def broken(p: Place) -> list[str]:
        p.unseal("sft")
        return list(given)

    return broken


def sft(name: str, broken: Breaking, *says: str, code: int = 78, progress: int = 0) -> Case:
    return Case(name, "sft", code, broken, says, progress=progress)


def lora(name: str, values: dict[str, Any], *says: str) -> Case:
    return sft(name, lambda p: p.set(**{f"sft__lora__{k}": v for k, v in values.items()}), *says)


def base_lost_a_tensor(p: Place) -> None:
    """Prepared and packed already with the base as it now is."""
    lost_tensor(p)
    arguments = ["--runs", str(p.runs), "--job", str(p.write_job())]
    assert start("pack", arguments) == 0


def choosing(name: str, source: str, **more: Any) -> Breaking:
    """A choice on development rows of a file beside the project's own."""

    def broken(p: Place) -> None:
        reported = [row for row in sample_rows("harmful") if row["split"] == "heldout"]
        rows = {"ordinary": sample_rows("ordinary")[:6], "copied": spread(reported, 4)}[source]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (p.folder / "data" / "dev.jsonl").write_text(text)
        suite = {"name": name, "measures": "benign", "source": "data/dev.jsonl"}
        bound = {"metric": "over_refusal", "at_most": 0.5}
        p.set(choose={"suites": [suite | {"max_new_tokens": 2}], "wanted": [bound]} | more)

    return broken


SECTION = {"zero_optimization": {"stage": 2}}
TRAINING = [
    Case(
        "no-document-fits",
        "pack",
        65,
        lambda p: p.set(pack__max_length=8),
        ("no document of 14 fits pack.max_length=8", "raise it"),
    ),
    Case(
        "empty-generation-prompt",
        "pack",
        78,
        lambda p: p.set(chat__generation_prompt=""),
        ("chat.generation_prompt is empty", "leave it out"),
    ),
    lora("target-nowhere", {"targets": ["w_proj"]}, "w_proj matches no linear", "down_proj"),
    lora(
        "layers-out-of-range",
        {"layers": {"first": 1, "last": 2}},
        "sft.lora.layers.last=2 is out of range",
        "layers 0..1",
        "lower it",
    ),
    lora(
        "no-layer-selected",
        {"layers": {"from_fraction": 0.1, "to_fraction": 0.2}},
        "sft.lora.layers selects no layer of 2",
        "widen the range",
    ),
    lora("rank-above-size", {"rank": 33}, "sft.lora.rank=33 is above the size", "64 x 32"),
    sft(
        "batch-in-the-ds-file",
        deepspeed(SECTION | {"train_batch_size": 8}),
        "ds.json: train_batch_size belongs to the job file (sft.batch)",
        'say "auto"',
    ),
    sft("ds-without-zero", deepspeed({}), "no zero_optimization section", "see ds_configs/"),
    sft(
        "ds-offload-to-nvme",
        deepspeed({"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme"}}}),
        "zero_optimization.offload_param.device",
        "got nvme, wanted cpu or none",
    ),
    sft("ds-not-json", deepspeed("{"), "ds.json: cannot be read as JSON", "line 1"),
    sft(
        "ds-unknown-key",
        deepspeed(SECTION | {"train_batchsize": 8}),
        "unknown key train_batchsize",
        "known here: comms_logger",
    ),
    sft(
        "ds-unknown-key-nested",
        deepspeed({"zero_optimization": {"stage": 3, "stage3_prefetch_bucket": 1}}),
        "zero_optimization.stage3_prefetch_bucket",
        "not permitted",
    ),
    sft("ds-nowhere", options("--ds", "no.json"), "--ds no.json: ", "No such file"),
    sft("ds-stage-9", deepspeed({"zero_optimization": {"stage": 9}}), "stage=9", "wanted 1, 2"),
    sft(
        "two-engines",
        options("--ds", ZERO3, "--engine", "ddp"),
        "--ds and --engine exclude each other",
        "chooses DeepSpeed ZeRO",
    ),
    sft(
        "base-without-a-tensor",
        base_lost_a_tensor,
        "1 tensors are missing, such as model.layers.1.mlp.up_proj.weight",
        "fetch it again",
        code=65,
        progress=1,
    ),
    Case(
        "update-lost-in-rounding",
        "merge",
        78,
        lambda p: None,
        ("% of the update survives", "merge.survival_floor is 50.0%", "below_floor: fp32"),
        progress=4,
    ),
    Case(
        "choose-among-reported-rows",
        "choose",
        65,
        choosing("copy", "copied"),
        ("of the 4 rows of copy, 4 ask what a suite that is reported asks", "rows of its own"),
    ),
    Case(
        "choose-what-rounding-takes",
        "choose",
        65,
        choosing("ordinary", "ordinary", scales=[0.5]),
        ("rounding leaves less than merge.survival_floor=0.5 of the update", "larger update"),
        progress=5,
    ),
    Case(
        "choose-before-training",
        "choose",
        65,
        lambda p: (choosing("ordinary", "ordinary")(p), p.unseal("sft"))[0],
        ("needs sft (sft-", "run sft first"),
    ),
    Case(
        "reasoning-without-answers",
        "baseline",
        78,
        sums_without_column,
        ("eval.suites sums", "names no worked answer", "set columns.response"),
    ),
    Case(
        "worked-answer-without-number",
        "baseline",
        65,
        rows_without_number,
        ("data/sums.jsonl:2", "holds no number", "wanted one to compare with"),
    ),
    Case(
        "two-jobs-of-one-name",
        "untaxed run",
        65,
        with_two_jobs,
        ("two jobs of one name", "broken, broken", "rename one"),
    ),
]
STAGES = [*LEFT, *TRAINING]
