"""The training loss over packed rows: cross-entropy on targets, KL to the base on anchors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.model.attention import borders
from pipeline.model.geometry import ARCHITECTURES
from pipeline.train.batches import MicroBatch, to_device
from pipeline.train.head import ChunkedHead, WithGradient

T = TypeVar("T")


@dataclass
class Reference:
    """The base's ``k`` largest log-probabilities at every anchor target, on the CPU.

    ids: int64 [M, k]; log_probs: float32 [M, k].
    """

    ids: Tensor
    log_probs: Tensor


class Scales(NamedTuple):
    """Factors of the summed cross-entropy and of the summed KL in the loss of a step."""

    cross_entropy: float = 1.0
    kl: float = 1.0


NO_SCALES = Scales()


class SftModule(nn.Module):
    """A causal language model that returns losses, so that engines wrap the whole step.

    Only rows that predict a trained token are multiplied by the output head. In the architectures
    that are known here a frozen head works in chunks; any other model gives all logits at once.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        known = model.config.model_type in ARCHITECTURES
        self.chunked = known and not model.lm_head.weight.requires_grad
        if self.chunked:
            model.lm_head = ChunkedHead(model.lm_head)
        self.model = model

    def forward(
        self,
        batch: MicroBatch,
        reference: Reference | None = None,
        scales: Scales = NO_SCALES,
        want: str = "losses",
    ) -> tuple[Tensor, ...]:
        """``losses``: scaled total (differentiable), and the sums of cross-entropy and of KL in nats.
        ``top_k``: ids and log-probabilities [N, k], of the ``k`` of an empty ``reference``.
        ``logits``: float32 [N, V]."""
        rows = self._decode(batch)
        if want == "logits":
            return (torch.cat(self._with_logits(rows, lambda logits, _: logits)),)
        if want == "top_k":
            assert reference is not None
            k = reference.ids.shape[1]
            tops = self._with_logits(rows, lambda logits, _: logits.log_softmax(-1).topk(k))
            return torch.cat([t.indices for t in tops]), torch.cat([t.values for t in tops])
        if not self.chunked:
            return row_losses(rows, batch, slice(0, len(rows)), reference, scales)

        if not rows.requires_grad:
            sums = self._with_logits(
                rows, lambda some, at: torch.stack(row_losses(some, batch, at, reference, scales))
            )
            total, cross_entropy, kl = torch.stack(sums).sum(0)
            return total, cross_entropy, kl

        def work(weight: Tensor, hidden: Tensor, some: slice) -> tuple[Tensor, Tensor]:
            logits = functional.linear(hidden, weight).float().requires_grad_()
            with torch.enable_grad():
                losses = row_losses(logits, batch, some, reference, scales)
            (by_logit,) = torch.autograd.grad(losses[0], logits)
            return torch.stack(losses).detach(), by_logit.to(hidden.dtype) @ weight

        pieces = self.model.lm_head(rows.detach(), work)
        total, cross_entropy, kl = torch.stack([sums for sums, _ in pieces]).sum(0)
        gradient = torch.cat([gradient for _, gradient in pieces])
        loss: Tensor = WithGradient.apply(rows, total, gradient)  # type: ignore[no-untyped-call]
        return loss, cross_entropy, kl

    def _with_logits(self, rows: Tensor, work: Callable[[Tensor, slice], T]) -> list[T]:
        """``work(logits, rows)``, chunk by chunk where the head is chunked."""
        if not self.chunked:
            return [work(rows, slice(0, len(rows)))]
        done: list[T] = self.model.lm_head(
            rows, lambda weight, some, at: work(functional.linear(some, weight).float(), at)
        )
        return done

    def _decode(self, batch: MicroBatch) -> Tensor:
        """What predicts, [N, hidden size], where the head is chunked; else logits, float32 [N, V]."""
        options: dict[str, Any] = {"position_ids": batch.positions, "use_cache": False}
        options |= borders(batch.starts, batch.positions.device)
        if batch.states is None:
            options["input_ids"] = batch.ids
        else:
            options["inputs_embeds"] = batch.states
        if self.chunked:
            output = self.model.model(**options)
            rows: Tensor = output.last_hidden_state[0, batch.predict]
            return rows
        output = self.model(**options, logits_to_keep=batch.predict)
        logits: Tensor = output.logits[0].float()
        return logits


def row_losses(
    logits: Tensor,
    batch: MicroBatch,
    rows: slice,
    reference: Reference | None,
    scales: Scales,
) -> tuple[Tensor, Tensor, Tensor]:
    """(scaled total, cross-entropy, KL), summed over ``rows`` of ``batch`` with these ``logits``."""
    log_p = functional.log_softmax(logits, dim=-1)
    nll = -log_p.gather(1, batch.labels[rows, None])[:, 0]
    cross_entropy = (nll * batch.weights[rows]).sum()
    kl = cross_entropy.new_zeros(())
    if reference is not None:
        kl = _kl(log_p, batch.reference[rows], reference)
    return scales.cross_entropy * cross_entropy + scales.kl * kl, cross_entropy, kl


def _kl(log_p: Tensor, rows: Tensor, reference: Reference) -> Tensor:
    """Sum over anchor rows of KL(base || model) in nats, from the base's top k and one bucket for
    the rest: a lower bound of the full divergence, equal to it where the rest is negligible.

    Rows that are no anchors weigh nothing but stay on the graph: ZeRO-3 wants one trace on all ranks.
    """
    at = rows.clamp_min(0)
    base_log = to_device(reference.log_probs[at], log_p.device)
    model_top = log_p.gather(1, to_device(reference.ids[at], log_p.device))
    base_top_p = base_log.exp()
    head = (base_top_p * (base_log - model_top)).sum(-1)
    tiny = torch.finfo(torch.float32).eps
    base_rest = (1.0 - base_top_p.sum(-1)).clamp_min(tiny)
    model_rest = (1.0 - model_top.exp().sum(-1)).clamp_min(tiny)
    divergence = head + base_rest * (base_rest.log() - model_rest.log())
    anchors = to_device(rows >= 0, log_p.device)
    return torch.where(anchors, divergence, torch.zeros_like(divergence)).sum()
