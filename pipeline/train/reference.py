"""The base's own predictions on anchor rows, taken once, before the first update, and kept on disk.

At that point the adapter changes nothing (B is zero, or the origin is subtracted), so the model is
the base. And the start-up probe: packed documents must predict what they predict alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pipeline.data.packing import Pack, share
from pipeline.errors import UntaxedError
from pipeline.train.batches import Documents, MicroBatch
from pipeline.train.cache_place import digest_of
from pipeline.train.engine import Engine
from pipeline.train.loop import set_dropout
from pipeline.train.loss import Reference
from pipeline.train.reference_cache import ReferenceCache
from pipeline.train.world import device, gather_objects

if TYPE_CHECKING:
    from pipeline.stage import Context

PROBE_ROWS = 8
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


def reference(
    engine: Engine,
    documents: Documents,
    capacity: int,
    top_k: int,
    context: Context,
    identity: Mapping[str, Any],
) -> Reference | None:
    """Reference rows [M, k] of all KL documents, the same on every rank; None without any.

    Read from the cache where they are stored under ``identity``, all that decides a bit of them
    beside the documents and the machine.
    """
    if not documents.kl_documents:
        return None
    what = {
        **identity,
        "engine": engine.name,
        "capacity": capacity,
        "beginnings": documents.share_beginnings,
        "tokens": digest_of([documents.tokens_of(d) for d in documents.kl_documents]),
        "trained": digest_of([documents.trained_of(d) for d in documents.kl_documents]),
    }
    cache = ReferenceCache(context, what, documents.reference_rows, top_k)
    found = cache.load()
    if found is None:
        # read or computed, training draws the same random numbers after it
        with torch.random.fork_rng([device()] if device().type == "cuda" else []):
            set_dropout(engine.module, on=False)
            found = _compute(engine, documents, capacity, top_k, context)
            set_dropout(engine.module, on=True)
        cache.save(found)
    return found


@torch.no_grad()
def _compute(
    engine: Engine, documents: Documents, capacity: int, top_k: int, context: Context
) -> Reference:
    """The packs are those of a lone process, whatever the number of ranks that they are dealt to:
    the shape of a pack decides the last bits."""
    packs = share(documents.kl_documents, documents.lengths, capacity, 1)[0]
    rank, size = context.world.rank, context.world.size
    packs += [[]] * (-len(packs) % size)
    want = Reference(torch.zeros(0, top_k, dtype=torch.int64), torch.zeros(0, top_k))
    mine: list[tuple[Tensor, Tensor, Tensor]] = []
    for pack in packs[rank::size]:
        batch = documents.micro_batch(pack)
        ids, log_probs = engine.forward(batch.to(device()), want, want="top_k")
        if pack:
            mine.append((batch.reference, ids.cpu().to(torch.int32), log_probs.float().cpu()))
    table_ids = torch.zeros(documents.reference_rows, top_k, dtype=torch.int64)
    table_log = torch.zeros(documents.reference_rows, top_k)
    for part in gather_objects(mine):
        for rows, ids, log_probs in part:
            table_ids[rows] = ids.long()
            table_log[rows] = log_probs
    return Reference(table_ids, table_log)


@torch.no_grad()
def probe_isolation(engine: Engine, documents: Documents, dtype: torch.dtype) -> float:
    """Largest difference between packed and alone, relative to the largest logit.

    Raises UntaxedError when documents of one pack see each other on this backend.
    """
    order = sorted(range(len(documents)), key=lambda d: documents.lengths[d])[:3]
    packed, *alone = (
        engine.forward(_some_rows(documents, pack).to(device()), want="logits")[0]
        for pack in (order, *([d] for d in order))
    )
    expected = torch.cat(alone)
    difference = float((packed - expected).abs().max() / expected.abs().max())
    if not difference <= PROBE_TOLERANCE[dtype]:
        raise UntaxedError(
            f"sft: documents in one pack see each other on this attention backend (logits differ"
            f" by {difference:.3g}, allowed {PROBE_TOLERANCE[dtype]:g}); nothing was trained"
        )
    return difference


def _some_rows(documents: Documents, pack: Pack) -> MicroBatch:
    """``pack`` with ``PROBE_ROWS`` predictions of each document, from the first to the last: a row of
    logits is as large as the vocabulary."""
    batch = documents.micro_batch(pack)
    rows, start = [], 0
    for d in pack:
        count = int(documents.trained_of(d).sum())
        rows.append(torch.linspace(start, start + count - 1, min(count, PROBE_ROWS)).long())
        start += count
    at = torch.cat(rows)
    names = ("predict", "labels", "weights", "reference")
    return replace(batch, **{name: getattr(batch, name)[at] for name in names})
