"""Where training stands: what is trained, the optimiser, RNG and position.

Of an adapter that is a few megabytes: rank 0 writes all, whole. Where a model is trained fully and
sharded, every rank writes its own shards, and none ever holds all. From both another world size or
engine can go on. Frozen weights are never saved: the key of the run already fixes them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
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
    """Writes checkpoints below ``folder`` while training goes on.

    Leaving it waits for this rank's file, but not for those of others: one that lacks shards is given
    up, and the one before stays. After an error it waits for no shard at all, so that the error is
    told while the launcher still listens.
    """

    def __init__(self, folder: Path, engine: Engine, rank: int) -> None:
        self.folder, self.engine, self.rank = folder, engine, rank
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: Future[None] | None = None
        self.left = False

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        self.left = True
        self.thread.shutdown(wait=kind is None or not self.engine.sharded)

    def save(self, position: Position) -> None:
        """Collective; files are written in a thread. An error of the last writing is raised here."""
        self.wait()
        final = self.folder / f"checkpoint-{position.step:08d}-{position.epochs:04d}"
        wanted = self.rank == 0 and _make_room(final)
        told = gather_objects((_rng_states(), wanted))
        if not told[0][1]:
            return
        if self.engine.sharded:
            tensors, shapes = self.engine.shards()
            writers = len(told)
        else:
            keep, shapes, writers = self.rank == 0, {}, 1
            trained = self.engine.trainable_state(keep=keep)
            optimizer = self.engine.optimizer_state(keep=keep)
            tensors = {f"trainable.{k}": v for k, v in trained.items()}
            tensors |= {f"optimizer.{k}": v for k, v in optimizer.items()}
        if self.rank >= writers:
            return
        if self.rank == 0:
            rngs = enumerate(states for states, _ in told)
            tensors |= {f"rng.{r}.{k}": v for r, states in rngs for k, v in states.items()}
        meta = vars(position) | {"history": list(position.history), "world_size": len(told)}
        meta["shapes"] = shapes
        self.pending = self.thread.submit(self._write, final, tensors, meta, writers)

    def wait(self) -> None:
        """Until the last checkpoint is on disk; raises what kept it from there."""
        if self.pending is not None:
            self.pending.result()

    def _write(self, final: Path, tensors: State, meta: dict[str, Any], writers: int) -> None:
        """This rank's file; on rank 0 the rest, when all files are there. Keeps the newest two."""
        from safetensors.torch import save_file

        staging = _staging(final)
        file = staging / f"state-{self.rank:05d}.safetensors"
        save_file({k: v.contiguous() for k, v in tensors.items()}, file)
        write_atomic(file.with_suffix(".sha256"), hash_file(file).sha256)
        if self.rank != 0:
            return
        while len(hashes := sorted(staging.glob("state-*.sha256"))) < writers:
            if self.left:
                raise TimeoutError(f"{final}: only {len(hashes)} of {writers} ranks wrote theirs")
            time.sleep(0.05)
        files = {h.with_suffix(".safetensors").name: h.read_text(encoding="ascii") for h in hashes}
        write_atomic(staging / "meta.json", json.dumps(meta | {"files": files}))
        staging.rename(final)
        # a later one could not be read when this run began: it does not count, and may yet be good
        found = sorted(f for f in self.folder.glob("checkpoint-*") if f.name <= final.name)
        for old in found[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)


def _staging(final: Path) -> Path:
    return final.with_name(f".{final.name}.tmp")


def _make_room(final: Path) -> bool:
    """Whether ``final`` is to be written; then all that stands in its way is gone."""
    if final.exists():
        try:
            _verify(final)
            return False  # a stop at the place of the last one; what is good is never touched
        except DAMAGE:
            pass
    # of a try that was killed, or found no room
    for old in (final, *final.parent.glob(".checkpoint-*.tmp")):
        shutil.rmtree(old, ignore_errors=True)
    _staging(final).mkdir(parents=True)
    return True


def _rng_states() -> State:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def newest(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint, verified by hash; a damaged one is named and passed over."""
    for path in sorted(folder.glob("checkpoint-*"), reverse=True):
        try:
            _verify(path)
            return path
        except DAMAGE as error:
            warn(f"sft: checkpoint {path.name} is damaged ({error}); trying the one before")
    return None


def _described(path: Path) -> dict[str, Any]:
    """What meta.json says; one of DAMAGE where that is not all."""
    meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    wanted = ("step", "epochs", "history", "world_size", "shapes", "files")
    return {name: meta[name] for name in wanted}


def _verify(path: Path) -> None:
    """One of DAMAGE where the checkpoint is not whole."""
    for name, sha256 in _described(path)["files"].items():
        if hash_file(path / name).sha256 != sha256:
            raise ValueError(f"the content of {name} does not match its hash")


def restore(path: Path, engine: Engine, rank: int, world_size: int) -> Position:
    """Put a checkpoint that ``newest`` has chosen into the engine; RNG states only at the same world
    size."""
    meta = _described(path)
    files = [path / name for name in sorted(meta["files"])]
    engine.load_trainable_state(_Tensors(files, "trainable.", meta["shapes"]))
    engine.load_optimizer_state(_Tensors(files, "optimizer.", meta["shapes"]))
    if meta["world_size"] == world_size:
        own = _Tensors(files, f"rng.{rank}.", {})
        torch.set_rng_state(own["cpu"])
        if "cuda" in own and torch.cuda.is_available():
            torch.cuda.set_rng_state(own["cuda"])
    return Position(meta["step"], meta["epochs"], meta["history"])


class _Tensors(Mapping[str, Tensor]):
    """The tensors of ``files`` whose names begin with ``prefix``, each read when it is asked for. One
    that has a shape in ``shapes`` is the flat shards of all files, one after another, without what
    follows its last element (ZeRO-3 pads)."""

    def __init__(self, files: list[Path], prefix: str, shapes: Mapping[str, list[int]]) -> None:
        from safetensors import safe_open

        self.prefix, self.shapes = prefix, shapes
        self.files: dict[str, list[Any]] = {}
        for file in files:
            opened = safe_open(file, framework="pt")
            for name in opened.offset_keys():  # type: ignore[no-untyped-call]
                if name.startswith(prefix):
                    self.files.setdefault(name.removeprefix(prefix), []).append(opened)

    def __getitem__(self, name: str) -> Tensor:
        parts = [file.get_tensor(self.prefix + name) for file in self.files[name]]
        if self.prefix + name not in self.shapes:
            whole: Tensor = parts[0]
            return whole
        shape = torch.Size(self.shapes[self.prefix + name])
        return torch.cat(parts)[: shape.numel()].view(shape)

    def __contains__(self, name: object) -> bool:
        return name in self.files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)
