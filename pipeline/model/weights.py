"""All weights files of a merged model: rewritten where a tensor changes, else shared with the base."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch

from pipeline import artifact as art
from pipeline.artifact import Artifact, FileEntry, Hashed
from pipeline.errors import DataError
from pipeline.files import link_or_copy, stamp
from pipeline.model.merging import Plan, touched
from pipeline.model.rewrite import Rewritten, rewrite
from pipeline.model.shards import Checkpoint
from pipeline.model.survival import Proof

MOST_AT_ONCE = 5


def write_weights(
    base: Artifact,
    checkpoint: Checkpoint,
    plan: Plan,
    out: Path,
    *,
    widen: bool,
    load_dtype: torch.dtype | None,
    log: Callable[[str], None],
) -> tuple[Proof, dict[str, Hashed]]:
    """Write or share every file of ``checkpoint``, the weights of ``base``, under ``out``.

    Returns what the files have shown, and their hashes. ``widen`` and ``load_dtype`` as in
    ``rewrite``. DataError where a file of the base is no longer what was sealed.
    """
    proof, hashed = Proof(widened=widen), dict[str, Hashed]()
    shards = checkpoint.shards
    with _one_thread_each(), ThreadPoolExecutor(_at_once()) as pool:
        begun: dict[str, Future[Rewritten]] = {
            file: pool.submit(
                rewrite,
                shards[file],
                plan,
                out / file,
                widen=widen,
                load_dtype=load_dtype,
                sha256=None if base.untouched(file) else base.manifest.files[file].sha256,
            )
            for file in (shards if widen else touched(checkpoint, plan))
        }
        try:
            for number, (file, shard) in enumerate(shards.items(), start=1):
                if file in begun:
                    done = begun[file].result()
                    entry = FileEntry(size=done.size, sha256=done.sha256)
                    proof.tensors |= done.tensors
                    proof.unchanged += done.unchanged
                    proof.unchanged_bytes += done.unchanged_bytes
                else:
                    entry = _share(base, file, out / file)
                    proof.unchanged += len(shard.entries)
                    proof.unchanged_bytes += sum(e.size_bytes for e in shard.entries.values())
                hashed[file] = Hashed(entry, stamp(out / file))
                if len(shards) > 1:
                    log(f"merge: {file} ({number} of {len(shards)})")
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return proof, hashed


def _at_once() -> int:
    """Files at once: one more than processors is no faster and holds a file's blocks more."""
    return min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """Files are worked on side by side, so the arithmetic of one needs no threads of its own."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _share(base: Artifact, file: str, target: Path) -> FileEntry:
    """Put a file of the base at ``target``. It is hashed unless it is the very file that was hashed
    when the base was sealed."""
    sealed = base.manifest.files[file]
    shared = link_or_copy(base.path(file), target)
    if not (shared and base.untouched(file)) and art.hash_file(target) != sealed:
        raise DataError(
            f"{base.path(file)}: content changed since it was sealed; adopt the base again"
        )
    return sealed
