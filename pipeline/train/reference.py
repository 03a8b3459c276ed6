"""The base's own predictions on anchor rows, taken once, before the first update.

At that point the adapter changes nothing (B is zero, or the origin is subtracted), so the model is
the base. And the start-up probe: packed documents must predict what they predict alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pipeline.data.packing import share
from pipeline.errors import UntaxedError
from pipeline.train.batches import Documents
from pipeline.train.engine import Engine
from pipeline.train.loss import Reference
from pipeline.train.world import device, gather_objects

PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}


@torch.no_grad()
def reference(
    engine: Engine, documents: Documents, capacity: int, top_k: int, rank: int, world_size: int
) -> Reference | None:
    """Reference rows [M, k] of all KL documents, the same on every rank; None without any."""
    chosen = documents.kl_documents
    if not chosen:
        return None
    lengths = documents.lengths
    want = Reference(torch.zeros(0, top_k, dtype=torch.int64), torch.zeros(0, top_k))
    mine: list[tuple[Tensor, Tensor, Tensor]] = []
    for pack in share(chosen, lengths, capacity, world_size)[rank]:
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
        engine.forward(documents.micro_batch(pack).to(device()), want="logits")[0]
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
