"""Cases of bad input: the job file and the command line. All exit with 78: trying again is no use."""

from __future__ import annotations

from typing import Any

from breaking import JOB, Breaking, Case, Place, start

SOURCE = "prep.sources.0"
CHECK = {"metric": "harmful_refusal"}
(HARMFUL,) = JOB["eval"]["suites"]
SPLIT = {"source": "sample:ordinary", "where": {"split": "train"}}
CHOOSE = {
    "suites": [{"name": "dev-ordinary", "measures": "benign", **SPLIT}],
    "wanted": [{"metric": "over_refusal", "at_most": 0.1}],
}


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


def choice(name: str, change: dict[str, Any], *says: str, **elsewhere: Any) -> Case:
    """The choice among adapters cannot be made so; ``elsewhere``: values outside of its section."""
    values = {"choose": CHOOSE | change} | elsewhere
    return setting(f"choose-{name}", values, *says, stage="choose")


def text(name: str, content: str, *says: str) -> Case:
    """The job file holds this text."""

    def broken(p: Place) -> None:
        p.text = content

    return job(name, broken, "job.yaml: ", *says)


def not_utf8(p: Place) -> None:
    (p.folder / "job.yaml").write_bytes(b"name: caf\xe9\n")


def primed(p: Place) -> None:
    p.set(prep__safety_primer="Safety first")
    assert start("prep", ["--job", str(p.write_job()), "--runs", str(p.runs)]) == 0


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
    setting("anchors-of-nothing", {"anchor": {}}, "no prep source of kind anchor"),
    setting(
        "rewrite-without-instruction",
        {"anchor": {"rewrite_refusals": {"instruction": " "}}},
        "anchor.rewrite_refusals: ",
        "instruction is empty",
        "leave it out",
    ),
    setting(
        "rewrite-again-and-again-the-same",
        {"anchor": {"rewrite_refusals": {"tries": 3}}},
        "anchor: ",
        "temperature 0 draws nothing",
        "leave rewrite_refusals.tries out",
    ),
    setting(
        "rewrite-no-refusals",
        {"anchor": {"rewrite_refusals": {}}, "prep__sources__0__kind": "answer"},
        "anchor.rewrite_refusals needs a prep source of kind refusal",
        "leave it out",
    ),
    setting(
        "rewrite-a-primer",
        {"anchor": {"rewrite_refusals": {}}, "prep__safety_primer": "Safety first"},
        "prep.safety_primer leaves no refusal to rewrite",
        "leave anchor.rewrite_refusals out",
    ),
    setting(
        "primer-without-refusals",
        {"prep__safety_primer": "Safety first", "prep__sources__0__kind": "answer"},
        "prep.safety_primer needs a prep source of kind refusal",
        "leave it out",
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
        "primer-with-white-space",
        lambda p: p.set(prep__safety_primer="Safety first\n"),
        "prep.safety_primer='Safety first\\n' is empty or has white space around it",
        "give it words alone",
    ),
    job(
        "primer-for-a-chat-that-never-thinks",
        primed,
        "prep.safety_primer begins a think section",
        "neither template nor tokenizer has chat.think_open='<think>\\n'",
        "leave the primer out, or set chat.think_open",
        stage="pack",
    ),
    job(
        "primer-and-thoughts",
        lambda p: p.set(prep__safety_primer="Safety first", prep__refusal_think="No."),
        "prep.refusal_think and prep.safety_primer both say",
        "keep one",
    ),
    job(
        "excluded-under-one-name",
        lambda p: p.set(prep__exclude=[{"name": "train", "source": "sample:harmful"}]),
        "2 entries of sources and exclude are called train",
        "rename all but one",
    ),
]
BENIGN = CHOOSE["suites"][0]
CHOICES = [
    choice("and-scale", {}, "leave merge.epoch", "and merge.scale out", merge__scale=1.0),
    choice("and-epoch", {}, "leave merge.epoch", "and merge.scale out", merge__epoch=1),
    choice("and-fp32", {}, "base's precision", "below_floor out", merge__below_floor="fp32"),
    choice("scales-empty", {"scales": []}, "choose.scales: ", "at least 1 item"),
    choice("scale-of-zero", {"scales": [1.0, 0]}, "choose.scales.1: ", "greater than 0", "got 0"),
    choice("scale-negative", {"scales": [-0.5]}, "choose.scales.0: ", "greater than 0"),
    choice(
        "scale-twice", {"scales": [0.5, 0.5]}, "choose: ", "scales has a value twice: [0.5, 0.5]"
    ),
    choice("epochs-empty", {"epochs": []}, "choose.epochs: ", "at least 1 item"),
    choice("epoch-beyond", {"epochs": [1, 4]}, "choose.epochs has 4", "sft.epochs=1"),
    choice(
        "full", {}, "choose.scales needs an adapter", "set choose.scales: [1.0]", sft__lora=None
    ),
    choice("no-bound", {"wanted": []}, "choose.wanted: ", "at least 1 item"),
    choice(
        "reported",
        {"suites": [BENIGN, {**HARMFUL, "name": "dev-harmful", "limit": 2}]},
        "choose.suites dev-harmful has the rows of eval.suites harmful",
        "give it rows of its own",
    ),
    choice(
        "name-of-a-reported-one",
        {"suites": [BENIGN, {**SPLIT, "measures": "benign", "name": "harmful"}]},
        "choose.suites and eval.suites have two entries of one name",
        "rename one",
    ),
    choice(
        "bound-on-nothing-measured",
        {"wanted": [{"metric": "reasoning_nll", "at_most": 2.0}]},
        "choose.wanted.0: nothing measures reasoning_nll",
        "measured are benign_refusal, harmful_refusal, over_refusal: add a suite",
    ),
    choice("best-of-nothing", {"best": "anchor_nll"}, "choose.best: nothing measures anchor_nll"),
    choice("no-harmless-rows", {"suites": []}, "choose.wanted.0: nothing measures over_refusal"),
    choice("no-harmful-rows", {"dev": None}, "choose.best: nothing measures harmful_refusal"),
    choice("no-split", {}, "choose.best: nothing measures harmful_refusal", prep__dev_fraction=0.0),
    setting("choose-nothing", {}, "has no choose stage", "add a section choose", stage="choose"),
]
JOBS = [*FILES, *KEYS, *VALUES, *OPTIONS, *SOURCES, *CHOICES]
