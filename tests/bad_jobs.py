"""Cases of bad input: the job file and the command line. All exit with 78: trying again is no use."""

from __future__ import annotations

from typing import Any

from breaking import Breaking, Case, Place

SOURCE = "prep.sources.0"
CHECK = {"metric": "harmful_refusal"}


def job(name: str, broken: Breaking, *says: str, stage: str = "prep") -> Case:
    return Case(name, stage, 78, broken, says)


def setting(name: str, values: dict[str, Any], *says: str, stage: str = "prep") -> Case:
    """One or more values of the job file are wrong."""
    return job(name, lambda p: p.set(**values), "job.yaml: ", *says, stage=stage)


def source(name: str, values: dict[str, Any], *says: str) -> Case:
    """The training source asks for what cannot be."""
    return job(name, lambda p: p.source(**values), *says)


def option(name: str, options: list[str], *says: str, stage: str = "prep") -> Case:
    return job(name, lambda p: options, *says, stage=stage)


def text(name: str, content: str, *says: str) -> Case:
    """The job file holds this text."""

    def broken(p: Place) -> None:
        p.text = content

    return job(name, broken, "job.yaml: ", *says)


def not_utf8(p: Place) -> None:
    (p.folder / "job.yaml").write_bytes(b"name: caf\xe9\n")


FILES = [
    option("no-job", ["--job", "nowhere.yaml"], "nowhere.yaml: no such job file", "see jobs/"),
    job("job-is-a-folder", lambda p: ["--job", str(p.base)], "base: cannot be read", "directory"),
    job("job-not-utf8", not_utf8, "job.yaml: cannot be read as UTF-8", "0xe9"),
    text("job-empty", "", "wanted a mapping at the top", "got nothing"),
    text("job-is-a-list", "- prep\n- pack\n", "wanted a mapping at the top", "got list"),
    text("job-broken-yaml", "prep: [1, 2\nsft: 3", "not valid YAML", "line 2"),
    text("job-key-twice", "name: a\nsft:\n  epochs: 1\n  epochs: 2\n", "'epochs' twice", "line 4"),
    text("job-key-is-a-list", "? [a, b]\n: 1\n", "not valid YAML", "line 1"),
]
KEYS = [
    setting("unknown-key", {"packs": {}}, "unknown key packs", "did you mean pack?"),
    setting(
        "unknown-key-nested",
        {"sft__lora__rnak": 8},
        "unknown key sft.lora.rnak",
        "did you mean rank?",
    ),
    setting(
        "unknown-key-in-a-list",
        {"prep__sources__0__colums": {}},
        f"unknown key {SOURCE}.colums",
        "did you mean columns?",
    ),
    setting(
        "unknown-key-like-no-other",
        {"merge__zzz": 1},
        "unknown key merge.zzz",
        "known here: below_floor, epoch",
    ),
    job("missing-section", lambda p: p.drop("eval"), "job.yaml: eval is missing", "add it"),
    job(
        "missing-name-in-a-list",
        lambda p: p.drop("prep", "sources", 0, "kind"),
        f"job.yaml: {SOURCE}.kind is missing",
        "add it",
    ),
]
VALUES = [
    setting("wrong-type", {"sft__epochs": "two"}, "sft.epochs: ", "valid integer", "got 'two'"),
    setting("yes-is-no-number", {"sft__epochs": True}, "sft.epochs: ", "a number", "got True"),
    setting("not-positive", {"sft__lora__rank": 0}, "sft.lora.rank: ", "greater than 0", "got 0"),
    setting("too-much-dropout", {"sft__lora__dropout": 1.0}, "sft.lora.dropout: ", "less than 1"),
    setting("bad-name", {"name": "My Job"}, "name: ", "pattern", "got 'My Job'"),
    setting("target-is-a-number", {"sft__lora__targets": 5}, "sft.lora.targets: ", "got 5"),
    setting("unknown-kind", {"prep__sources__0__kind": "refuse"}, "kind: ", "'refusal', 'answer'"),
    setting("a-list-was-wanted", {"prep__sources": {}}, "prep.sources: ", "valid tuple"),
    setting("no-source", {"prep__sources": []}, "prep.sources: ", "at least 1 item"),
    setting(
        "batch-in-two-units",
        {"sft__batch": {"rows": 8, "tokens": 512}},
        "sft.batch: ",
        "exactly one of rows and tokens",
    ),
    setting(
        "gate-without-bound",
        {"eval__gate": [CHECK]},
        "eval.gate.0: ",
        "exactly one of at_least and at_most",
    ),
    setting(
        "gate-with-two-bounds",
        {"eval__gate": [CHECK | {"at_least": 0.9, "at_most": 1.0}]},
        "eval.gate.0: ",
        "exactly one of at_least and at_most",
    ),
    setting(
        "gate-on-nothing-known",
        {"eval__gate": [{"metric": "harmfulness", "at_most": 0.1}]},
        "eval.gate.0.metric: ",
        "'harmful_refusal'",
        "got 'harmfulness'",
    ),
    setting("epoch-beyond-epochs", {"merge__epoch": 4}, "merge.epoch=4", "sft.epochs=1"),
    setting(
        "anchors-unanswered", {"prep__sources__0__kind": "anchor"}, "no anchor section", "job:"
    ),
    setting("layers-half-a-range", {"sft__lora__layers": {"first": 1}}, "layers: ", "both"),
    setting(
        "layers-backwards",
        {"sft__lora__layers": {"first": 5, "last": 2}},
        "sft.lora.layers: ",
        "5..2 is empty",
    ),
    setting(
        "layers-in-two-forms",
        {"sft__lora__layers": {"first": 0, "last": 1, "from_fraction": 0.0, "to_fraction": 1.0}},
        "sft.lora.layers: ",
        "not both",
    ),
    setting(
        "full-and-quantized",
        {"sft__lora": None, "sft__quantization": "nf4"},
        "sft: ",
        "full fine-tuning of a quantized base",
        "set lora",
    ),
    job(
        "two-sources-of-one-name",
        lambda p: p.job["prep"]["sources"].append(p.job["prep"]["sources"][0]),
        "prep.sources has two entries of one name",
        "'train', 'train'",
    ),
]
OPTIONS = [
    option("set-without-value", ["--set", "sft.epochs"], "--set 'sft.epochs'", "sft.epochs=2"),
    option("set-unknown", ["--set", "sft.seeds=8"], "unknown key sft.seeds", "mean seed?"),
    option("set-beyond-the-list", ["--set", "prep.sources.3.limit=1"], "prep.sources.3", "below 1"),
    option("set-into-a-value", ["--set", "sft.epochs.more=1"], "epochs holds 1", "not a section"),
    option("set-not-yaml", ["--set", "sft.epochs=[1"], "--set sft.epochs", "'[1' is not YAML"),
    option("unknown-option", ["--rebuilt"], "unrecognized arguments: --rebuilt", "see --help"),
    option("option-without-value", ["--set"], "argument --set: expected", "see --help"),
    option("unknown-engine", ["--engine", "zero9"], "'zero9'", "fsdp", "see --help", stage="sft"),
    option("engine-elsewhere", ["--engine", "ddp"], "unrecognized", "--engine", stage="pack"),
    option("processes", ["--nproc", "two"], "--nproc", "value: 'two'", stage="untaxed run"),
    option("unknown-command-option", ["--jobs", "x"], "--jobs", "see --help", stage="untaxed plan"),
]
SOURCES = [
    source("unknown-sample", {"source": "sample:harmfull"}, "'harmfull'", "did you mean harmful?"),
    source("revision-of-a-file", {"revision": "main"}, "revision=main is for hub:", "leave it out"),
    source("subset-of-a-sample", {"source": "sample:harmful", "subset": "a"}, "subset=a", "hub:"),
    source("not-a-hub-id", {"source": "hub:dataset"}, "got hub:dataset", "wanted hub:org/name"),
    source(
        "messages-and-response",
        {"columns": {"messages": "messages", "response": "response"}},
        "source train: columns: messages replaces response",
        "leave those out",
    ),
    source(
        "answer-without-column",
        {"kind": "answer", "columns": {}},
        "source train: columns: kind answer needs response",
        "name that column",
    ),
    source(
        "split-said-twice",
        {"split": "train", "where": {"split": "heldout"}},
        "source train: split=train and where.split=heldout contradict",
        "keep one",
    ),
    job(
        "threshold-of-zero",
        lambda p: p.set(prep__near_duplicate_threshold=0.0),
        "prep.near_duplicate_threshold=0",
        "wanted above 0",
    ),
    job(
        "nothing-to-think",
        lambda p: p.set(prep__refusal_think=" "),
        "prep.refusal_think is empty",
        "leave it out",
    ),
    job(
        "excluded-under-one-name",
        lambda p: p.set(prep__exclude=[{"name": "train", "source": "sample:harmful"}]),
        "2 entries of sources and exclude are called train",
        "rename all but one",
    ),
]
JOBS = [*FILES, *KEYS, *VALUES, *OPTIONS, *SOURCES]
