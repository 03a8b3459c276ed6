"""One run of one way to prepare rows, for benchmarks/pack.py: SYSTEM SPEC.json.

Writes result-0.json: rows a second, how full the packs are, and how unlike the work of the ranks is.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def untaxed(spec: dict[str, Any]) -> dict[str, Any]:
    from rich.console import Console
    from safetensors.numpy import load_file

    from pipeline import artifact as art
    from pipeline import pack
    from pipeline.data.packing import measure
    from pipeline.graph import PackStep
    from pipeline.recipes import Batch, ChatRecipe, PackRecipe
    from pipeline.stage import Context

    recipe = PackStep(
        pack=PackRecipe(max_length=spec["max_length"]),
        chat=ChatRecipe(),
        batch=Batch(tokens=spec["batch_tokens"]),
        epochs=1,
    )
    loader = pack.load_tokenizer
    tokenizer = loader(Path(spec["base"]))
    pack.load_tokenizer = lambda folder: tokenizer  # loaded before the clock starts, as TRL's is
    scratch = Path(spec["scratch"])
    out = scratch / "out"
    out.mkdir()
    context = Context(scratch=scratch, console=Console(quiet=True))
    started = time.perf_counter()
    inputs = {name: art.open_artifact(Path(spec[name])) for name in ("base", "prep")}
    facts = pack.run(recipe, inputs, out, context)
    seconds = time.perf_counter() - started
    lengths = [int(n) for n in load_file(out / "tokens.safetensors")["train.starts"][1:]]
    lengths = [b - a for a, b in zip([0, *lengths], lengths, strict=False)]
    (steps,) = json.loads((out / "steps.json").read_text())
    fill = measure(steps, lengths, spec["max_length"], spec["ranks"])
    return {
        "rows_per_second": facts["documents"] / seconds,
        "tokens": facts["tokens"],
        "efficiency": fill.efficiency,
        "imbalance": fill.imbalance,
        "token_imbalance": fill.token_imbalance,
        "square_imbalance": fill.square_imbalance,
    }


def trl(spec: dict[str, Any], processes: int | None = None) -> dict[str, Any]:
    import torch
    from datasets import Dataset, disable_progress_bars
    from transformers import AutoConfig, AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    from pipeline.model.base import load_tokenizer

    disable_progress_bars()
    scratch = Path(spec["scratch"])
    tokenizer = load_tokenizer(Path(spec["base"]))
    config = AutoConfig.from_pretrained(spec["base"])
    config.update({"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64})
    config.update({"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 64})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    lines = (Path(spec["prep"]) / "train.jsonl").read_text().splitlines()
    rows = []
    for row in map(json.loads, lines):
        answer = [{"role": "assistant", "content": row["response"]}]
        rows.append({"prompt": row["messages"], "completion": answer})
    arguments = SFTConfig(
        output_dir=str(scratch / "out"),
        max_length=spec["max_length"],
        packing=True,
        dataset_num_proc=processes,
        report_to=[],
        use_cpu=True,
        bf16=False,
    )
    first = Dataset.from_list(rows[:8])
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=first, processing_class=tokenizer
    )
    Dataset.from_list(rows).save_to_disk(scratch / "rows")
    dataset = Dataset.load_from_disk(scratch / "rows")
    started = time.perf_counter()
    packed = trainer._prepare_dataset(dataset, tokenizer, arguments, True, None, "train")
    seconds = time.perf_counter() - started
    return {"rows_per_second": len(rows) / seconds} | fill_of(packed, spec)


def fill_of(packed: Any, spec: dict[str, Any]) -> dict[str, Any]:
    """Efficiency and imbalance of packs that are dealt to ranks in their order, one each a step."""
    from pipeline.data.packing import cost

    documents = packed["seq_lengths"]
    tokens = sum(map(sum, documents))
    found: dict[str, Any] = {
        "tokens": tokens,
        "efficiency": tokens / (len(documents) * spec["max_length"]),
    }
    ranks = spec["ranks"]
    turns = [documents[at : at + ranks] for at in range(0, len(documents), ranks)]
    weighing = {
        "imbalance": cost,
        "token_imbalance": float,
        "square_imbalance": lambda length: float(length) ** 2,
    }
    for name, weigh in weighing.items():
        loads = [[sum(map(weigh, pack)) for pack in turn] for turn in turns]
        found[name] = 1 - sum(map(sum, loads)) / sum(ranks * max(turn) for turn in loads)
    return found


def main(system: str, path: Path) -> None:
    spec = json.loads(path.read_text())
    if system == "untaxed":
        result = untaxed(spec)
    else:
        result = trl(spec, 2 if system == "trl_two_processes" else None)
    (path.parent / "result-0.json").write_text(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
