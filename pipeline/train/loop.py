"""The training loop: one for all engines."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import torch
from torch import nn

from pipeline.data.packing import Pack, Step, share
from pipeline.errors import Stopped, UntaxedError
from pipeline.recipes import SftRecipe
from pipeline.train.batches import Documents
from pipeline.train.checkpoint import Checkpoints, Position
from pipeline.train.divergence import Divergence
from pipeline.train.engine import Engine, GradientWatch
from pipeline.train.loss import Reference, Scales
from pipeline.train.progress import StepProgress
from pipeline.train.schedule import learning_rate
from pipeline.train.stopping import StopRequests
from pipeline.train.world import device, gather_objects, sum_over_ranks

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
    stop: StopRequests

    def run(self, start: Position, save_epoch: Callable[[int], None]) -> Position:
        """Train from ``start`` to the end; ``save_epoch(n)`` after each epoch, on all ranks."""
        position = start
        steps = sum(len(epoch) for epoch in self.epochs)
        rank, scratch = self.context.world.rank, self.context.scratch
        self.divergence = Divergence(self.context.execution.divergence_nats, position.history)
        self.saved_at = time.monotonic()
        self.stop.wait_for_boundary()
        with (
            StepProgress(self.context, steps, position.step) as progress,
            Checkpoints(scratch, self.engine, rank) as checkpoints,
        ):
            first = 0
            for number, epoch in enumerate(self.epochs, start=1):
                for index in range(max(0, position.step - first), len(epoch)):
                    started = time.monotonic()
                    for following in epoch[index + 1 : index + 2]:
                        self.train.documents.will_need(following)
                    record = self._step(epoch[index], position.step, steps)
                    record["epoch"] = number - 1 + (index + 1) / len(epoch)
                    tokens = sum(self.train.documents.lengths[d] for d in epoch[index])
                    record["tokens_per_second"] = tokens / (time.monotonic() - started)
                    position.step += 1
                    position.history.append(record)
                    self.context.metric(position.step - 1, record)
                    progress.advance(record)
                    self._boundary(checkpoints, position)
                first += len(epoch)
                if position.epochs < number:
                    self._end_epoch(number, checkpoints, position, save_epoch)
        return position

    def _end_epoch(
        self,
        number: int,
        checkpoints: Checkpoints,
        position: Position,
        save_epoch: Callable[[int], None],
    ) -> None:
        """Validate and save; a stop in between does both again."""
        found = self._validate(position.step)
        if found is None:
            self._stop(checkpoints, position)
        else:
            self.context.world.mark(f"saving epoch {number}")
            save_epoch(number)
            position.history.append(found)
            self.context.metric(position.step, found)
            position.epochs = number
            self._boundary(checkpoints, position)

    def _step(self, step: Step, index: int, steps: int) -> dict[str, float]:
        """One optimiser step over all ranks; its losses are per target token of the step."""
        documents = self.train.documents
        targets, kl_targets = documents.targets(step)
        scales = Scales(1.0 / max(1, targets), self.recipe.anchors.weight / max(1, kl_targets))
        sums = []
        packs = self._packs(self.train, step)
        for pack in packs:
            self.context.world.mark(f"step {index + 1}")
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
            own = self._names([d for pack in packs for d in pack])
            ranks = [f"rank {r} (rows {o})" for r, o in enumerate(gather_objects(bad and own)) if o]
            raise UntaxedError(
                f"sft: step {index + 1}: a gradient is not finite on {', '.join(ranks)}; stopped"
                " before the update"
            )
        record: dict[str, float] = {"step": index}
        record["loss"] = scales.cross_entropy * ce_sum + scales.kl * kl_sum
        if targets:
            record["cross_entropy"] = ce_sum / targets
        if kl_targets:
            record["kl"] = kl_sum / kl_targets
        wrong = self.divergence.see(record)
        if wrong:
            raise UntaxedError(
                f"sft: step {index + 1}, all ranks (rows {self._names(step)}): training diverges:"
                f" {wrong}; stopped before the update. Lower sft.optimizer.learning_rate, or raise"
                " execution.divergence_nats"
            )
        if index + 1 == MUST_MOVE_WITHIN:
            self._require_moving(step)
        record["learning_rate"] = learning_rate(self.recipe.optimizer, index, steps)
        record["grad_norm"] = self.engine.step(record["learning_rate"])
        if not math.isfinite(record["grad_norm"]):
            raise UntaxedError(
                f"sft: step {index + 1}, all ranks (rows {self._names(step)}): the gradient norm is"
                f" {record['grad_norm']}; stopped before the update"
            )
        return record

    def _packs(self, split: Split, step: Step) -> list[Pack]:
        """What of ``step`` this rank computes."""
        world, lengths = self.context.world, split.documents.lengths
        return share(step, lengths, self.capacity, world.size)[world.rank]

    def _require_finite(self, loss: torch.Tensor, index: int, pack: list[int]) -> None:
        if not bool(torch.isfinite(loss)):
            raise UntaxedError(
                f"sft: step {index + 1}, rank {self.context.world.rank}: loss {float(loss.detach())} on"
                f" rows {self._names(pack)}; stopped before the update"
            )

    def _require_moving(self, step: Step) -> None:
        still = self.watch.never_moved(self.trainable)
        counts = sum_over_ranks([float(name in still) for name in self.trainable])
        dead = [
            n for n, c in zip(self.trainable, counts, strict=True) if c == self.context.world.size
        ]
        if dead:
            raise UntaxedError(
                f"sft: step {MUST_MOVE_WITHIN}, all ranks (rows {self._names(step)}): {len(dead)} of"
                f" {len(self.trainable)} trainable tensors have had no gradient yet, such as"
                f" {dead[0]}; stopped before the update"
            )

    @torch.no_grad()
    def _validate(self, step: int) -> dict[str, float] | None:
        """Loss on the development rows; None when a stop is asked for meanwhile."""
        documents = self.dev.documents
        record: dict[str, float] = {"step": step}
        everything = list(range(len(documents)))
        if not everything:
            return record
        sums = torch.zeros(2, dtype=torch.float64)
        set_dropout(self.engine.module, on=False)
        for pack in self._packs(self.dev, everything):
            self.context.world.mark(f"validation after step {step}")
            batch = documents.micro_batch(pack).to(device())
            _, cross_entropy, kl = self.engine.forward(batch, self.dev.reference)
            sums += torch.stack([cross_entropy, kl]).cpu()
            if self.stop.agreed()[0]:
                return None
        set_dropout(self.engine.module, on=True)
        targets, kl_targets = documents.targets(everything)
        ce_sum, kl_sum = sum_over_ranks(sums.tolist())
        if targets:
            record["dev_loss"] = ce_sum / targets
        if kl_targets:
            record["dev_kl"] = kl_sum / kl_targets
        return record

    def _boundary(self, checkpoints: Checkpoints, position: Position) -> None:
        """Checkpoint when it is time or a stop is asked for; all ranks agree. None is written while
        the loss looks wrong: the last good one is kept."""
        due = time.monotonic() - self.saved_at >= self.context.execution.checkpoint_seconds
        leads = self.context.world.rank == 0  # one clock decides
        stop, save = self.stop.agreed(float(due and leads))
        if stop:
            self._stop(checkpoints, position)
        elif save and not self.divergence.suspicious:
            checkpoints.save(position)
            self.saved_at = time.monotonic()

    def _stop(self, checkpoints: Checkpoints, position: Position) -> NoReturn:
        checkpoints.save(position)
        checkpoints.wait()
        self.context.world.barrier()  # a rank that leaves early has the launcher kill the writer
        raise Stopped(
            f"sft: stopped on request after step {position.step}; the same command goes on there"
        )

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
