"""One run for benchmarks/memory.py: SPEC.json, under any launcher. Each rank writes result-RANK.json.

A tiny run first, so that libraries, communication and optimiser have taken their own; then the real
one, with the high-water mark put back where its steps begin.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")

from rich.console import Console
from transformers import AutoConfig

from pipeline import artifact as art
from pipeline import sft
from pipeline.model.attention import choose
from pipeline.recipes import Execution, SftRecipe
from pipeline.stage import Context, Solo
from pipeline.train.loop import Trainer
from pipeline.train.world import device

ROOT = Path(__file__).resolve().parents[1]
ON_GPU = torch.cuda.is_available()


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def held() -> int:
    """Bytes now: allocated on the GPU, else resident."""
    return torch.cuda.memory_allocated() if ON_GPU else _status("VmRSS")


def most() -> int:
    """The high-water mark since ``again``."""
    return torch.cuda.max_memory_allocated() if ON_GPU else _status("VmHWM")


def again() -> None:
    """Put the high-water mark back to what is held now."""
    if ON_GPU:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    world = sft.join(always=spec["engine"] != "single") or Solo()
    is_zero = spec["engine"].startswith("zero")
    peaks = {"run": 0, "step": 0}
    train = Trainer.run

    def watched(self: Trainer, *arguments: Any) -> Any:
        gc.collect()  # what loading leaves to the garbage collector
        peaks["run"] = most()
        again()
        try:
            return train(self, *arguments)
        finally:
            peaks["step"] = most()

    Trainer.run = watched  # type: ignore[method-assign]
    process = 0
    for name in ("warm", "real"):
        gc.collect()
        process = held()
        again()
        scratch = Path(spec["scratch"]) / name
        (scratch / "out").mkdir(parents=True, exist_ok=True)
        context = Context(
            scratch=scratch,
            execution=Execution(activation_checkpointing=spec["checkpointing"]),
            world=world,
            options={
                "ds": ROOT / "ds_configs" / f"{spec['engine']}.json" if is_zero else None,
                "engine": None if is_zero else spec["engine"],
            },
            console=Console(quiet=True),
        )
        inputs = dict(zip(("base", "pack"), map(Path, spec[name]), strict=True))
        opened = {key: art.open_artifact(folder) for key, folder in inputs.items()}
        recipe = SftRecipe.model_validate(spec["recipe"])
        sft.run(recipe, opened, scratch / "out", context)
    result = {
        "kind": device().type,
        "masked": choose(AutoConfig.from_pretrained(spec["real"][0]), bf16=True) == "sdpa",
        "device": torch.cuda.get_device_name() if ON_GPU else "cpu",
        "process_bytes": process,
        "step_bytes": peaks["step"] - process,
        "run_bytes": max(peaks.values()) - process,
    }
    rank = os.environ.get("RANK", "0")
    Path(spec["scratch"], f"result-{rank}.json").write_text(json.dumps(result))
    world.barrier()


if __name__ == "__main__":
    main()
    sft.leave(0)
