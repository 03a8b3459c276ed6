"""The training loss over packed rows: cross-entropy on targets, KL to the base on anchors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.train.batches import MicroBatch


@dataclass
class Reference:
    """The base's ``k`` largest log-probabilities at every anchor target.

    ids: int64 [M, k]; log_probs: float32 [M, k].
    """

    ids: Tensor
    log_probs: Tensor


class SftModule(nn.Module):
    """A causal language model that returns losses, so that engines wrap the whole step.

    Only rows that predict a trained token are multiplied by the output head.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def logits(self, batch: MicroBatch) -> Tensor:
        """float32 [N, V] at the predicted positions."""
        output = self.model(
            input_ids=batch.ids,
            position_ids=batch.positions,
            document_starts=batch.starts,
            use_cache=False,
            logits_to_keep=batch.predict,
        )
        logits: Tensor = output.logits[0]
        return logits.float()

    def forward(
        self, batch: MicroBatch, reference: Reference | None = None, mode: str = "loss"
    ) -> tuple[Tensor, Tensor]:
        """``loss``: summed (cross-entropy, KL) in nats. ``top_k``: the Reference of this batch, of
        the ``k`` of an empty ``reference``. ``logits``: the logits, twice."""
        logits = self.logits(batch)
        if mode == "logits":
            return logits, logits
        if mode == "top_k":
            assert reference is not None
            top = functional.log_softmax(logits, dim=-1).topk(reference.ids.shape[1], dim=-1)
            return top.indices, top.values
        log_p = functional.log_softmax(logits, dim=-1)
        nll = -log_p.gather(1, batch.labels[:, None])[:, 0]
        cross_entropy = (nll * batch.weights).sum()
        if reference is None:
            return cross_entropy, 0.0 * cross_entropy
        return cross_entropy, _kl(log_p, batch.reference, reference)


def _kl(log_p: Tensor, rows: Tensor, reference: Reference) -> Tensor:
    """Sum over anchor rows of KL(base || model) in nats, from the base's top k and one bucket for
    the rest: a lower bound of the full divergence, equal to it where the rest is negligible.

    Rows that are no anchors weigh nothing but stay on the graph: ZeRO-3 wants one trace on all ranks.
    """
    at = rows.clamp_min(0).to(reference.ids.device)
    base_log = reference.log_probs[at].to(log_p.device)
    model_top = log_p.gather(1, reference.ids[at].to(log_p.device))
    base_top_p = base_log.exp()
    head = (base_top_p * (base_log - model_top)).sum(-1)
    tiny = torch.finfo(torch.float32).eps
    base_rest = (1.0 - base_top_p.sum(-1)).clamp_min(tiny)
    model_rest = (1.0 - model_top.exp().sum(-1)).clamp_min(tiny)
    divergence = head + base_rest * (base_rest.log() - model_rest.log())
    return torch.where(rows >= 0, divergence, torch.zeros_like(divergence)).sum()
