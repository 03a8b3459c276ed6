"""One model in memory that becomes each of its merged models in turn.

What merge would write is written into the loaded weights: the same blocks of rows, summed in fp32 and
rounded once. So what is measured is, bit for bit, the model that would be served, and it costs what
the base costs: no second model, no adapter beside each layer, and only the matrices that an update
touches are read again.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pipeline.errors import DataError
from pipeline.model.merging import Plan
from pipeline.model.shards import FLOATS, Checkpoint, as_tensor
from pipeline.model.survival import Survival


class InPlace:
    """``model`` was loaded from ``checkpoint`` in any floating precision, and is the base."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.parameters = dict(model.named_parameters(remove_duplicate=False))
        self.own: dict[str, Tensor] = {}
        self.changed: set[str] = set()

    @torch.no_grad()
    def become(self, plan: Plan | None) -> Survival:
        """Be the base with the updates of ``plan`` (None: the base), whatever it was before; returns
        how much of the update is there after rounding. DataError for a value that is not finite."""
        wanted = set(plan.updates) if plan else set()
        for name in sorted(self.changed - wanted):
            self._restore(name)
        survival = Survival()
        for name in sorted(wanted):
            assert plan is not None
            survival.join(self._update(name, plan))
        return survival

    def _update(self, name: str, plan: Plan) -> Survival:
        target, shard = self._memory(name), self.checkpoint.shard_of(name)
        entry, rows, survival = shard.entries[name], plan.updates[name].opened(), Survival()
        for start, stop, buffer in shard.blocks(name):
            base = as_tensor(buffer, entry)
            delta, summed = rows(base.float(), start, stop)
            loaded = summed.to(FLOATS[entry.dtype]).to(target.dtype)
            if not math.isfinite(float(loaded.float().sum())):
                raise DataError(
                    f"{shard.path}: {name} is not finite as {loaded.dtype} with the update; lower"
                    " choose.scales or train at a lower learning rate"
                )
            survival.add(loaded.float() - base.to(target.dtype).float(), delta)
            target[start:stop] = loaded.to(target.device)
        return survival

    def _restore(self, name: str) -> None:
        target, shard = self.own[name], self.checkpoint.shard_of(name)
        for start, stop, buffer in shard.blocks(name):
            target[start:stop] = as_tensor(buffer, shard.entries[name]).to(target)
        self.changed.discard(name)

    def _memory(self, name: str) -> Tensor:
        """The weight's memory, its own: loaded weights may be views of the base's file."""
        if name not in self.own:
            if name not in self.parameters:
                raise DataError(
                    f"{self.checkpoint.folder}: {name} has another name in the loaded model; choose"
                    " cannot change it in place"
                )
            parameter = self.parameters[name]
            self.own[name] = parameter.data = torch.empty_like(parameter.data)
        self.changed.add(name)
        return self.own[name]
