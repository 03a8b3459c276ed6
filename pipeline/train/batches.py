"""Packed documents as the tensors of one micro-batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.packing import Pack, Step
from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.artifact import Artifact
    from pipeline.recipes import AnchorLoss

ANCHOR = 2
FILLER_TOKENS = 4


@dataclass
class MicroBatch:
    """One pack of T tokens with N predicted positions.

    ids, positions: int64 [1, T]; positions restart at each document, which is what isolates them.
    What all documents begin with may stand once, before the first.
    states: [1, T, hidden size], the output of the frozen prefix, or None where there is no cut.
    predict: int64 [N], where the next token is trained. labels: int64 [N]. weights: float32 [N],
    of the cross-entropy (0 where KL is the objective, and in a filler). Always on the CPU:
    reference, int64 [N], row of the base's log-probabilities, or -1; starts, int64 [D + 1], where
    each document (what it does not share) begins, and T.
    """

    ids: Tensor
    positions: Tensor
    predict: Tensor
    labels: Tensor
    weights: Tensor
    reference: Tensor
    starts: Tensor
    states: Tensor | None = None

    def to(self, device: torch.device) -> MicroBatch:
        names = ("ids", "positions", "predict", "labels", "weights", "states")
        given = {name: getattr(self, name) for name in names}
        return replace(self, **{n: to_device(t, device) for n, t in given.items() if t is not None})


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on ``device``; a GPU need not have done what it was given before."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


class States(Protocol):
    """The output [T, hidden size] of the frozen prefix for each document."""

    def of(self, documents: Sequence[int]) -> list[Tensor]: ...
    def will_need(self, document: int) -> None: ...


class Documents:
    """The documents of one split: tokens, trained mask, lengths, and what each is trained for.

    ``share_beginnings``: a pack holds the tokens that all its documents begin with once.
    """

    def __init__(
        self, artifact: Artifact, split: str, anchors: AnchorLoss, share_beginnings: bool = False
    ) -> None:
        from safetensors.numpy import load_file

        arrays = load_file(artifact.path("tokens.safetensors"))
        self.ids = arrays[f"{split}.ids"].astype(np.int64)
        self.trained = arrays[f"{split}.trained"].astype(bool)
        self.starts = arrays[f"{split}.starts"]
        self.kind = arrays[f"{split}.kind"]
        self.lengths = [int(n) for n in np.diff(self.starts)]
        self.names = json.loads(artifact.path("documents.json").read_text())[split]
        self.anchors = anchors
        is_kl = (self.kind == ANCHOR) & (anchors.objective == "kl")
        self.kl_documents = [int(d) for d in np.flatnonzero(is_kl)]
        self.reference_start: dict[int, int] = {}
        rows = 0
        for d in self.kl_documents:
            self.reference_start[d] = rows
            rows += int(self.trained[self._span(d)].sum())
        self.reference_rows = rows
        self.states: States | None = None
        self.share_beginnings = share_beginnings

    def __len__(self) -> int:
        return len(self.kind)

    def tokens_of(self, d: int) -> Tensor:
        """Token ids of one document, int64 [T]."""
        return torch.from_numpy(self.ids[self._span(d)])

    def trained_of(self, d: int) -> Tensor:
        """Which tokens of one document are trained, bool [T]."""
        return torch.from_numpy(self.trained[self._span(d)])

    def _span(self, d: int) -> slice:
        return slice(int(self.starts[d]), int(self.starts[d + 1]))

    def targets(self, documents: Sequence[int]) -> tuple[int, int]:
        """(cross-entropy tokens, KL tokens) that ``documents`` hold."""
        kl = sum(int(self.trained[self._span(d)].sum()) for d in documents if d in self._kl)
        every = sum(int(self.trained[self._span(d)].sum()) for d in documents)
        return every - kl, kl

    @property
    def _kl(self) -> dict[int, int]:
        return self.reference_start

    def will_need(self, step: Step) -> None:
        """Have what the documents of ``step`` need read from disk ahead of time."""
        if self.states:
            for document in step:
                self.states.will_need(document)

    def micro_batch(self, pack: Pack) -> MicroBatch:
        """The tensors of ``pack``; of an empty pack, a filler whose weights are all zero."""
        if not pack:
            return self._filler()
        shared = self._shared(pack)
        ids, positions, predict, labels, weights, reference = [], [], [], [], [], []
        starts = [shared]
        for d in pack:
            span = self._span(d)
            tokens, trained = self.ids[span], self.trained[span]
            at = np.flatnonzero(trained)
            if at[0] == 0:
                raise DataError(f"document {self.names[d]}: its first token is trained")
            is_kl = d in self._kl
            weight = self.anchors.weight if self.kind[d] == ANCHOR else 1.0
            ids.append(tokens[shared:])
            positions.append(np.arange(shared, len(tokens)))
            predict.append(at - 1 - shared + starts[-1])
            labels.append(tokens[at])
            weights.append(np.full(len(at), 0.0 if is_kl else weight, dtype=np.float32))
            first = self._kl.get(d, 0)
            reference.append(np.arange(first, first + len(at)) if is_kl else np.full(len(at), -1))
            starts.append(starts[-1] + len(tokens) - shared)
        ids.insert(0, self.ids[self._span(pack[0])][:shared])
        positions.insert(0, np.arange(shared))
        flat = [np.concatenate(a) for a in (ids, positions, predict, labels, weights, reference)]
        row, places, *others = (torch.from_numpy(a) for a in (*flat, np.array(starts)))
        batch = MicroBatch(row[None], places[None], *others)
        if self.states:
            states = self.states.of(pack)
            beginning = states[0][:shared]
            batch.states = torch.cat([beginning, *(own[shared:] for own in states)])[None]
        return batch

    def _shared(self, pack: Pack) -> int:
        """How many tokens all documents of ``pack`` begin with, where that is made use of; at least
        one token of each, before the first that it predicts, is its own."""
        if not self.share_beginnings or len(pack) == 1:
            return 0
        spans = [self._span(d) for d in pack]
        shared = max(0, min(int(self.trained[span].argmax()) for span in spans) - 1)
        first = self.ids[spans[0]]
        for span in spans[1:]:
            differs = first[:shared] != self.ids[span][:shared]
            shared = int(differs.argmax()) if differs.any() else shared
        return shared

    def _filler(self) -> MicroBatch:
        """A few real tokens that weigh nothing, so that every rank does equal collectives."""
        ids = torch.from_numpy(self.ids[:FILLER_TOKENS])[None]
        zero = torch.zeros(1, dtype=torch.int64)
        positions = torch.arange(ids.shape[1])[None]
        starts = torch.tensor([0, ids.shape[1]])
        states = self.states.of([0])[0][None, : ids.shape[1]] if self.states else None
        labels = ids[0, 1:2]
        return MicroBatch(ids, positions, zero, labels, torch.zeros(1), zero - 1, starts, states)


def load_steps(artifact: Artifact) -> list[list[Step]]:
    """Steps by epoch, as the pack stage fixed them."""
    steps: list[list[Step]] = json.loads(Path(artifact.path("steps.json")).read_text())
    return steps
