"""The processes of a training run, as torch.distributed knows them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from pipeline.errors import RecipeError
from pipeline.train.watch import Verdict, Watch, describe

T = TypeVar("T")
WITHOUT_LIMIT = timedelta(days=7)  # Watch decides how long to wait


class DistributedWorld:
    """One rank of ``size``; collectives on Python objects and on small CPU tensors.

    ``leave`` ends this process where another rank is at fault and the main thread cannot notice.
    """

    def __init__(self, leave: Callable[[Verdict], None]) -> None:
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.watch: Watch | None = None
        if self.size > 1:
            self.watch = Watch(self.rank, self.size, leave)
            self.watch.start()

    def broadcast(self, value: T) -> T:
        """Rank 0's ``value`` on all ranks."""
        box: list[Any] = [value]
        with self.blaming():
            dist.broadcast_object_list(box, src=0)
        return box[0]  # type: ignore[no-any-return]

    def barrier(self) -> None:
        with self.blaming():
            dist.barrier()

    def mark(self, at: str) -> None:
        """Say that this rank goes on, and where it is."""
        if self.watch:
            self.watch.mark(at)

    def be_patient(self, seconds: float) -> None:
        """How long a rank for which others wait may go without a mark or a collective."""
        if self.watch:
            self.watch.patience = seconds

    @contextlib.contextmanager
    def blaming(self) -> Iterator[None]:
        """Tell the other ranks what ends this one; turn a broken collective into an error that names
        the rank which broke it."""
        try:
            yield
        except BaseException as error:
            found = self.watch.blame(error) if self.watch else None
            if found is None:
                self.say_left(*describe(error))
                raise
            self.say_left(found.code, found.message, found.rank)
            raise found.error() from error

    def say_left(self, code: int, message: str, fault: int | None = None) -> None:
        """Tell the other ranks that this one ends before its time; the first reason counts."""
        if self.watch:
            self.watch.say_left(code, message, fault)

    def close(self) -> None:
        """All ranks have come to their end."""
        if self.watch:
            self.watch.close()
        dist.destroy_process_group()


def device() -> torch.device:
    """This rank's device."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    return torch.device("cpu")


def init_world(*, always: bool, leave: Callable[[Verdict], None]) -> DistributedWorld | None:
    """Join the process group that the launcher describes; None in a lone process.

    With ``always`` a lone process becomes a group of one (DeepSpeed needs a group). ``leave``: see
    DistributedWorld.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        if not always:
            return None
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
        os.environ.setdefault("MASTER_PORT", "0")
    if "MASTER_ADDR" not in os.environ or "MASTER_PORT" not in os.environ:
        raise RecipeError("RANK is set but MASTER_ADDR or MASTER_PORT is not; start with torchrun")
    if os.environ["MASTER_PORT"] == "0" and os.environ["WORLD_SIZE"] != "1":
        raise RecipeError(
            f"MASTER_PORT=0 cannot bring {os.environ['WORLD_SIZE']} processes together; give a free"
            " port, such as --master-port 29500"
        )
    if device().type == "cuda" and (device().index or 0) >= torch.cuda.device_count():
        raise RecipeError(
            f"LOCAL_RANK={device().index} but this machine has {torch.cuda.device_count()} GPU(s);"
            " start fewer processes, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    if device().type == "cuda":
        torch.cuda.set_device(device())
    backend = "cpu:gloo,cuda:nccl" if device().type == "cuda" else "gloo"
    if os.environ["MASTER_PORT"] == "0":
        from torch._C._distributed_c10d import HashStore

        store = HashStore()
        dist.init_process_group(backend, store=store, rank=0, world_size=1)
    else:
        dist.init_process_group(backend, timeout=WITHOUT_LIMIT)
    return DistributedWorld(leave)


def sum_over_ranks(values: list[float]) -> list[float]:
    """Element-wise sum in float64; the values themselves in a lone process."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(tensor)
    return [float(v) for v in tensor]


def gather_objects(value: T) -> list[T]:
    """``value`` of every rank, in rank order, on all ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    boxes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(boxes, value)
    return boxes
