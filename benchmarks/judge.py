"""The offline refusal judge against people: XSTest's labels of Llama-2's completions.

python benchmarks/judge.py --data FOLDER [--json FILE]

FOLDER holds ``xstest_v2_completions_llama2new.csv`` (arXiv 2308.01263). The judge was tuned on its even
rows; the odd ones are held out. Refused means a full or a partial refusal. Two people labelled every
row; they are compared with each other, too.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.evals.judge import judge_refusal
from pipeline.evals.stats import wilson

NAME = "xstest_v2_completions_llama2new.csv"
CONFIDENCE = 0.95
HUMAN = {
    "2_full_refusal": "refusal",
    "3_partial_refusal": "partial",
    "1_full_compliance": "compliance",
}
VERDICTS = ("refusal", "partial", "compliance", "empty")
PARTS = {"even": "tuned on", "odd": "held out"}


def agreement(ours: Sequence[Any], theirs: Sequence[Any]) -> dict[str, Any]:
    """Share of rows with the same label, its Wilson interval, and Cohen's kappa."""
    n = len(ours)
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    chance = sum(
        ours.count(label) * theirs.count(label) / n**2 for label in set(ours) | set(theirs)
    )
    kappa = (same / n - chance) / (1 - chance) if chance < 1 else 1.0
    low, high = wilson(same, n, CONFIDENCE)
    return {"rows": n, "same": same, "accuracy": same / n, "low": low, "high": high, "kappa": kappa}


def crossed(
    human: Sequence[Any], judged: Sequence[Any], rows: Sequence[Any], columns: Sequence[Any]
) -> dict[str, dict[str, int]]:
    """Counts by label (rows) and verdict (columns)."""
    pairs = list(zip(human, judged, strict=True))
    return {str(h): {str(j): pairs.count((h, j)) for j in columns} for h in rows}


def measure(rows: Sequence[dict[str, str]]) -> dict[str, Any]:
    """Of some rows: the judge against the final label, and the annotators against each other."""
    human = [HUMAN[row["final_label"]] for row in rows]
    judged = [judge_refusal(row["prompt"], row["completion"]) for row in rows]
    one, other = ([HUMAN[row[f"annotation_{i}"]] for row in rows] for i in (1, 2))
    columns = [verdict for verdict in VERDICTS if verdict != "empty" or verdict in judged]
    return {
        "labels": crossed(human, judged, list(HUMAN.values()), columns),
        "refused": crossed(
            refused(human), refused(judged), ("refused", "complied"), ("refused", "complied")
        ),
        "judge": agreement(refused(judged), refused(human)),
        "judge_of_three": agreement(judged, human),
        "annotators": agreement(refused(one), refused(other)),
        "annotators_of_three": agreement(one, other),
    }


def refused(labels: Sequence[str]) -> list[str]:
    return ["refused" if label in ("refusal", "partial") else "complied" for label in labels]


def print_counts(counts: dict[str, dict[str, int]]) -> None:
    columns = list(next(iter(counts.values())))
    print(f"  {'people / judge':16s}" + "".join(f"{name:>12s}" for name in columns))
    for name, row in counts.items():
        print(f"  {name:16s}" + "".join(f"{row[column]:12d}" for column in columns))


def print_agreement(title: str, found: dict[str, Any]) -> None:
    print(
        f"  {title}: {found['same']} of {found['rows']}, {found['accuracy']:.1%}"
        f" ({found['low']:.1%} to {found['high']:.1%}), kappa {found['kappa']:.3f}"
    )


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--data", type=Path, required=True, help=f"folder of {NAME}")
    options.add_argument("--json", type=Path, help="also write the numbers here")
    given = options.parse_args()
    with (given.data / NAME).open(encoding="utf-8", newline="") as stream:
        rows = list(csv.DictReader(stream))
    parts = {part: measure(rows[parity::2]) for parity, part in enumerate(PARTS)}
    for part, found in parts.items():
        print(f"{part} rows ({PARTS[part]})")
        print_counts(found["labels"])
        print_counts(found["refused"])
        print_agreement("judge and people, refused or not", found["judge"])
        print_agreement("judge and people, of three", found["judge_of_three"])
        print_agreement("one annotator and the other, refused or not", found["annotators"])
        print_agreement("one annotator and the other, of three", found["annotators_of_three"])
    if given.json:
        given.json.write_text(json.dumps(parts, indent=1) + "\n")


if __name__ == "__main__":
    main()
