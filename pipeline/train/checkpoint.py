"""Where training stands, in a few megabytes: what is trained, the optimiser, RNG and position.

Frozen weights are never saved: the key of the run already fixes them. Tensors are whole (not
sharded), so another world size or engine can go on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.artifact import hash_file, write_atomic
from pipeline.train.engine import Engine, State
from pipeline.train.world import gather_objects

KEEP = 2


@dataclass
class Position:
    """The next step to run (0-based, over all epochs) and the metrics so far."""

    step: int
    history: list[dict[str, float]]


def save(folder: Path, engine: Engine, position: Position, rank: int) -> None:
    """Collective: gather on all ranks, write on rank 0, atomically; keep the newest two."""
    trainable = engine.trainable_state()
    optimizer = engine.optimizer_state()
    rngs = gather_objects(torch.get_rng_state())
    if rank != 0:
        return
    from safetensors.torch import save_file

    final = folder / f"checkpoint-{position.step:08d}"
    staging = folder / f".checkpoint-{position.step:08d}.tmp"
    shutil.rmtree(staging, ignore_errors=True)
    shutil.rmtree(final, ignore_errors=True)
    staging.mkdir(parents=True)
    tensors = {f"trainable.{k}": v for k, v in trainable.items()}
    tensors |= {f"optimizer.{k}": v for k, v in optimizer.items()}
    tensors |= {f"rng.{rank}": state for rank, state in enumerate(rngs)}
    save_file({k: v.contiguous() for k, v in tensors.items()}, staging / "state.safetensors")
    meta = {
        "step": position.step,
        "history": position.history,
        "world_size": len(rngs),
        "sha256": hash_file(staging / "state.safetensors").sha256,
    }
    write_atomic(staging / "meta.json", json.dumps(meta))
    staging.rename(final)
    for old in sorted(folder.glob("checkpoint-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def newest(folder: Path, warn: Callable[[str], None]) -> tuple[dict[str, Any], State] | None:
    """The newest whole checkpoint, verified by hash; a damaged one is named and passed over."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
            if hash_file(path / "state.safetensors").sha256 != meta["sha256"]:
                raise ValueError("its content does not match its hash")
            return meta, load_file(path / "state.safetensors")
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            warn(f"sft: checkpoint {path.name} is damaged ({error}); trying the one before")
    return None


def restore(
    engine: Engine, meta: Mapping[str, Any], state: Mapping[str, Tensor], rank: int
) -> Position:
    """Put a checkpoint into the engine; RNG states only at the same world size."""
    engine.load_trainable_state(_part(state, "trainable."))
    engine.load_optimizer_state(_part(state, "optimizer."))
    if meta["world_size"] == len([k for k in state if k.startswith("rng.")]):
        own = state.get(f"rng.{rank}")
        if own is not None:
            torch.set_rng_state(own)
    return Position(int(meta["step"]), list(meta["history"]))


def _part(state: Mapping[str, Tensor], prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
