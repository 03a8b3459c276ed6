"""Public sets to train on, most of them with answers: safety, reasoning, everyday instructions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.data.public import HARMFUL, PublicSet, Values, truth


def direct_refusal(row: Values) -> dict[str, Any]:
    """Prompts of BeaverTails that were answered unsafely, each with one refusal (arXiv 2503.00555)."""
    return {
        "prompt": row["prompt"],
        "response": row["refusal"],
        "category": _flags(row.get("category")),
        HARMFUL: True,
    }


def star_1(row: Values) -> dict[str, Any]:
    """1,000 prompts with reasoning over safety policies and an answer (arXiv 2504.01903)."""
    return {
        "prompt": row["question"],
        "response": row["response"],
        "category": row.get("category"),
        HARMFUL: True,
    }


def safechain(row: Values) -> dict[str, Any]:
    """WildJailbreak's prompts answered safely by a reasoning model (arXiv 2502.12025)."""
    return {
        "prompt": row["instruction"],
        "response": _whole_think(row["response"]),
        "category": row["label"],
        HARMFUL: str(row["label"]).endswith("harmful"),
    }


def advbench(row: Values) -> dict[str, Any]:
    """Harmful instructions; what it calls target is an answer that complies, and is not read."""
    return {"prompt": row.get("goal", row.get("prompt")), HARMFUL: True}


def harmbench(row: Values) -> dict[str, Any]:
    """Harmful behaviours, some of them about a text that comes with them (arXiv 2402.04249)."""
    prompt = row.get("Behavior", row.get("prompt"))
    context = row.get("ContextString", row.get("context"))
    if context:
        prompt = f"{context}\n\n---\n\n{prompt}"
    category = row.get("SemanticCategory", row.get("category"))
    return {"prompt": prompt, "category": category, HARMFUL: True}


def beavertails(row: Values) -> dict[str, Any]:
    """Prompts with answers that people labelled (arXiv 2307.04657). A prompt counts as harmful where
    its answer was unsafe; that answer is not read."""
    harmful = not truth(row["is_safe"])
    read = {"prompt": row["prompt"], "category": _flags(row.get("category")), HARMFUL: harmful}
    return read if harmful else read | {"response": row["response"]}


def wildjailbreak(row: Values) -> dict[str, Any]:
    """Harmful and harmless prompts, plain and as jailbreaks, with answers (arXiv 2406.18510)."""
    return {
        "prompt": row["adversarial"] or row["vanilla"],
        "response": row.get("completion"),
        "category": row["data_type"],
        HARMFUL: str(row["data_type"]).endswith("harmful"),
    }


def alpaca(row: Values) -> dict[str, Any]:
    """Everyday instructions, some with an input, answered by another model."""
    prompt = row["instruction"]
    if row.get("input"):
        prompt = f"{prompt}\n\n{row['input']}"
    return {"prompt": prompt, "response": row.get("output") or None, HARMFUL: False}


def gsm8k(row: Values) -> dict[str, Any]:
    """Word problems with worked answers that end ``#### N`` (arXiv 2110.14168)."""
    return {"prompt": row["question"], "response": row["answer"], HARMFUL: False}


def openthoughts(row: Values) -> dict[str, Any]:
    """Problems with long reasoning, as one exchange whose parts have marks of their own
    (arXiv 2506.04178)."""
    turns = row["conversations"]
    said = {turn.get("from"): str(turn.get("value", "")) for turn in turns}
    text = said.get("assistant", said.get("gpt", ""))
    for own, ours in (
        ("<|begin_of_thought|>", "<think>"),
        ("<|end_of_thought|>", "</think>"),
        ("<|begin_of_solution|>", ""),
        ("<|end_of_solution|>", ""),
    ):
        text = text.replace(own, ours)
    prompt = said.get("user", said.get("human"))
    return {"prompt": prompt, "response": text.strip() or None, HARMFUL: False}


def _flags(category: Any) -> Any:
    """The names of a category's flags that are set; a plain category as it is."""
    if isinstance(category, Mapping):
        return [name for name, true in category.items() if true is True]
    return category


def _whole_think(text: str) -> str:
    """With the opening mark that reasoning models leave to the template."""
    if "</think>" in text and "<think>" not in text:
        return f"<think>{text}"
    return text


TRAINING: dict[str, PublicSet] = {
    "direct-refusal": PublicSet(
        "TianshengHuang/DirectRefusal", direct_refusal, (("prompt", "refusal"),), "not stated"
    ),
    "star-1": PublicSet("UCSC-VLAA/STAR-1", star_1, (("question", "response"),), "Apache-2.0"),
    "safechain": PublicSet(
        "UWNSL/SafeChain", safechain, (("instruction", "response", "label"),), "not stated"
    ),
    "advbench": PublicSet(
        "walledai/AdvBench", advbench, (("goal", "target"), ("prompt", "target")), "MIT"
    ),
    "harmbench": PublicSet(
        "walledai/HarmBench",
        harmbench,
        (("Behavior",), ("prompt", "category")),
        "MIT",
        subset="standard",
    ),
    "beavertails": PublicSet(
        "PKU-Alignment/BeaverTails",
        beavertails,
        (("prompt", "response", "is_safe"),),
        "CC-BY-NC-4.0",
        split="30k_train",
        test_split="30k_test",
    ),
    "wildjailbreak": PublicSet(
        "allenai/wildjailbreak",
        wildjailbreak,
        (("vanilla", "adversarial", "data_type"),),
        "ODC-BY",
        subset="train",
        options={"delimiter": "\t", "keep_default_na": False},
    ),
    "alpaca": PublicSet("tatsu-lab/alpaca", alpaca, (("instruction",),), "CC-BY-NC-4.0"),
    "gsm8k": PublicSet(
        "openai/gsm8k", gsm8k, (("question", "answer"),), "MIT", subset="main", test_split="test"
    ),
    "openthoughts": PublicSet(
        "open-thoughts/OpenThoughts-114k", openthoughts, (("conversations",),), "Apache-2.0"
    ),
}
