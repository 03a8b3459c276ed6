"""Where training stands, in a few megabytes: what is trained, the optimiser, RNG and position.

Frozen weights are never saved: the key of the run already fixes them. Tensors are whole (not
sharded), so another world size or engine can go on.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pipeline.artifact import hash_file, write_atomic
from pipeline.train.engine import Engine, State
from pipeline.train.world import gather_objects

KEEP = 2
DAMAGE = (OSError, ValueError, KeyError, TypeError)


@dataclass
class Position:
    """The next step to run (0-based, over all epochs), how many epochs are validated and saved, and
    the metrics so far."""

    step: int
    epochs: int
    history: list[dict[str, float]]


class Checkpoints:
    """Writes checkpoints below ``folder`` while training goes on; leaving it waits for the last, whose
    failure then no longer matters."""

    def __init__(self, folder: Path, engine: Engine, rank: int) -> None:
        self.folder, self.engine, self.rank = folder, engine, rank
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future[None] | None = None

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *error: object) -> None:
        self.thread.shutdown()

    def save(self, position: Position) -> None:
        """Collective: gather on all ranks; rank 0 writes in a thread. An error of the last writing
        is raised here."""
        self.wait()
        trainable = self.engine.trainable_state()
        optimizer = self.engine.optimizer_state()
        rngs = gather_objects(_rng_states())
        if self.rank != 0:
            return
        tensors = {f"trainable.{k}": v for k, v in trainable.items()}
        tensors |= {f"optimizer.{k}": v for k, v in optimizer.items()}
        tensors |= {f"rng.{r}.{k}": v for r, states in enumerate(rngs) for k, v in states.items()}
        meta = vars(position) | {"history": list(position.history), "world_size": len(rngs)}
        self.pending = self.thread.submit(_write, self.folder, tensors, meta)

    def wait(self) -> None:
        """Until the last checkpoint is on disk; raises what kept it from there."""
        if self.pending is not None:
            self.pending.result()


def _write(folder: Path, tensors: State, meta: dict[str, Any]) -> None:
    """Atomically; keeps the newest two."""
    from safetensors.torch import save_file

    final = folder / f"checkpoint-{meta['step']:08d}-{meta['epochs']:04d}"
    with contextlib.suppress(*DAMAGE):
        _verified(final)
        return  # a stop at the place of the last one; what is good is never touched
    staging = folder / f".{final.name}.tmp"
    # of a try that was killed, or found no room
    for old in (final, *folder.glob(".checkpoint-*.tmp")):
        shutil.rmtree(old, ignore_errors=True)
    staging.mkdir(parents=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, staging / "state.safetensors")
    sha256 = hash_file(staging / "state.safetensors").sha256
    write_atomic(staging / "meta.json", json.dumps(meta | {"sha256": sha256}))
    staging.rename(final)
    for old in sorted(folder.glob("checkpoint-*"))[:-KEEP]:
        shutil.rmtree(old, ignore_errors=True)


def _rng_states() -> State:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, verified by hash; a damaged one is named and passed over."""
    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            _verified(path)
            return path
        except DAMAGE as error:
            warn(f"sft: checkpoint {path.name} is damaged ({error}); trying the one before")
    return None


def _verified(path: Path) -> dict[str, Any]:
    """The description of a whole checkpoint; one of DAMAGE for any other."""
    meta: dict[str, Any] = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    if hash_file(path / "state.safetensors").sha256 != meta["sha256"]:
        raise ValueError("its content does not match its hash")
    return {name: meta[name] for name in ("step", "epochs", "history", "world_size")}


def restore(path: Path, engine: Engine, rank: int, world_size: int) -> Position:
    """Put a checkpoint into the engine; RNG states only at the same world size."""
    from safetensors.torch import load_file

    meta = _verified(path)
    state = load_file(path / "state.safetensors")
    engine.load_trainable_state(_part(state, "trainable."))
    engine.load_optimizer_state(_part(state, "optimizer."))
    if meta["world_size"] == world_size:
        own = _part(state, f"rng.{rank}.")
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
    return Position(meta["step"], meta["epochs"], meta["history"])


def _part(state: Mapping[str, Tensor], prefix: str) -> State:
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
