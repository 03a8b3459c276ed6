"""Whether the other ranks still live and move: each says so twice a second, in the store that
brought them together.

A rank that waits in a collective for one that hangs can neither return nor raise, so a thread
decides, and ends its process. Collectives themselves wait without limit: a rank that computes for an
hour (a frozen prefix, a validation) and says so is no failure.
"""

from __future__ import annotations

import contextlib
import json
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace

import torch.distributed as dist

from pipeline.errors import DataError, RecipeError, Stopped, UntaxedError, one_line

PERIOD = 0.5
GONE = 5 * PERIOD  # of silence, where a collective has broken
SILENCE = 120.0  # of a rank whose thread would speak whatever its main thread does
BROKEN = ("gloo", "nccl", "connection", "socket", "store", "distributed", "peer")


@dataclass(frozen=True)
class Beat:
    """What a rank says: that it lives (``count``), how many collectives it has joined (``joined``),
    what else it has done (``marks``) and where it is (``at``).

    ``left``: why it ends, as (exit code, rank at fault, message).
    """

    host: str
    count: int = 0
    joined: int = 0
    marks: int = 0
    at: str = "starting"
    left: tuple[int, int, str] | None = None


@dataclass
class Heard:
    """The last beat of a rank, and when (``time.monotonic``) it last spoke and last moved."""

    beat: Beat
    spoke: float
    moved: float

    def hear(self, beat: Beat, now: float) -> None:
        """Take in a later beat."""
        if beat != self.beat:
            self.spoke = now
        if (beat.joined, beat.marks, beat.at) != (
            self.beat.joined,
            self.beat.marks,
            self.beat.at,
        ):
            self.moved = now
        self.beat = beat


@dataclass(frozen=True)
class Verdict:
    """The rank at fault, and what happened to it; ``code`` is the exit code that this gives."""

    rank: int
    message: str
    code: int = UntaxedError.exit_code

    def error(self) -> UntaxedError:
        """As an exception."""
        kinds = {kind.exit_code: kind for kind in (DataError, RecipeError, Stopped)}
        return kinds.get(self.code, UntaxedError)(self.message)


def judge(
    ranks: Mapping[int, Heard], own: int, now: float, silence: float, patience: float
) -> Verdict | None:
    """Who, if anybody, keeps rank ``own`` from going on.

    One that has left before its end; one that has been silent for ``silence`` seconds; or one that
    has not moved for ``patience`` seconds and has joined fewer collectives than others, who
    therefore wait for it. Where nobody moves and all have joined the same, the network has failed.
    """
    for rank, heard in ranks.items():
        if rank != own and heard.beat.left and heard.beat.left[0]:
            code, fault, message = heard.beat.left
            return Verdict(fault, message, code)
    present = {rank: heard for rank, heard in ranks.items() if heard.beat.left is None}
    for rank, heard in present.items():
        if rank != own and now - heard.spoke > silence:
            return Verdict(
                rank,
                f"{_name(rank, heard)} is dead or stopped: not heard of for"
                f" {now - heard.spoke:.0f} s, last at {heard.beat.at}",
            )
    still = [rank for rank, heard in present.items() if now - heard.moved > patience]
    fewest = min((heard.beat.joined for heard in present.values()), default=0)
    behind = [rank for rank in still if present[rank].beat.joined == fewest]
    others_wait = any(heard.beat.joined > fewest for heard in present.values())
    if not behind or not (others_wait or len(still) == len(ranks) > 1):
        return None
    first = behind[0]
    seconds = now - present[first].moved
    if not others_wait:
        names = ", ".join(_name(rank, heard) for rank, heard in sorted(present.items()))
        return Verdict(first, f"a collective of {names} has hung for {seconds:.0f} s")
    return Verdict(
        first,
        f"{_name(first, present[first])} hangs: no progress for {seconds:.0f} s, at"
        f" {present[first].beat.at}, while other ranks wait for it",
    )


def _name(rank: int, heard: Heard) -> str:
    return f"rank {rank} on {heard.beat.host}"


class Watch:
    """One rank's voice and ear. ``patience`` is ``execution.collective_timeout_seconds``.

    ``leave``: called in the thread, with a verdict, where the main thread cannot notice by itself;
    it must not return.
    """

    def __init__(self, rank: int, size: int, leave: Callable[[Verdict], None]) -> None:
        self.rank, self.size, self.leave = rank, size, leave
        self.patience = 1800.0
        self.store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self.beat = Beat(socket.gethostname())
        self.ranks: dict[int, Heard] = {}
        self.talked = 0.0
        self.over, self.leaving = threading.Event(), threading.Event()
        self.speaking = threading.Lock()
        # two threads: a store whose keeper is frozen never answers, whatever its time limit
        self.threads = [
            threading.Thread(target=run, daemon=True, name="untaxed-watch")
            for run in (self._talk, self._judge)
        ]

    def start(self) -> None:
        """Collective: from now on all ranks listen to one another."""
        self._speak()
        dist.barrier()
        now = time.monotonic()
        keys = [_key(rank) for rank in range(self.size)]
        for rank, text in enumerate(self.store.multi_get(keys)):
            self.ranks[rank] = Heard(_parse(text), now, now)
        self.talked = now
        for thread in self.threads:
            thread.start()

    def mark(self, at: str) -> None:
        """The main thread is at ``at``, which may take ``patience`` seconds."""
        with self.speaking:
            self.beat = replace(self.beat, at=at, marks=self.beat.marks + 1)

    def say_left(self, code: int, message: str, fault: int | None = None) -> None:
        """This rank ends before its time; gives the others a moment to hear why."""
        if self.leaving.is_set() and self.beat.left:
            return
        self.leaving.set()
        fault = self.rank if fault is None else fault
        with self.speaking:
            self.beat = replace(self.beat, left=(code, fault, message))
        until = time.monotonic() + 3 * PERIOD
        while time.monotonic() < until and not self._all_leave():
            time.sleep(PERIOD / 10)

    def close(self) -> None:
        """The run ends well here."""
        self.over.set()
        for thread in self.threads:
            thread.join(2 * PERIOD)

    def blame(self, error: BaseException) -> Verdict | None:
        """Who broke the collective that raised ``error``; None if ``error`` is of this rank's making.

        Waits for signs of it, for as long as a silence says something.
        """
        text = f"{type(error).__name__} {error}".lower()
        if not isinstance(error, RuntimeError) or not any(word in text for word in BROKEN):
            return None
        self.leaving.set()
        until = time.monotonic() + 2 * GONE + PERIOD
        while time.monotonic() < until:
            found = self._verdict(GONE)
            if found:
                return found
            time.sleep(PERIOD / 5)
        return None

    def _all_leave(self) -> bool:
        return all(heard.beat.left for heard in self.ranks.values())

    def _talk(self) -> None:
        while not self.over.wait(PERIOD / 10 if self.leaving.is_set() else PERIOD):
            with contextlib.suppress(RuntimeError):  # silence speaks for itself
                self._speak()
                self._hear()

    def _judge(self) -> None:
        while not self.over.wait(PERIOD):
            found = None if self.leaving.is_set() else self._verdict(min(self.patience, SILENCE))
            if found and not self.leaving.wait(2 * PERIOD) and not self.over.is_set():
                self.leave(found)

    def _verdict(self, silence: float) -> Verdict | None:
        """Of what has been heard. Where the store does not answer, its keeper is at fault."""
        now = time.monotonic()
        if now - self.talked < silence:
            return judge(dict(self.ranks), self.rank, now, silence, self.patience)
        return Verdict(
            0,
            f"{_name(0, self.ranks[0])}, or the launcher that keeps the ranks together there, is dead"
            f" or stopped: no answer for {now - self.talked:.0f} s",
        )

    def _speak(self) -> None:
        with self.speaking:
            count, joined = self.beat.count + 1, _joined()
            self.beat = replace(self.beat, count=count, joined=joined)
            said = json.dumps(asdict(self.beat))
        self.store.set(_key(self.rank), said)

    def _hear(self) -> None:
        texts = self.store.multi_get([_key(rank) for rank in range(self.size)])
        self.talked = time.monotonic()
        for rank, text in enumerate(texts):
            self.ranks[rank].hear(_parse(text), self.talked)


def _key(rank: int) -> str:
    return f"untaxed/watch/{rank}"


def _parse(text: bytes) -> Beat:
    values = json.loads(text)
    return Beat(**(values | {"left": values["left"] and tuple(values["left"])}))


def _joined() -> int:
    """Collectives that this rank has begun, in all groups."""
    groups = list(dist.distributed_c10d._world.pg_map)
    return sum(g._get_sequence_number_for_group() for g in groups)  # type: ignore[attr-defined]


def describe(error: BaseException) -> tuple[int, str]:
    """Exit code and message of what ends a rank."""
    if isinstance(error, UntaxedError):
        return error.exit_code, one_line(error)
    if isinstance(error, KeyboardInterrupt):
        return Stopped.exit_code, "stopped on request"
    return UntaxedError.exit_code, f"{type(error).__name__}: {one_line(error)[:300]}"
