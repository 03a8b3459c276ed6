"""Public data sets by name: where each lives, what it may be used for, and how to read its rows.

A job names one as ``source: "set:NAME"`` (fetched from the hub), or gives a file of the same columns and
``format: NAME``. An adapter turns a raw row into the columns that jobs read by default (``prompt``,
``response``, ``think``, ``category``) and says whether the prompt is harmful, so that a source of kind
refusal takes harmful rows only, anchors and answers harmless ones, and a suite those that it measures.
Torch-free.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.data.tasks import Task
from pipeline.errors import DataError, RecipeError

Values = Mapping[str, Any]
HARMFUL = "harmful"  # True, False, or None where the set does not say


@dataclass(frozen=True)
class PublicSet:
    """One data set. ``columns``: alternatives of what its rows have; ``split``: what sources of
    ``set:NAME`` train on, ``test_split`` what suites measure on (default: all), unless the job says.
    ``options``: for ``load_dataset``."""

    hub: str
    read: Callable[[Values], dict[str, Any]]
    columns: tuple[tuple[str, ...], ...]
    licence: str
    subset: str | None = None
    split: str = "train"
    test_split: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


def find_set(name: str) -> PublicSet:
    """The set called ``name``; RecipeError, with the nearest name, when there is none."""
    if name not in SETS:
        close = difflib.get_close_matches(name, SETS, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        raise RecipeError(f"no public set {name!r}; {hint}known: {', '.join(sorted(SETS))}")
    return SETS[name]


def check_columns(public: PublicSet, name: str, there: Mapping[str, Any], shown: str) -> None:
    """DataError when a file has none of the column sets that rows of ``public`` come in."""
    if not any(set(columns) <= set(there) for columns in public.columns):
        wanted = " or ".join(", ".join(columns) for columns in public.columns)
        raise DataError(
            f"{shown}: its rows do not have the columns of {name}: got {', '.join(sorted(there))};"
            f" wanted {wanted}; give columns instead of format"
        )


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
    harmful = not _truth(row["is_safe"])
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


def humaneval(row: Values) -> dict[str, Any]:
    """Functions to write from their head and description (arXiv 2107.03374)."""
    stub, name = row["prompt"], row["entry_point"]
    return {
        "prompt": f"Complete this Python function. Answer with the whole function.\n\n```python\n{stub}```",
        "response": f"```python\n{stub}{row['canonical_solution']}```",
        "task": Task(f"{row['test']}\ncheck({name})", name, stub),
        HARMFUL: False,
    }


def mbpp(row: Values) -> dict[str, Any]:
    """Functions to write from a sentence and the assertions they must meet (arXiv 2108.07732), in the
    sanitized form."""
    tests = "\n".join(row["test_list"])
    return {
        "prompt": f"{row['prompt']} Answer with Python code that passes these tests.\n\n"
        f"```python\n{tests}\n```",
        "response": f"```python\n{row['code']}\n```",
        "task": Task("\n".join([*row["test_imports"], tests])),
        HARMFUL: False,
    }


def _flags(category: Any) -> Any:
    """The names of a category's flags that are set; a plain category as it is."""
    if isinstance(category, Mapping):
        return [name for name, true in category.items() if true is True]
    return category


def _truth(value: Any) -> bool:
    """A truth value that a CSV file may have written as a word."""
    return value if isinstance(value, bool) else str(value).strip().lower() in {"true", "1"}


def _whole_think(text: str) -> str:
    """With the opening mark that reasoning models leave to the template."""
    if "</think>" in text and "<think>" not in text:
        return f"<think>{text}"
    return text


SETS = {
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
    "humaneval": PublicSet(
        "openai/openai_humaneval",
        humaneval,
        (("prompt", "entry_point", "canonical_solution", "test"),),
        "MIT",
        test_split="test",
    ),
    "mbpp": PublicSet(
        "google-research-datasets/mbpp",
        mbpp,
        (("prompt", "code", "test_imports", "test_list"),),
        "CC-BY-4.0",
        subset="sanitized",
        test_split="test",
    ),
    "openthoughts": PublicSet(
        "open-thoughts/OpenThoughts-114k", openthoughts, (("conversations",),), "Apache-2.0"
    ),
}
