"""The training loop: one for all engines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from pipeline.data.packing import Pack, Step, share
from pipeline.errors import Stopped, UntaxedError
from pipeline.recipes import SftRecipe
from pipeline.train.batches import Documents
from pipeline.train.checkpoint import Checkpoints, Position
from pipeline.train.engine import Engine, GradientWatch
from pipeline.train.loss import Reference, Scales
from pipeline.train.progress import StepProgress
from pipeline.train.schedule import learning_rate
from pipeline.train.world import device, sum_over_ranks

if TYPE_CHECKING:
    from pipeline.stage import Context

MUST_MOVE_WITHIN = 2


@dataclass
class Split:
    """Documents and the base's predictions on their anchor rows."""

    documents: Documents
    reference: Reference | None


@dataclass
class Trainer:
    """Everything one run of the loop needs."""

    engine: Engine
    recipe: SftRecipe
    context: Context
    train: Split
    dev: Split
    epochs: list[list[Step]]
    capacity: int
    watch: GradientWatch
    trainable: list[str]
    stop_requested: Callable[[], bool]

    def run(self, start: Position, save_epoch: Callable[[int], None]) -> Position:
        """Train from ``start`` to the end; ``save_epoch(n)`` after each epoch, on all ranks."""
        position = start
        steps = sum(len(epoch) for epoch in self.epochs)
        saved_at = time.monotonic()
        first = 0
        rank, scratch = self.context.world.rank, self.context.scratch
        with (
            StepProgress(self.context, steps, position.step) as progress,
            Checkpoints(scratch, self.engine, rank) as checkpoints,
        ):
            for number, epoch in enumerate(self.epochs, start=1):
                for index, step in enumerate(epoch):
                    if first + index < position.step:
                        continue
                    started = time.monotonic()
                    for following in epoch[index + 1 : index + 2]:
                        self.train.documents.will_need(following)
                    record = self._step(step, position.step, steps)
                    record |= {
                        "step": position.step,
                        "epoch": number - 1 + (index + 1) / len(epoch),
                    }
                    tokens = sum(self.train.documents.lengths[d] for d in step)
                    record["tokens_per_second"] = tokens / (time.monotonic() - started)
                    position.step += 1
                    position.history.append(record)
                    self.context.metric(int(record["step"]), record)
                    progress.advance(record)
                    if index + 1 == len(epoch):
                        position.history.append(self._validate(position.step))
                        self.context.metric(position.step, position.history[-1])
                        save_epoch(number)
                    saved_at = self._maybe_checkpoint(checkpoints, position, saved_at)
                first += len(epoch)
        return position

    def _step(self, step: Step, index: int, steps: int) -> dict[str, float]:
        """One optimiser step over all ranks; its losses are per target token of the step."""
        documents = self.train.documents
        targets, kl_targets = documents.targets(step)
        scales = Scales(1.0 / max(1, targets), self.recipe.anchors.weight / max(1, kl_targets))
        sums = []
        for pack in self._packs(self.train, step):
            batch = documents.micro_batch(pack).to(device())
            loss, cross_entropy, kl = self.engine.forward(batch, self.train.reference, scales)
            self._require_finite(loss, index, pack)
            self.engine.backward(loss)
            # left on the device: the next pack is made ready while this one's backward pass runs
            sums.append(torch.stack([cross_entropy.detach(), kl.detach()]))
        bad = not (self.watch.all_finite() and self.engine.gradient_finite())
        both = torch.stack(sums).cpu().double().sum(0)
        ce_sum, kl_sum, bad_ranks = sum_over_ranks([*both.tolist(), float(bad)])
        if bad_ranks:
            raise UntaxedError(
                f"sft: step {index + 1}: a gradient is not finite (documents"
                f" {self._names(step)}); stopped before the update"
            )
        rate = learning_rate(self.recipe.optimizer, index, steps)
        norm = self.engine.step(rate)
        if not math.isfinite(norm):
            raise UntaxedError(f"sft: step {index + 1}: the gradient norm is {norm}; stopped")
        if index + 1 == MUST_MOVE_WITHIN:
            self._require_moving()
        record = {
            "loss": scales.cross_entropy * ce_sum + scales.kl * kl_sum,
            "learning_rate": rate,
            "grad_norm": norm,
        }
        if targets:
            record["cross_entropy"] = ce_sum / targets
        if kl_targets:
            record["kl"] = kl_sum / kl_targets
        return record

    def _packs(self, split: Split, step: Step) -> list[Pack]:
        """What of ``step`` this rank computes."""
        world, lengths = self.context.world, split.documents.lengths
        return share(step, lengths, self.capacity, world.size)[world.rank]

    def _require_finite(self, loss: torch.Tensor, index: int, pack: list[int]) -> None:
        if not bool(torch.isfinite(loss)):
            raise UntaxedError(
                f"sft: step {index + 1}, rank {self.context.world.rank}: loss {float(loss)} on"
                f" documents {self._names(pack)}; stopped before the update"
            )

    def _require_moving(self) -> None:
        still = self.watch.never_moved(self.trainable) if self.watch.non_zero else []
        counts = sum_over_ranks([float(name in still) for name in self.trainable])
        dead = [
            n for n, c in zip(self.trainable, counts, strict=True) if c == self.context.world.size
        ]
        if dead:
            raise UntaxedError(
                f"sft: {len(dead)} of {len(self.trainable)} trainable tensors had no gradient in"
                f" the first {MUST_MOVE_WITHIN} steps, such as {dead[0]}; nothing was saved"
            )

    @torch.no_grad()
    def _validate(self, step: int) -> dict[str, float]:
        """Loss on the development rows."""
        documents = self.dev.documents
        record: dict[str, float] = {"step": step}
        everything = list(range(len(documents)))
        if not everything:
            return record
        sums = torch.zeros(2, dtype=torch.float64)
        set_dropout(self.engine.module, on=False)
        for pack in self._packs(self.dev, everything):
            batch = documents.micro_batch(pack).to(device())
            _, cross_entropy, kl = self.engine.forward(batch, self.dev.reference)
            sums += torch.stack([cross_entropy, kl]).cpu()
        set_dropout(self.engine.module, on=True)
        targets, kl_targets = documents.targets(everything)
        ce_sum, kl_sum = sum_over_ranks(sums.tolist())
        if targets:
            record["dev_loss"] = ce_sum / targets
        if kl_targets:
            record["dev_kl"] = kl_sum / kl_targets
        return record

    def _maybe_checkpoint(
        self, checkpoints: Checkpoints, position: Position, saved_at: float
    ) -> float:
        """Checkpoint when it is time or a stop is asked for; all ranks agree at a step boundary."""
        due = time.monotonic() - saved_at >= self.context.execution.checkpoint_seconds
        leads = self.context.world.rank == 0  # one clock decides
        stop, save = sum_over_ranks([float(self.stop_requested()), float(due and leads)])
        if stop or save:
            checkpoints.save(position)
            saved_at = time.monotonic()
        if stop:
            checkpoints.wait()
            self.context.world.barrier()  # a rank that leaves early has the launcher kill the writer
            raise Stopped(
                f"sft: stopped on request after step {position.step}; the same command goes on there"
            )
        return saved_at

    def _names(self, documents: list[int]) -> str:
        names = [self.train.documents.names[d] for d in documents]
        return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def set_dropout(module: nn.Module, *, on: bool) -> None:
    """Switch dropout alone. In evaluation mode bitsandbytes repacks 4-bit weights in place, and a
    shard repacked between two gathers is garbage."""
    for part in module.modules():
        if isinstance(part, nn.Dropout):
            part.train(on)


def write_history(path: Path, history: list[dict[str, float]]) -> None:
    """metrics.jsonl: one record a step, and one a validation."""
    import json

    path.write_text("".join(json.dumps(record) + "\n" for record in history), encoding="utf-8")
