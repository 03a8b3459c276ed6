"""Merging side by side: this project's merge stage, PEFT's merge_and_unload + save_pretrained, cp -r.

python benchmarks/merge.py --json FILE [--rounds 5] [--size qwen-1.5b] [--systems ...]

A sharded bf16 checkpoint of random weights, an adapter of rank 1 on up_proj in the middle third. One
round runs every system once, in a new process, in turn (every other round backwards), on a warm page
cache and with nothing left to write from before. "Seconds" are those of the work, imports apart: for
this project from opening the inputs to the sealed folder, forced to disk; once with the logit probes
that the stage makes, once without; PEFT and cp leave the writing to the system. FILE is written after
each run; the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from rounds import ROOT, in_turn, load, print_ratios, spread

SYSTEMS = ("untaxed", "untaxed_without_probes", "peft", "cp")
SHARDS = 8  # as Qwen2.5-14B has
SIZES: dict[str, dict[str, Any]] = {
    "qwen-1.5b": {
        "vocab_size": 151936,
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
    },
    "tiny": {
        "vocab_size": 600,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}
MEASURES = (
    "seconds",
    "process_seconds",
    "peak_bytes",
    "peak_private_bytes",
    "read_bytes",
    "written_bytes",
    "written_to_disk_bytes",
)


def make_base(folder: Path, shape: dict[str, Any]) -> int:
    """A Qwen2 checkpoint of random bf16 weights in ``SHARDS`` files; returns its size in bytes."""
    from accelerate import init_empty_weights
    from safetensors.torch import save_file
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    folder.mkdir()
    config = AutoConfig.for_model("qwen2", **shape, tie_word_embeddings=True, dtype="bfloat16")
    config.architectures = ["Qwen2ForCausalLM"]
    config.save_pretrained(folder)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    shapes = {n: p.shape for n, p in model.named_parameters() if n != "lm_head.weight"}
    total = 2 * sum(math.prod(s) for s in shapes.values())
    generator = torch.Generator().manual_seed(0)
    files: list[dict[str, torch.Tensor]] = [{}]
    where: dict[str, str] = {}

    def save() -> None:
        name = f"model-{len(files):05d}-of-{SHARDS:05d}.safetensors"
        where.update(dict.fromkeys(files[-1], name))
        save_file(files[-1], folder / name, metadata={"format": "pt"})
        files[-1] = {}

    written = 0
    for name, size in shapes.items():
        weight = torch.empty(size).normal_(std=0.02, generator=generator)
        files[-1][name] = (weight + 1.0 if len(size) == 1 else weight).bfloat16()
        written += 2 * math.prod(size)
        if written >= total * len(files) / SHARDS:
            save()
            files.append({})
    assert len(files) == SHARDS + 1, len(files)
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    words = Tokenizer(models.WordLevel({"<e>": 0}, unk_token="<e>"))
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>").save_pretrained(folder)
    return total


def make_adapter(folder: Path, shape: dict[str, Any]) -> None:
    """Rank 1 on up_proj of the middle third, as PEFT names things, with an update that survives."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    third = shape["num_hidden_layers"] // 3
    layers = range(third, shape["num_hidden_layers"] - third)
    config = LoraConfig(
        r=1,
        lora_alpha=1,
        target_modules=["up_proj"],
        layers_to_transform=list(layers),
        task_type="CAUSAL_LM",
    )
    config.save_pretrained(folder)
    torch.manual_seed(1)
    tensors = {}
    for layer in layers:
        name = f"base_model.model.model.layers.{layer}.mlp.up_proj.lora_"
        tensors[f"{name}A.weight"] = torch.randn(1, shape["hidden_size"])
        tensors[f"{name}B.weight"] = torch.randn(shape["intermediate_size"], 1) * 1e-3
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def prepare(folder: Path, size: str) -> dict[str, Any]:
    """Base and adapter, as plain folders and as sealed artifacts."""
    from pipeline import artifact as art
    from pipeline.graph import Workspace
    from pipeline.model.base import adopt_base
    from pipeline.recipes import BaseRecipe

    total = make_base(folder / "base", SIZES[size])
    base = adopt_base(BaseRecipe(source=str(folder / "base")), Workspace(folder))
    staging = art.stage_folder(folder / "sft")
    (staging / "epoch-1").mkdir()
    make_adapter(staging / "epoch-1", SIZES[size])
    sft = art.seal(
        staging,
        folder / "sft",
        stage="sft",
        stage_version=1,
        key="benchmark",
        recipe={},
        inputs={},
        facts={"epochs": 1, "method": "lora"},
        seconds=0.0,
    )
    return {
        "base": str(base.folder),
        "sft": str(sft.folder),
        "model": str(folder / "base"),
        "adapter": str(sft.folder / "epoch-1"),
        "weights_bytes": total,
    }


def run_once(system: str, spec: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One run in a new process, watched from here for its private memory."""
    scratch = Path(tempfile.mkdtemp(dir=folder))
    path = scratch / "spec.json"
    path.write_text(json.dumps(spec | {"scratch": str(scratch)}))
    os.sync()
    cell = [sys.executable, str(ROOT / "benchmarks" / "merge_cell.py"), system, str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = time.perf_counter()
    with (scratch / "log").open("w") as log:
        process = subprocess.Popen(cell, env=environment, stdout=log, stderr=log)
        private = 0
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                line = next(line for line in status if line.startswith("RssAnon"))
                private = max(private, int(line.split()[1]) * 1024)
            time.sleep(0.01)
    ended = time.perf_counter()
    if process.returncode:
        raise SystemExit(f"{system}: failed\n{(scratch / 'log').read_text()[-3000:]}")
    result: dict[str, Any] = json.loads((scratch / "result.json").read_text())
    subprocess.run(["rm", "-rf", str(scratch)], check=True)
    return result | {"process_seconds": ended - started, "peak_private_bytes": private}


def report(data: dict[str, Any]) -> dict[str, Any]:
    """Cells with medians and spread, and the ratios of medians."""
    cells: dict[str, Any] = {}
    for name, runs in data["runs"].items():
        cells[name] = {"rounds": len(runs)}
        for measure in MEASURES:
            cells[name][measure] = spread([run[measure] for run in runs])
    ratios = {}
    for ours in ("untaxed", "untaxed_without_probes"):
        if all(name in cells for name in (ours, "peft", "cp")):
            mine, peft, cp = (
                {m: cells[name][m]["median"] for m in MEASURES} for name in (ours, "peft", "cp")
            )
            ratios |= {
                f"{ours}_speed_vs_peft": peft["seconds"] / mine["seconds"],
                f"{ours}_process_speed_vs_peft": peft["process_seconds"] / mine["process_seconds"],
                f"{ours}_time_vs_cp": mine["seconds"] / cp["seconds"],
                f"{ours}_peak_vs_peft": mine["peak_bytes"] / peft["peak_bytes"],
                f"{ours}_written_vs_peft": mine["written_bytes"] / peft["written_bytes"],
            }
    return {"cells": cells, "ratios": ratios}


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("--json", type=Path, required=True)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--size", choices=SIZES, default="qwen-1.5b")
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    given = options.parse_args()
    data = load(given.json)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        spec = prepare(folder, given.size)
        data |= {"weights_bytes": spec["weights_bytes"], "files": SHARDS}
        in_turn(
            given.json,
            data,
            given.rounds,
            given.systems,
            lambda system: run_once(system, spec, folder),
            report,
            lambda run: (
                f"{run['seconds']:6.2f} s (process {run['process_seconds']:6.2f} s)  peak"
                f" {run['peak_bytes'] / 1e9:.2f} GB ({run['peak_private_bytes'] / 1e9:.2f} private)"
                f"  read {run['read_bytes'] / 1e9:.2f} GB  written"
                f" {run['written_bytes'] / 1e9:.2f} GB"
            ),
        )
    print_ratios(data)


if __name__ == "__main__":
    main()
