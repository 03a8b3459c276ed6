"""Public sets to measure on: harmful and harmless prompts, and problems with a known answer.

Where a set is stated to be gated, its terms have to be accepted on the hub first, and ``HF_TOKEN`` set.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from typing import Any

from pipeline.data.public import HARMFUL, PublicSet, Values, truth
from pipeline.data.tasks import LETTERS, Choice, Expression, Number, Task, Words

ASK_BOXED = "Put the final answer within \\boxed{}."
ASK_LETTER = 'End with "The answer is (X)", where X is the letter of the right option.'
ASK_WORDS = 'End with "The answer is X.", where X is the answer alone.'
OPTION = re.compile(r"^\(([A-Z])\) ", re.MULTILINE)
OR_BENCH = {"or-bench-hard-1k": False, "or-bench-80k": False, "or-bench-toxic": True}
BBH_TASKS = (
    "boolean_expressions",
    "causal_judgement",
    "date_understanding",
    "disambiguation_qa",
    "dyck_languages",
    "formal_fallacies",
    "geometric_shapes",
    "hyperbaton",
    "logical_deduction_five_objects",
    "logical_deduction_seven_objects",
    "logical_deduction_three_objects",
    "movie_recommendation",
    "multistep_arithmetic_two",
    "navigate",
    "object_counting",
    "penguins_in_a_table",
    "reasoning_about_colored_objects",
    "ruin_names",
    "salient_translation_error_detection",
    "snarks",
    "sports_understanding",
    "temporal_sequences",
    "tracking_shuffled_objects_five_objects",
    "tracking_shuffled_objects_seven_objects",
    "tracking_shuffled_objects_three_objects",
    "web_of_lies",
    "word_sorting",
)


def strongreject(row: Values) -> dict[str, Any]:
    """Forbidden prompts of six kinds (arXiv 2402.10260); gated on the hub."""
    prompt = row.get("forbidden_prompt", row.get("prompt"))
    return {"prompt": prompt, "category": row.get("category"), HARMFUL: True}


def jailbreakbench(row: Values) -> dict[str, Any]:
    """100 misuse behaviours and 100 benign ones on the same themes (arXiv 2404.01318); the split says
    which, and files have none."""
    kind = {"harmful": True, "benign": False}.get(str(row.get("split")))
    return {"prompt": row["Goal"], "category": row.get("Category"), HARMFUL: kind}


def toxicchat(row: Values) -> dict[str, Any]:
    """What users wrote to a chat model, labelled by people (arXiv 2310.17389). Harmful is what is
    labelled toxic."""
    return {"prompt": row["user_input"], HARMFUL: truth(row["toxicity"])}


def xstest(row: Values) -> dict[str, Any]:
    """Safe prompts that sound unsafe, and unsafe ones in contrast (arXiv 2308.01263); gated on the
    hub."""
    kind = {"safe": False, "unsafe": True}[row["label"]]
    return {"prompt": row["prompt"], "category": row["type"], HARMFUL: kind}


def or_bench(row: Values) -> dict[str, Any]:
    """Harmless prompts that seem toxic, and toxic ones to compare with (arXiv 2405.20947); the subset
    says which, and files have none."""
    kind = OR_BENCH.get(str(row.get("subset")))
    return {"prompt": row["prompt"], "category": row.get("category"), HARMFUL: kind}


def oktest(row: Values) -> dict[str, Any]:
    """Safe questions with words that sound harmful (arXiv 2401.17633)."""
    return {"prompt": row["prompt"], HARMFUL: False}


def humaneval(row: Values) -> dict[str, Any]:
    """Functions to write from their head and description (arXiv 2107.03374)."""
    stub, name = row["prompt"], row["entry_point"]
    return {
        "prompt": f"Complete this Python function. Answer with the whole function.\n\n```python\n{stub}```",
        "response": f"```python\n{stub}{row['canonical_solution']}```",
        "reference": Task(f"{row['test']}\ncheck({name})", name, stub),
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
        "reference": Task("\n".join([*row["test_imports"], tests])),
        HARMFUL: False,
    }


def math_500(row: Values) -> dict[str, Any]:
    """500 problems of MATH (arXiv 2103.03874), those that Lightman et al. held out (arXiv 2305.20050)."""
    return {
        "prompt": row["problem"],
        "ask": ASK_BOXED,
        "response": row.get("solution"),
        "category": row.get("subject"),
        "reference": Expression(_text(row["answer"], "answer")),
        HARMFUL: False,
    }


def aime24(row: Values) -> dict[str, Any]:
    """The 30 problems of the American Invitational Mathematics Examination of 2024; answers are whole
    numbers up to 999."""
    return {
        "prompt": row.get("problem", row.get("Problem")),
        "ask": ASK_BOXED,
        "response": row.get("solution", row.get("Solution")),
        "reference": Number(str(row.get("answer", row.get("Answer")))),
        HARMFUL: False,
    }


def gpqa(row: Values) -> dict[str, Any]:
    """Questions for experts, with one right and three wrong options (arXiv 2311.12022); gated on the
    hub. They are published with the right one first, so they are put in an order that hangs on the row
    alone."""
    names = ("Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3)))
    options = [_text(row[name], name).strip() for name in names]
    question = _text(row["Question"], "Question").strip()
    order = sorted(range(len(options)), key=lambda i: _digest(question, options[i]))
    letter = LETTERS[order.index(0)]
    why = row.get("Explanation")
    return {
        "prompt": question,
        "ask": _lettered([options[i] for i in order]),
        "response": f"{why.strip()}\n\nThe answer is ({letter})." if why and why.strip() else None,
        "category": row.get("High-level domain"),
        "reference": Choice(letter, len(options)),
        HARMFUL: False,
    }


def mmlu_pro(row: Values) -> dict[str, Any]:
    """Questions on 14 subjects with up to ten options (arXiv 2406.01574), in the order in which they
    are published: some speak of one another."""
    if not isinstance(row["options"], list):
        raise ValueError("'options' is no list")
    options = [_text(option, "options").strip() for option in row["options"]]
    return {
        "prompt": row["question"],
        "ask": _lettered(options),
        "category": row.get("category"),
        "reference": Choice(_text(row["answer"], "answer"), len(options)),
        HARMFUL: False,
    }


def bbh(row: Values) -> dict[str, Any]:
    """27 tasks of BIG-bench that were hard for language models (arXiv 2210.09261). The answer is one of
    the options in the prompt, a number or a text."""
    prompt, target = _text(row["input"], "input"), _text(row["target"], "target").strip()
    options = OPTION.findall(prompt)
    reference: Choice | Number | Words
    if options and re.fullmatch(r"\([A-Z]\)", target):
        reference = Choice(target[1], len(options))
    else:
        number = re.fullmatch(r"-?\d+(\.\d+)?", target)
        reference = Number(target) if number else Words(target)
    return {
        "prompt": prompt,
        "ask": ASK_LETTER if isinstance(reference, Choice) else ASK_WORDS,
        "category": row.get("subset"),
        "reference": reference,
        HARMFUL: False,
    }


def _lettered(options: Sequence[str]) -> str:
    """The options a line each, and how to answer."""
    lines = [f"({letter}) {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join(lines) + f"\n\n{ASK_LETTER}"


def _digest(question: str, option: str) -> str:
    return hashlib.sha256(f"{question}\n{option}".encode("utf-8", "replace")).hexdigest()


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{name!r} is empty or no text")
    return value


EVALUATION: dict[str, PublicSet] = {
    "strongreject": PublicSet(
        "walledai/StrongREJECT",
        strongreject,
        (("forbidden_prompt",), ("prompt", "category", "source")),
        "MIT",
        split=None,
    ),
    "jailbreakbench": PublicSet(
        "JailbreakBench/JBB-Behaviors",
        jailbreakbench,
        (("Goal", "Category"),),
        "MIT",
        subset="behaviors",
        split=None,
    ),
    "toxicchat": PublicSet(
        "lmsys/toxic-chat",
        toxicchat,
        (("user_input", "toxicity"),),
        "CC-BY-NC-4.0",
        subset="toxicchat0124",
        test_split="test",
    ),
    "xstest": PublicSet(
        "walledai/XSTest", xstest, (("prompt", "type", "label"),), "CC-BY-4.0", split=None
    ),
    "or-bench": PublicSet(
        "bench-llm/or-bench",
        or_bench,
        (("prompt", "category"),),
        "CC-BY-4.0",
        subset="or-bench-hard-1k",
        split=None,
        subsets=tuple(OR_BENCH),
    ),
    "oktest": PublicSet(
        None,
        oktest,
        (("prompt",),),
        "not stated",
        split=None,
        home="data/OKTest.csv of github.com/InvokerStark/OverKill",
    ),
    "humaneval": PublicSet(
        "openai/openai_humaneval",
        humaneval,
        (("prompt", "entry_point", "canonical_solution", "test"),),
        "MIT",
        split=None,
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
    "math-500": PublicSet(
        "HuggingFaceH4/MATH-500",
        math_500,
        (("problem", "answer"),),
        "MIT",
        split=None,
        test_split="test",
    ),
    "aime24": PublicSet(
        "Maxwell-Jia/AIME_2024",
        aime24,
        (("Problem", "Answer"), ("problem", "answer")),
        "MIT",
        split=None,
    ),
    "gpqa-diamond": PublicSet(
        "Idavidrein/gpqa",
        gpqa,
        (("Question", "Correct Answer", *(f"Incorrect Answer {n}" for n in (1, 2, 3))),),
        "CC-BY-4.0",
        subset="gpqa_diamond",
        split=None,
    ),
    "mmlu-pro": PublicSet(
        "TIGER-Lab/MMLU-Pro",
        mmlu_pro,
        (("question", "options", "answer"),),
        "MIT",
        split=None,
        test_split="test",
    ),
    "bbh": PublicSet(
        "SaylorTwift/bbh",
        bbh,
        (("input", "target"),),
        "MIT",
        split=None,
        test_split="test",
        subsets=BBH_TASKS,
    ),
}
